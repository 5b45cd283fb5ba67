"""Which images make up a step: the permutation of an epoch, cut into global batches.

Everything here is a function of (seed, step). With N images and a global batch of B, an epoch has
N // B steps, and its step s takes the images from s * B to (s + 1) * B - 1 of the permutation. The
ranks then take slices of that batch by position (Plan.positions), so together they see the same
images in the same order, however many ranks there are.
"""

from functools import lru_cache

import numpy as np

from resnet_dist.draws import generator

BLOCK_IMAGES = 16  # neighbours in a shard that are read together: 1.8 MB of ImageNet
WINDOW_IMAGES = 32_768  # about this many images are mixed with each other


@lru_cache(maxsize=2)  # 10 MB each for ImageNet; two, because DALI reads ahead over an epoch's end
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """Returns a permutation of all sample numbers, seeded by (seed, epoch): int64 [images]."""
    order = generator("order", seed, epoch).permutation(images)
    order.flags.writeable = False  # the cache gives the same array to every caller
    return order


@lru_cache(maxsize=2)
def block_order(seed: int, epoch: int, images: int, global_batch_size: int) -> np.ndarray:
    """Returns a permutation that reads shards almost sequentially: int64 [images].

    Blocks of BLOCK_IMAGES neighbouring samples are shuffled, and each position in the global batch
    is given its own run of blocks, from which it takes one image per step. The images of a position
    are then shuffled within windows of a few steps; the windows of different positions begin at
    different steps, which keeps the read rate even. As a result, the images of one batch come from
    as many blocks as the batch has images, and each block is read by a single rank, however many
    ranks there are. Seeded by (seed, epoch).
    """
    random = generator("order", seed, epoch)
    blocks = random.permutation(-(-images // BLOCK_IMAGES))
    sequence = (blocks[:, None] * BLOCK_IMAGES + np.arange(BLOCK_IMAGES)).reshape(-1)
    sequence = sequence[sequence < images]  # the last block may be incomplete
    steps = images // global_batch_size
    window_steps = max(1, WINDOW_IMAGES // global_batch_size)
    positions = sequence[: steps * global_batch_size].reshape(global_batch_size, steps)
    begins = np.arange(global_batch_size) * window_steps // global_batch_size
    window = (np.arange(steps) + begins[:, None]) // window_steps  # [positions, steps]
    mixed = np.argsort(window + random.random(positions.shape), axis=1)
    sequence[: positions.size] = np.take_along_axis(positions, mixed, axis=1).T.reshape(-1)
    sequence.flags.writeable = False
    return sequence


def step_samples(
    seed: int, step: int, images: int, global_batch_size: int, in_blocks: bool = False
) -> tuple[int, np.ndarray]:
    """Returns the epoch and the images of a global step: int64 [global_batch_size].

    The last, partial batch of an epoch is dropped (see plan.py). in_blocks: use `block_order`.
    """
    epoch, step_in_epoch = divmod(step, images // global_batch_size)
    start = step_in_epoch * global_batch_size
    if in_blocks:
        order = block_order(seed, epoch, images, global_batch_size)
    else:
        order = epoch_order(seed, epoch, images)
    return epoch, order[start : start + global_batch_size]


def slice_of(samples: np.ndarray, number: int, count: int) -> np.ndarray:
    """Returns slice `number` of `count` contiguous slices whose sizes differ by at most one."""
    images = len(samples)
    return samples[number * images // count : (number + 1) * images // count]


def holdout(images: int, held_out: int) -> tuple[np.ndarray, np.ndarray]:
    """Splits the training images: the sample numbers to train on, and the `held_out` others.

    Both are ascending int64 arrays. The split does not depend on the seed, so runs with different
    seeds can be compared.
    """
    order = generator("holdout", 0, 0).permutation(images)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
