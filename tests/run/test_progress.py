"""What a person sees, on a terminal and elsewhere."""

import re
import sys
from pathlib import Path

import pytest

from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.plan import Plan
from resnet_dist.run.progress import Console, Progress, duration, fitting, table, time_left
from tests.support.terminal import open_terminal

METRICS = {
    "train/loss": 1.5,
    "train/acc1": 42.0,
    "train/lr": 0.1,
    "perf/images_per_sec": 1234.5,
    "perf/data_wait_pct": 3.2,
}
PLAN = Plan.of(Config(), 1, 25_600, 100)


def progress_on(console: Console) -> Progress:
    return Progress(console, PLAN, first_step=0)


def test_lines_elsewhere(capsys: pytest.CaptureFixture[str]) -> None:
    progress = progress_on(Console(speaks=True))
    progress.tick(1)
    progress.update(50, METRICS, best_acc1=-1)
    progress.update(100, METRICS, best_acc1=43.21)
    out = capsys.readouterr().out
    assert "\r" not in out
    first, second = out.splitlines()
    clock = r"\d{4}-\d\d-\d\d \d\d:\d\d:\d\d  "
    wanted = r"epoch 0\.5/90  loss 1\.5000  acc1 42\.0%  1,234 img/s  ETA 0:0\d  "
    rest = r"lr 0\.1  data-wait 3%"
    assert re.fullmatch(f"{clock}{wanted}step 50/9000  {rest}", first)
    assert re.fullmatch(
        f"{clock}{wanted}best 43\\.21%  step 100/9000  {rest}".replace("0\\.5/", "1\\.0/"), second
    )


def test_other_ranks_are_silent(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with Console(speaks=False) as console:
        console.keep_in(tmp_path)
        progress = progress_on(console)
        progress.console.say("hello")
        progress.tick(1)
        progress.update(50, METRICS, best_acc1=-1)
    assert capsys.readouterr() == ("", "")
    assert not (tmp_path / "log.txt").exists()


DRAWS = (
    "import sys; from pathlib import Path; from tests.run.test_progress import *\n"
    "with Console(True) as console:\n"
    "    console.keep_in(Path(sys.argv[1]))\n"
    "    p = progress_on(console); p.update(50, METRICS, 43.21); p.update(60, METRICS, 43.21)\n"
    "    console.say('stays')"
)


@pytest.mark.parametrize(
    ("columns", "shown"),
    [
        (60, "epoch 0.6/90 loss 1.5000 acc1 42.0% 1,234 img/s ETA 0:00"),
        (80, "epoch 0.6/90  loss 1.5000  acc1 42.0%  1,234 img/s  ETA 0:00  best 43.21%"),
        (
            120,
            "epoch 0.6/90  loss 1.5000  acc1 42.0%  1,234 img/s  ETA 0:00  best 43.21%  "
            "step 60/9000  lr 0.1  data-wait 3%",
        ),
        (20, "epoch 0.6/90"),
        (8, "epoch 0"),
    ],
)
def test_one_living_line_on_a_terminal(columns: int, shown: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", DRAWS, tmp_path]
    with open_terminal(command, columns) as terminal:
        assert terminal.exit_code() == 0, terminal.screen
    out = terminal.screen
    assert out.count("\n") == 1  # the two updates share one line; what is said stays
    out = re.sub(r"ETA 0:0\d", "ETA 0:00", out)  # on a slow machine it is more
    _, first, second, last = out.split("\r\x1b[K")
    assert (len(first), second, last) == (len(shown), shown, "stays\r\n")


def test_a_dumb_terminal_gets_plain_lines(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Such as Emacs's shell, which shows escape sequences as they are."""
    monkeypatch.setenv("TERM", "dumb")
    with open_terminal([sys.executable, "-c", DRAWS, tmp_path]) as terminal:
        assert terminal.exit_code() == 0
    assert "\x1b" not in terminal.screen
    assert terminal.screen.count("\n") == 3


def test_the_widest_figures_fit_into_60_columns() -> None:
    """ResNet-110 on CIFAR-10, fast; and ResNet-152 on ImageNet for weeks."""
    for name, fields in {
        "cifar": ["epoch 123.4/164", "loss 0.1234", "acc1 95.1%", "3,456 img/s", "ETA 1h02"],
        "imagenet": ["epoch 12.3/90", "loss 1.2345", "acc1 62.1%", "12,345 img/s", "ETA 26h13"],
    }.items():
        assert fitting([*fields, "best 71.23%"], 59) == " ".join(fields), name


def test_the_log_keeps_what_the_screen_had_over_all_starts(tmp_path: Path) -> None:
    for start in ("one", "two"):
        console = Console(speaks=True)
        console.say(f"before the folder, {start}")
        console.keep_in(tmp_path)
        progress_on(console).update(50, METRICS, best_acc1=-1)
        console.keep("name \udce9 and \U0001f408")
        with pytest.raises(UserError), console:
            raise UserError("a disk is full")
    console = Console(speaks=True)
    console.keep_in(tmp_path)
    with pytest.raises(ZeroDivisionError), console:
        1 / 0  # noqa: B018
    lines = (tmp_path / "log.txt").read_text().splitlines()
    assert [line for line in lines if line.startswith("before")] == [
        "before the folder, one",
        "before the folder, two",
    ]
    assert sum("loss 1.5000" in line for line in lines) == 2
    assert sum(line.endswith("  name \\udce9 and \U0001f408") for line in lines) == 2
    assert lines.count("resnet-dist: a disk is full") == 2
    assert lines[-1] == "ZeroDivisionError: division by zero"
    assert "Traceback" in "".join(lines)
    assert sum(line.startswith("--- 2") for line in lines) == 3


def test_a_log_that_cannot_be_written_is_done_without(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "log.txt").mkdir()
    with Console(speaks=True) as console:
        console.keep_in(tmp_path)
        console.say("shown")
    assert capsys.readouterr().out == "shown\n"


def test_durations_and_tables() -> None:
    assert [duration(s) for s in (0, 59.6, 61, 3723)] == ["0:00", "1:00", "1:01", "1:02:03"]
    assert [time_left(s) for s in (0, 61, 3599, 3600, 94_400)] == [
        *("0:00", "1:01", "59:59", "1h00", "26h13"),
    ]
    assert table([("a", "x"), ("long", "y")]).splitlines()[1:3] == ["a     x", "long  y"]
