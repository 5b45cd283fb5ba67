"""What a loader produces: images and labels on the device, and where in the run they belong."""

from dataclasses import dataclass

from torch import Tensor

BLANK_LABEL = -1  # label of an unreadable image in an evaluation; no prediction equals it
NO_STEP = -1


@dataclass(frozen=True)
class Batch:
    """What one rank takes through the network at once.

    Whatever is random about an image in training must be a function of the seed, `step` and the
    image's position in the global batch. Then it is the same on any number of ranks and after a
    restart.

    The tensors may be written to. The loader reuses their memory once nothing refers to them.
    """

    images: Tensor  # [B, 3, H, W], channels_last strides, normalized, in the autocast dtype
    labels: Tensor  # int64 [B]; in an evaluation BLANK_LABEL for an image that cannot be read
    step: int = NO_STEP  # the optimizer step; NO_STEP in an evaluation
    # [B]: the images' positions in the step's global batch; empty in an evaluation.
    positions: range = range(0)
