"""Dropout whose masks are a function of (seed, step, position of the image in the global batch).

torch's own dropout draws from a generator whose state is in no checkpoint and differs between
ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resnet_dist.draws import bits, keys


class KeyedDropout(nn.Module):
    """[B, C] -> [B, C]: each value becomes zero with probability p, and is else divided by 1 - p.

    Srivastava et al. 2014. In training mode, call `set_dropout_keys` before each forward pass.
    """

    def __init__(self, layer: int, p: float = 0.5):
        """layer: a number that differs between the dropout layers of a network, from 1."""
        super().__init__()
        self.layer, self.p = layer, p
        self.keys: Tensor | None = None  # int64 [B], on the device of x

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return x
        assert self.keys is not None
        # 53 random bits are below p * 2**53 with probability p. x / (1 - p) keeps x's expectation.
        kept = bits(self.keys, self.layer, x.shape[1]) >= int(self.p * 2**53)
        return x * kept / (1 - self.p)


def set_dropout_keys(
    layers: Iterable[KeyedDropout], seed: int, step: int, positions: range, device: torch.device
) -> None:
    """Sets the keys for the next forward pass, that of the images at `positions` in step `step`.

    No CPU-GPU sync: the keys are made on the device, because copying them from pageable host
    memory might wait for the GPU.
    """
    items = torch.arange(positions.start, positions.stop, device=device)
    drawn = keys("dropout", seed, step, items)
    for layer in layers:
        layer.keys = drawn
