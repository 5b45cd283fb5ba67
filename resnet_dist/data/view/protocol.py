"""How a trained network is tested: what it sees of an image, and which images make a batch.

center-crop  The central crop.
ten-crop     Four corners, the centre, and their mirrors: Krizhevsky et al. 2012, section 4.1; He et
             al. 2015, tables 2 and 3.
multi-scale  The whole image at several scales, and its mirrors: the fully convolutional form of
             He et al. 2015, section 3.4, after Simonyan & Zisserman 2015, section 3.2.
"""

from dataclasses import dataclass

import numpy as np

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.view.augment import Windows, crop_windows, resized_sizes, whole_windows
from resnet_dist.errors import UserError


@dataclass(frozen=True)
class Protocol:
    name: str
    crops: tuple[tuple[float, float], ...] = ()  # `anchor` of each, see augment.crop_windows
    scales_px: tuple[int, ...] = ()  # of the shorter side of the whole image
    mirrored: bool = False

    @property
    def views(self) -> int:
        """Of one image: what its score is the mean over."""
        return (len(self.crops) + len(self.scales_px)) * (1 + self.mirrored)

    def windows(self, data: DataConfig, sizes: np.ndarray) -> list[Windows]:
        """Of the images of one batch; each is then also seen mirrored, or not. sizes: [B, 2]."""
        resize_px, crop_px = data.eval_resize_px, data.eval_crop_px
        crops = [crop_windows(sizes, resize_px, crop_px, anchor) for anchor in self.crops]
        return crops + [whole_windows(sizes, px) for px in self.scales_px]

    def batches(self, config: Config, sizes: np.ndarray) -> list[np.ndarray]:
        """Sample numbers of each batch, int64 [B]: all images, once. sizes: [N, 2].

        The images of a batch have one shape at every scale, and together no more pixels than
        train.max_local_batch_size crops; or the batch is one image.
        """
        most = config.train.max_local_batch_size
        if not self.scales_px:
            return _cut(np.arange(len(sizes)), most)
        scales = [resized_sizes(sizes, np.full(len(sizes), px)) for px in self.scales_px]
        shapes, shape_of = np.unique(np.hstack(scales), axis=0, return_inverse=True)
        batches = []
        for number, shape in enumerate(shapes):
            area = shape.reshape(-1, 2).prod(axis=1).max()
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
    """Of the command line. scales: such as "224,256"; None: the paper's.

    Raises:
        UserError: scales that are none, or that the protocol does not take.
    """
    protocol = PROTOCOLS[name]
    if scales is None:
        return protocol
    if not protocol.scales_px:
        raise UserError("command line: --scales goes with --protocol multi-scale")
    given = scales.split(",")
    numbers = tuple(int(text) for text in given if text.isdecimal() and int(text) > 0)
    if len(set(numbers)) < len(given):
        raise UserError(
            f"command line: --scales {scales}: must be different whole numbers above zero, "
            "such as 224,256,384"
        )
    return Protocol(name, scales_px=numbers, mirrored=True)


def _cut(samples: np.ndarray, size: int) -> list[np.ndarray]:
    return [samples[start : start + size] for start in range(0, len(samples), size)]
