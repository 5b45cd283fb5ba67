"""What a person sees, on a terminal and elsewhere."""

import os
import pty
import subprocess
import sys

import pytest

from resnet_dist.config import Config
from resnet_dist.plan import Plan
from resnet_dist.run.progress import Console, Progress, duration, table
from tests.support.waiting import HANG_SECONDS

METRICS = {
    "train/loss": 1.5,
    "train/acc1": 42.0,
    "train/lr": 0.1,
    "perf/images_per_sec": 1234.5,
    "perf/data_wait_pct": 3.2,
}
PLAN = Plan.of(Config(), 1, 25_600, 100)


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Console(speaks=True), PLAN, first_step=0)
    progress.tick(1)
    progress.update(50, METRICS)
    out = capsys.readouterr().out
    assert "\r" not in out
    assert out.count("\n") == 1
    for part in ("epoch 0.50/90", "step 50/9000", "loss 1.5000", "acc1 42.00 %", "lr 0.1"):
        assert part in out
    for part in ("1,234 img/s", "data-wait 3 %", "ETA 0:00"):
        assert part in out


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str]) -> None:
    progress = Progress(Console(speaks=False), PLAN, first_step=0)
    progress.console.say("hello")
    progress.tick(1)
    progress.update(50, METRICS)
    assert capsys.readouterr() == ("", "")


def test_one_living_line_on_a_terminal() -> None:
    code = (
        "from tests.run.test_progress import *\n"
        "p = Progress(Console(True), PLAN, 0); p.update(50, METRICS); p.update(60, METRICS)\n"
        "p.console.say('stays')"
    )
    parent, child = pty.openpty()
    path = os.pathsep.join(sys.path)
    env = os.environ | {"PYTHONPATH": path, "COLUMNS": "200"}
    subprocess.run(
        [sys.executable, "-c", code], stdout=child, check=True, env=env, timeout=HANG_SECONDS
    )
    os.close(child)
    out = os.read(parent, 10_000).decode()
    os.close(parent)
    assert out.count("\n") == 1  # the two updates share one line; what is said stays
    assert out.count("\r\x1b[K") == 3
    assert out.endswith("\r\x1b[Kstays\r\n")


def test_durations_and_tables() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert table([("a", "x"), ("long", "y")]).splitlines()[1:3] == ["a     x", "long  y"]
