"""Executes requests (sample numbers + windows) with NVIDIA DALI; the only file that imports it.

Nothing is drawn here: what a batch shows is decided by resnet_dist.data.augment. The resampling is
Pillow's and torchvision's antialiased bilinear, a triangle as wide as the scale, except at the
image's border: taps beyond it repeat the edge pixel, where Pillow leaves them out.
"""

import os
from collections import deque
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, fn, pipeline_def, types

from resnet_dist.data.augment import Request
from resnet_dist.data.index import Index

PATHS_IN_ERROR = 5


@dataclass(frozen=True)
class Batch:
    """One training or evaluation batch, on the device."""

    images: torch.Tensor  # [B, 3, H, W], channels_last strides, normalised, in the autocast dtype
    labels: torch.Tensor  # int64 [B]


class Loader:
    """Turns requests into batches, reading and decoding two requests ahead of the consumer."""

    def __init__(
        self,
        index: Index,
        *,
        output_px: int,
        mean: Sequence[float],
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
        max_batch_size: int,
        num_threads: int,
    ) -> None:
        """mean, std: per channel (R, G, B), on the 0..1 scale. dtype: of the images."""
        self._index = index
        self._output_px = output_px
        self._device = device
        self._dtype = dtype
        self._normalisation = {
            "mean": [255 * m for m in mean],
            "std": [255 * s for s in std],
            # DALI has no bfloat16. Its float16 has three bits more mantissa, and normalised pixels
            # lie far inside its range, so nothing is lost on the way.
            "dtype": types.FLOAT if dtype == torch.float32 else types.FLOAT16,
        }
        self._executor = {
            "batch_size": max_batch_size,
            "num_threads": num_threads,
            "device_id": _device_id(device),
            "prefetch_queue_depth": 2,
        }
        self._idle: tuple[_Feed, Pipeline] | None = None

    def batches(self, requests: Iterable[Request]) -> Iterator[Batch]:
        """One Batch per request, in order. B may vary from request to request.

        Each call is a stream of its own, whatever became of earlier ones.

        Raises:
            RuntimeError: a file could not be read or decoded; names the files of that request.
        """
        # A pipeline is used again only if its stream ran to the end: one that was abandoned or
        # failed still holds batches that it prefetched.
        feed, pipe = self._idle or self._build()
        self._idle = None
        feed.start(requests)
        pipe.reset()
        while True:
            # Waits on the host for DALI's CPU threads, not for the GPU: the current CUDA stream is
            # made to wait for the batch, and orders the later reuse of its memory.
            try:
                images, labels = pipe.run(_current_stream(self._device))
            except StopIteration:
                break
            except RuntimeError as error:
                raise RuntimeError(feed.describe(error)) from error
            feed.in_flight.popleft()
            yield Batch(
                # [B, H, W, 3] seen as [B, 3, H, W]: channels_last without a copy.
                torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).to(self._dtype),
                torch.from_dlpack(labels.as_tensor()),
            )
        self._idle = feed, pipe

    def _build(self) -> tuple["_Feed", Pipeline]:
        feed = _Feed(self._index, self._output_px)
        graph = _encoded_graph if self._index.pixels is None else _raw_graph
        return feed, graph(feed, self._output_px, self._normalisation, **self._executor)


