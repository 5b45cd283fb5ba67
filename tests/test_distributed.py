"""The verbs that all ranks say together, and the request to stop."""

import io
import os
import signal
import time
from contextlib import redirect_stderr
from datetime import timedelta
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from torch import nn

from resnet_dist import distributed
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from tests.support.multirank import run_ranks


def say_the_verbs(rank: int, world_size: int) -> dict:
    world = distributed.start()
    said = {
        "who": (world.rank, world.size, world.local_size, world.is_main, world.device.type),
        "sum": world.sum(torch.tensor([1.0, rank])).tolist(),
        "any": (world.any(rank == world_size - 1), world.any(False)),
        "on_main": world.on_main(lambda: {"rank": rank}),
    }
    for error in (UserError("one line"), ValueError("a bug")):
        try:
            world.on_main(lambda error=error: raises(error))
        except Exception as caught:
            said[type(error).__name__] = (type(caught).__name__, str(caught))
    said["on_all"] = world.on_all(lambda: rank)
    try:
        world.on_all(lambda: raises(UserError("no such file")) if rank == 1 else None)
    except UserError as error:
        said["on_all failed"] = str(error)
    distributed.stop()
    return said


def raises(error: Exception) -> None:
    raise error


@pytest.mark.parametrize("world_size", [2, 4])
def test_every_rank_hears_the_same(world_size: int) -> None:
    ranks = run_ranks(say_the_verbs, world_size, init_process_group=False)
    for rank, said in enumerate(ranks):
        assert said["who"] == (rank, world_size, world_size, rank == 0, "cpu")
        assert said["sum"] == [world_size, sum(range(world_size))]
        assert said["any"] == (True, False)
        assert said["on_main"] == {"rank": 0}
        assert said["UserError"] == ("UserError", "one line")
        assert said["on_all"] == rank
        assert said["on_all failed"] == "rank 1: no such file"
        kind, text = said["ValueError"]
        assert (kind, "a bug" in text) == ("ValueError" if rank == 0 else "RuntimeError", True)


def sum_within_the_node(rank: int, world_size: int) -> float:
    os.environ["LOCAL_WORLD_SIZE"] = "2"
    world = distributed.start()
    ones = torch.tensor([float(rank)])
    dist.all_reduce(ones, group=world.node_group())
    distributed.stop()
    return ones.item()


def test_a_node_is_its_own_ranks() -> None:
    assert run_ranks(sum_within_the_node, 4, init_process_group=False) == [1.0, 1.0, 5.0, 5.0]


def wait_for_a_slow_disk(rank: int, world_size: int, rendezvous: Path) -> tuple[list[int], str]:
    dist.init_process_group(
        "gloo",
        f"file://{rendezvous}",
        rank=rank,
        world_size=world_size,
        timeout=timedelta(seconds=2),
    )
    world = distributed.start()
    said = io.StringIO()

    def slowly() -> int:
        time.sleep(5 * rank)
        return rank

    with (
        redirect_stderr(said),
        world.patiently("data index, train", say_every_seconds=1) as patient,
    ):
        ranks = patient.gather(patient.on_all(slowly))
    with pytest.raises(RuntimeError, match=r"(?i)timed out|timeout|closed"):  # the usual limit
        world.on_all(slowly)
    distributed.stop()
    return ranks, said.getvalue()


@pytest.mark.slow
def test_a_slow_disk_has_a_limit_of_its_own(tmp_path: Path) -> None:
    said_by_0, said_by_1 = run_ranks(
        wait_for_a_slow_disk, 2, tmp_path / "rendezvous", init_process_group=False
    )
    assert said_by_0[0] == said_by_1[0] == [0, 1]
    first, *others = said_by_0[1].splitlines()
    assert first == "data index, train: 1 s so far"
    assert others
    assert said_by_1[1] == ""


def leave_with_ddp_alive(rank: int, world_size: int, rendezvous: Path) -> None:
    """DDP goes last, when the function returns, as in train()."""
    dist.init_process_group("gloo", f"file://{rendezvous}", rank=rank, world_size=world_size)
    world = distributed.start()
    model = nn.parallel.DistributedDataParallel(nn.Linear(2, 2))
    model(torch.ones(1, 2)).sum().backward()
    world.on_main(lambda: None)
    distributed.stop()


def leave_often(rank: int, world_size: int, folder: Path) -> None:
    for number in range(100):
        leave_with_ddp_alive(rank, world_size, folder / str(number))


@pytest.mark.slow
def test_a_run_that_is_done_ends(tmp_path: Path) -> None:
    """With torch 2.11 it would hang after fewer than 100 times, if DDP let go of the group last."""
    run_ranks(leave_often, 2, tmp_path, init_process_group=False)


def test_a_world_of_one_needs_no_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE"):
        monkeypatch.delenv(name, raising=False)
    world = distributed.start()
    assert (world.rank, world.size, world.any(True), world.on_main(lambda: 3)) == (0, 1, True, 3)
    assert world.sum(torch.tensor(2.0)).item() == 2


def test_half_an_environment_is_refused_in_one_line(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setenv("WORLD_SIZE", "2")
    with pytest.raises(UserError, match=r"environment: RANK='': must be a whole number.*torchrun"):
        distributed.start()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("LOCAL_RANK", "0")
    with pytest.raises(UserError, match="RANK=2: must be below WORLD_SIZE=2"):
        distributed.start()
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("MASTER_ADDR", raising=False)
    with pytest.raises(UserError, match="MASTER_ADDR is not set"):
        distributed.start()
    monkeypatch.setenv("WORLD_SIZE", "two")
    with pytest.raises(UserError, match="WORLD_SIZE='two'"):
        distributed.start()


@pytest.mark.parametrize("name", ["TERM", "USR1", "USR2", "HUP", "INT"])
def test_a_signal_is_remembered_not_obeyed(name: str) -> None:
    number = signal.Signals[f"SIG{name}"]
    before = signal.getsignal(number)
    with Interrupt() as interrupt:
        assert not interrupt.requested
        os.kill(os.getpid(), number)
        assert interrupt.requested
        assert interrupt.received == {number}
    assert signal.getsignal(number) == before


def test_a_hangup_that_was_ignored_stays_ignored() -> None:
    """`nohup` ignores it."""
    before = signal.signal(signal.SIGHUP, signal.SIG_IGN)
    try:
        with Interrupt() as interrupt:
            os.kill(os.getpid(), signal.SIGHUP)
            assert not interrupt.requested
    finally:
        signal.signal(signal.SIGHUP, before)


def test_a_second_ctrl_c_stops_at_once() -> None:
    with Interrupt():
        os.kill(os.getpid(), signal.SIGINT)
        with pytest.raises(KeyboardInterrupt):
            os.kill(os.getpid(), signal.SIGINT)
