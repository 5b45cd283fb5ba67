"""Ctrl-C on a real terminal: an answer at once, a clean ending, and never a traceback."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist.config import Config
from resnet_dist.run.interrupt import CTRL_C_LINE
from resnet_dist.run.outcome import Ending, Outcome
from tests.support.slow import slow
from tests.support.terminal import CTRL_C, open_terminal
from tests.support.waiting import HANG_SECONDS

RESNET_DIST = (sys.executable, "-m", "resnet_dist")
ENDLESS = "train.epochs=100000"
SLOW_STEPS = ("model.name=resnet34", "train.global_batch_size=30")
SLOW_STEPS += ("train.max_local_batch_size=30", "data.scale_px=[224, 240]", "data.crop_px=224")
RANKS = [[], slow(["--ranks", "2"])]


@pytest.fixture
def run_dir(run_root: Path) -> Path:
    return run_root / "tiny"


@pytest.mark.parametrize("ranks", RANKS)
def test_the_first_saves_and_stops(tiny_yaml: Path, run_dir: Path, ranks: list[str]) -> None:
    with open_terminal([*RESNET_DIST, "train", tiny_yaml, ENDLESS, *ranks]) as terminal:
        terminal.wait_for("loss ")
        terminal.press(CTRL_C)
        assert terminal.exit_code() == 75
    assert terminal.screen.count(CTRL_C_LINE) == 1
    assert "to resume  run the same command again" in terminal.screen
    assert "Traceback" not in terminal.screen
    ending = Ending.read(run_dir)
    assert ending is not None
    assert ending.outcome is Outcome.STOPPED
    assert (run_dir / f"checkpoints/step-{ending.step:08d}").is_dir()


@pytest.mark.parametrize("ranks", RANKS)
def test_the_second_stops_without_saving(tiny_yaml: Path, run_dir: Path, ranks: list[str]) -> None:
    with open_terminal([*RESNET_DIST, "train", tiny_yaml, *SLOW_STEPS, *ranks]) as terminal:
        terminal.wait_for("first step")  # the second one takes seconds
        terminal.press(CTRL_C)
        terminal.wait_for(CTRL_C_LINE)
        terminal.press(CTRL_C)
        assert terminal.exit_code() == -signal.SIGINT
    assert terminal.screen.count("resnet-dist: ended by Ctrl-C") == 1
    assert "Traceback" not in terminal.screen
    assert not (run_dir / "checkpoints").exists()


@pytest.mark.slow
def test_ctrl_backslash_ends_at_once_too(tiny_yaml: Path) -> None:
    with open_terminal([*RESNET_DIST, "train", tiny_yaml, ENDLESS]) as terminal:
        terminal.wait_for("loss ")
        terminal.press(b"\x1c")
        assert terminal.exit_code() == -signal.SIGINT
    assert "Traceback" not in terminal.screen


HOLDER = """
import sys
from resnet_dist.config_file import load_config
from resnet_dist.run.folder import sole_process
with sole_process(load_config(sys.argv[1])):
    print("holds it", flush=True)
    sys.stdin.readline()
"""


@pytest.mark.parametrize("ranks", RANKS)
def test_while_waiting_for_a_name_it_ends_at_once(
    tiny_yaml: Path, run_dir: Path, ranks: list[str]
) -> None:
    with subprocess.Popen(
        [sys.executable, "-c", HOLDER, tiny_yaml],
        stdin=subprocess.PIPE,
        stdout=subprocess.PIPE,
        text=True,
    ) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        with open_terminal([*RESNET_DIST, "train", tiny_yaml, *ranks]) as terminal:
            terminal.wait_for("waiting for process")
            terminal.press(CTRL_C)
            assert terminal.exit_code() == 75
        assert "stopped while waiting; nothing has changed" in terminal.screen
        assert "is training under this name" not in terminal.screen  # what it says after a minute
        assert not run_dir.exists()
        holder.communicate("\n", timeout=HANG_SECONDS)


def verbs(checkpoint: Path, data: Path, here: Path) -> dict[str, list[object]]:
    images = [data / "train/class0/0.jpg"]
    return {
        "evaluate": ["evaluate", checkpoint],
        "recalibrate": ["evaluate", checkpoint, "--recalibrate-bn", "30"],
        "predict": ["predict", checkpoint, *images],
        "export": ["export", checkpoint, "--to", "pt2", "--output", here / "x.pt2"],
        "analyze": ["analyze", "responses", checkpoint],
        "verify": ["verify", data],
        "compare": ["compare", checkpoint.parent.parent],
        "prepare shards": ["prepare", "shards", data, here / "shards"],
        "prepare digits": ["prepare", "digits", here / "digits"],
        "bench index": ["bench", "index"],
        "bench order": ["bench", "order"],
        "bench checkpoint": ["bench", "checkpoint", here],
        "bench deterministic": ["bench", "deterministic"],
        "bench loader": ["bench", "loader", data, "--no-peers"],
        "bench peers": ["bench", "peers", data, "--model", "resnet18", "--batch-size", "2"],
        "bench step": ["bench", "step", "--model", "resnet20", "--px", "32"],
        "bench e2e": ["bench", "e2e", here / "tiny.yaml"],
        "bench loop": ["bench", "loop"],
        "bench start": ["bench", "start"],
        "dry run": ["train", here / "tiny.yaml", "--dry-run"],
        "status": ["status", here / "tiny.yaml"],
    }


DELAYS_SECONDS = tuple(map(float, os.environ.get("CTRL_C_SECONDS", "0.5 4").split()))
# Starts a verb, presses Ctrl-C after that many seconds of its own, and says whether it had ended.
PRESSES = """
import os, signal, sys, threading
delay = float(sys.argv.pop(1))
def press():
    os.killpg(0, signal.SIGINT)
timer = threading.Timer(delay, press)
timer.daemon = True
timer.start()
from resnet_dist.__main__ import main
main()
"""


@pytest.mark.slow
@pytest.mark.parametrize("verb", verbs(Path(), Path(), Path()))
def test_no_verb_shows_a_traceback(
    verb: str, trained: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    """At several moments: while it imports, while it works, and perhaps after its end."""
    checkpoint = trained().run_dir / "checkpoints/best"
    arguments = verbs(checkpoint, tiny_folder, tmp_path)[verb]
    for delay in DELAYS_SECONDS:
        command = [sys.executable, "-c", PRESSES, str(delay), *map(str, arguments)]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANG_SECONDS, start_new_session=True
        )
        assert "Traceback" not in done.stderr, done.stderr
        assert "KeyboardInterrupt" not in done.stderr, done.stderr
        interrupted = done.returncode in (-signal.SIGINT, 130)
        assert interrupted or "Ctrl-C" not in done.stderr, done.stderr
        if not interrupted:  # it was done before
            return