class _Feed:
    """What DALI polls for input, in the consumer's thread, up to two requests ahead."""

    def __init__(self, index: Index, output_px: int) -> None:
        self._index = index
        self._output_px = output_px
        self._requests: Iterator[Request] = iter(())
        self.in_flight: deque[np.ndarray] = deque()  # sample numbers of requests not yet answered

    def start(self, requests: Iterable[Request]) -> None:
        self._requests = iter(requests)

    def poll(self) -> tuple[Any, ...]:
        """The external sources of the graph, in its order, each a batch."""
        samples, windows = next(self._requests)  # StopIteration tells DALI that the stream ends
        self.in_flight.append(samples)
        inputs = self._raw if self._index.pixels is not None else self._encoded
        flip = windows.flip.astype(np.int32)
        return *inputs(samples, windows.roi), flip, self._index.labels[samples]

    def _encoded(self, samples: np.ndarray, roi: np.ndarray) -> tuple[Any, ...]:
        """File names, the part of each image to decode, and the window relative to that part."""
        start, end = decoded_part(roi, self._index.sizes[samples], self._output_px)
        paths = [np.frombuffer(os.fsencode(self._index.paths[i]), np.uint8) for i in samples]
        # DALI takes float32: enough once the part's corner is subtracted, 1/1000 pixel at 16,000.
        roi_start = (roi[:, :2] - start).astype(np.float32)
        roi_end = (roi[:, 2:] - start).astype(np.float32)
        return paths, start, end, roi_start, roi_end

    def _raw(self, samples: np.ndarray, roi: np.ndarray) -> tuple[Any, ...]:
        """Pixels, and the top left corner of each window, which may lie outside the image."""
        assert self._index.pixels is not None
        corner = roi[:, :2].astype(np.int32)
        if not np.array_equal(np.hstack([corner, corner + self._output_px]), roi):
            raise ValueError(
                f"windows of raw pixels must be {self._output_px} pixels high and wide and start "
                f"at whole pixels, to be cut out unscaled: got {roi[0].tolist()}, ..."
            )
        return self._index.pixels[samples], corner

    def describe(self, error: RuntimeError) -> str:
        """DALI's own reason, and the files of the request: its decoder does not say which one."""
        reason = str(error).partition("encountered:")[2].strip().partition("\n")[0]
        if not reason or not self._index.paths:
            return str(error)
        paths = [self._index.paths[i] for i in self.in_flight[0]]
        if len(paths) > PATHS_IN_ERROR:
            paths[PATHS_IN_ERROR:] = [f"... {len(paths)} files in all"]
        return "\n  ".join([f"{reason}, in a batch of these files:", *paths])


def decoded_part(
    roi: np.ndarray, sizes: np.ndarray, output_px: int
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that resampling `roi` touches: int32 start, end, each [B, 2], rows first.

    roi: float64 [B, 4] in pixels; sizes: [B, 2].
    """
    scale = (roi[:, 2:] - roi[:, :2]) / output_px
    reach = np.ceil(np.maximum(scale, 1)) + 1  # the triangle's half-width, and one for rounding
    start = np.maximum(np.floor(roi[:, :2] - reach), 0)
    end = np.minimum(np.ceil(roi[:, 2:] + reach), sizes)
    return start.astype(np.int32), end.astype(np.int32)


@pipeline_def
def _encoded_graph(feed: _Feed, output_px: int, normalisation: dict[str, Any]) -> tuple[Any, Any]:
    gpu = Pipeline.current().device_id is not None
    paths, start, end, roi_start, roi_end, flip, labels = fn.external_source(
        source=feed.poll,
        num_outputs=7,
        dtype=[types.UINT8, *[types.INT32] * 2, *[types.FLOAT] * 2, types.INT32, types.INT64],
        ndim=[1, 1, 1, 1, 1, 0, 0],
    )
    # Slices are taken in the frame that EXIF turns the image to, the one `Index.sizes` speaks of.
    images = fn.decoders.image_slice(
        fn.io.file.read(paths),
        start=start,
        end=end,
        axis_names="HW",
        device="mixed" if gpu else "cpu",
    )
    # float, not uint8: the resampled values are normalised as they are, where Pillow rounds them
    # to whole grey levels twice. On a CPU it costs 4 % of the time.
    images = fn.resize(
        images,
        roi_start=roi_start,
        roi_end=roi_end,
        size=(output_px, output_px),
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )
    images = fn.crop_mirror_normalize(images, mirror=flip, output_layout="HWC", **normalisation)
    return images, labels.gpu() if gpu else labels


@pipeline_def
def _raw_graph(feed: _Feed, output_px: int, normalisation: dict[str, Any]) -> tuple[Any, Any]:
    gpu = Pipeline.current().device_id is not None
    images, corner, flip, labels = fn.external_source(
        source=feed.poll,
        num_outputs=4,
        dtype=[types.UINT8, types.INT32, types.INT32, types.INT64],
        ndim=[3, 1, 0, 0],
        layout=["HWC"],
    )
    # Padding must be zero for the network, so after normalisation: before it, that is the mean.
    images = fn.slice(
        images.gpu() if gpu else images,
        start=corner,
        shape=(output_px, output_px),
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=normalisation["mean"],
        dtype=types.FLOAT,
    )
    images = fn.crop_mirror_normalize(images, mirror=flip, output_layout="HWC", **normalisation)
    return images, labels.gpu() if gpu else labels


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
