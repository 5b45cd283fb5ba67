"""How an image is seen: its crop window, flip and colour, as a function of (seed, epoch, sample).

Each image takes its random numbers from a counter-based generator with the key (seed, epoch,
sample). So its position in a batch, the number of ranks and restarts make no difference.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.draws import uniforms

RANDOM_RESIZED_ATTEMPTS = 10  # Szegedy et al. 2015, as torchvision's RandomResizedCrop does it

# Principal components of ImageNet's RGB values on the 0..1 scale, one per column, and the standard
# deviation along each, as in fb.resnet.torch (datasets/imagenet.lua).
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
    """The crop windows of a batch of images, in pixels after the EXIF rotation."""

    roi: np.ndarray  # float64 [B, 4]: top, left, bottom, right; whole numbers if cut_first
    flip: np.ndarray  # bool [B]: whether the window is mirrored left to right
    size_px: tuple[int, int]  # height and width to which each window is resized
    color_shift: np.ndarray  # float64 [B, 3]: added to R, G and B, on the 0..1 scale
    # True: cut out the window, then resize it, so that pixels outside have no influence (training,
    # like torchvision's resized_crop). False: resize the image, then cut out the window.
    cut_first: bool = False

    def at(self, row: int) -> "Windows":
        """Returns the single window in `row`."""
        one = slice(row, row + 1)
        return replace(
            self, roi=self.roi[one], flip=self.flip[one], color_shift=self.color_shift[one]
        )

    def put(self, row: int, one: "Windows") -> "Windows":
        """Returns a copy in which `row` is replaced by the window `one`."""
        roi, flip, color_shift = self.roi.copy(), self.flip.copy(), self.color_shift.copy()
        roi[row], flip[row], color_shift[row] = one.roi[0], one.flip[0], one.color_shift[0]
        return replace(self, roi=roi, flip=flip, color_shift=color_shift)


class Request(NamedTuple):
    """A batch before anything is read: which images, and how each is seen."""

    samples: np.ndarray  # int64 [B]
    windows: Windows
    # (sample, attempt) -> the image that replaces an unreadable one, and its window. None: replace
    # it by a blank image with the label -1, which no prediction matches.
    stand_in: Callable[[int, int], tuple[int, Windows]] | None = None
    # In training: the optimizer step, and the images' positions in its global batch.
    step: int = -1
    positions: range = range(0)


def train_windows(
    data: DataConfig, seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray
) -> Windows:
    """Returns random windows of training images. samples: int64 [B]; sizes: [B, 2] height, width.

    Every image draws the same numbers under all settings: one for the flip, two for the position of
    the crop, twenty for its size, six for the colour.
    """
    sizes = np.maximum(sizes, 1)  # unreadable images have size 0, and are replaced later
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
    """Returns the windows of an evaluation with data.eval_resize_px and data.eval_crop_px."""
    return center_windows(sizes, data.eval_resize_px, data.eval_crop_px)


def center_windows(sizes: np.ndarray, resize_px: int, crop_px: int) -> Windows:
    """Resizes the shorter side to resize_px, takes the central crop_px square. sizes: [B, 2]."""
    return crop_windows(sizes, resize_px, crop_px, (0.5, 0.5))


def crop_windows(
    sizes: np.ndarray, resize_px: int, crop_px: int, anchor: tuple[float, float]
) -> Windows:
    """Resizes the shorter side to resize_px, and takes a crop_px square. sizes: [B, 2].

    anchor: where the square is, vertically and horizontally, from 0 (top, left) to 1 (bottom,
    right).
    """
    sizes = np.maximum(sizes, 1)  # unreadable images have size 0, and are replaced later
    resized = resized_sizes(sizes, np.full(len(sizes), resize_px))
    corner = np.rint((resized - crop_px) * anchor)  # as torchvision's center_crop rounds
    return unchanged(_in_original(corner, resized, sizes, crop_px), (crop_px, crop_px))


def whole_windows(sizes: np.ndarray, shorter_px: int) -> Windows:
    """Takes whole images, with the shorter side resized to shorter_px. sizes: [B, 2].

    Raises:
        ValueError: the resized images differ in size.
    """
    resized = resized_sizes(sizes, np.full(len(sizes), shorter_px))
    if (resized != resized[0]).any():
        raise ValueError(f"images of different shapes cannot be a batch: {sizes.tolist()}")
    height, width = resized[0].tolist()
    return unchanged(np.hstack([np.zeros_like(sizes), sizes]).astype(float), (height, width))


def whole_images(sizes: np.ndarray) -> Windows:
    """Takes whole images, shrunk to one pixel, where only decoding matters. sizes: [B, 2]."""
    roi = np.hstack([np.zeros_like(sizes), sizes]).astype(float)
    return replace(unchanged(roi, (1, 1)), cut_first=True)


def unchanged(roi: np.ndarray, size_px: tuple[int, int]) -> Windows:
    """Returns windows without a flip and without a change of colour."""
    return Windows(roi, np.zeros(len(roi), bool), size_px, np.zeros((len(roi), 3)))


def _pca_shift(std: float, u: np.ndarray) -> np.ndarray:
    """Returns a colour shift for each image: [B, 3]. Krizhevsky et al. 2012, section 4.1.

    It is the sum over the principal components of N(0, std) * spread * component. u: [B, 6] uniform
    in [0, 1). Two uniform numbers give one normal one, sqrt(-2 ln(1 - u1)) * cos(2 pi u2) (Box &
    Muller 1958).
    """
    normal = np.sqrt(-2 * np.log1p(-u[:, :3])) * np.cos(2 * np.pi * u[:, 3:])
    return (std * normal * PCA_SPREAD) @ PCA_COMPONENTS.T


def _scale(
    sizes: np.ndarray, scale_px: tuple[int, int], crop_px: int, u: np.ndarray, anchor: np.ndarray
) -> np.ndarray:
    """Scale augmentation (Simonyan & Zisserman 2015; He et al. 2015, section 3.4).

    The image is resized so that its shorter side is uniform in [low, high], and cropped at random.
    The crop is returned as a window of the original image, so that only that window needs to be
    decoded and resized. Its edges are rounded to whole pixels (for ImageNet by 0.1 % of its size).
    """
    low, high = scale_px
    shorter = low + np.floor(u * (high - low + 1))
    resized = resized_sizes(sizes, shorter)
    corner = np.floor(anchor * (resized - crop_px + 1))  # every offset is equally likely
    roi = np.rint(_in_original(corner, resized, sizes, crop_px))
    # At least one pixel, and inside the image.
    roi[:, :2] = np.minimum(roi[:, :2], sizes - 1)
    roi[:, 2:] = np.maximum(roi[:, 2:], roi[:, :2] + 1)
    return roi


def _random_resized(
    sizes: np.ndarray, data: DataConfig, u: np.ndarray, anchor: np.ndarray
) -> np.ndarray:
    """A box of random area and aspect ratio (Szegedy et al. 2015), as torchvision draws it.

    The first of ten attempts that fits inside the image is taken; if none does, the largest central
    crop with a permitted aspect ratio.
    """
    height, width = sizes[:, 0, None].astype(float), sizes[:, 1, None].astype(float)
    share = data.area[0] + u[:, 0::2] * (data.area[1] - data.area[0])  # [B, attempts]
    low, high = np.log(data.aspect)
    aspect = np.exp(low + u[:, 1::2] * (high - low))  # width / height, log-uniform
    w = np.rint(np.sqrt(share * height * width * aspect))
    h = np.rint(np.sqrt(share * height * width / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = (np.arange(len(sizes)), fits.argmax(axis=1))

    # The fallback: the whole image, cut on its longer side to a permitted aspect ratio.
    fallback_w = np.minimum(width[:, 0], np.rint(height[:, 0] * data.aspect[1]))
    fallback_h = np.minimum(height[:, 0], np.rint(width[:, 0] / data.aspect[0]))
    found = fits.any(axis=1)
    crop = np.stack(
        [np.where(found, h[first], fallback_h), np.where(found, w[first], fallback_w)], axis=1
    )
    crop = np.maximum(crop, 1)  # an image that is one pixel high stays one pixel high
    corner = np.where(
        found[:, None], np.floor(anchor * (sizes - crop + 1)), np.floor((sizes - crop) / 2)
    )
    return np.concatenate([corner, corner + crop], axis=1)


def _pad(sizes: np.ndarray, pad_px: int, crop_px: int, anchor: np.ndarray) -> np.ndarray:
    """pad_px zeros on each side, then a random crop: He et al. 2015, section 4.2."""
    corner = np.floor(anchor * (sizes + 2 * pad_px - crop_px + 1)) - pad_px
    return np.concatenate([corner, corner + crop_px], axis=1)


def resized_sizes(sizes: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Returns sizes after resizing the shorter side; the longer is rounded down: int64 [B, 2]."""
    return shorter.astype(np.int64)[:, None] * sizes // sizes.min(axis=1, keepdims=True)


def _in_original(
    corner: np.ndarray, resized: np.ndarray, sizes: np.ndarray, crop_px: int
) -> np.ndarray:
    """Returns a crop of the resized image as a window of the original image: [B, 4]."""
    scale = sizes / resized
    return np.concatenate([corner * scale, (corner + crop_px) * scale], axis=1)
