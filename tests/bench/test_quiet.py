"""Other load is seen, and what it disturbs is measured again."""

import os
import signal
import subprocess
import sys
import time
from collections.abc import Iterator

import pytest

from resnet_dist.bench import quiet
from resnet_dist.bench.quiet import Disturbance, Watch, cpu_seconds_of_tree, undisturbed
from resnet_dist.bench.turns import Spread, Turn, figures_of, ratio, take_turns
from tests.support.waiting import HANG_SECONDS

BURN = "import time\nwhile time.process_time() < {}: pass"  # CPU seconds
# Starts a process and ends at once, so that the process belongs to nobody.
ORPHAN = """
import subprocess, sys
command = [sys.executable, "-c", sys.argv[1]]
print(subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL).pid)
"""


@pytest.fixture(autouse=True)
def patient(monkeypatch: pytest.MonkeyPatch) -> None:
    """Whatever other tests in this process have asked for, and set back afterwards."""
    monkeypatch.setattr(quiet, "at_once", False)


@pytest.fixture
def at_once(patient: None) -> None:
    quiet.measure_at_once()


def burn(seconds: float) -> None:
    subprocess.run([sys.executable, "-c", BURN.format(seconds)], check=True, timeout=HANG_SECONDS)


@pytest.fixture
def stranger() -> Iterator[int]:
    """A process that keeps a core busy and is no descendant of this one."""
    command = [sys.executable, "-c", ORPHAN, BURN.format(HANG_SECONDS)]
    started = subprocess.run(
        command, stdout=subprocess.PIPE, text=True, check=True, timeout=HANG_SECONDS
    )
    pid = int(started.stdout)
    yield pid
    os.kill(pid, signal.SIGKILL)


def test_the_time_of_ended_children_counts_as_ours() -> None:
    before = cpu_seconds_of_tree(os.getpid())
    burn(0.5)
    assert cpu_seconds_of_tree(os.getpid()) - before >= 0.3


def test_less_than_a_tick_is_counted() -> None:
    """The files in /proc count in ticks of 10 ms, and a short measurement takes less than one."""
    ticks = [cpu_seconds_of_tree(os.getpid()) * quiet.TICKS for _ in range(5)]
    assert any(abs(count - round(count)) > 0.01 for count in ticks)


def test_the_time_of_running_children_counts_as_ours() -> None:
    before = cpu_seconds_of_tree(os.getpid())
    burns_and_sleeps = f"{BURN.format(0.5)}\nprint(flush=True)\ntime.sleep({HANG_SECONDS})"
    child = subprocess.Popen([sys.executable, "-c", burns_and_sleeps], stdout=subprocess.PIPE)
    try:
        assert child.stdout is not None
        assert child.stdout.readline()
        assert cpu_seconds_of_tree(os.getpid()) - before >= 0.5
    finally:
        child.kill()
        child.communicate()


def test_a_stranger_is_seen() -> None:
    """Seen from a process that sleeps, this one is a stranger."""
    sleeper = subprocess.Popen(["sleep", str(HANG_SECONDS)])
    try:
        watch = Watch(sleeper.pid)
        burn(2.0)
        seen = watch.seen()
        assert seen.others_pct > 100 * quiet.QUIET_SHARE / (os.cpu_count() or 1)
        assert seen.others_pct <= 101
    finally:
        sleeper.kill()
        sleeper.wait()


def test_what_a_stranger_disturbs_is_measured_again(
    stranger: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(quiet, "QUIET_SHARE", 0.1 / (os.cpu_count() or 1))
    monkeypatch.setattr(quiet, "MAX_WAIT_SECONDS", 0)
    calls: list[int] = []
    said: list[str] = []

    def measure() -> str:
        calls.append(1)
        time.sleep(1)
        return "result"

    result, seen = undisturbed(measure, say=said.append)
    assert (result, len(calls), seen.repeats) == ("result", quiet.REPEATS + 1, quiet.REPEATS)
    assert seen.is_disturbed
    assert [line.rpartition(": ")[2] for line in said] == ["measured again"] * 3 + ["kept"]


def test_at_once_nothing_is_repeated(stranger: int, at_once: None) -> None:
    calls: list[int] = []
    began = time.monotonic()
    quiet.wait_until_quiet()
    assert time.monotonic() - began < quiet.LOOK_SECONDS
    undisturbed(lambda: calls.append(1), say=lambda _: None)
    assert len(calls) == 1


def test_the_order_rotates_and_the_warm_up_does_not_count(at_once: None) -> None:
    order: list[str] = []

    def contestant(name: str) -> float:
        order.append(name)
        return float(len(order))

    turns = take_turns(
        {name: lambda name=name: contestant(name) for name in "ABC"}, runs=3, say=lambda _: None
    )
    assert "".join(order) == "ABC" + "ABC" + "BCA" + "CAB"
    assert [turn.value for turn in turns["A"]] == [4, 9, 11]


def test_a_ratio_is_of_each_round() -> None:
    quiet_turn = Disturbance(0, 0)
    ours = [Turn(value, quiet_turn) for value in (10, 20, 1)]
    others = [Turn(value, Disturbance(1.5, 0.5, repeats=1)) for value in (5, 10, 0.5)]
    assert ratio(ours, others) == Spread(2, 2, 2)
    assert figures_of(others)["repeats"] == 3
    assert figures_of(others)["steal_pct"] == [1.5] * 3
