"""A loss that becomes NaN or infinite: what is said, what is kept, and how the run ends."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_dist import cli, distributed
from resnet_dist.checkpoints import folders
from resnet_dist.config import Config
from resnet_dist.config_file import load_config
from resnet_dist.errors import Diverged
from resnet_dist.plan import Plan
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.meter import Meter
from resnet_dist.run.nonfinite import NonfiniteLoss, nonfinite_tensors
from resnet_dist.run.outcome import Ending, Outcome
from resnet_dist.state import TrainState
from resnet_dist.train import train
from tests.support.multirank import run_ranks

Captured = pytest.CaptureFixture[str]
BREAKS = "optim.base_lr=1e35"  # after the first step, the weights are too large


def strict(line: str) -> Any:
    def refuse(name: str) -> None:
        raise AssertionError(f"{name} is not JSON")

    return json.loads(line, parse_constant=refuse)


def journal(run_dir: Path) -> dict[int, dict[str, float | None]]:
    found: dict[int, dict[str, float | None]] = {}
    for line in (run_dir / "journal.jsonl").read_text().splitlines():
        record = strict(line)
        found.setdefault(record["step"], {}).update(record["metrics"])
    return found


def test_a_run_that_diverges_ends_as_failed_and_says_where(
    tiny_yaml: Path, capsys: Captured
) -> None:
    config = load_config(tiny_yaml)
    cli.main(["train", str(tiny_yaml), "train.iterations=2"])  # sound
    capsys.readouterr()
    with pytest.raises(SystemExit) as left:
        cli.main(["train", str(tiny_yaml), "train.epochs=9", BREAKS, "--resume-anyway"])
    assert left.value.code == 1
    out, err = capsys.readouterr()
    steps = journal(config.run_dir)
    first = min(step for step, figures in steps.items() if figures.get("train/loss", 0.0) is None)
    lr = steps[first]["train/lr"]
    lines = [line for line in out.splitlines() if "warning: loss not finite from " in line]
    assert len(lines) == config.train.max_nonfinite_logs
    assert (
        f"from step {first} at lr {lr:.4g} on, in 1 log lines in a row; not finite by now: "
        in (lines[0])
    )
    assert "in 3 log lines in a row" in lines[2]
    assert err.count("\n") == 1
    assert err.startswith(f"resnet-dist: loss not finite from step {first} at lr {lr:.4g} on")
    sound = folders.newest_sound(config.run_dir)
    assert sound is not None
    assert f"without saving a checkpoint; the last sound one is {sound.name}; lower optim" in err
    ending = Ending.read(config.run_dir)
    assert ending is not None
    assert ending.outcome is Outcome.FAILED
    assert f"resnet-dist: {ending.reason}\n" == err
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert folders.read_meta(newest)["step"] < max(steps)  # the last state is not on the disk
    with pytest.raises(SystemExit):
        cli.main(["status", str(config.run_dir), "--exit-code"])
    assert f": failed at step 2, {ending.time} (start {ending.start}): loss not finite from" in (
        capsys.readouterr().out
    )


def diverge(rank: int, world_size: int, config: Config) -> str:
    try:
        return train(config, "test", Interrupt()).name
    except Diverged as error:
        return str(error)


def test_all_ranks_end_together(tiny_config: Callable[..., Config]) -> None:
    said = run_ranks(diverge, 2, tiny_config(BREAKS), init_process_group=False)
    assert said[0] == said[1]
    assert said[0].startswith("loss not finite from step ")


def test_an_evaluation_that_is_not_finite_is_never_the_best(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config(BREAKS, "train.max_nonfinite_logs=100")
    train(config, "test", Interrupt())
    scores = [figures for figures in journal(config.run_dir).values() if "val/acc1" in figures]
    assert [figures["val/loss"] for figures in scores] == [None, None]
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert folders.read_meta(newest)["best"]["step"] == -1
    assert not folders.read_meta(newest)["sound"]
    assert not (config.run_dir / "checkpoints/best").exists()


def test_a_loss_that_recovers_starts_the_count_again() -> None:
    said: list[str] = []
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    watch = NonfiniteLoss(2, Path("nowhere"), distributed.start(), said.append)
    for first_step in (5, None, 7):
        watch.check(first_step, 0.25, network)
    assert said == [
        f"warning: loss not finite from step {step} at lr 0.25 on, in 1 log lines in a row; "
        "all parameters are finite so far"
        for step in (5, 7)
    ]
    with pytest.raises(Diverged, match=r"from step 7 .* in 2 log lines .*; no checkpoint is sound"):
        watch.check(9, 0.5, network)


def test_parameters_and_buffers_that_are_not_finite_are_named() -> None:
    network = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    assert nonfinite_tensors(network) == []
    with torch.no_grad():
        network[0].weight[1, 1] = math.inf
        network[1].running_var[2] = math.nan
    assert nonfinite_tensors(network) == ["0.weight", "1.running_var"]


def add(meter: Meter, loss: float) -> None:
    meter.add(torch.tensor(loss), torch.tensor(3), 4)


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf])
def test_the_meter_counts_from_the_first_loss_that_is_not_finite(bad: float) -> None:
    meter = Meter(distributed.start())
    for losses, expected in (
        ([1.0, 2.0], 0),
        ([1.0, bad, 2.0, 3.0], 3),
        ([bad], 1),
        ([bad, -bad, 1.0], 3),
        ([1.0], 0),
    ):
        for loss in losses:
            add(meter, loss)
        figures = meter.drain()
        assert meter.nonfinite_passes == expected
        assert math.isfinite(figures["train/loss"]) == (expected == 0)


def count_on_rank(rank: int, world_size: int) -> int:
    meter = Meter(distributed.start())
    for step in range(5):
        add(meter, math.nan if step == 3 - rank else 1.0)
    meter.drain()
    return meter.nonfinite_passes


def test_the_rank_where_it_came_first_counts() -> None:
    assert run_ranks(count_on_rank, 3, init_process_group=False) == [4, 4, 4]


@pytest.mark.parametrize("loss", [math.nan, math.inf])
def test_acc1_of_a_network_that_answers_nan_counts_for_nothing(loss: float) -> None:
    network = nn.Linear(1, 1)
    state = TrainState(network, torch.optim.SGD(network.parameters()), torch.amp.GradScaler("cpu"))
    plan = Plan.of(Config(), 1, 25_600, 100)
    state.step = 10
    state.remember_evaluation(50.0, 1.0, plan)
    state.step = 20
    state.remember_evaluation(90.0, loss, plan)
    assert (state.best_acc1, state.best_step, state.evaluated_step) == (50.0, 10, 20)
