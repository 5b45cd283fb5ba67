"""WHO comes next: the permutation of an epoch, and a rank's slice of a step.

A function of (seed, step) alone. The global batch of a step is cut into slices by position, so the
union over ranks is the same set of images, in the same order, for any world size.
"""

from functools import lru_cache

import numpy as np

from resnet_dist.draws import generator

BLOCK_IMAGES = 16  # neighbours in a shard that are read together: 1.8 MB of ImageNet
WINDOW_IMAGES = 32_768  # the blocks of about so many images are mixed with each other


@lru_cache(maxsize=2)  # 10 MB each for ImageNet; two, because DALI reads ahead over an epoch's end
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """int64 [images]: a permutation of all sample numbers, seeded by (seed, epoch)."""
    order = generator("order", seed, epoch).permutation(images)
    order.flags.writeable = False  # it is shared by all callers of this cache
    return order


@lru_cache(maxsize=2)
def block_order(seed: int, epoch: int, images: int, global_batch_size: int) -> np.ndarray:
    """int64 [images]: a permutation that reads shards nearly in sequence; seeded by (seed, epoch).

    Blocks of neighbours are shuffled, and dealt to the places in the global batch: each place goes
    through a part of them, an image per step. A place's images are then mixed within windows of
    some steps, which do not begin at the same step for all places, so that reading is even. So a
    batch comes from as many parts of the data set as it has images; and a block is read whole by
    the one rank that has its place in the batch, whatever the number of ranks.
    """
    random = generator("order", seed, epoch)
    blocks = random.permutation(-(-images // BLOCK_IMAGES))
    sequence = (blocks[:, None] * BLOCK_IMAGES + np.arange(BLOCK_IMAGES)).reshape(-1)
    sequence = sequence[sequence < images]  # the last block may be a part of one
    steps = images // global_batch_size
    window_steps = max(1, WINDOW_IMAGES // global_batch_size)
    places = sequence[: steps * global_batch_size].reshape(global_batch_size, steps)
    begins = np.arange(global_batch_size) * window_steps // global_batch_size
    window = (np.arange(steps) + begins[:, None]) // window_steps  # [places, steps]
    mixed = np.argsort(window + random.random(places.shape), axis=1)
    sequence[: places.size] = np.take_along_axis(places, mixed, axis=1).T.reshape(-1)
    sequence.flags.writeable = False
    return sequence


def step_samples(
    seed: int, step: int, images: int, global_batch_size: int, in_blocks: bool = False
) -> tuple[int, np.ndarray]:
    """(epoch, int64 [global_batch_size]): the images of global step `step`.

    The last, partial batch of an epoch is dropped (see plan.py). in_blocks: by `block_order`.
    """
    epoch, step_in_epoch = divmod(step, images // global_batch_size)
    start = step_in_epoch * global_batch_size
    if in_blocks:
        order = block_order(seed, epoch, images, global_batch_size)
    else:
        order = epoch_order(seed, epoch, images)
    return epoch, order[start : start + global_batch_size]


def slice_of(samples: np.ndarray, part: int, parts: int) -> np.ndarray:
    """Part `part` of `parts` contiguous slices whose sizes differ by one at most."""
    count = len(samples)
    return samples[part * count // parts : (part + 1) * count // parts]


def holdout(images: int, held: int) -> tuple[np.ndarray, np.ndarray]:
    """Sample numbers that are trained on, and the `held` ones that are not: rising int64 arrays.

    The same for every seed, so that runs of different seeds compare.
    """
    order = generator("holdout", 0, 0).permutation(images)
    return np.sort(order[held:]), np.sort(order[:held])
