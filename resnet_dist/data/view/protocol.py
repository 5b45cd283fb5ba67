"""How a trained network is tested: the views of each image, and which images form a batch.

center-crop  The central crop.
ten-crop     Four corners, the centre, and their mirrors: Krizhevsky et al. 2012, section 4.1; He et
             al. 2015, tables 2 and 3.
multi-scale  The whole image at several scales, and its mirrors: the fully convolutional form of
             He et al. 2015, section 3.4, after Simonyan & Zisserman 2015, section 3.2.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.view.augment import (
    Windows,
    crop_windows,
    resized_sizes,
    whole_sizes,
    whole_windows,
)
from resnet_dist.errors import UserError


@dataclass(frozen=True)
class Protocol:
    name: str
    crops: tuple[tuple[float, float], ...] = ()  # the `anchor` of each, see augment.crop_windows
    scales_px: tuple[int, ...] = ()  # lengths of the shorter side, for views of the whole image
    mirrored: bool = False  # whether each view is also shown mirrored

    @property
    def views(self) -> int:
        """Number of views averaged per image."""
        return (len(self.crops) + len(self.scales_px)) * (1 + self.mirrored)

    def windows(self, data: DataConfig, sizes: np.ndarray) -> list[Windows]:
        """Returns the windows through which a batch is seen, one per request. sizes: [B, 2].

        The mirrored views are not included: they are made from the same pixels (see evaluate.py).
        """
        resize_px, crop_px = data.eval_resize_px, data.eval_crop_px
        crops = [crop_windows(sizes, resize_px, crop_px, anchor) for anchor in self.crops]
        return crops + [whole_windows(sizes, px) for px in self.scales_px]

    def batches(self, config: Config, sizes: np.ndarray) -> list[np.ndarray]:
        """Returns the sample numbers of each batch, int64 [B]; each image is in one. sizes: [N, 2].

        Views of whole images differ in size. So all images of a batch have the same shape at every
        scale, and together no more pixels than train.max_local_batch_size crops; an image with
        more pixels than that is a batch of its own.
        """
        most = config.train.max_local_batch_size
        if not self.scales_px:
            return _cut(np.arange(len(sizes)), most)
        shown = whole_sizes(sizes)
        scales = [resized_sizes(shown, np.full(len(sizes), px)) for px in self.scales_px]
        # A row of `shapes`: height and width at each scale.
        shapes, shape_of = np.unique(np.hstack(scales), axis=0, return_inverse=True)
        batches = []
        for number, shape in enumerate(shapes):
            area = shape.reshape(-1, 2).prod(axis=1).max()  # pixels at the largest scale
            fit = max(1, most * config.data.eval_crop_px**2 // int(area))
            batches += _cut(np.flatnonzero(shape_of == number), min(fit, most))
        return batches

    def __str__(self) -> str:
        if not self.scales_px:
            return self.name
        return f"{self.name}  shorter side {', '.join(map(str, self.scales_px))} px"


CENTER_CROP = Protocol("center-crop", crops=((0.5, 0.5),))
TEN_CROP = Protocol("ten-crop", ((0, 0), (0, 1), (1, 0), (1, 1), (0.5, 0.5)), mirrored=True)
MULTI_SCALE = Protocol("multi-scale", scales_px=(224, 256, 384, 480, 640), mirrored=True)
PROTOCOLS = {protocol.name: protocol for protocol in (CENTER_CROP, TEN_CROP, MULTI_SCALE)}


def protocol_of(name: str, scales: str | None) -> Protocol:
    """Returns the protocol that the command line specifies.

    scales: for example "224,256"; None: the paper's.

    Raises:
        UserError: the scales are invalid, or the protocol has no scales.
    """
    protocol = PROTOCOLS[name]
    if scales is None:
        return protocol
    if not protocol.scales_px:
        raise UserError("command line: --scales needs --protocol multi-scale")
    given = scales.split(",")
    numbers = tuple(int(text) for text in given if text.isdecimal() and int(text) > 0)
    if len(set(numbers)) < len(given):
        raise UserError(
            f"command line: --scales {scales}: must be distinct whole numbers above zero, "
            "such as 224,256,384"
        )
    return Protocol(name, scales_px=numbers, mirrored=True)


def _cut(samples: np.ndarray, size: int) -> list[np.ndarray]:
    """Cuts samples into batches of at most `size`."""
    return [samples[start : start + size] for start in range(0, len(samples), size)]
