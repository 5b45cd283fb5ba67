"""Every derived number, as tables."""

import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_dist import cli
from resnet_dist.config import Config, ModelConfig, OptimConfig, TrainConfig
from resnet_dist.errors import UserError
from resnet_dist.plan import LrMemory, Plan
from resnet_dist.run.plan_text import describe_plan


def plan(
    world_size: int = 1, images: int = 1000, optim: dict[str, Any] | None = None, **train: Any
):
    config = Config(
        optim=OptimConfig(**(optim or {})), train=replace(TrainConfig(epochs=10), **train)
    )
    return Plan.of(config, world_size, images, 100)


@pytest.mark.parametrize(
    ("world_size", "largest", "accumulation", "local"),
    [(1, 256, 1, 256), (1, 128, 2, 128), (1, 100, 3, 86), (2, 128, 1, 128), (3, 128, 1, 86)]
    + [(3, 50, 2, 43), (8, 32, 1, 32), (64, 32, 1, 4), (7, 10, 4, 10)],
)
def test_accumulation_keeps_the_global_batch(
    world_size: int, largest: int, accumulation: int, local: int
) -> None:
    p = plan(world_size, global_batch_size=256, max_local_batch_size=largest)
    assert (p.accumulation, p.local_batch_size) == (accumulation, local)
    assert p.global_batch_size == 256
    assert p.local_batch_size <= largest


def test_the_partial_batch_is_dropped_and_said() -> None:
    p = plan(images=1000, global_batch_size=64)
    assert (p.steps_per_epoch, p.dropped_images_per_epoch) == (15, 40)
    assert p.total_steps == 150
    assert "40 images dropped" in describe_plan(p)


def test_peak_lr_is_linear_in_the_global_batch() -> None:
    assert plan(global_batch_size=256, images=9000).peak_lr == 0.1
    assert plan(global_batch_size=8192, images=9000).peak_lr == pytest.approx(3.2)  # Goyal, 1 h


def test_warmup_is_linear_per_step() -> None:
    p = plan(global_batch_size=100, optim={"warmup_epochs": 2, "schedule": "cosine"})
    assert p.warmup_steps == 20
    rises = [p.lr_at(step) for step in range(20)]
    assert rises == pytest.approx([p.peak_lr * (step + 1) / 20 for step in range(20)])
    assert p.lr_at(20) == p.peak_lr


