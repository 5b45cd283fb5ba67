"""The box of pixels that a window depends on, and images of which Pillow decodes only that.

DALI gets such a box as a PPM, which it decodes by copying. So the images that DALI must not decode
go through the same pipeline as all others, and no more of them is held than of those.
"""

from collections.abc import Sequence

import numpy as np

from resnet_dist.data.index.pillow import upright
from resnet_dist.data.load.cache import Image
from resnet_dist.data.view.augment import Windows


def boxes_of(windows: Windows, sizes: np.ndarray) -> np.ndarray:
    """Returns the pixels that the windows depend on: int32 [B, 4], top, left, bottom, right.

    sizes: height and width of each image, [B, 2].
    """
    if windows.cut_first:
        return windows.roi.astype(np.int32)
    # The triangle filter has a half-width of one output pixel, which is `scale` input pixels when
    # shrinking, and one input pixel when enlarging. One more is for rounding.
    scale = (windows.roi[:, 2:] - windows.roi[:, :2]) / np.array(windows.size_px)
    reach = np.ceil(np.maximum(scale, 1)) + 1
    start = np.maximum(np.floor(windows.roi[:, :2] - reach), 0)
    end = np.minimum(np.ceil(windows.roi[:, 2:] + reach), sizes)
    return np.hstack([start, end]).astype(np.int32)


def decoded_box(data: bytes, size: tuple[int, int], box: Sequence[int]) -> Image:
    """Decodes an image with Pillow and returns a box of it, as a PPM.

    size: height and width in the index. box: top, left, bottom, right.

    Raises:
        UnreadableImage: it cannot be decoded, or has a different size.
    """
    top, left, bottom, right = box
    pixels = upright(data, size)[top:bottom, left:right]
    height, width = pixels.shape[:2]
    ppm = b"P6 %d %d 255\n" % (width, height) + pixels.tobytes()
    return Image(np.frombuffer(ppm, np.uint8), (height, width), (top, left))
