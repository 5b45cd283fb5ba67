"""Training outlives its screen: a closed pipe, a full device, a closed terminal, none at all."""

import contextlib
import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist.run.outcome import Ending, Outcome
from tests.support.resuming import ONE_EPOCH
from tests.support.slow import slow
from tests.support.terminal import CTRL_C, open_terminal
from tests.support.waiting import HANG_SECONDS, wait_until

TRAIN = (sys.executable, "-m", "resnet_dist", "train")
ENDLESS = "train.epochs=100000"


@pytest.fixture
def run_dir(run_root: Path) -> Path:
    return run_root / "tiny"


def in_a_shell(line: str, *arguments: object) -> int:
    """Runs bash's exit code of a line in which "$@" is the command."""
    command = ["bash", "-c", line, "bash", *map(str, arguments)]
    return subprocess.run(command, timeout=HANG_SECONDS).returncode


def logged_steps(run_dir: Path) -> int:
    journal = run_dir / "journal.jsonl"
    return journal.read_text().count('"train/loss"') if journal.exists() else 0


def outcome(run_dir: Path) -> tuple[Outcome, int | None]:
    ending = Ending.read(run_dir)
    assert ending is not None
    return ending.outcome, ending.step


@pytest.mark.parametrize(
    "screen",
    [
        '"$@" > >(head -c 10 >/dev/null) 2>&1',  # a pipe whose reader ends
        slow('"$@" >/dev/full 2>/dev/full'),
        slow('"$@" >&- 2>&-'),
        slow('"$@" <&- >&- 2>&-'),
        slow('PYTHONUNBUFFERED=1 "$@" > >(head -c 10 >/dev/null) 2>&1'),
        slow('PYTHONUNBUFFERED= "$@" > >(head -c 10 >/dev/null) 2>&1'),
        slow('"$@" --ranks 2 > >(head -c 10 >/dev/null) 2>&1'),
    ],
)
def test_training_goes_to_its_end(screen: str, tiny_yaml: Path, run_dir: Path) -> None:
    assert in_a_shell(screen, *TRAIN, tiny_yaml, *ONE_EPOCH) == 0
    assert outcome(run_dir) == (Outcome.FINISHED, 3)
    assert logged_steps(run_dir) == 3
    assert "finished at step 3" in (run_dir / "log.txt").read_text()


@pytest.mark.slow
def test_a_stopped_terminal_does_not_stop_training(tiny_yaml: Path, run_dir: Path) -> None:
    """Ctrl-S: nobody sees the screen move. After Ctrl-Q it moves again."""
    with open_terminal([*TRAIN, tiny_yaml, ENDLESS]) as terminal:
        terminal.wait_for("loss ")
        terminal.press(b"\x13")
        before = logged_steps(run_dir)
        wait_until(lambda: logged_steps(run_dir) > before + 100, "training waits for the screen")
        terminal.press(b"\x11")
        terminal.press(CTRL_C)
        terminal.wait_for("to resume")
        assert terminal.exit_code() == 75


@pytest.mark.slow
def test_a_reader_that_is_stuck_does_not_stop_training(tiny_yaml: Path, run_dir: Path) -> None:
    never_read, screen = os.pipe()
    os.set_blocking(screen, False)
    with contextlib.suppress(BlockingIOError):
        while True:  # until the pipe is full
            os.write(screen, bytes(1 << 16))
    os.set_blocking(screen, True)
    command = [*TRAIN, tiny_yaml, *ONE_EPOCH]
    try:
        done = subprocess.run(command, stdout=screen, stderr=screen, timeout=HANG_SECONDS)
    finally:
        os.close(never_read)
        os.close(screen)
    assert done.returncode == 0
    assert outcome(run_dir) == (Outcome.FINISHED, 3)
    assert "finished at step 3" in (run_dir / "log.txt").read_text()


@pytest.mark.parametrize("screen", ['"$@" >&-', '"$@" 2>&-', '"$@" <&- >&- 2>&-'])
def test_no_file_takes_the_number_of_a_closed_screen(screen: str, tmp_path: Path) -> None:
    code = (
        "import os, sys; from resnet_dist.process import set_up_process; set_up_process();"
        f"descriptor = os.open({str(tmp_path / 'file')!r}, os.O_WRONLY | os.O_CREAT);"
        "print('shown', flush=True); print('shown', file=sys.stderr, flush=True);"
        "os.write(1, b'shown'); os.write(2, b'shown'); sys.exit(descriptor < 3)"
    )
    assert in_a_shell(screen, sys.executable, "-c", code) == 0
    assert (tmp_path / "file").read_bytes() == b""


def test_a_result_that_cannot_be_printed_is_an_error() -> None:
    """Unlike training, whose record is in files."""
    models = (sys.executable, "-m", "resnet_dist", "models")
    assert in_a_shell('"$@" | head -1 >/dev/null; exit ${PIPESTATUS[0]}', *models) in (0, 141)
    assert in_a_shell('"$@" >/dev/full 2>/dev/null', *models) not in (0, 141)


@pytest.mark.parametrize("ranks", [slow([]), slow(["--ranks", "2"])])
def test_a_terminal_that_is_closed_saves_and_stops(
    tiny_yaml: Path, run_dir: Path, ranks: list[str]
) -> None:
    with open_terminal([*TRAIN, tiny_yaml, ENDLESS, *ranks]) as terminal:
        terminal.wait_for("loss ")
        terminal.close()
        terminal.exit_code()
    state, step = outcome(run_dir)
    assert state is Outcome.STOPPED
    assert (run_dir / f"checkpoints/step-{step:08d}").is_dir()


@pytest.mark.slow
@pytest.mark.parametrize("ranks", [[], ["--ranks", "2"]])
def test_with_nohup_training_outlives_the_terminal(
    tiny_yaml: Path, run_dir: Path, tmp_path: Path, ranks: list[str]
) -> None:
    line = f'nohup "$@" >{tmp_path}/nohup.out & wait'
    command = ["bash", "-c", line, "bash", *TRAIN, tiny_yaml, ENDLESS, *ranks]
    with open_terminal(command) as terminal:
        wait_until(lambda: logged_steps(run_dir) > 2, "no step was done")
        terminal.close()
        terminal.exit_code()
        before = logged_steps(run_dir)
        wait_until(lambda: logged_steps(run_dir) > before + 5, "training did not continue")
    lock = (run_dir.parent / ".locks/tiny").read_text()  # "process 7 on n0"
    os.kill(int(lock.split()[1]), signal.SIGTERM)
    wait_until(lambda: outcome(run_dir)[0] is Outcome.STOPPED, "it did not stop")
