"""The data of step s is a function of (seed, s), for any world."""

import numpy as np
import pytest

from resnet_dist.config import Config, DataConfig, TrainConfig
from resnet_dist.data.index.index import Index, Shards
from resnet_dist.data.view import order as order_module
from resnet_dist.data.view.order import (
    BLOCK_IMAGES,
    block_order,
    epoch_order,
    holdout,
    slice_of,
    step_samples,
)
from resnet_dist.data.view.protocol import CENTER_CROP, PROTOCOLS, Protocol
from resnet_dist.data.view.requests import eval_requests, train_request, train_requests
from resnet_dist.plan import Plan

IMAGES = 103
GOLDEN_BLOCKS = [
    *(16, 35, 39, 12, 25, 34, 2, 9, 23, 31, 4, 13, 22, 27, 36, 6, 19, 30, 5, 7),
    *(18, 33, 0, 8, 17, 26, 38, 10, 24, 29, 3, 11, 20, 28, 37, 14, 21, 32, 1, 15),
]


def index_of(images: int, in_shards: bool = False) -> Index:
    sizes = np.random.default_rng(0).integers(60, 900, (images, 2)).astype(np.int32)
    zeros = np.zeros(images, np.int64)
    shards = Shards(("a.tar",), zeros.astype(np.int32), zeros) if in_shards else None
    return Index(("a",), zeros, sizes, (), None, "", shards=shards)


def test_an_epoch_is_a_permutation_and_no_two_are_alike() -> None:
    orders = [epoch_order(seed, epoch, IMAGES) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(IMAGES))
    assert len({tuple(order) for order in orders}) == 4
    assert np.array_equal(epoch_order(0, 1, IMAGES), orders[1])


def test_golden_order() -> None:
    """A change here is a change of every run that is to be resumed."""
    assert epoch_order(0, 0, 10).tolist() == [0, 7, 8, 6, 9, 5, 1, 3, 2, 4]


def test_golden_block_order() -> None:
    assert block_order(0, 0, 40, 4).tolist() == GOLDEN_BLOCKS


@pytest.mark.parametrize("images", [7, 16, 103, 5000])
@pytest.mark.parametrize("batch", [1, 7, 64])
def test_a_block_order_is_a_permutation_too(images: int, batch: int) -> None:
    orders = [block_order(seed, epoch, images, batch) for seed in (0, 1) for epoch in (0, 1)]
    for order in orders:
        assert sorted(order) == list(range(images))
    if images > 16:
        assert len({tuple(order) for order in orders}) == 4


