"""Dropout whose masks are a function of (seed, step, place of the image in the global batch).

torch's own draws from a generator whose state is part of no checkpoint and differs by rank.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resnet_dist.draws import bits, keys


class KeyedDropout(nn.Module):
    """[B, C] -> [B, C]: each value is zero with probability p, else divided by 1 - p.

    Srivastava et al. 2014. In training mode it needs `set_dropout_keys` before each forward pass.
    """

    def __init__(self, layer: int, p: float = 0.5):
        """layer: tells the masks of a network's dropout layers apart."""
        super().__init__()
        self.layer, self.p = layer, p
        self.keys: Tensor | None = None  # int64 [B], on the device of x

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.keys is not None
        kept = bits(self.keys, self.layer, x.shape[1]) >= int(self.p * 2**53)
        return x * kept / (1 - self.p)


def set_dropout_keys(
    layers: Iterable[KeyedDropout], seed: int, step: int, positions: range, device: torch.device
) -> None:
    """Sets the keys for the next forward pass: of the images at `positions` in the batch of `step`.

    No sync: a copy of keys from the host's pageable memory might wait for the GPU.
    """
    items = torch.arange(positions.start, positions.stop, device=device)
    drawn = keys("dropout", seed, step, items)
    for layer in layers:
        layer.keys = drawn
