"""What a loader gives: images and labels on the device, and where in the run they belong."""

from dataclasses import dataclass

from torch import Tensor

BLANK_LABEL = -1  # of an image that stands for a bad one in an evaluation: no answer is right
NO_STEP = -1


@dataclass(frozen=True)
class Batch:
    """What one rank takes through the network at once.

    What is drawn for an image in training is a function of the seed, `step` and the image's place
    in the global batch: then it is the same on any number of ranks, and after a restart.

    The loader uses the memory again when nobody has the tensors any more; until then they may be
    written to.
    """

    images: Tensor  # [B, 3, H, W], channels_last strides, normalised, in the autocast dtype
    labels: Tensor  # int64 [B]; BLANK_LABEL where an image of an evaluation could not be read
    step: int = NO_STEP  # the optimizer step that it is for; NO_STEP in an evaluation
    positions: range = range(
        0
    )  # [B]: of the images in the step's global batch; empty in an evaluation
