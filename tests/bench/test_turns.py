"""What a turn measures is one repetition, and there are as many as fill the turn."""

import time

import pytest
import torch

from resnet_dist.bench.turns import FIRST_CALLS, many, repeated
from resnet_dist.distributed import World

ALONE = World(0, 0, 1, 1, torch.device("cpu"))
SLEEP_SECONDS, TURN_SECONDS, READY = 0.002, 0.1, 3


def test_a_turn_measures_one_of_its_repetitions() -> None:
    called: list[float] = []  # when

    def once() -> None:
        called.append(time.perf_counter())
        time.sleep(SLEEP_SECONDS)

    measure = repeated(many(once), ALONE, TURN_SECONDS, READY)
    each = measure()
    assert len(called) == FIRST_CALLS + READY + FIRST_CALLS
    assert each >= SLEEP_SECONDS
    count = max(1, round(TURN_SECONDS / each))
    called.clear()
    seconds = measure()
    ended = time.perf_counter()
    assert len(called) == READY + count
    # From the first repetition that is not among those that were ready.
    assert seconds == pytest.approx((ended - called[READY]) / count, rel=0.5)
