"""All ranks stop before the same step, whichever of them is asked to, or has no data for it."""

import io
import json
import shutil
import weakref
from collections.abc import Callable, Iterable, Iterator
from contextlib import redirect_stderr
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist import distributed
from resnet_dist import train as train_module
from resnet_dist.checkpoints import folders
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.view.augment import Request
from resnet_dist.errors import UserError
from resnet_dist.job import Job
from resnet_dist.run import lookahead as lookahead_module
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.outcome import Ending, Outcome
from resnet_dist.train import train
from tests.support.multirank import run_ranks
from tests.support.slow import slow

STEPS = 6  # with an evaluation after the third and the last
# The steps before which the loop asks whether to stop: before and after an evaluation, too.
ASKS = [0, 1, 2, 3, 3, 4, 5, 6]


class At(Interrupt):
    """Does something when the loop asks for the time `ask`, counted from 0, on one rank."""

    def __init__(self, ask: int, action: Callable[[], bool]) -> None:
        super().__init__()
        self.ask, self.action, self.asked = ask, action, -1

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked == self.ask and self.action()


def train_and_stop(rank: int, world_size: int, config: Config, asked: int, ask: int) -> str:
    """Rank `asked` alone is asked to stop, and once."""
    action = (lambda: True) if rank == asked else (lambda: False)
    return train(config, "test", At(ask, action)).name


@pytest.mark.parametrize("ask", range(len(ASKS)))
@pytest.mark.parametrize(("world_size", "asked"), [(2, 1), slow(3, 2), slow(2, 0)])
def test_all_ranks_stop_before_the_same_step(
    tiny_config: Callable[..., Config], world_size: int, asked: int, ask: int
) -> None:
    config = tiny_config("train.log_every_steps=2")
    outcomes = run_ranks(train_and_stop, world_size, config, asked, ask, init_process_group=False)
    assert outcomes == ["STOPPED"] * world_size
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert Checkpoint.load(newest).step == ASKS[ask]


@pytest.mark.parametrize("ask", [3, slow(7)])
def test_a_stop_does_not_wait_for_an_evaluation(
    tiny_config: Callable[..., Config], ask: int
) -> None:
    """Which is made up for, and so nothing is told apart from a run that was not stopped."""
    config, whole = (
        tiny_config(f"name={name}", "train.deterministic=true", "train.log_every_steps=1")
        for name in ("stopped", "whole")
    )
    run_ranks(train_and_stop, 1, whole, 0, len(ASKS), init_process_group=False)
    assert run_ranks(train_and_stop, 1, config, 0, ask, init_process_group=False) == ["STOPPED"]
    evaluations = [step for step, metrics in journal(config) if "val/acc1" in metrics]
    assert evaluations == ([] if ASKS[ask] == 3 else [3])
    assert run_ranks(train_and_stop, 1, config, 0, len(ASKS), init_process_group=False) == [
        "FINISHED"
    ]
    assert journal(config) == journal(whole)


def journal(config: Config) -> list[tuple[int, dict[str, float]]]:
    """Steps and metrics, but for speeds."""
    lines = map(json.loads, (config.run_dir / "journal.jsonl").read_text().splitlines())
    return [
        (line["step"], {k: v for k, v in line["metrics"].items() if not k.startswith("perf/")})
        for line in lines
        if "metrics" in line
    ]


def train_and_lose(rank: int, world_size: int, config: Config, roots: list[Path], step: int) -> str:
    """The data of rank 1 go when the loop asks about `step`."""
    root = roots[rank]
    config = replace(config, data=replace(config.data, root=str(root)))

    def lose() -> bool:
        if rank == 1:
            shutil.rmtree(root / "train")
        return False

    try:
        return train(config, "test", At(step, lose)).name
    except UserError as error:
        return str(error)
    finally:
        distributed.stop()


@pytest.mark.parametrize("step", [0, 1, 2])
def test_a_rank_that_loses_its_data_ends_all_with_its_reason(
    tiny_config: Callable[..., Config], tiny_folder: Path, tmp_path: Path, step: int
) -> None:
    """What was read ahead is still trained on; then all save the same step and tell why."""
    roots = [tmp_path / "a", tmp_path / "b"]
    for root in roots:
        shutil.copytree(tiny_folder, root)
    settings = ["data.max_bad_samples=0", "train.log_every_steps=50", "train.eval_every_epochs=2"]
    config = tiny_config(*settings, "data.prefetch_batches=1")
    said = run_ranks(train_and_lose, 2, config, roots, step, init_process_group=False)
    assert said[0] == said[1]
    assert said[0].startswith("rank 1: ")
    assert "cannot be read" in said[0]
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert step <= Checkpoint.load(newest).step < STEPS


def train_on_a_bug(rank: int, world_size: int, config: Config) -> tuple[str, str]:
    """The loader of rank 1 fails at its third batch, as if out of memory."""
    batches = Loader.batches

    def failing(loader: Loader, requests: Iterable[Request]) -> Iterator[Batch]:
        for number, batch in enumerate(batches(loader, requests)):
            if rank == 1 and number == 2:
                raise MemoryError("no room")
            yield batch

    said = io.StringIO()
    with pytest.MonkeyPatch.context() as patch, redirect_stderr(said):
        patch.setattr(Loader, "batches", failing)
        with pytest.raises(UserError) as failure:
            train(config, "test", Interrupt())
    distributed.stop()
    return str(failure.value), said.getvalue()


def test_nothing_is_lost_by_a_bug_in_one_rank_s_data(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.log_every_steps=50", "train.eval_every_epochs=2")
    ends = run_ranks(train_on_a_bug, 2, config, init_process_group=False)
    assert [reason for reason, _ in ends] == ["rank 1: MemoryError: no room"] * 2
    assert ["Traceback" in said for _, said in ends] == [False, True]
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert Checkpoint.load(newest).step == 2
    ending = Ending.read(config.run_dir)  # rank 0's, whose input was good
    assert ending is not None
    assert ending.outcome is Outcome.FAILED


def test_a_step_s_batches_are_free_when_others_are_made(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Or the memory of one more step would be held."""
    seen: list[weakref.ref[Batch]] = []
    held: list[int] = []
    train_step, look_ahead = train_module.train_step, lookahead_module.look_ahead

    def noted_step(job: Job, passes: list[Batch], *rest: Any) -> torch.Tensor:
        seen.extend(map(weakref.ref, passes))
        return train_step(job, passes, *rest)

    def noted_look(*arguments: Any) -> lookahead_module.Upcoming:
        held.append(sum(batch() is not None for batch in seen))
        return look_ahead(*arguments)

    monkeypatch.setattr(train_module, "train_step", noted_step)
    monkeypatch.setattr(lookahead_module, "look_ahead", noted_look)
    train(tiny_config("train.max_local_batch_size=4"), "test", Interrupt())
    assert len(seen) == 2 * STEPS
    assert held == [0] * len(held)


def ask_while_others_are_asked(rank: int, world_size: int) -> list[object]:
    """Other collectives between a question and its answer."""
    world = distributed.start()
    answers: list[object] = []
    for number in range(20):
        answer = world.start_any(rank == number % 3 and number % 2 == 0)
        gathered = world.gather(rank)
        total = int(world.sum(torch.tensor(rank)))
        told = world.on_main(lambda number=number: number)
        answers.append((answer(), gathered, total, told))
    return answers


def test_an_answer_may_come_after_other_collectives() -> None:
    expected = [(number % 2 == 0, [0, 1, 2], 3, number) for number in range(20)]
    assert run_ranks(ask_while_others_are_asked, 3, init_process_group=False) == [expected] * 3
