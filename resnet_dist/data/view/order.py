"""Which images a step sees: the permutation of an epoch, and the slice of it that a step takes.

With `images` training images and a global batch of G, an epoch has images // G steps. Step s is
step k = s % (images // G) of epoch e = s // (images // G), and its global batch is

    order(seed, e)[k * G : (k + 1) * G]

For given `images` and G, it depends on (seed, s) alone. `Plan.positions` then cuts the global batch
into a slice for each rank and pass, so the union of the slices is the same images in the same order
for any world size.
"""

from functools import lru_cache

import numpy as np

from resnet_dist.draws import generator

BLOCK_IMAGES = 16  # neighbours in a shard that are read together: 1.8 MB of ImageNet
WINDOW_IMAGES = 32_768  # images of an epoch that are shuffled together, over all positions


@lru_cache(maxsize=2)  # 10 MB each for ImageNet; two, because DALI reads ahead into the next epoch
def epoch_order(seed: int, epoch: int, images: int) -> np.ndarray:
    """Returns a random permutation of all sample numbers, seeded by (seed, epoch): int64 [images].

    The array is cached and read-only.
    """
    order = generator("order", seed, epoch).permutation(images)
    order.flags.writeable = False  # all callers share the cached array
    return order


@lru_cache(maxsize=2)
def block_order(seed: int, epoch: int, images: int, global_batch_size: int) -> np.ndarray:
    """Returns a permutation of an epoch that reads shards almost sequentially: int64 [images].

    Blocks of BLOCK_IMAGES neighbouring samples are shuffled, and each position in the global batch
    gets its own run of blocks, from which it takes one image per step. The images of a position
    are then shuffled within windows of WINDOW_IMAGES // global_batch_size steps.

    As a result, the images of one batch come from as many blocks as the batch has images, and each
    block is read by a single rank, however many ranks there are (except for blocks that straddle
    two runs). Seeded by (seed, epoch); cached and read-only.
    """
    random = generator("order", seed, epoch)
    blocks = random.permutation(-(-images // BLOCK_IMAGES))  # rounded up
    sequence = (blocks[:, None] * BLOCK_IMAGES + np.arange(BLOCK_IMAGES)).reshape(-1)
    sequence = sequence[sequence < images]  # the block with the last images may be incomplete
    steps = images // global_batch_size
    window_steps = max(1, WINDOW_IMAGES // global_batch_size)
    # Row p is the run of position p: the images it shows in this epoch, one per step.
    positions = sequence[: steps * global_batch_size].reshape(global_batch_size, steps)
    # Most blocks of a window are read for the first time near its start. So the windows of
    # different positions begin at different steps, which keeps the read rate even.
    begins = np.arange(global_batch_size) * window_steps // global_batch_size
    window = (np.arange(steps) + begins[:, None]) // window_steps  # [positions, steps]
    # Sorting by window number plus a random fraction shuffles within each window only.
    mixed = np.argsort(window + random.random(positions.shape), axis=1)
    # Transposed to [steps, positions]: step k takes elements k * G to (k + 1) * G.
    sequence[: positions.size] = np.take_along_axis(positions, mixed, axis=1).T.reshape(-1)
    sequence.flags.writeable = False
    return sequence


def step_samples(
    seed: int, step: int, images: int, global_batch_size: int, in_blocks: bool = False
) -> tuple[int, np.ndarray]:
    """Returns the epoch and the images of global step `step`: (epoch, int64 [global_batch_size]).

    The last, partial batch of an epoch is dropped (see plan.py). in_blocks: takes the epoch's
    order from `block_order` rather than `epoch_order`.
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
    """Splits the training images into those to train on and `held_out` images for validation.

    Returns the sample numbers of both as ascending int64 arrays. The split does not depend on the
    seed, so runs with different seeds can be compared.
    """
    order = generator("holdout", 0, 0).permutation(images)
    return np.sort(order[held_out:]), np.sort(order[:held_out])