def test_a_block_is_read_by_one_rank_soon_and_a_batch_is_mixed() -> None:
    """Label-sorted shards of 50 classes, 8 ranks."""
    images, batch, steps = 200_000, 64, 200_000 // 64
    order = block_order(0, 0, images, batch)[: steps * batch].reshape(steps, batch)
    block, rank = order // BLOCK_IMAGES, np.arange(batch) // 8
    first_rank = np.full(-(-images // BLOCK_IMAGES), -1)
    first_rank[block[::-1]] = rank  # of the earliest step
    share = (first_rank[block] == rank).mean()
    assert share > 0.99  # positions begin in the middle of a block: 64 of 12,500 are on two ranks
    step = np.repeat(np.arange(steps), batch)
    seen = [step[(block == b).reshape(-1)] for b in range(100)]
    window_steps = order_module.WINDOW_IMAGES // batch
    within = [np.ptp(s) <= 2 * window_steps for s in seen if len(s) == BLOCK_IMAGES]
    assert np.mean(within) > 0.97

    def bits(batches: np.ndarray) -> float:
        counts = [np.bincount(b * 50 // images, minlength=50) / batch for b in batches]
        return float(np.mean([-(p[p > 0] * np.log2(p[p > 0])).sum() for p in counts]))

    full = epoch_order(0, 0, images)[: steps * batch].reshape(steps, batch)
    assert bits(order) > 0.99 * bits(full)
    sorted_reads = np.arange(steps * batch).reshape(steps, batch)
    assert bits(sorted_reads) < 0.1 * bits(full)  # what it is good for


def test_an_epoch_of_imagenet_is_ordered_in_no_time() -> None:
    """No clock: it is a handful of array operations. Their memory: a few arrays of 10 MB."""
    order = block_order(0, 0, 1_281_167, 256)
    assert order.dtype == np.int64
    assert len(np.unique(order)) == 1_281_167


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


def requests_of_a_run(
    crop: str, world_size: int, largest: int, first_step: int = 0, in_shards: bool = False
):
    """Per step: the global batch as (sample, window, flip) rows, in the order of the slices."""
    config = Config(
        seed=5,
        data=DataConfig(train_crop=crop),  # type: ignore[arg-type]
        train=TrainConfig(epochs=2, global_batch_size=25, max_local_batch_size=largest),
    )
    plan = Plan.of(config, world_size, IMAGES, IMAGES)
    streams = [
        train_requests(config, plan, index_of(IMAGES, in_shards), rank, first_step)
        for rank in range(world_size)
    ]
    steps = []
    for _ in range(first_step, plan.total_steps):
        rows = []
        for _ in range(plan.accumulation):
            for stream in streams:
                samples, windows, *_ = next(stream)
                assert 1 <= len(samples) <= largest
                rows += [
                    (int(sample), *roi.tolist(), bool(flip))
                    for sample, roi, flip in zip(samples, windows.roi, windows.flip, strict=True)
                ]
        steps.append(rows)
    assert all(next(stream, None) is None for stream in streams)
    return steps


@pytest.mark.parametrize("in_shards", [False, True])
@pytest.mark.parametrize("crop", ["scale", "random_resized"])
def test_samples_and_windows_do_not_depend_on_the_world(crop: str, in_shards: bool) -> None:
    alone = requests_of_a_run(crop, world_size=1, largest=25, in_shards=in_shards)
    assert all(len(rows) == 25 for rows in alone)
    for world_size in (1, 2, 3, 4):
        for largest in (25, 4):  # without and with accumulation
            assert requests_of_a_run(crop, world_size, largest, in_shards=in_shards) == alone


@pytest.mark.parametrize("in_shards", [False, True])
def test_a_restart_goes_on_with_the_same_requests(in_shards: bool) -> None:
    alone = requests_of_a_run("scale", world_size=1, largest=25, in_shards=in_shards)
    for first_step in (1, 4, 5, 7):  # within and across epochs
        again = requests_of_a_run("scale", 2, 25, first_step, in_shards)
        assert again == alone[first_step:]


def test_shards_are_read_in_blocks() -> None:
    for in_shards in (False, True):
        steps = requests_of_a_run("scale", world_size=1, largest=25, in_shards=in_shards)
        samples = [row[0] for rows in steps[:4] for row in rows]  # epoch 0
        order = block_order(5, 0, IMAGES, 25) if in_shards else epoch_order(5, 0, IMAGES)
        assert samples == order[:100].tolist()


def test_a_stand_in_is_a_function_of_seed_epoch_and_sample() -> None:
    def stand_ins(seed: int, epoch: int) -> list[int]:
        request = train_request(Config(seed=seed), index_of(IMAGES), epoch, np.arange(5))
        assert request.stand_in is not None
        return [request.stand_in(sample, attempt)[0] for sample in (0, 3) for attempt in (0, 1)]

    assert stand_ins(0, 0) == stand_ins(0, 0)
    assert len({tuple(stand_ins(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4
    assert all(0 <= number < IMAGES for number in stand_ins(0, 0))
    assert len(set(stand_ins(0, 0))) == 4  # others for each sample, and for each attempt


@pytest.mark.parametrize("protocol", PROTOCOLS.values(), ids=PROTOCOLS)
@pytest.mark.parametrize("world_size", [1, 2, 3, 4, 7])
def test_evaluation_sees_each_image_once_in_batches_of_any_world(
    protocol: Protocol, world_size: int
) -> None:
    def batches_of(rank: int, world_size: int) -> list[list[int]]:
        config = Config(train=TrainConfig(max_local_batch_size=8))
        requests = eval_requests(config, index_of(IMAGES), protocol, rank, world_size)
        windows = len(protocol.crops) + len(protocol.scales_px)
        return [samples.tolist() for samples, *_ in requests][::windows]

    dealt = [batches_of(rank, world_size) for rank in range(world_size)]
    assert max(map(len, dealt)) - min(map(len, dealt)) <= 1
    batches = sorted(batch for of_rank in dealt for batch in of_rank)
    assert sorted(sample for batch in batches for sample in batch) == list(range(IMAGES))
    assert batches == sorted(batches_of(0, 1))


def test_more_ranks_than_validation_images() -> None:
    requests = [list(eval_requests(Config(), index_of(2), CENTER_CROP, r, 4)) for r in range(4)]
    assert [len(of_rank) for of_rank in requests] == [1, 0, 0, 0]


def test_held_out_images_are_apart_and_the_same_for_every_seed() -> None:
    kept, held = holdout(50_000, 5_000)
    assert len(held) == 5_000
    assert np.array_equal(np.sort(np.concatenate([kept, held])), np.arange(50_000))
    assert np.array_equal(held, holdout(50_000, 5_000)[1])
    # Spread over the whole set, as folders are sorted by class.
    assert np.histogram(held, 10, (0, 50_000))[0].min() > 400
