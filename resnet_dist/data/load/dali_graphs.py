"""The NVIDIA DALI pipelines: from encoded bytes or pixels to normalized images.

`input_kind` says what comes in: encoded bytes of which only a "window" or the whole "image" is
decoded, or "decoded" pixels.
"""

from collections.abc import Callable
from typing import Any

import numpy as np
from nvidia.dali import Pipeline, fn, pipeline_def, types

from resnet_dist.data.load.decoding import Decoding


@pipeline_def
def decode_graph(poll: Callable[[], Any], input_kind: str, cut: bool, decoding: Decoding) -> Any:
    """Decodes windows or whole images, and does nothing else."""
    dtypes, ndim = _image_types(input_kind, cut)
    inputs = fn.external_source(
        source=poll, num_outputs=len(ndim), dtype=dtypes, ndim=ndim, no_copy=True
    )
    return _decoded(input_kind, decoding, *inputs)


@pipeline_def
def image_graph(
    poll: Callable[[], Any],
    input_kind: str,
    cut: bool,
    decoding: Decoding,
    mean: np.ndarray,
    normalisation: dict[str, Any],
) -> tuple[Any, Any]:
    """Decodes images, resamples their windows, normalizes and flips them."""
    dtypes, ndim = _image_types(input_kind, cut)
    *image, roi_start, roi_end, size, window_mean, flip, labels = fn.external_source(
        source=poll,
        num_outputs=len(ndim) + 6,
        dtype=[*dtypes, *[types.FLOAT] * 4, types.INT32, types.INT64],
        ndim=[*ndim, 1, 1, 1, 1, 0, 0],
        layout=["HWC" if input_kind == "decoded" else "", *[""] * (len(ndim) + 5)],
        no_copy=True,
    )
    # float, not uint8: the resampled values are normalized without rounding, while Pillow rounds
    # them to whole grey levels twice.
    images = fn.resize(
        _decoded(input_kind, decoding, *image),
        roi_start=roi_start,
        roi_end=roi_end,
        size=size,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )
    if mean.ndim == 3:
        images = images - types.Constant(mean, device="gpu" if _on_gpu() else "cpu")
    images = fn.crop_mirror_normalize(
        images, mean=window_mean, mirror=flip, output_layout="HWC", **normalisation
    )
    return images, labels.gpu() if _on_gpu() else labels


def _image_types(input_kind: str, cut: bool) -> tuple[list[Any], list[int]]:
    """Returns the types and the numbers of dimensions of the inputs of `_decoded`."""
    if input_kind == "window" or (input_kind == "image" and cut):
        return [types.UINT8, types.INT32, types.INT32], [1, 1, 1]
    return [types.UINT8], [3 if input_kind == "decoded" else 1]


def _decoded(input_kind: str, decoding: Decoding, images: Any, *box: Any) -> Any:
    if input_kind == "decoded":
        return images.gpu() if _on_gpu() else images
    decoder: dict[str, Any] = {"device": "cpu"}
    if decoding.device == "mixed":
        decoder = {
            "device": "mixed",
            "hw_decoder_load": decoding.hw_decoder_load,
            "jpeg_fancy_upsampling": decoding.fancy_upsampling,
        }
    pixels = _decode_box(input_kind, decoder, images, *box)
    return pixels.gpu() if _on_gpu() and decoding.device != "mixed" else pixels


def _decode_box(input_kind: str, decoder: dict[str, Any], images: Any, *box: Any) -> Any:
    if input_kind == "image":
        images = fn.decoders.image(images, **decoder)
        return fn.slice(images, start=box[0], end=box[1], axis_names="HW") if box else images
    # Slices are in the coordinates after the EXIF rotation, like Index.sizes.
    start, end = box
    return fn.decoders.image_slice(images, start=start, end=end, axis_names="HW", **decoder)


@pipeline_def
def raw_graph(
    poll: Callable[[], Any], mean: np.ndarray, normalisation: dict[str, Any]
) -> tuple[Any, Any]:
    """Cuts windows out of pixels in memory, with padding, normalizes and flips them."""
    images, corner, size, flip, labels = fn.external_source(
        source=poll,
        num_outputs=5,
        dtype=[types.UINT8, *[types.INT32] * 3, types.INT64],
        ndim=[3, 1, 1, 0, 0],
        layout=["HWC"],
    )
    images = images.gpu() if _on_gpu() else images
    # Subtract the mean before padding, so that the padding is zero for the network.
    images = fn.slice(
        images - types.Constant(mean, device="gpu" if _on_gpu() else "cpu"),
        start=corner,
        shape=size,
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
    images = fn.crop_mirror_normalize(
        images, mean=0.0, mirror=flip, output_layout="HWC", **normalisation
    )
    return images, labels.gpu() if _on_gpu() else labels


def _on_gpu() -> bool:
    return Pipeline.current().device_id is not None