def test_schedules_as_tables() -> None:
    optim = {"milestones_epochs": (3.0, 6.0), "gamma": 0.1}
    step = plan(global_batch_size=100, optim=optim | {"schedule": "step"})
    assert [step.lr_at(s) / step.peak_lr for s in (0, 29, 30, 59, 60, 99)] == pytest.approx(
        [1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    between = plan(global_batch_size=100, optim={"milestones_epochs": (0.55,)})
    assert [between.lr_at(s) / between.peak_lr for s in (5, 6)] == pytest.approx([1, 0.1])
    cosine = plan(global_batch_size=100, optim={"schedule": "cosine"})
    assert [cosine.lr_at(s) / cosine.peak_lr for s in (0, 25, 50, 75)] == pytest.approx(
        [1, 0.5 + 0.5 * math.cos(math.pi / 4), 0.5, 0.5 - 0.5 * math.cos(math.pi / 4)]
    )
    polynomial = plan(global_batch_size=100, optim={"schedule": "polynomial", "power": 2.0})
    assert [polynomial.lr_at(s) / polynomial.peak_lr for s in (0, 50, 90)] == pytest.approx(
        [1, 0.25, 0.01]
    )
    plateau = plan(global_batch_size=100, optim={"schedule": "plateau"})
    drops = LrMemory(plateau_drops=(40, 70))
    assert [plateau.lr_at(s, drops) / plateau.peak_lr for s in (39, 40, 69, 70)] == pytest.approx(
        [1, 0.1, 0.1, 0.01]
    )


@pytest.mark.parametrize("schedule", ["step", "cosine", "polynomial"])
def test_the_lr_does_not_depend_on_the_world(schedule: str) -> None:
    optim = {"schedule": schedule, "warmup_epochs": 1}
    alone = plan(1, global_batch_size=96, optim=optim, max_local_batch_size=8)
    many = plan(5, global_batch_size=96, optim=optim, max_local_batch_size=8)
    assert alone.total_steps == many.total_steps
    steps = range(alone.total_steps)
    assert [alone.lr_at(s) for s in steps] == [many.lr_at(s) for s in steps]


def test_cadence() -> None:
    p = plan(global_batch_size=100, eval_every_epochs=2.5, log_every_steps=40)
    assert [s for s in range(1, 101) if p.evals_after(s)] == [25, 50, 75, 100]
    assert [s for s in range(1, 101) if p.logs_after(s)] == [40, 80, 100]
    half = plan(global_batch_size=100, epochs=0.5)
    assert half.total_steps == 5
    assert half.evals_after(5)
    assert half.saves_after(5)


def test_checkpoints_that_stay_are_saved() -> None:
    p = plan(global_batch_size=100, epochs=4, save_every_epochs=1.5, keep_every_epochs=1.0)
    assert p.keep_every_steps == 10
    assert [s for s in range(1, 41) if p.saves_after(s)] == [10, 15, 20, 30, 40]
    assert "kept             the last 2, the best, and every 10 steps for good" in describe_plan(p)
    assert plan(images=1000, keep_every_epochs=0.01, global_batch_size=100).keep_every_steps == 1
    p = plan(global_batch_size=100, keep_checkpoints=5)
    assert p.keep_every_steps is None
    assert "kept             the last 5, the best\n" in describe_plan(p) + "\n"


@pytest.mark.parametrize(
    ("shared_by", "world_size", "per_node", "batch", "largest", "expected", "said"),
    [
        ("world", 1, None, 256, 256, 256, "256 images = 256 per pass x 1 ranks"),
        ("world", 4, None, 32, 8, 32, "32 images = 8 per pass x 4 ranks"),
        ("world", 3, None, 256, 128, 256, "256 images = 85 or 86 per pass x 3 ranks"),
        ("world", 3, None, 256, 64, 128, "128 images = 42 or 43 per pass x 3 ranks"),
        ("node", 4, 2, 10, 8, 5, "5 images = 2 or 3 per pass x 2 ranks"),
        ("node", 8, 4, 256, 16, 64, "64 images = 16 per pass x 4 ranks"),
        ("node", 4, None, 32, 8, 32, "32 images = 8 per pass x 4 ranks"),
        ("node", 4, 1, 32, 8, 8, "8 images = 8 per pass x 1 ranks"),
        ("none", 3, None, 256, 128, 86, "86 images = 85 or 86 per pass x 1 ranks"),
        ("none", 8, 4, 256, 16, 16, "16 images = 16 per pass x 1 ranks"),
    ],
)
def test_what_bn_normalizes_together(
    shared_by: Any,
    world_size: int,
    per_node: int | None,
    batch: int,
    largest: int,
    expected: int,
    said: str,
) -> None:
    train = TrainConfig(global_batch_size=batch, max_local_batch_size=largest)
    config = Config(model=ModelConfig(sync_batchnorm=shared_by), train=train)
    p = Plan.of(config, world_size, 1000, 100, per_node)
    assert p.bn_batch_size == expected
    assert f"BN batch         {said} (model.sync_batchnorm={shared_by})" in describe_plan(p)
    # Counted, place by place: the ranks that share statistics, in each pass.
    ranks = {"world": world_size, "node": per_node or world_size, "none": 1}[shared_by]
    together = [
        sum(len(p.positions(rank, accumulated)) for rank in range(first, first + ranks))
        for accumulated in range(p.accumulation)
        for first in range(0, world_size, ranks)
    ]
    assert max(together) == expected
    assert sum(together) == batch


def test_a_network_without_bn_says_so() -> None:
    config = Config(model=ModelConfig(name="vgg19"))
    p = Plan.of(config, 4, 1000, 100)
    assert p.bn_batch_size == 0
    assert "BN batch         none: the network has no BN" in describe_plan(p)
    with_bn = Config(model=ModelConfig(name="vgg19_bn"))
    assert Plan.of(with_bn, 4, 1000, 100).bn_batch_size == 256


def test_a_dry_run_knows_the_ranks_of_a_node(
    tiny_yaml: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    arguments = ["train", str(tiny_yaml), "--dry-run", "--world-size", "4"]
    arguments += ["model.sync_batchnorm=node", "train.global_batch_size=8"]
    for ranks_per_node, said in ((None, "8 images = 2 per pass x 4"), ("2", "4 images = 2 per")):
        if ranks_per_node is not None:
            monkeypatch.setenv("LOCAL_WORLD_SIZE", ranks_per_node)
        cli.main(arguments)
        assert said in capsys.readouterr().out


def test_impossible_batches() -> None:
    with pytest.raises(UserError, match=r"global_batch_size=4: cannot be divided over 8.* is 8$"):
        plan(8, global_batch_size=4)
    with pytest.raises(UserError, match=r"=256: is larger than the 100 training images.* is 100$"):
        plan(1, images=100)
    with pytest.raises(UserError, match=r"max_local_batch_size=1: leaves some of 3 ranks.* is 2$"):
        plan(3, global_batch_size=4, max_local_batch_size=1)


def test_iterations_are_steps() -> None:
    optim = {"milestones_epochs": None, "milestones_iterations": (32, 48)}
    optim |= {"warmup_epochs": None, "warmup_iterations": 4}
    train = {"epochs": None, "iterations": 64, "eval_every_epochs": None}
    train |= {"eval_every_iterations": 30, "save_every_epochs": None, "save_every_iterations": 20}
    p = plan(global_batch_size=100, optim=optim, **train)
    assert (p.total_steps, p.warmup_steps, p.milestone_steps) == (64, 4, (32, 48))
    assert [p.lr_at(s) / p.peak_lr for s in (0, 3, 31, 32, 47, 48, 63)] == pytest.approx(
        [0.25, 1, 1, 0.1, 0.1, 0.01, 0.01]
    )
    assert [s for s in range(1, 65) if p.evals_after(s)] == [30, 60, 64]
    assert [s for s in range(1, 65) if p.saves_after(s)] == [20, 40, 60, 64]
    assert "32 (3.2), 48 (4.8)" in describe_plan(p)


def test_the_lr_is_low_until_the_training_error_is() -> None:
    """He et al. 2015, section 4.2, for ResNet-110: 0.01 until the error is under 80 %."""
    p = plan(global_batch_size=100, optim={"warmup_until_train_error_pct": 80.0})
    memory = LrMemory()
    right = [10] * 25 + [30] * 30  # of 100 images: the window of 20 steps passes 20 % ...
    for step, correct in enumerate(right, start=1):
        assert p.lr_at(step - 1, memory) == pytest.approx(0.1 * p.peak_lr)
        memory = p.after_train_step(memory, step, correct)
        if not p.watches_train_error(memory):
            break
    assert memory == LrMemory(warmup_end=36)  # ... with eleven of 30 among nine of 10
    assert p.lr_at(36, memory) == p.peak_lr
    assert "until the training error is below 80 % over 20 steps" in describe_plan(p)
    assert not plan(global_batch_size=100).watches_train_error(LrMemory())


def test_a_warmup_longer_than_the_run() -> None:
    with pytest.raises(UserError, match=r"warmup_epochs=9: is longer than the run's 30.* is 3\.0$"):
        plan(global_batch_size=100, epochs=None, iterations=30, optim={"warmup_epochs": 9})
    optim = {"warmup_epochs": None, "warmup_iterations": 31}
    with pytest.raises(UserError, match=r"warmup_iterations=31: is longer .* is 30$"):
        plan(global_batch_size=100, epochs=3, optim=optim)


@pytest.mark.parametrize(
    ("world_size", "before", "local"),
    [
        (8, 128, 16),  # 4 ranks had 2 passes of 32: 8 ranks keep it with 2 passes of 16
        (2, 128, 64),
        (4, 256, 64),
        (3, 128, 43),  # in two passes of 42 or 43
        (4, 3, None),  # fewer than the ranks
        (256, 128, None),  # a pass has an image for each rank
    ],
)
def test_how_the_bn_batch_is_kept(world_size: int, before: int, local: int | None) -> None:
    def plan_with(max_local_batch_size: int) -> Plan:
        train = TrainConfig(global_batch_size=256, max_local_batch_size=max_local_batch_size)
        return Plan.of(Config(train=train), world_size, 1000, None)

    assert plan_with(32).max_local_batch_size_for(before) == local
    if local is not None:
        assert plan_with(local).bn_batch_size == before


@pytest.mark.parametrize(("batch", "most"), [(256, 256), (256, 32), (10, 10), (12, 4), (8, 8)])
@pytest.mark.parametrize("world_size", [1, 2, 3, 4])
def test_neighbours_may_be_kept_together(
    monkeypatch: pytest.MonkeyPatch, batch: int, most: int, world_size: int
) -> None:
    """For methods that mix them: on any world each place is there once, and no pair is parted."""
    monkeypatch.setattr(Config, "neighbours_kept", 2)
    train = TrainConfig(global_batch_size=batch, max_local_batch_size=most)
    config = replace(Config(), train=train)
    p = Plan.of(config, world_size, 1000, None)
    slices = [p.positions(r, a) for a in range(p.accumulation) for r in range(world_size)]
    assert [place for one in slices for place in one] == list(range(batch))
    assert all(one.start % 2 == 0 < len(one) <= min(p.local_batch_size, most) for one in slices)
    assert max(map(len, slices)) == p.local_batch_size
    with pytest.raises(UserError, match="must be a multiple of 2: images are mixed"):
        Plan.of(replace(config, train=replace(train, global_batch_size=9)), 1, 1000, None)
    with pytest.raises(UserError, match="max_local_batch_size=1: splits groups of 2"):
        Plan.of(replace(config, train=replace(train, max_local_batch_size=1)), 1, 1000, None)
