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

from resnet_dist.data.augment import Request, Windows
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
        mean: Sequence[float] | np.ndarray,
        std: Sequence[float],
        device: torch.device,
        dtype: torch.dtype,
        max_batch_size: int,
        num_threads: int,
    ) -> None:
        """mean, std: per channel (R, G, B), on the 0..1 scale; mean may also be a mean image
        [H, W, 3]: of raw pixels, or of encoded images seen at H x W. dtype: of the images."""
        self._index = index
        self._device = device
        self._dtype = dtype
        self._mean = 255 * np.asarray(mean, np.float32)
        self._normalisation = {
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
        feed = _Feed(self._index, self._mean)
        graph = _encoded_graph if self._index.pixels is None else _raw_graph
        return feed, graph(feed, self._mean, self._normalisation, **self._executor)


class _Feed:
    """What DALI polls for input, in the consumer's thread, up to two requests ahead."""

    def __init__(self, index: Index, mean: np.ndarray) -> None:
        self._index = index
        self._mean = mean  # grey levels, [3] or [H, W, 3]
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
        return *inputs(samples, windows), flip, self._index.labels[samples]

    def _encoded(self, samples: np.ndarray, windows: Windows) -> tuple[Any, ...]:
        """File names, the part of each image to decode, the window relative to that part, its
        size after the resize, and what is then subtracted from R, G and B."""
        roi, size_px = windows.roi, windows.size_px
        if self._mean.ndim == 3 and self._mean.shape[:2] != size_px:
            raise ValueError(f"the mean image is {self._mean.shape[:2]}, the windows {size_px}")
        start, end = decoded_part(roi, self._index.sizes[samples], size_px)
        paths = [np.frombuffer(os.fsencode(self._index.paths[i]), np.uint8) for i in samples]
        # DALI takes float32: enough once the part's corner is subtracted, 1/1000 pixel at 16,000.
        roi_start = (roi[:, :2] - start).astype(np.float32)
        roi_end = (roi[:, 2:] - start).astype(np.float32)
        size = np.tile(np.array(size_px, np.float32), (len(samples), 1))
        mean = self._mean if self._mean.ndim == 1 else np.zeros(3)
        # Adding a colour is subtracting it from the mean: it costs no pass over the pixels.
        mean = (mean - 255 * windows.color_shift).astype(np.float32)
        return paths, start, end, roi_start, roi_end, size, mean

    def _raw(self, samples: np.ndarray, windows: Windows) -> tuple[Any, ...]:
        """Pixels, the top left corner of each window, which may lie outside the image, and its
        size."""
        assert self._index.pixels is not None
        corner, size = windows.roi[:, :2].astype(np.int32), np.array(windows.size_px, np.int32)
        if not np.array_equal(np.hstack([corner, corner + size]), windows.roi):
            raise ValueError(
                f"windows of raw pixels must be {windows.size_px} pixels high and wide and start "
                f"at whole pixels, to be cut out unscaled: got {windows.roi[0].tolist()}, ..."
            )
        return self._index.pixels[samples], corner, np.tile(size, (len(samples), 1))

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
    roi: np.ndarray, sizes: np.ndarray, size_px: tuple[int, int]
) -> tuple[np.ndarray, np.ndarray]:
    """The pixels that resampling `roi` touches: int32 start, end, each [B, 2], rows first.

    roi: float64 [B, 4] in pixels; sizes: [B, 2].
    """
    scale = (roi[:, 2:] - roi[:, :2]) / np.array(size_px)
    reach = np.ceil(np.maximum(scale, 1)) + 1  # the triangle's half-width, and one for rounding
    start = np.maximum(np.floor(roi[:, :2] - reach), 0)
    end = np.minimum(np.ceil(roi[:, 2:] + reach), sizes)
    return start.astype(np.int32), end.astype(np.int32)


@pipeline_def
def _encoded_graph(
    feed: _Feed, mean_image: np.ndarray, normalisation: dict[str, Any]
) -> tuple[Any, Any]:
    gpu = Pipeline.current().device_id is not None
    paths, start, end, roi_start, roi_end, size, mean, flip, labels = fn.external_source(
        source=feed.poll,
        num_outputs=9,
        dtype=[types.UINT8, *[types.INT32] * 2, *[types.FLOAT] * 4, types.INT32, types.INT64],
        ndim=[1, 1, 1, 1, 1, 1, 1, 0, 0],
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
        size=size,
        interp_type=types.INTERP_LINEAR,
        antialias=True,
        dtype=types.FLOAT,
    )
    if mean_image.ndim == 3:
        images = images - types.Constant(mean_image, device="gpu" if gpu else "cpu")
    images = fn.crop_mirror_normalize(
        images, mean=mean, mirror=flip, output_layout="HWC", **normalisation
    )
    return images, labels.gpu() if gpu else labels


@pipeline_def
def _raw_graph(feed: _Feed, mean: np.ndarray, normalisation: dict[str, Any]) -> tuple[Any, Any]:
    gpu = Pipeline.current().device_id is not None
    images, corner, size, flip, labels = fn.external_source(
        source=feed.poll,
        num_outputs=5,
        dtype=[types.UINT8, *[types.INT32] * 3, types.INT64],
        ndim=[3, 1, 1, 0, 0],
        layout=["HWC"],
    )
    images = images.gpu() if gpu else images
    # The mean first, then the padding: that must be zero for the network.
    images = fn.slice(
        images - types.Constant(mean, device="gpu" if gpu else "cpu"),
        start=corner,
        shape=size,
        axis_names="HW",
        out_of_bounds_policy="pad",
        fill_values=0.0,
    )
    images = fn.crop_mirror_normalize(
        images, mean=0.0, mirror=flip, output_layout="HWC", **normalisation
    )
    return images, labels.gpu() if gpu else labels


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
