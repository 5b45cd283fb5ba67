"""`train --ranks N`: real ranks, one clean ending, and an exit code that says how it ended."""

import os
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from resnet_dist.run.folder import lock_of
from resnet_dist.run.outcome import Ending, Outcome
from tests.support.resuming import ONE_EPOCH
from tests.support.waiting import HANG_SECONDS, wait_until

pytestmark = pytest.mark.slow
TRAIN = (sys.executable, "-m", "resnet_dist", "train")
ENDLESS = "train.epochs=100000"
Running = subprocess.Popen[str]


@pytest.fixture
def run_dir(run_root: Path) -> Path:
    return run_root / "tiny"


@pytest.fixture
def running(tiny_yaml: Path, run_dir: Path) -> Iterator[Running]:
    """Two ranks that have done a step and continue."""
    process = start(tiny_yaml, ENDLESS)
    journal = run_dir / "journal.jsonl"
    wait_until(lambda: journal.exists() and journal.stat().st_size, "no step was done")
    yield process
    process.kill()
    process.communicate()


def start(*arguments: object) -> Running:
    return subprocess.Popen(
        [*TRAIN, *map(str, arguments), "--ranks", "2"],
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


def ended(process: Running) -> tuple[int, str, str]:
    """Returns its exit code, and what it said on stdout and stderr."""
    out, err = process.communicate(timeout=HANG_SECONDS)
    return process.returncode, out, err


def ranks_of(process: Running) -> list[int]:
    """Returns the process ids of the ranks, rank 0 first."""
    children = Path(f"/proc/{process.pid}/task/{process.pid}/children").read_text().split()
    found = {}
    for child in children:
        environment = Path(f"/proc/{child}/environ").read_bytes().split(b"\0")
        found |= {int(entry[5:]): int(child) for entry in environment if entry.startswith(b"RANK=")}
    return [found[rank] for rank in sorted(found)]


def outcome(run_dir: Path) -> Outcome:
    ending = Ending.read(run_dir)
    assert ending is not None
    return ending.outcome


def test_two_ranks_train_to_the_end(tiny_yaml: Path, run_dir: Path) -> None:
    code, out, err = ended(start(tiny_yaml, *ONE_EPOCH))
    assert (code, err) == (0, "")
    assert "ranks            2" in out
    assert out.count("finished at step 3") == 1
    assert outcome(run_dir) is Outcome.FINISHED
    # With more to do, it is resumed by two ranks again.
    code, out, _ = ended(start(tiny_yaml, "train.epochs=2", "--resume-anyway", *ONE_EPOCH[1:]))
    assert code == 0
    assert "resumes at step 3" in out
    assert "saved" in out


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGUSR1, signal.SIGHUP, signal.SIGINT])
def test_a_request_to_stop_reaches_the_ranks(
    running: Running, run_dir: Path, number: signal.Signals
) -> None:
    running.send_signal(number)
    code, _, err = ended(running)
    assert (code, err) == (75, "")
    assert outcome(run_dir) is Outcome.STOPPED


def test_a_request_that_comes_before_the_ranks_can_hear_it_is_kept(
    tiny_yaml: Path, run_dir: Path
) -> None:
    process = start(tiny_yaml, ENDLESS)
    wait_until(lambda: len(ranks_of(process)) == 2, "no ranks were started")
    process.send_signal(signal.SIGTERM)
    code, _, err = ended(process)
    assert (code, err) == (75, "")
    assert outcome(run_dir) is Outcome.STOPPED


def test_bad_input_is_one_line(tiny_yaml: Path, run_dir: Path, tmp_path: Path) -> None:
    code, _, err = ended(start(tiny_yaml, f"data.root={tmp_path}/nowhere"))
    assert code == 2
    assert err.startswith("resnet-dist: ")
    assert err.count("\n") == 1
    assert outcome(run_dir) is Outcome.BAD_INPUT


@pytest.mark.parametrize("rank", [0, 1])
def test_a_rank_that_is_killed_ends_the_others(running: Running, run_dir: Path, rank: int) -> None:
    os.kill(ranks_of(running)[rank], signal.SIGKILL)
    code, _, err = ended(running)
    assert code == 1
    last = err.splitlines()[-1]
    assert last.startswith("resnet-dist: rank ")
    assert f"rank {rank} was ended by SIGKILL; the same command resumes the run" in err
    assert "torch.distributed.elastic" not in err


def test_ranks_whose_launcher_is_killed_save_and_stop(running: Running, run_dir: Path) -> None:
    running.kill()
    wait_until(lambda: outcome(run_dir) is Outcome.STOPPED, "the ranks trained on")
    assert (run_dir / "checkpoints/latest").is_dir()


def test_it_does_not_go_with_torchrun(tiny_yaml: Path, run_dir: Path) -> None:
    done = subprocess.run(
        [*TRAIN, tiny_yaml, "--ranks", "2"],
        env=os.environ | {"RANK": "0"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 2
    assert "command line: --ranks: torchrun has started the ranks; leave it out" in done.stderr
    assert not lock_of(run_dir).exists()
