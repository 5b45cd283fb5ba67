"""A rank's requests, in order: which samples, seen through which windows."""

from collections.abc import Iterator
from functools import partial

import numpy as np

from resnet_dist.config import Config
from resnet_dist.data.index.index import Index
from resnet_dist.data.view.augment import Request, Windows, train_windows
from resnet_dist.data.view.order import step_samples
from resnet_dist.data.view.protocol import Protocol
from resnet_dist.draws import uniforms
from resnet_dist.plan import Plan


def train_requests(
    config: Config, plan: Plan, index: Index, rank: int, first_step: int
) -> Iterator[Request]:
    """Yields this rank's requests from `first_step` to the end, `plan.accumulation` per step.

    Every rank computes the same global batch, and takes the slice of it that `plan.positions`
    assigns to the rank and the pass.
    """
    in_blocks = index.shards is not None
    for step in range(first_step, plan.total_steps):
        epoch, batch = step_samples(
            config.seed, step, len(index), plan.global_batch_size, in_blocks
        )
        for accumulated in range(plan.accumulation):
            positions = plan.positions(rank, accumulated)
            mine = batch[positions.start : positions.stop]
            request = train_request(config, index, epoch, mine)
            yield request._replace(step=step, positions=positions)


def train_request(config: Config, index: Index, epoch: int, samples: np.ndarray) -> Request:
    """Returns a request for training images as they are seen in `epoch`. samples: int64 [B]."""
    windows = train_windows(config.data, config.seed, epoch, samples, index.sizes[samples])
    return Request(samples, windows, partial(_stand_in, config, index, epoch))


def _stand_in(
    config: Config, index: Index, epoch: int, sample: int, attempt: int
) -> tuple[int, Windows]:
    """Returns the training image to show instead of the unreadable `sample`, and its window.

    The window is the one that this image has in `epoch` anyway. The choice is a function of (seed,
    epoch, sample, attempt), so neither the number of ranks nor a restart changes what is shown.
    """
    key = np.array([len(index) * (1 + attempt) + sample])  # a different key for every attempt
    other = (uniforms("stand-in", config.seed, epoch, key, draws=1)[0] * len(index)).astype(
        np.int64
    )
    return int(other[0]), train_windows(config.data, config.seed, epoch, other, index.sizes[other])


def eval_requests(
    config: Config, index: Index, protocol: Protocol, rank: int, world_size: int
) -> Iterator[Request]:
    """Yields this rank's share of all samples; together the ranks see each sample exactly once.

    Each batch is requested once per window of the protocol, in consecutive requests. Rank r takes
    the whole batches r, r + world_size, r + 2 * world_size and so on: which images form a batch
    does not depend on the number of ranks, so neither do the network's outputs. Nothing is padded,
    so some ranks have one batch more than others: 25 batches of 256 images where an even share is
    24.4 (ImageNet on 8 ranks), or 4 where it is 3.1 (on 64 ranks).
    """
    for samples in protocol.batches(config, index.sizes)[rank::world_size]:
        for windows in protocol.windows(config.data, index.sizes[samples]):
            yield Request(samples, windows)
