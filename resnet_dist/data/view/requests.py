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
    """`plan.accumulation` requests per step, from `first_step` to the end of the run."""
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
    """Training images as they are seen in `epoch`. samples: int64 [B]."""
    windows = train_windows(config.data, config.seed, epoch, samples, index.sizes[samples])
    return Request(samples, windows, partial(_stand_in, config, index, epoch))


def _stand_in(
    config: Config, index: Index, epoch: int, sample: int, attempt: int
) -> tuple[int, Windows]:
    """Another training image in the place of `sample`, seen as in its own place: a function of
    (seed, epoch, sample), so that neither ranks nor restarts change what is shown."""
    key = np.array([len(index) * (1 + attempt) + sample])  # beyond the numbers of the samples
    other = (uniforms("stand-in", config.seed, epoch, key, draws=1)[0] * len(index)).astype(
        np.int64
    )
    return int(other[0]), train_windows(config.data, config.seed, epoch, other, index.sizes[other])


def eval_requests(
    config: Config, index: Index, protocol: Protocol, rank: int, world_size: int
) -> Iterator[Request]:
    """This rank's part of all samples, each of them once over the ranks; nothing is padded.

    Each batch is asked for once per window of the protocol, one request after the other. Whole
    batches are dealt out: what stands together in one does not depend on the number of ranks, so
    neither do the network's answers. A rank may so have one batch more than another: 25 of 256
    images where 24.4 were even (ImageNet on 8 ranks), 4 where 3.1 were (on 64).
    """
    for samples in protocol.batches(config, index.sizes)[rank::world_size]:
        for windows in protocol.windows(config.data, index.sizes[samples]):
            yield Request(samples, windows)
