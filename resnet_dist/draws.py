"""All random draws of a run. Each is a pure function of its purpose and of a few numbers.

There is no generator state, so a restart loses nothing and the order of the draws does not matter.
Each purpose has a word, which keeps its numbers apart from those of all other purposes. To draw for
a new purpose, call `generator`, `uniforms` or `keys` with a word that is not used yet. (A test
checks that no two modules use the same word.) The first purposes, older than the words, are:

    order      data/view/order.py: the permutation of an epoch (seed, epoch)
    holdout    data/view/order.py: which training images are the validation images
    window     data/view/augment.py: crop, flip and colour of an image (seed, epoch, sample)
    stand-in   data/view/requests.py: what is shown for an unreadable image (seed, epoch, sample)
    dropout    models/dropout.py: the masks of an image (seed, step, position in the global batch)
    weights    job.py: a new network's weights (seed)
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Purposes that are older than the words. Their keys do not contain the word, so that older runs
# resume with the same random numbers. `holdout` draws the numbers of `order` at seed 0 and epoch 0,
# and must keep doing so: otherwise a resumed run would train on its validation images.
WITHOUT_WORD = ("order", "holdout", "window", "stand-in", "dropout", "weights")

GOLDEN_GAMMA = 0x9E3779B97F4A7C15  # SplitMix64's increment: 2**64 / golden ratio
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB  # SplitMix64's multipliers


def generator(purpose: str, seed: int, number: int) -> np.random.Generator:
    """Returns NumPy's generator for one large draw, such as a permutation.

    seed, number: from 0 to 2**63 - 1.
    """
    if purpose in WITHOUT_WORD:
        return np.random.Generator(np.random.Philox(key=[seed, number]))
    key = hashlib.sha256(f"{purpose}\0{seed}\0{number}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def uniforms(
    purpose: str, seed: int, number: int, items: np.ndarray | range, draws: int
) -> np.ndarray:
    """Returns `draws` random numbers in [0, 1) for each item: float64 [B, draws].

    Asking for more draws does not change the first ones. number: for example an epoch or a step.
    items: int64 [B], for example samples, or positions in the global batch.

    This is a keyed SplitMix64 (Steele et al. 2014). An item's key starts at 0; then key = mix(key ^
    word) for each of: the purpose's word (if it has one), the seed, `number` and the item. Draw
    k = 1, 2, ... is mix(key + k * GOLDEN_GAMMA), of which the upper 53 bits become a float64.
    NumPy's own counter-based generators would need one object per item.
    """
    key = np.zeros(len(items), np.uint64)
    words: list[Any] = [np.uint64(word) for word in (*_word(purpose), seed, number)]
    for word in (*words, np.asarray(items).astype(np.uint64)):
        key = _mix(key ^ word)
    counters = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    bits = _mix(key[:, None] + counters)
    return (bits >> np.uint64(11)) * 2.0**-53


def keys(purpose: str, seed: int, number: int, items: Tensor) -> Tensor:
    """Returns a key for each item, from which `bits` draws: int64 [B] on the device of `items`.

    items: int64 [B]. The keys are those of `uniforms`. No CPU-GPU sync: the numbers on the host
    reach the kernels as arguments.
    """
    key = torch.zeros((), dtype=torch.int64)
    words: list[Any] = [*map(_as_int64, _word(purpose)), seed, number, items]
    for word in words:
        key = _mix_int64(key ^ word)
    return key


def bits(keys: Tensor, stream: int, draws: int) -> Tensor:
    """Returns `draws` numbers of 53 random bits for each key: int64 [B, draws], 0 to 2**53 - 1.

    To get numbers in [0, 1), use `bits(...).double() * 2.0**-53` (without `.double()`, torch would
    compute in float32). Draw k = 1, 2, ... is mix(mix(key ^ stream) + k * GOLDEN_GAMMA) >> 11.

    keys: from `keys`. stream: 1 or above, different for each user of the same keys, such as the
    layers of a network.
    """
    counters = torch.arange(1, draws + 1, device=keys.device) * _as_int64(GOLDEN_GAMMA)
    return _shifted(_mix_int64(_mix_int64(keys ^ stream)[:, None] + counters), 11)


def seed_weights(seed: int) -> None:
    """Seeds torch's generator, from which layers draw their weights. Call it before building."""
    torch.manual_seed(seed)


def _word(purpose: str) -> tuple[int, ...]:
    """Returns the purpose as the first word of a key; empty for purposes older than the words."""
    if purpose in WITHOUT_WORD:
        return ()
    return (int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little"),)


def _mix(z: np.ndarray) -> np.ndarray:
    """One step of SplitMix64: a bijection of 64-bit words (arithmetic modulo 2**64)."""
    z = z + np.uint64(GOLDEN_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def _mix_int64(z: Tensor) -> Tensor:
    """`_mix` on int64, which wraps around like uint64; torch lacks operators for uint64."""
    z = z + _as_int64(GOLDEN_GAMMA)
    z = (z ^ _shifted(z, 30)) * _as_int64(MIX_1)
    z = (z ^ _shifted(z, 27)) * _as_int64(MIX_2)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros, whereas int64's own shift repeats the sign bit."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _as_int64(word: int) -> int:
    """Returns the int64 that has the same 64 bits as the unsigned `word`."""
    return word - 2**64 if word >= 2**63 else word
