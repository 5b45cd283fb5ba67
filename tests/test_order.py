"""The data of step s is a function of (seed, s), for any world."""

import numpy as np
import pytest

from resnet_dist.config import Config, DataConfig, TrainConfig
from resnet_dist.data.index import Index
from resnet_dist.data.order import epoch_order, slice_of, step_samples
from resnet_dist.data.stream import eval_requests, train_requests
from resnet_dist.plan import Plan

IMAGES = 103


def index_of(images: int) -> Index:
    sizes = np.random.default_rng(0).integers(60, 900, (images, 2)).astype(np.int32)
    return Index(("a",), np.zeros(images, np.int64), sizes, (), None, "")


def test_an_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    orders = [epoch_order(seed, epoch, IMAGES) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(IMAGES))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(epoch_order(0, 1, IMAGES), orders[1])


def test_golden_order() -> None:
    """A change here is a change of every run that is to be resumed."""
    assert epoch_order(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]


def test_an_epochs_steps_are_disjoint_and_the_partial_batch_is_left() -> None:
    steps = [step_samples(3, step, IMAGES, 25) for step in range(8)]
    assert [epoch for epoch, _ in steps] == [0] * 4 + [1] * 4
    for first in (0, 4):
        seen = np.concatenate([samples for _, samples in steps[first : first + 4]])
        assert len(set(seen.tolist())) == len(seen) == 100
    left = [
        set(range(IMAGES)) - set(np.concatenate([s for _, s in steps[i : i + 4]])) for i in (0, 4)
    ]
    assert left[0] != left[1]  # other images are left out in each epoch


@pytest.mark.parametrize("parts", range(1, 8))
@pytest.mark.parametrize("count", [7, 8, 20, 21, 256])
def test_slices_differ_by_one_and_lose_nothing(count: int, parts: int) -> None:
    slices = [slice_of(np.arange(count), part, parts) for part in range(parts)]
    assert np.concatenate(slices).tolist() == list(range(count))
    assert max(map(len, slices)) - min(map(len, slices)) <= 1


def requests_of_a_run(crop: str, world_size: int, largest: int, first_step: int = 0):
    """Per step: the global batch as (sample, window, flip) rows, in the order of the slices."""
    config = Config(
        seed=5,
        data=DataConfig(train_crop=crop),  # type: ignore[arg-type]
        train=TrainConfig(epochs=2, global_batch_size=25, max_local_batch_size=largest),
    )
    plan = Plan.of(config, world_size, IMAGES, IMAGES)
    streams = [
        train_requests(config, plan, index_of(IMAGES), rank, first_step)
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(first_step, plan.total_steps):
        rows = []
        for _ in range(plan.accumulation):
            for stream in streams:
                samples, windows = next(stream)
                assert 1 <= len(samples) <= largest
                rows += [
                    (int(sample), *roi.tolist(), bool(flip))
                    for sample, roi, flip in zip(samples, windows.roi, windows.flip, strict=True)
                ]
        steps.append(rows)
    assert all(next(stream, None) is None for stream in streams)
    return steps


@pytest.mark.parametrize("crop", ["scale", "random_resized"])
def test_samples_and_windows_do_not_depend_on_the_world(crop: str) -> None:
    alone = requests_of_a_run(crop, world_size=1, largest=25)
    assert all(len(rows) == 25 for rows in alone)
    for world_size in (1, 2, 3, 4):
        for largest in (25, 4):  # without and with accumulation
            assert requests_of_a_run(crop, world_size, largest) == alone


def test_a_restart_goes_on_with_the_same_requests() -> None:
    alone = requests_of_a_run("scale", world_size=1, largest=25)
    for first_step in (1, 4, 5, 7):  # within and across epochs
        assert requests_of_a_run("scale", 2, 25, first_step) == alone[first_step:]


@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_evaluation_sees_each_image_once(world_size: int) -> None:
    seen = [
        sample
        for rank in range(world_size)
        for samples, _ in eval_requests(Config(), index_of(IMAGES), rank, world_size, 8)
        for sample in samples.tolist()
    ]
    assert sorted(seen) == list(range(IMAGES))


def test_more_ranks_than_validation_images() -> None:
    counts = [len(list(eval_requests(Config(), index_of(2), rank, 4, 8))) for rank in range(4)]
    assert sorted(counts) == [0, 0, 1, 1]
