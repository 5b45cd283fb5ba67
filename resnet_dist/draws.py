"""All that is drawn at random, by purpose: each draw is a function of its word and its numbers.

No generator's state exists, so nothing is lost by a restart, and nothing depends on who draws
first. A word of its own keeps each purpose's numbers apart from all others': to draw for something
new, call `generator`, `uniforms` or `keys` with a word that nobody uses yet. (A test looks that no
word is used by two modules.) These had none when they began:

    order      data/view/order.py: the permutation of an epoch (seed, epoch)
    holdout    data/view/order.py: which training images are the validation images
    window     data/view/augment.py: crop, flip and colour of an image (seed, epoch, sample)
    stand-in   data/view/requests.py: what is shown for an unreadable image (seed, epoch, sample)
    dropout    models/dropout.py: the masks of an image (seed, step, place in the global batch)
    weights    job.py: a new network's weights (seed)
"""

import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor

# Older than their words, which so are no part of their keys: runs under way go on with the same
# bits. `holdout` has the numbers of `order` at seed 0 and epoch 0, and must keep them: a resumed
# run would otherwise train on its validation images.
WITHOUT_WORD = ("order", "holdout", "window", "stand-in", "dropout", "weights")

GOLDEN_GAMMA = 0x9E3779B97F4A7C15
MIX_1, MIX_2 = 0xBF58476D1CE4E5B9, 0x94D049BB133111EB


def generator(purpose: str, seed: int, number: int) -> np.random.Generator:
    """For a draw as a whole, such as a permutation. seed, number: from 0 to 2**63 - 1."""
    if purpose in WITHOUT_WORD:
        return np.random.Generator(np.random.Philox(key=[seed, number]))
    key = hashlib.sha256(f"{purpose}\0{seed}\0{number}".encode()).digest()[:16]
    return np.random.Generator(np.random.Philox(key=int.from_bytes(key, "little")))


def uniforms(
    purpose: str, seed: int, number: int, items: np.ndarray | range, draws: int
) -> np.ndarray:
    """float64 [B, draws] in [0, 1): `draws` numbers of each item; more draws change none.

    number: such as an epoch or a step. items: int64 [B], such as samples, or places in the batch.

    A keyed SplitMix64 (Steele et al. 2014): the key is mixed word by word, draws count up by the
    golden gamma. NumPy's own counter-based generators would need one object per item.
    """
    key = np.zeros(len(items), np.uint64)
    words: list[Any] = [np.uint64(word) for word in (*_word(purpose), seed, number)]
    for word in (*words, np.asarray(items).astype(np.uint64)):
        key = _mix(key ^ word)
    counters = np.arange(1, draws + 1, dtype=np.uint64) * np.uint64(GOLDEN_GAMMA)
    bits = _mix(key[:, None] + counters)
    return (bits >> np.uint64(11)) * 2.0**-53


def keys(purpose: str, seed: int, number: int, items: Tensor) -> Tensor:
    """int64 [B] on the device of `items`: a key for each, of which `bits` draws. items: int64 [B].

    The same key as that of `uniforms`. No sync: numbers of the host are passed to kernels as they
    are.
    """
    key = torch.zeros((), dtype=torch.int64)
    words: list[Any] = [*map(_as_int64, _word(purpose)), seed, number, items]
    for word in words:
        key = _mix_int64(key ^ word)
    return key


def bits(keys: Tensor, stream: int, draws: int) -> Tensor:
    """int64 [B, draws]: 53 random bits each, from 0 to 2**53 - 1. As numbers in [0, 1):
    `bits(...).double() * 2.0**-53` (without the first, torch makes float32 of them).

    keys: of `keys`. stream: tells apart what draws from the same keys, such as layers; from 1 on.
    """
    counters = torch.arange(1, draws + 1, device=keys.device) * _as_int64(GOLDEN_GAMMA)
    return _shifted(_mix_int64(_mix_int64(keys ^ stream)[:, None] + counters), 11)


def seed_weights(seed: int) -> None:
    """Before a network is built: its layers draw from torch's generator."""
    torch.manual_seed(seed)


def _word(purpose: str) -> tuple[int, ...]:
    """The first word of a key; none for a purpose that is older than words."""
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
    """The same on int64, which wraps as uint64 does; torch lacks uint64's operators."""
    z = z + _as_int64(GOLDEN_GAMMA)
    z = (z ^ _shifted(z, 30)) * _as_int64(MIX_1)
    z = (z ^ _shifted(z, 27)) * _as_int64(MIX_2)
    return z ^ _shifted(z, 31)


def _shifted(z: Tensor, bits: int) -> Tensor:
    """To the right, zeros coming in: int64's own shift repeats the sign."""
    return (z >> bits) & (2 ** (64 - bits) - 1)


def _as_int64(word: int) -> int:
    return word - 2**64 if word >= 2**63 else word
