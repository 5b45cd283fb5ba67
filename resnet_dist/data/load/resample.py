"""Resizes, flips and normalizes windows of uint8 pixels on the CPU.

Resizing is antialiased bilinear, as in Pillow. torch's kernel for it is several times faster than
Pillow, and than DALI on a CPU.
"""

import math
import sys
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, wait
from threading import Barrier

import numpy as np
import torch
from torch import Tensor

from resnet_dist.data.view.augment import Windows

TASKS_PER_THREAD = 2  # of a batch: few, because each waits for its turn to run Python
MIN_IMAGES_PER_TASK = 8
MAX_KEPT = 16  # buffers


class Buffers:
    """Tensors whose memory is reused once nothing refers to them any more.

    A batch is larger than the blocks that malloc keeps. A new allocation would cost a page fault
    for every 4 KiB, which takes as long as the resizing itself.
    """

    def __init__(self) -> None:
        self._kept: list[np.ndarray] = []
        (self._free_count,) = _reference_counts([np.empty(1)])

    def take(self, shape: tuple[int, ...], dtype: torch.dtype) -> Tensor:
        """Returns a tensor with arbitrary content."""
        # A tensor made from an array keeps a reference to it, and so do all views of the tensor. An
        # array with as few references as one that is not in use is free.
        nbytes = math.prod(shape) * dtype.itemsize
        for array, count in zip(self._kept, _reference_counts(self._kept), strict=True):
            if array.nbytes == nbytes and count == self._free_count:
                break
        else:
            array = np.empty(nbytes, np.uint8)
            self._kept = [*self._kept[1 - MAX_KEPT :], array]
        return torch.from_numpy(array).view(dtype).view(shape)

    def forget(self) -> None:
        """Frees buffers that are not in use now, and the others when they no longer are."""
        self._kept = []


def _reference_counts(arrays: list[np.ndarray]) -> list[int]:
    return [sys.getrefcount(array) for array in arrays]


class Resampler:
    """Resizes the windows of a batch, in threads."""

    def __init__(
        self, mean: np.ndarray, std: Sequence[float], dtype: torch.dtype, threads: int
    ) -> None:
        """mean: float32 [3] or [H, W, 3], std: [3], in grey levels. dtype: of the results."""
        self._mean = mean
        self._dtype = dtype
        self._std = np.array(std)
        self._threads = _serial_threads(threads)
        self._tasks = TASKS_PER_THREAD * threads  # of a large batch
        self._buffers = Buffers()

    def forget(self) -> None:
        """Frees the memory that is kept for the next batch."""
        self._buffers.forget()

    def start(self, images: Sequence[Tensor], windows: Windows) -> Callable[[], Tensor]:
        """Starts to resize images to windows.size_px, flip and normalize them.

        images: uint8 [h, w, 3] each. Returns a function that waits for the result:
        [B, 3, H, W] with channels_last strides.
        """
        batch, (height, width) = len(images), windows.size_px
        out = self._buffers.take((batch, height, width, 3), self._dtype)
        # (pixels - mean + color_shift) / std, computed as pixels * scale + bias
        scale = np.tile(1 / self._std, width)
        bias = (255 * windows.color_shift[:, None, None] - self._mean) / self._std
        rows = np.broadcast_to(bias, (*bias.shape[:2], width, 3))  # [B, 1 or H, W, 3]
        rows = rows.reshape(batch, -1, 3 * width)
        images_per_task = max(MIN_IMAGES_PER_TASK, math.ceil(batch / self._tasks))
        tasks = [
            self._threads.submit(
                _resize,
                images[some],
                windows.flip[some],
                torch.from_numpy(scale).float(),
                torch.tensor(rows[some], dtype=torch.float32),
                out[some],
            )
            for start in range(0, batch, images_per_task)
            for some in [slice(start, start + images_per_task)]
        ]

        def finish() -> Tensor:
            for task in tasks:
                task.result()
            return out.permute(0, 3, 1, 2)

        return finish


@torch.inference_mode()  # views are cheaper in it
def _resize(
    images: Sequence[Tensor], flips: np.ndarray, scale: Tensor, biases: Tensor, out: Tensor
) -> None:
    """Does one task. scale: [3 W], biases: [B, 1 or H, 3 W], both float32; out: [B, H, W, 3]."""
    height, width = out.shape[1:3]
    pixels = torch.empty(height, width, 3, dtype=torch.uint8)
    # An image at a time, because its pixels stay in the CPU's cache. As rows of 3 W numbers rather
    # than pixels of 3, because only long rows are vectorized.
    rows = out.view(len(images), height, 3 * width)
    is_float32 = out.dtype == torch.float32
    scratch = torch.empty(0 if is_float32 else height, 3 * width)
    for image, flip, bias, row in zip(images, flips, biases, rows, strict=True):
        # The operator itself, since torch.nn.functional.interpolate has no `out`.
        torch.ops.aten._upsample_bilinear2d_aa.out(
            image.permute(2, 0, 1)[None],
            [height, width],
            False,
            out=pixels.permute(2, 0, 1)[None],
        )
        seen = pixels.flip(1) if flip else pixels
        levels = row if is_float32 else scratch
        levels.copy_(seen.view(height, 3 * width))
        torch.addcmul(bias, levels, scale, out=levels)
        if not is_float32:
            row.copy_(levels)


def _serial_threads(count: int) -> ThreadPoolExecutor:
    """Returns threads in which torch starts no threads of its own, which would compete."""
    before = torch.get_num_threads()
    threads = ThreadPoolExecutor(count, "resampler", initializer=_be_serial)
    all_here = Barrier(count)
    wait([threads.submit(all_here.wait) for _ in range(count)])
    torch.set_num_threads(before)
    return threads


def _be_serial() -> None:
    torch.set_num_threads(1)  # for this thread, and for threads that start before it is set again
    torch.get_num_threads()  # the setting takes effect at the first use
