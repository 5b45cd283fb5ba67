"""Dropout whose masks are a function of (seed, step, place of the image in the global batch).

torch's own draws from a generator whose state is part of no checkpoint and differs by rank.
"""

from collections.abc import Iterable

import torch
from torch import Tensor, nn

GOLDEN_GAMMA = 0x9E3779B97F4A7C15 - 2**64  # as int64, which wraps as uint64 does
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9 - 2**64, 0x94D049BB133111EB - 2**64


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
        counters = torch.arange(1, x.shape[1] + 1, device=x.device) * GOLDEN_GAMMA
        bits = _mix(_mix(self.keys ^ self.layer)[:, None] + counters)
        kept = _shifted(bits, 11) >= int(self.p * 2**53)  # the upper 53 bits
        return x * kept / (1 - self.p)


def set_dropout_keys(
    layers: Iterable[KeyedDropout], seed: int, step: int, places: range, device: torch.device
) -> None:
    """Before a forward pass, on `device`, of the images at `places` of the global batch of `step`.

    No sync: a copy of keys from the host's pageable memory might wait for the GPU.
    """
    key = torch.zeros((), dtype=torch.int64)  # a scalar of the host, which kernels take as it is
    for word in (seed, step, torch.arange(places.start, places.stop, device=device)):
        key = _mix(key ^ word)
    for layer in layers:
        layer.keys = key


def _mix(z: Tensor) -> Tensor:
    """SplitMix64's finalizer (Steele et al. 2014), as data/augment.py's, on int64."""
    z = z + GOLDEN_GAMMA
    z = (z ^ _shifted(z, 30)) * MIX_1
    z = (z ^ _shifted(z, 27)) * MIX_2
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: int64's own shift repeats the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)
