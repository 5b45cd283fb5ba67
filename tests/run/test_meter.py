"""The sums between two log lines, across a stop and another world."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor

from resnet_dist import distributed
from resnet_dist.checkpoints.content import NO_SUMS, mean_loss
from resnet_dist.distributed import World
from resnet_dist.run.meter import Meter
from tests.support.multirank import run_ranks

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
LOSS, ACC1 = "train/loss", "train/acc1"
Record = Callable[[str, float], None]


def add_passes(meter: Meter, rank: int, steps: range) -> None:
    for step in steps:
        loss_sum = torch.tensor(0.1 * (step + 1) + 0.01 * rank)  # of no short binary fraction
        meter.add(loss_sum, torch.tensor((step + rank) % 3), 3 + rank)


def gathered(rank: int, world_size: int, saved: Tensor, steps: range) -> tuple[Tensor, float]:
    """What is saved after `steps`, and the loss that a log line would show."""
    meter = Meter(distributed.start(), saved)
    add_passes(meter, rank, steps)
    return meter.gather(), meter.drain()[LOSS]


@pytest.mark.parametrize("world_size", [1, 3])
def test_the_sums_outlive_a_stop(world_size: int, record_difference: Record) -> None:
    whole, loss = run_ranks(gathered, world_size, NO_SUMS, range(7))[0]
    assert whole.dtype == torch.float64
    assert whole.shape == (world_size, 3)
    saved = NO_SUMS
    for steps in (range(1), range(1, 1), range(1, 5)):
        saved = run_ranks(gathered, world_size, saved, steps)[0][0]
    again, loss_again = run_ranks(gathered, world_size, saved, range(5, 7))[0]
    assert torch.equal(again, whole)
    assert loss_again == loss
    what = f"meter of 7 steps, and cut in 4, {world_size} ranks"
    record_difference(what, (again - whole).abs().max().item())


def test_the_sums_outlive_a_change_of_the_world(record_difference: Record) -> None:
    """Three ranks, then two, then one: the total is the same, for they started with the same."""
    three = run_ranks(gathered, 3, NO_SUMS, range(5))[0][0]
    two = run_ranks(gathered, 2, three, range(0))[0][0]
    assert torch.equal(two[1], torch.zeros(3, dtype=torch.float64))
    one, loss = run_ranks(gathered, 1, two, range(0))[0]
    assert torch.equal(one[0], three.sum(0))
    assert loss == mean_loss(three, None) == mean_loss(one, None)
    what = "meter's total, 3 ranks -> 2 -> 1"
    record_difference(what, (one.sum(0) - three.sum(0)).abs().max().item())


def test_the_speed_is_that_of_this_process() -> None:
    before = torch.tensor([[1000.0, 1000.0, 1e9]], dtype=torch.float64)
    meter = Meter(ALONE, before)
    meter.started -= 2.0
    meter.add(torch.tensor(6.0), torch.tensor(2), 10)
    metrics = meter.drain()
    assert metrics["perf/images_per_sec"] == pytest.approx(5, rel=0.01)
    assert metrics[ACC1] == pytest.approx(100 * 1002 / (1e9 + 10))
    meter.started -= 2.0
    meter.add(torch.tensor(6.0), torch.tensor(2), 10)
    assert meter.drain()["perf/images_per_sec"] == pytest.approx(5, rel=0.01)


def test_the_loss_of_a_checkpoint() -> None:
    """That of the images since the last log line, or else that of the line."""
    meter = Meter(ALONE)
    assert mean_loss(meter.gather(), meter.last_loss) is None
    meter.add(torch.tensor(6.0), torch.tensor(2), 3)
    assert mean_loss(meter.gather(), meter.last_loss) == 2
    meter.drain()
    assert mean_loss(meter.gather(), meter.last_loss) == 2
    meter.add(torch.tensor(3.0), torch.tensor(2), 3)
    assert mean_loss(meter.gather(), meter.last_loss) == 1
    assert Meter(ALONE, NO_SUMS, meter.last_loss).last_loss == 2
