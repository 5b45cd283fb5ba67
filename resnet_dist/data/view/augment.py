"""How an image is seen: its crop window, flip and colour, a pure function of (seed, epoch, sample).

Each sample draws its numbers from a counter-based generator keyed by (seed, epoch, sample), so
neither its position in the batch, nor the number of ranks, nor a restart changes what is seen.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import NamedTuple

import numpy as np

from resnet_dist.config import DataConfig
from resnet_dist.draws import uniforms

# Longer side to shorter side of a whole image. A strip of 1 x 60,000 pixels, whose shorter side is
# resized to 640 as in multi-scale evaluation, would take more memory than there is.
MAX_ASPECT = 16
RANDOM_RESIZED_ATTEMPTS = 10  # Szegedy et al. 2015; ten, as in torchvision's RandomResizedCrop

# Principal components of ImageNet's RGB values on the 0..1 scale, one per column, and the spread
# along each of them, as used by fb.resnet.torch (datasets/imagenet.lua) and Caffe-era trainers.
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
    """The window of each image in a batch that is shown, in pixels after the EXIF rotation."""

    roi: np.ndarray  # float64 [B, 4]: top, left, bottom, right; whole numbers if cut_first
    flip: np.ndarray  # bool [B]: mirrored left to right after the crop
    size_px: tuple[int, int]  # height and width to which each window is resized
    color_shift: np.ndarray  # float64 [B, 3]: added to R, G and B, on the 0..1 scale
    # True: the window is cut out and then resized, so pixels outside it have no influence
    # (training, as in torchvision's resized_crop). False: the image is resized, and the window is
    # then cut out, so resampling also reads pixels next to the window.
    cut_first: bool = False

    def at(self, row: int) -> "Windows":
        """Returns the window of row `row` as a batch of one."""
        one = slice(row, row + 1)
        return replace(
            self, roi=self.roi[one], flip=self.flip[one], color_shift=self.color_shift[one]
        )

    def put(self, row: int, one: "Windows") -> "Windows":
        """Returns a copy in which row `row` is replaced by the window `one`."""
        roi, flip, color_shift = self.roi.copy(), self.flip.copy(), self.color_shift.copy()
        roi[row], flip[row], color_shift[row] = one.roi[0], one.flip[0], one.color_shift[0]
        return replace(self, roi=roi, flip=flip, color_shift=color_shift)


class Request(NamedTuple):
    """A batch that is yet to be read: which samples, and through which windows."""

    samples: np.ndarray  # int64 [B]
    windows: Windows
    # (sample, attempt) -> the sample to show instead of an unreadable one, and its window. None:
    # show a blank image with the label -1, which no prediction matches.
    stand_in: Callable[[int, int], tuple[int, Windows]] | None = None
    # In training: the optimizer step, and the positions of the images in its global batch.
    step: int = -1
    positions: range = range(0)


def train_windows(
    data: DataConfig, seed: int, epoch: int, samples: np.ndarray, sizes: np.ndarray
) -> Windows:
    """Returns the windows of training images. samples: int64 [B]; sizes: [B, 2] height, width."""
    sizes = np.maximum(sizes, 1)  # unreadable images have size 0; they are not shown
    # Columns: 0 the flip, 1 and 2 the crop's place, 3 to 22 its size (two per attempt), 23 to 28
    # the colour.
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
    """Returns the windows of an evaluation. sizes: [B, 2].

    They resize the shorter side to eval_resize_px and cut out the central eval_crop_px square.
    """
    return center_windows(sizes, data.eval_resize_px, data.eval_crop_px)


def center_windows(sizes: np.ndarray, resize_px: int, crop_px: int) -> Windows:
    """Resizes the shorter side to resize_px and cuts the central crop_px square. sizes: [B, 2]."""
    return crop_windows(sizes, resize_px, crop_px, (0.5, 0.5))


def crop_windows(
    sizes: np.ndarray, resize_px: int, crop_px: int, anchor: tuple[float, float]
) -> Windows:
    """Resizes the shorter side to resize_px, then cuts out a crop_px square. sizes: [B, 2].

    anchor: (down, across). 0 puts the crop at the top or left edge of the image, 1 at the bottom
    or right edge.
    """
    sizes = np.maximum(sizes, 1)  # unreadable images have size 0; they are not shown
    resized = resized_sizes(sizes, np.full(len(sizes), resize_px))
    corner = np.rint((resized - crop_px) * anchor)  # rounded as in torchvision's center_crop
    return unchanged(_in_original(corner, resized, sizes, crop_px), (crop_px, crop_px))


def whole_windows(sizes: np.ndarray, shorter_px: int) -> Windows:
    """Shows each whole image, with its shorter side resized to shorter_px. sizes: [B, 2].

    Of an image that is longer than MAX_ASPECT, the central part is shown.

    Raises:
        ValueError: the resized images differ in size.
    """
    shown = whole_sizes(sizes)
    resized = resized_sizes(shown, np.full(len(sizes), shorter_px))
    if (resized != resized[0]).any():
        raise ValueError(f"images of different shapes cannot form a batch: {sizes.tolist()}")
    height, width = resized[0].tolist()
    corner = (np.maximum(sizes, 1) - shown) // 2
    return unchanged(np.hstack([corner, corner + shown]).astype(float), (height, width))


def whole_sizes(sizes: np.ndarray) -> np.ndarray:
    """Returns the height and width that are shown of whole images: int64 [B, 2]. sizes: [B, 2]."""
    sizes = np.maximum(sizes, 1).astype(np.int64)  # unreadable images have size 0
    return np.minimum(sizes, MAX_ASPECT * sizes.min(axis=1, keepdims=True))


def whole_images(sizes: np.ndarray) -> Windows:
    """Covers each whole image and shrinks it to one pixel. sizes: [B, 2].

    Used where images are only decoded, and the resized result is not needed.
    """
    roi = np.hstack([np.zeros_like(sizes), sizes]).astype(float)
    return replace(unchanged(roi, (1, 1)), cut_first=True)


def unchanged(roi: np.ndarray, size_px: tuple[int, int]) -> Windows:
    """Returns windows that are neither mirrored nor shifted in colour."""
    return Windows(roi, np.zeros(len(roi), bool), size_px, np.zeros((len(roi), 3)))


def _pca_shift(std: float, u: np.ndarray) -> np.ndarray:
    """Returns the colour shift of Krizhevsky et al. 2012, section 4.1: float64 [B, 3].

    It is the sum over the components of N(0, std) * spread * component. u: [B, 6], uniform in
    [0, 1). Two of them, u1 and u2, make a normal number, sqrt(-2 log(1 - u1)) * cos(2 pi u2) (Box
    & Muller 1958); 1 - u1 is never 0.
    """
    normal = np.sqrt(-2 * np.log1p(-u[:, :3])) * np.cos(2 * np.pi * u[:, 3:])
    return (std * normal * PCA_SPREAD) @ PCA_COMPONENTS.T


def _scale(
    sizes: np.ndarray, scale_px: tuple[int, int], crop_px: int, u: np.ndarray, anchor: np.ndarray
) -> np.ndarray:
    """Scale augmentation (Simonyan & Zisserman 2015; He et al. 2015, section 3.4): float64 [B, 4].

    Resizes the shorter side to a random length, then cuts out a crop_px square at a random place.
    This crop is returned as a window of the original. Its edges are rounded to whole pixels
    (by about 0.1 % of an ImageNet image), so that it can be cut out first and resized by itself.
    """
    low, high = scale_px
    shorter = low + np.floor(u * (high - low + 1))  # uniform over low, low + 1, ..., high
    resized = resized_sizes(sizes, shorter)
    corner = np.floor(anchor * (resized - crop_px + 1))  # uniform over 0, ..., resized - crop_px
    roi = np.rint(_in_original(corner, resized, sizes, crop_px))
    # A window of a tiny image may round to nothing: keep at least one pixel, inside the image.
    roi[:, :2] = np.minimum(roi[:, :2], sizes - 1)
    roi[:, 2:] = np.maximum(roi[:, 2:], roi[:, :2] + 1)
    return roi


def _random_resized(
    sizes: np.ndarray, data: DataConfig, u: np.ndarray, anchor: np.ndarray
) -> np.ndarray:
    """Random area and aspect ratio, as in torchvision's RandomResizedCrop: float64 [B, 4].

    Takes the first of ten attempts that fits into the image, at a random place; if none fits, the
    largest central crop whose aspect ratio is allowed.
    """
    height, width = sizes[:, 0, None].astype(float), sizes[:, 1, None].astype(float)
    share = data.area[0] + u[:, 0::2] * (data.area[1] - data.area[0])  # [B, attempts]
    low, high = np.log(data.aspect)
    aspect = np.exp(low + u[:, 1::2] * (high - low))  # width / height, log-uniform
    # w * h = share * height * width, and w / h = aspect.
    w = np.rint(np.sqrt(share * height * width * aspect))
    h = np.rint(np.sqrt(share * height * width / aspect))
    fits = (w >= 1) & (w <= width) & (h >= 1) & (h <= height)
    first = (np.arange(len(sizes)), fits.argmax(axis=1))  # of each image, the first that fits

    # The fallback: the whole image, its longer side cut until the aspect ratio is allowed.
    fallback_w = np.minimum(width[:, 0], np.rint(height[:, 0] * data.aspect[1]))
    fallback_h = np.minimum(height[:, 0], np.rint(width[:, 0] / data.aspect[0]))
    found = fits.any(axis=1)
    crop = np.stack(
        [np.where(found, h[first], fallback_h), np.where(found, w[first], fallback_w)], axis=1
    )
    crop = np.maximum(crop, 1)  # the fallback of a one-pixel strip may round to 0
    corner = np.where(
        found[:, None], np.floor(anchor * (sizes - crop + 1)), np.floor((sizes - crop) / 2)
    )
    return np.concatenate([corner, corner + crop], axis=1)


def _pad(sizes: np.ndarray, pad_px: int, crop_px: int, anchor: np.ndarray) -> np.ndarray:
    """Pads with pad_px zeros on each side, then crops at random: He et al. 2015, section 4.2.

    Returns float64 [B, 4] in pixels of the unpadded image: a window may reach beyond it.
    """
    # Uniform over the places in the padded image, whose first pixel is at -pad_px.
    corner = np.floor(anchor * (sizes + 2 * pad_px - crop_px + 1)) - pad_px
    return np.concatenate([corner, corner + crop_px], axis=1)


def resized_sizes(sizes: np.ndarray, shorter: np.ndarray) -> np.ndarray:
    """Returns the sizes after the shorter side is resized to `shorter`: int64 [B, 2].

    The longer side becomes shorter * longer side / shorter side, rounded down.
    """
    return shorter.astype(np.int64)[:, None] * sizes // sizes.min(axis=1, keepdims=True)


def _in_original(
    corner: np.ndarray, resized: np.ndarray, sizes: np.ndarray, crop_px: int
) -> np.ndarray:
    """Converts a crop of the resized image to a window of the original: float64 [B, 4]."""
    scale = sizes / resized  # pixels of the original per pixel of the resized image
    return np.concatenate([corner * scale, (corner + crop_px) * scale], axis=1)
