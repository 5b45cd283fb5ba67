"""Resizing on the CPU: windows of uint8 pixels, antialiased bilinear as Pillow does it.

torch has a kernel for this that is several times faster than DALI's on a CPU, and than Pillow.
"""

from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
import torch
from torch import Tensor

from resnet_dist.data.augment import Windows

IMAGES_PER_TASK = 8


class Resampler:
    def __init__(self, threads: int) -> None:
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="resampler")

    def start(self, images: Sequence[Tensor], windows: Windows) -> Callable[[], Tensor]:
        """Starts to resize images, uint8 [h, w, 3] each, to windows.size_px, and to mirror them;
        what is returned waits for them: uint8 [B, H, W, 3]."""
        resized = torch.empty(len(images), *windows.size_px, 3, dtype=torch.uint8)
        tasks = [
            self._threads.submit(_resize, images[part], windows.flip[part], resized[part])
            for start in range(0, len(images), IMAGES_PER_TASK)
            for part in [slice(start, start + IMAGES_PER_TASK)]
        ]

        def wait() -> Tensor:
            for task in tasks:
                task.result()
            return resized

        return wait


def normalized(
    pixels: Tensor, mean: np.ndarray, std: Sequence[float], color_shift: np.ndarray
) -> Tensor:
    """(pixels - mean + color_shift) / std.

    pixels: uint8 [B, H, W, 3]. mean: float32 [3] or [H, W, 3], std: [3], color_shift: [B, 3], in
    grey levels. Returns float32 [B, 3, H, W] with channels_last strides.
    """
    batch, height, width, _ = pixels.shape
    scale = 1 / np.array(std)
    bias = (color_shift[:, None, None] - mean) * scale  # [B, 1 or H, 1 or W, 3]
    rows = np.broadcast_to(bias, (*bias.shape[:2], width, 3)).reshape(*bias.shape[:2], 3 * width)
    # Rows of 3 W numbers, not pixels of three: only long rows are vectorized.
    out = pixels.reshape(batch, height, 3 * width).float()
    scales = torch.from_numpy(np.tile(scale, width)).float()
    torch.addcmul(torch.tensor(rows, dtype=torch.float32), out, scales, out=out)
    return out.reshape(batch, height, width, 3).permute(0, 3, 1, 2)


def _resize(images: Sequence[Tensor], flips: np.ndarray, out: Tensor) -> None:
    for image, flip, place in zip(images, flips, out, strict=True):
        # The operator itself, since torch.nn.functional.interpolate has no `out`.
        torch.ops.aten._upsample_bilinear2d_aa.out(
            image.permute(2, 0, 1)[None],
            place.shape[:2],
            False,
            out=place.permute(2, 0, 1)[None],
        )
        if flip:
            place.copy_(place.flip(1))
