"""HOW an image is seen: its crop window, flip and colour, a pure function of (seed, epoch, sample).

Each sample draws its numbers from a counter-based generator keyed by (seed, epoch, sample), so
neither its place in a batch, nor the number of ranks, nor a restart changes what is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.draws import uniforms

RANDOM_RESIZED_ATTEMPTS = 10  # Szegedy et al. 2015, as torchvision's RandomResizedCrop does it

# Principal components of ImageNet's RGB values on the 0..1 scale, a column each, and the spread
# along them, as fb.resnet.torch (datasets/imagenet.lua) and Caffe-era trainers use them.
PCA_SPREAD = np.array([0.2175, 0.0188, 0.0045])
PCA_COMPONENTS = np.array(
    [
        [-0.5675, 0.7192, 0.4009],
        [-0.5808, -0.0045, -0.8140],
        [-0.5836, -0.6948, 0.4203],
    ]
)


@dataclass(frozen=True)
class Windows:
    """What part of each image of a batch is looked at, in pixels after the EXIF rotation."""

    roi: np.ndarray  # float64 [B, 4]: top, left, bottom, right; whole numbers if cut_first
    flip: np.ndarray  # bool [B]: mirrored left to right after the crop
    size_px: tuple[int, int]  # height, width that each window is resized to
    color_shift: np.ndarray  # float64 [B, 3]: added to R, G and B, on the 0..1 scale
    # True: the window is cut out, then resized, and pixels beside it play no part (training, as in
    # torchvision's resized_crop). False: the image is resized, then the window is cut out.
    cut_first: bool = False

    def at(self, row: int) -> "Windows":
        """The window at `row` alone."""
        one = slice(row, row + 1)
        return replace(
            self, roi=self.roi[one], flip=self.flip[one], color_shift=self.color_shift[one]
        )

    def put(self, row: int, one: "Windows") -> "Windows":
        """The same, with the window `one` at `row`."""
        roi, flip, color_shift = self.roi.copy(), self.flip.copy(), self.color_shift.copy()
        roi[row], flip[row], color_shift[row] = one.roi[0], one.flip[0], one.color_shift[0]
        return replace(self, roi=roi, flip=flip, color_shift=color_shift)


class Request(NamedTuple):
    """A batch before it is read."""

    samples: np.ndarray  # int64 [B]
    windows: Windows
    # (sample, attempt) -> what is shown in the place of an unreadable one, and its window. None: a
    # blank image with the label -1, which no answer matches.
    stand_in: Callable[[int, int], tuple[int, Windows]] | None = None
    # In training: the optimizer step, and where the images stand in its global batch.
    step: int = -1
    positions: range = range(0)


def train_windows(
    data: DataConfig, seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray
) -> Windows:
    """Windows of training images. samples: int64 [B]; sizes: [B, 2] height, width."""
    sizes = np.maximum(sizes, 1)  # unreadable ones have none, and are not shown
    draws = 3 + 2 * RANDOM_RESIZED_ATTEMPTS
    random = uniforms("window", seed, epoch, samples, draws=draws + 6)
    flip, anchor, rest = random[:, 0], random[:, 1:3], random[:, 3:draws]
    if data.train_crop == "scale":
        roi = _scale(sizes, data.scale_px, data.crop_px, rest[:, 0], anchor)
    elif data.train_crop == "random_resized":
        roi = _random_resized(sizes, data, rest, anchor)
    else:
        roi = _pad(sizes, data.pad_px, data.crop_px, anchor)
    return Windows(
        roi=roi,
        flip=(flip < 0.5) & data.flip,
        size_px=(data.crop_px, data.crop_px),
        color_shift=_pca_shift(data.pca_color_std, random[:, draws:]),
        cut_first=True,
    )


def eval_windows(data: DataConfig, sizes: np.ndarray) -> Windows:
    """Shorter side to eval_resize_px, then the central eval_crop_px square. sizes: [B, 2]."""
    return center_windows(sizes, data.eval_resize_px, data.eval_crop_px)


def center_windows(sizes: np.ndarray, resize_px: int, crop_px: int) -> Windows:
    """Shorter side to resize_px, then the central crop_px square. sizes: [B, 2]."""
    return crop_windows(sizes, resize_px, crop_px, (0.5, 0.5))


def crop_windows(
    sizes: np.ndarray, resize_px: int, crop_px: int, anchor: tuple[float, float]
) -> Windows:
    """Shorter side to resize_px, then a crop_px square. sizes: [B, 2].

    anchor: down and across; 0 is the top or left end of where the crop can be, 1 the other end.
    """
    sizes = np.maximum(sizes, 1)  # unreadable ones have none, and are not shown
    resized = resized_sizes(sizes, np.full(len(sizes), resize_px))
    corner = np.rint((resized - crop_px) * anchor)  # as torchvision's center_crop rounds
    return unchanged(_in_original(corner, resized, sizes, crop_px), (crop_px, crop_px))


def whole_windows(sizes: np.ndarray, shorter_px: int) -> Windows:
    """All of each image, its shorter side resized to shorter_px. sizes: [B, 2].

    Raises:
        ValueError: the images differ in size after that.
    """
    resized = resized_sizes(sizes, np.full(len(sizes), shorter_px))
    if (resized != resized[0]).any():
        raise ValueError(f"images of different shapes make no batch: {sizes.tolist()}")
    height, width = resized[0].tolist()
    return unchanged(np.hstack([np.zeros_like(sizes), sizes]).astype(float), (height, width))


def whole_images(sizes: np.ndarray) -> Windows:
    """All of each image, made one pixel: for what is not to be looked at. sizes: [B, 2]."""
    roi = np.hstack([np.zeros_like(sizes), sizes]).astype(float)
    return replace(unchanged(roi, (1, 1)), cut_first=True)


def unchanged(roi: np.ndarray, size_px: tuple[int, int]) -> Windows:
    """Windows that are seen as they are: not mirrored, in their own colours."""
    return Windows(roi, np.zeros(len(roi), bool), size_px, np.zeros((len(roi), 3)))


def _pca_shift(std: float, u: np.ndarray) -> np.ndarray:
    """Krizhevsky et al. 2012, section 4.1: sum over components of N(0, std) * spread * component.

    u: [B, 6] uniform in [0, 1), two for each normal number (Box & Muller 1958).
    """
    normal = np.sqrt(-2 * np.log1p(-u[:, :3])) * np.cos(2 * np.pi * u[:, 3:])
    return (std * normal * PCA_SPREAD) @ PCA_COMPONENTS.T


def _scale(
    sizes: np.ndarray, scale_px: tuple[int, int], crop_px: int, u: np.ndarray, anchor: np.ndarray
) -> np.ndarray:
    """Scale augmentation (Simonyan & Zisserman 2015; He et al. 2015, section 3.4).

    The crop of the resized image, as a window of the original whose edges are rounded to whole
    pixels (ImageNet: by 0.1 % of it), so that it can be cut out and resized alone.
    """
    low, high = scale_px
    shorter = low + np.floor(u * (high - low + 1))
    resized = resized_sizes(sizes, shorter)
    corner = np.floor(anchor * (resized - crop_px + 1))
    roi = np.rint(_in_original(corner, resized, sizes, crop_px))
    roi[:, :2] = np.minimum(roi[:, :2], sizes - 1)
    roi[:, 2:] = np.maximum(roi[:, 2:], roi[:, :2] + 1)
    return roi


def _random_resized(
    sizes: np.ndarray, data: DataConfig, u: np.ndarray, anchor: np.ndarray
) -> np.ndarray:
    """Area and aspect drawn until they fit, ten times; else the largest central crop that does."""
    height, width = sizes[:, 0, None].astype(float), sizes[:, 1, None].astype(float)
    share = data.area[0] + u[:, 0::2] * (data.area[1] - data.area[0])  # [B, attempts]
    low, high = np.log(data.aspect)
    aspect = np.exp(low + u[:, 1::2] * (high - low))  # width / height, log-uniform
    w = np.rint(np.sqrt(share * height * width * aspect))
    h = np.rint(np.sqrt(share * height * width / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = (np.arange(len(sizes)), fits.argmax(axis=1))

    # The fallback: whole image, its longer side cut until the aspect is legal; central.
    fallback_w = np.minimum(width[:, 0], np.rint(height[:, 0] * data.aspect[1]))
    fallback_h = np.minimum(height[:, 0], np.rint(width[:, 0] / data.aspect[0]))
    found = fits.any(axis=1)
    crop = np.stack(
        [np.where(found, h[first], fallback_h), np.where(found, w[first], fallback_w)], axis=1
    )
    crop = np.maximum(crop, 1)  # a 1-pixel strip stays one
    corner = np.where(
        found[:, None], np.floor(anchor * (sizes - crop + 1)), np.floor((sizes - crop) / 2)
    )
    return np.concatenate([corner, corner + crop], axis=1)


def _pad(sizes: np.ndarray, pad_px: int, crop_px: int, anchor: np.ndarray) -> np.ndarray:
    """pad_px zeros on each side, then a random crop: He et al. 2015, section 4.2."""
    corner = np.floor(anchor * (sizes + 2 * pad_px - crop_px + 1)) - pad_px
    return np.concatenate([corner, corner + crop_px], axis=1)


def resized_sizes(sizes: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """int64 [B, 2]: sizes after a resize of the shorter side; the longer is rounded down."""
    return shorter.astype(np.int64)[:, None] * sizes // sizes.min(axis=1, keepdims=True)


def _in_original(
    corner: np.ndarray, resized: np.ndarray, sizes: np.ndarray, crop_px: int
) -> np.ndarray:
    """A crop of the resized image as a window of the original: [B, 4]."""
    scale = sizes / resized
    return np.concatenate([corner * scale, (corner + crop_px) * scale], axis=1)
