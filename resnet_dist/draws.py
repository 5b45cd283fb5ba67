"""All random numbers of the package. Each is a function of its purpose and of a few numbers.

There is no generator state, so restarts lose nothing, and the order in which numbers are drawn does
not matter. A purpose is a word, which keeps its numbers apart from those of all other purposes. To
draw for a new purpose, call `generator`, `uniforms` or `keys` with a word that is not in use (a
test checks that no two modules use the same word). The words, and what their numbers depend on:

    order      data/view/order.py: the permutation of an epoch (seed, epoch)
    holdout    data/view/order.py: which training images are the validation images
    window     data/view/augment.py: crop, flip and colour of an image (seed, epoch, sample)
    stand-in   data/view/requests.py: what replaces an unreadable image (seed, epoch, sample)
    dropout    models/dropout.py: the masks of an image (seed, step, position in the global batch)
    weights    job.py: a new network's weights (seed)
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

# These purposes existed before words did. Their words are not part of the keys, so that runs from
# before can be resumed with the same numbers. (`holdout` therefore has the same numbers as `order`
# with seed 0 and epoch 0. That must stay: otherwise a resumed run would train on images that it
# validates on.)
WITHOUT_WORD = ("order", "holdout", "window", "stand-in", "dropout", "weights")

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def generator(purpose: str, seed: int, number: int) -> np.random.Generator:
    """Returns a generator for one draw as a whole, such as a permutation.

    seed, number: from 0 to 2**63 - 1.
    """
    if purpose in WITHOUT_WORD:
        return np.random.Generator(np.random.Philox(key=[seed, number]))
    key = hashlib.sha256(f"{purpose}\0{seed}\0{number}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def uniforms(
    purpose: str, seed: int, number: int, items: np.ndarray | range, draws: int
) -> np.ndarray:
    """Returns uniform numbers in [0, 1), `draws` of them for each item: float64 [B, draws].

    Asking for more draws does not change the first ones. number: for example an epoch or a step.
    items: int64 [B], for example samples.

    This is a keyed SplitMix64 (Steele et al. 2014). The words of the key are mixed one by one, and
    draw i is the mix of key + i * golden gamma. NumPy's own counter-based generators would need one
    object per item.
    """
    key = np.zeros(len(items), np.uint64)
    words: list[Any] = [np.uint64(word) for word in (*_word(purpose), seed, number)]
    for word in (*words, np.asarray(items).astype(np.uint64)):
        key = _mix(key ^ word)
    counters = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    bits = _mix(key[:, None] + counters)
    return (bits >> np.uint64(11)) * 2.0**-53


def keys(purpose: str, seed: int, number: int, items: Tensor) -> Tensor:
    """Returns a key for each item, from which `bits` draws: int64 [B], on the device of `items`.

    items: int64 [B]. The keys are those of `uniforms`. There is no CPU-GPU sync, since numbers on
    the host are passed to the kernels as arguments.
    """
    key = torch.zeros((), dtype=torch.int64)
    words: list[Any] = [*map(_as_int64, _word(purpose)), seed, number, items]
    for word in words:
        key = _mix_int64(key ^ word)
    return key


def bits(keys: Tensor, stream: int, draws: int) -> Tensor:
    """Returns 53 random bits per draw, as integers from 0 to 2**53 - 1: int64 [B, draws].

    `bits(...).double() * 2.0**-53` is uniform in [0, 1). (Without `.double()` it would be float32.)
    keys: from `keys`. stream: 1 or more; separates users of the same keys, such as layers.
    """
    counters = torch.arange(1, draws + 1, device=keys.device) * _as_int64(GOLDEN_GAMMA)
    return _shifted(_mix_int64(_mix_int64(keys ^ stream)[:, None] + counters), 11)


def seed_weights(seed: int) -> None:
    """Seeds torch's generator, from which layers draw their weights. Call before building one."""
    torch.manual_seed(seed)


def _word(purpose: str) -> tuple[int, ...]:
    """Returns the first word of the key: a hash of the purpose. Nothing for the oldest purposes."""
    if purpose in WITHOUT_WORD:
        return ()
    return (int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little"),)


def _mix(z: np.ndarray) -> np.ndarray:
    """SplitMix64's finalizer, a bijection of 64-bit words (arithmetic modulo 2**64)."""
    z = z + np.uint64(GOLDEN_GAMMA)
    z = (z ^ (z >> np.uint64(30))) * np.uint64(MIX_1)
    z = (z ^ (z >> np.uint64(27))) * np.uint64(MIX_2)
    return z ^ (z >> np.uint64(31))


def _mix_int64(z: Tensor) -> Tensor:
    """Does the same on int64, which wraps like uint64; torch lacks operators for uint64."""
    z = z + _as_int64(GOLDEN_GAMMA)
    z = (z ^ _shifted(z, 30)) * _as_int64(MIX_1)
    z = (z ^ _shifted(z, 27)) * _as_int64(MIX_2)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """Shifts right and fills with zeros; int64's own shift would repeat the sign bit."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _as_int64(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
