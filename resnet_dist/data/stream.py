"""A rank's requests, in order: which samples, seen through which windows."""

from collections.abc import Iterator

import numpy as np

from resnet_dist.config import Config
from resnet_dist.data.augment import Request, eval_windows, train_windows
from resnet_dist.data.index import Index
from resnet_dist.data.order import slice_of, step_samples
from resnet_dist.plan import Plan


def train_requests(
    config: Config, plan: Plan, index: Index, rank: int, first_step: int
) -> Iterator[Request]:
    """`plan.accumulation` requests per step, from `first_step` to the end of the run.

    Pass a of rank r takes slice a * world_size + r of the step's global batch.
    """
    slices = plan.accumulation * plan.world_size
    for step in range(first_step, plan.total_steps):
        epoch, batch = step_samples(config.seed, step, len(index), plan.global_batch_size)
        for accumulated in range(plan.accumulation):
            mine = slice_of(batch, accumulated * plan.world_size + rank, slices)
            yield mine, train_windows(config.data, config.seed, epoch, mine, index.sizes[mine])


def eval_requests(
    config: Config, index: Index, rank: int, world_size: int, batch_size: int
) -> Iterator[Request]:
    """This rank's part of all samples, each of them once over the ranks; nothing is padded."""
    mine = slice_of(np.arange(len(index)), rank, world_size)
    for start in range(0, len(mine), batch_size):
        samples = mine[start : start + batch_size]
        yield samples, eval_windows(config.data, index.sizes[samples])
