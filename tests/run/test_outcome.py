"""How a run ended: what real processes leave in outcome.json, and what `status` says of it."""

import os
import signal
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from resnet_dist import cli
from resnet_dist.config import Config
from resnet_dist.run.folder import lock_of
from resnet_dist.run.outcome import START_TOKEN, Ending, Outcome
from tests.support.multirank import serve_store
from tests.support.waiting import HANG_SECONDS, wait_until

Running = subprocess.Popen[str]
Start = Callable[..., Running]
Trained = Callable[..., Config]
Captured = pytest.CaptureFixture[str]
ENDLESS = "train.epochs=100000"
TRAIN = (sys.executable, "-m", "resnet_dist", "train")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone")
WITHOUT_TORCH = "import sys; sys.modules['torch'] = None; from resnet_dist import cli; cli.main()"
# For a folder that is taken; else it waits for a minute.
IMPATIENT = (
    "from resnet_dist import cli; from resnet_dist.run import folder; "
    "folder.LOCK_WAIT_SECONDS = 0.1; cli.main()"
)


@pytest.fixture
def run_dir(run_root: Path) -> Path:
    return run_root / "tiny"


@pytest.fixture
def start() -> Iterator[Start]:
    """Starts a command as start "mine"; what still runs at the end of the test is killed."""
    started: list[Running] = []

    def begin(*command: object, **environment: str) -> Running:
        process = subprocess.Popen(
            [str(part) for part in command],
            env=os.environ | {START_TOKEN: "mine", "OMP_NUM_THREADS": "1"} | environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            start_new_session=True,
        )
        started.append(process)
        return process

    yield begin
    for process in started:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture
def running(start: Start, tiny_yaml: Path, run_dir: Path) -> Running:
    """A direct start that has done a step and continues."""
    process = start(*TRAIN, tiny_yaml, ENDLESS)
    wait_for_a_step(run_dir)
    return process


def ended(process: Running) -> tuple[int, str]:
    """Its exit code, and what it said."""
    said, _ = process.communicate(timeout=HANG_SECONDS)
    return process.returncode, said


def wait_for_a_step(run_dir: Path) -> None:
    journal = run_dir / "journal.jsonl"
    wait_until(lambda: journal.exists() and journal.stat().st_size, "no step was done")


def status(*arguments: object) -> int:
    with pytest.raises(SystemExit) as left:
        cli.main(["status", *(str(part) for part in arguments), "--exit-code"])
    return int(left.value.code or 0)


def ending(run_dir: Path) -> tuple[Outcome, int | None, str]:
    held = Ending.read(run_dir)
    assert held is not None
    return held.outcome, held.step, held.start


def test_a_run_that_goes_on_says_running(
    running: Running, run_dir: Path, capsys: Captured, monkeypatch: pytest.MonkeyPatch
) -> None:
    assert ending(run_dir) == (Outcome.RUNNING, 0, "mine")
    monkeypatch.chdir(run_dir)
    for name in (run_dir, "."):
        assert status(name) == 1
        assert f"{run_dir}: running at step 0, " in capsys.readouterr().out


def test_a_direct_start_that_is_told_to_stop_exits_with_75(running: Running, run_dir: Path) -> None:
    running.send_signal(signal.SIGTERM)
    assert ended(running)[0] == 75
    assert status(run_dir, "--start", "mine") == 75
    outcome, step, _ = ending(run_dir)
    assert outcome is Outcome.STOPPED
    assert (run_dir / f"checkpoints/step-{step:08d}").is_dir()


@pytest.mark.slow
def test_ranks_under_a_launcher_that_are_told_to_stop_exit_with_0(
    start: Start, tiny_yaml: Path, run_dir: Path
) -> None:
    torchrun = start(*TORCHRUN, "--nproc-per-node=2", *TRAIN[1:], tiny_yaml, ENDLESS)
    wait_for_a_step(run_dir)
    one_rank = int(lock_of(run_dir).read_text().split()[1])  # "process 7 on n0"
    os.kill(one_rank, signal.SIGTERM)
    code, said = ended(torchrun)
    assert code == 0, said
    assert status(run_dir, "--start", "mine") == 75


def test_a_finished_run(trained: Trained) -> None:
    assert ending(trained().run_dir)[:2] == (Outcome.FINISHED, 3)
    assert status(trained().run_dir) == 0


def test_bad_input_that_the_run_has_met(
    start: Start, tiny_yaml: Path, run_dir: Path, tmp_path: Path
) -> None:
    assert ended(start(*TRAIN, tiny_yaml, f"data.root={tmp_path}/nowhere"))[0] == 2
    assert ending(run_dir) == (Outcome.BAD_INPUT, None, "mine")
    assert status(run_dir) == 2


@pytest.mark.slow
def test_a_run_whose_other_rank_has_died_failed(
    start: Start, tiny_yaml: Path, run_dir: Path
) -> None:
    _store, where = serve_store()
    world = {"WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2"} | where
    one = (*TRAIN, tiny_yaml, ENDLESS)
    ranks = [start(*one, RANK=rank, LOCAL_RANK=rank, **world) for rank in "01"]
    wait_for_a_step(run_dir)
    ranks[1].kill()
    assert ended(ranks[0])[0] == 1
    assert ending(run_dir) == (Outcome.FAILED, 0, "mine")
    assert status(run_dir) == 1


def test_a_killed_run_is_told_from_one_that_runs(
    running: Running, run_dir: Path, capsys: Captured
) -> None:
    running.kill()
    ended(running)
    assert status(run_dir, "--start", "mine") == 1
    assert f"{run_dir}: killed after starting at step 0" in capsys.readouterr().out


def test_what_another_start_wrote_does_not_count(trained: Trained, capsys: Captured) -> None:
    run_dir = trained().run_dir
    assert status(run_dir, "--start", ending(run_dir)[2]) == 0
    assert status(run_dir, "--start", "another") == 1
    assert capsys.readouterr().out.endswith(
        f"{run_dir}: start another never locked this run folder\n"
    )


@pytest.mark.slow
def test_a_process_that_is_refused_leaves_the_ending_alone(
    running: Running, start: Start, tiny_yaml: Path, run_dir: Path
) -> None:
    before = (run_dir / "outcome.json").read_bytes()
    second = start(
        sys.executable, "-c", IMPATIENT, "train", tiny_yaml, ENDLESS, RESNET_DIST_START="second"
    )
    code, said = ended(second)
    assert code == 2
    assert "is training under this name" in said
    assert (run_dir / "outcome.json").read_bytes() == before
    assert status(run_dir, "--start", "second") == 1


def test_status_needs_no_torch(start: Start, trained: Trained, tiny_yaml: Path) -> None:
    for name in (trained().run_dir, tiny_yaml):
        asked = (sys.executable, "-c", WITHOUT_TORCH, "status", name, "--exit-code")
        code, said = ended(start(*asked))
        assert (code, "finished at step 3" in said) == (0, True), said


@pytest.mark.parametrize("content", ["", "[]", '{"outcome": "lost"}'])
def test_an_ending_that_cannot_be_read_is_one_line(
    run_dir: Path, content: str, capsys: Captured
) -> None:
    run_dir.mkdir(parents=True)
    (run_dir / "outcome.json").write_text(content)
    assert status(run_dir) == 2
    assert (
        "outcome.json: cannot be read: not in the format that a run writes; "
        in capsys.readouterr().err
    )
