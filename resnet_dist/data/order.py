"""WHO comes next: the permutation of an epoch, and a rank's slice of a step.

A function of (seed, step) alone. The global batch of a step is cut into slices by position, so the
union over ranks is the same set of images, in the same order, for any world size.
"""

from functools import lru_cache

import numpy as np


@lru_cache(maxsize=2)  # 10 MB each for ImageNet; two, because DALI reads ahead over an epoch's end
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """int64 [images]: a permutation of all sample numbers, seeded by (seed, epoch)."""
    order = np.random.Generator(np.random.Philox(key=[seed, epoch])).permutation(images)
    order.flags.writeable = False  # it is shared by all callers of this cache
    return order


def step_samples(
    seed: int, step: int, images: int, global_batch_size: int
) -> tuple[int, np.ndarray]:
    """(epoch, int64 [global_batch_size]): the images of global step `step`.

    The last, partial batch of an epoch is dropped (see plan.py).
    """
    epoch, step_in_epoch = divmod(step, images // global_batch_size)
    start = step_in_epoch * global_batch_size
    return epoch, epoch_order(seed, epoch, images)[start : start + global_batch_size]


def slice_of(samples: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Part `part` of `parts` contiguous slices whose sizes differ by one at most."""
    count = len(samples)
    return samples[part * count // parts : (part + 1) * count // parts]


def holdout(images: int, held: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers that are trained on, and the `held` ones that are not: rising int64 arrays.

    The same for every seed, so that runs of different seeds compare.
    """
    order = np.random.Generator(np.random.Philox(key=0)).permutation(images)
    return np.sort(order[held:]), np.sort(order[:held])
