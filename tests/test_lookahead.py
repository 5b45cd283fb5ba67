"""All ranks stop before the same step, whichever of them is asked to, or has no data for it."""

import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from multirank import run_ranks

from resnet_dist import checkpoint, checkpoint_list, distributed
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.interrupt import Interrupt
from resnet_dist.train import train

STEPS = 6  # with an evaluation after the third and the last


class At(Interrupt):
    """Does something when the loop asks about `step`, on one rank: once per step, beforehand."""

    def __init__(self, step: int, action: Callable[[], bool]) -> None:
        super().__init__()
        self.step, self.action, self.asked = step, action, -1

    @property
    def requested(self) -> bool:
        self.asked += 1
        return self.asked == self.step and self.action()


def train_and_stop(rank: int, world_size: int, config: Config, asked: int, step: int) -> str:
    """Rank `asked` alone is asked to stop before `step`, and once."""
    action = (lambda: True) if rank == asked else (lambda: False)
    return train(config, "test", At(step, action)).name


@pytest.mark.parametrize("step", range(STEPS + 1))
@pytest.mark.parametrize(("world_size", "asked"), [(2, 1), (3, 2), (2, 0)])
def test_all_ranks_stop_before_the_same_step(
    tiny_config: Callable[..., Config], world_size: int, asked: int, step: int
) -> None:
    """At the last step, too, when it is too late to stop: no rank waits for another for ever."""
    config = tiny_config("train.log_every_steps=2")
    outcomes = run_ranks(
        train_and_stop, world_size, config, asked, step, init_process_group=False, timeout_s=100
    )
    assert outcomes == ["PREEMPTED" if step < STEPS else "FINISHED"] * world_size
    newest = checkpoint_list.latest(config.run_dir)
    assert newest is not None
    assert checkpoint.load(newest)["step"] == step


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
    newest = checkpoint_list.latest(config.run_dir)
    assert newest is not None
    assert step <= checkpoint.load(newest)["step"] < STEPS


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
