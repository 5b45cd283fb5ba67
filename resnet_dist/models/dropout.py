"""Dropout whose masks are a function of (seed, step, position of the image in the global batch).

torch's own dropout draws from a generator whose state is not saved and differs between ranks.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

from resnet_dist.draws import bits, keys


class KeyedDropout(nn.Module):
    """Dropout (Srivastava et al. 2014): [B, C] -> [B, C].

    Each value becomes zero with probability p, and is divided by 1 - p otherwise. In training mode,
    `set_dropout_keys` must be called before each forward pass.
    """

    def __init__(self, layer: int, p: float = 0.5):
        """layer: number of this dropout layer, so that the layers of a network differ."""
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
    """Sets the keys for the next forward pass, of the images at `positions` in `step`'s batch.

    The keys are computed on the device: copying them from the host might wait for the GPU.
    """
    items = torch.arange(positions.start, positions.stop, device=device)
    drawn = keys("dropout", seed, step, items)
    for layer in layers:
        layer.keys = drawn
