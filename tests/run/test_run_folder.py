"""The folder of a run: its config, the record of what has changed, one process at a time."""

import os
import re
import shutil
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from resnet_dist import cli, distributed
from resnet_dist.config import Config, flat_settings
from resnet_dist.config_file import load_config
from resnet_dist.errors import UserError
from resnet_dist.job import build, tags
from resnet_dist.run import folder as run_folder
from resnet_dist.run.folder import check_run_folder, differing_settings, open_run_folder
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.tracking import mirror
from resnet_dist.tracking.mirror import RunRecord, mlflow_client
from resnet_dist.train import train
from tests.support.multirank import run_ranks
from tests.support.needs import needs
from tests.support.paths import REPO
from tests.support.resuming import ONE_EPOCH, newest, refused, resumed
from tests.support.waiting import HANG_SECONDS

FREE = {
    "name",
    *("data.root", "data.decode", "data.hw_decoder_load"),
    *("data.decode_threads", "data.read_threads", "data.prefetch_batches"),
    *("data.max_bad_samples", "train.max_local_batch_size", "train.log_every_steps"),
    "train.max_nonfinite_logs",
    *("train.save_every_epochs", "train.save_every_iterations"),
    *("train.keep_checkpoints", "train.keep_every_epochs"),
    *("tracking.run_root", "tracking.experiment", "tracking.mlflow"),
}


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return "another" if isinstance(value, str) or value is None else ("another", value)


@pytest.mark.parametrize("key", flat_settings(Config()))
def test_every_setting_counts_but_for_those_that_change_no_result(key: str) -> None:
    section, _, name = key.rpartition(".")
    now = Config()
    value = another(flat_settings(now)[key])
    if section:
        now = replace(now, **{section: replace(getattr(now, section), **{name: value})})
    else:
        now = replace(now, **{name: value})
    differing = differing_settings(Config(), now)
    assert [line.partition(" ")[0] for line in differing] == ([] if key in FREE else [key])


def test_a_setting_is_shown_as_it_would_be_written(tiny_config: Callable[..., Config]) -> None:
    before = tiny_config()
    now = tiny_config("train.iterations=9", "data.scale_px=[32, 48]", "train.deterministic=true")
    assert differing_settings(before, now) == [
        "data.scale_px [32, 40] -> [32, 48]",
        "train.epochs 2.0 -> null",
        "train.iterations null -> 9",
        "train.deterministic false -> true",
    ]


def test_a_run_folder_without_a_checkpoint_is_guarded_too(
    tiny_config: Callable[..., Config],
) -> None:
    open_run_folder(tiny_config(), 0, ())
    now = tiny_config("seed=1", "optim.base_lr=1.0")
    differ = "differs from config.yaml: seed 0 -> 1; optim.base_lr 0.4 -> 1.0; undo that, "
    assert differ in refused(now)
    with pytest.raises(UserError, match=re.escape(differ)):
        check_run_folder(now, anyway=False)
    assert len(check_run_folder(now, anyway=True)) == 2
    assert build(now, distributed.start(), resume_anyway=True).previous.changes


def test_what_changes_no_result_may_change(
    trained: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    (tmp_path / "moved").symlink_to(tiny_folder)
    free = [f"data.root={tmp_path}/moved", "train.log_every_steps=2", "data.read_threads=3"]
    job, said = resumed(trained(*free, "train.keep_every_epochs=1"))
    assert job.state.step == 3
    assert "warning" not in said


@needs("mlflow")
def test_resume_anyway_resumes_and_keeps_a_record(
    tiny_yaml: Path,
    other_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
    monkeypatch.setattr(mirror, "DRAIN_SECONDS", HANG_SECONDS)
    command = ["train", str(tiny_yaml), "tracking.mlflow=true", *ONE_EPOCH]
    cli.main(command)
    # Not argparse's way: an option among the overrides, as launchers have it.
    changed = [*command, "--resume-anyway", "optim.weight_decay=0.0", f"data.root={other_data}"]
    changed += ["train.epochs=2"]
    capsys.readouterr()
    cli.main(changed)
    said = capsys.readouterr().out
    config = load_config(tiny_yaml, [text for text in changed[2:] if text != "--resume-anyway"])
    listed = (
        "optim.weight_decay 0.0001 -> 0.0; train.epochs 1.0 -> 2.0; data: different training images"
    )
    assert f"\nwarning: from here on this is a different run: {listed}" in said
    assert "finished at step 6" in said
    record = (config.run_dir / "changes.txt").read_text()
    assert record.startswith(f"from step 3: {listed}")
    assert record.count("\n") == 1
    assert load_config(config.run_dir / "config.yaml") == config
    run = RunRecord.read(config.run_dir)
    assert run is not None
    logged = mlflow_client(run.tracking_uri).get_run(run.run_id).data
    assert logged.tags["changes"] == record
    assert logged.params["optim.weight_decay"] == "0.0001"  # it was begun so
    # From now on it is what was meant, with or without the flag: nothing is said again.
    for again in (changed, [text for text in changed if text != "--resume-anyway"]):
        cli.main(again)
        assert "warning" not in capsys.readouterr().out
    assert (config.run_dir / "changes.txt").read_text() == record
    # And the old settings are another run now.
    assert "optim.weight_decay 0.0 -> 0.0001" in refused(load_config(tiny_yaml, command[2:]))


def test_resume_anyway_killed_before_it_saved_leaves_the_run_as_it_was(
    trained: Callable[..., Config],
) -> None:
    """RUN/config.yaml is new by then, but the checkpoint is not: it decides, also without torch."""
    now = trained("seed=5")
    for _ in range(2):
        job, _ = resumed(now, resume_anyway=True)
        open_run_folder(now, job.state.step, job.previous.changes)
    assert (now.run_dir / "changes.txt").read_text() == "from step 3: seed 0 -> 5\n"
    assert tags(job, "test")["changes"] == "from step 3: seed 0 -> 5\n"
    line = "differs from the checkpoint of step 3: seed 0 -> 5"
    assert line in refused(now)
    with pytest.raises(UserError, match=line):
        check_run_folder(now, anyway=False)
    assert check_run_folder(trained(), anyway=False) == []
    # What never took effect is taken back.
    train(trained(), "test", Interrupt())
    assert not (now.run_dir / "changes.txt").exists()
    assert tags(job, "test")["changes"] == "none"


def test_a_damaged_note_of_the_newest_checkpoint_is_passed_over(
    trained: Callable[..., Config],
) -> None:
    """As train passes its checkpoint over; and format 2 has none: config.yaml is what is left."""
    note = newest(trained()) / "meta.json"
    note.write_text("{")
    open_run_folder(trained("seed=5"), 3, ())
    assert check_run_folder(trained(), anyway=True) == ["seed 5 -> 0"]


def test_changes_that_took_effect_stay(tiny_config: Callable[..., Config]) -> None:
    config, path = tiny_config(), tiny_config().run_dir / "changes.txt"
    open_run_folder(config, 0, ("a 0 -> 1",))
    open_run_folder(config, 0, ())  # killed before a checkpoint; config.yaml has a=1
    assert path.read_text() == "from step 0: a 0 -> 1\n"
    path.write_text(path.read_text() + "by hand\n")
    open_run_folder(config, 20, ("b 0 -> 1", "c 0 -> 1"))
    for _ in range(2):
        open_run_folder(config, 30, ("d 0 -> 1",))
    kept = "from step 0: a 0 -> 1\nby hand\nfrom step 20: b 0 -> 1; c 0 -> 1\n"
    assert path.read_text() == kept + "from step 30: d 0 -> 1\n"
    open_run_folder(config, 30, ())  # as it was
    assert path.read_text() == kept
    open_run_folder(config, 20, ("e 0 -> 1",))  # went back
    assert path.read_text() == "from step 0: a 0 -> 1\nby hand\nfrom step 20: e 0 -> 1\n"


@pytest.mark.parametrize(
    ("spoil", "why"),
    [
        (lambda path: path.write_text(""), "is empty"),
        (lambda path: path.write_text("- a\n- b\n"), "must contain keys and values"),
        (lambda path: path.write_text("a: [1,"), "not valid YAML"),
        (lambda path: path.write_bytes(b"\xff\xfe\x00"), "cannot be read: not a text file"),
        (lambda path: path.mkdir(), "cannot be read: Is a directory"),
    ],
)
def test_a_config_yaml_that_cannot_be_used_is_one_line(
    tiny_config: Callable[..., Config], spoil: Callable[[Path], None], why: str
) -> None:
    path = tiny_config().run_dir / "config.yaml"
    path.parent.mkdir(parents=True)
    spoil(path)
    line = refused(tiny_config())
    assert line.startswith(str(path))
    assert why in line
    assert line.endswith("; repair it or move it away, or give another name=")


def test_a_config_yaml_that_is_not_needed_is_made_anew(trained: Callable[..., Config]) -> None:
    """A checkpoint is the truth."""
    path = trained().run_dir / "config.yaml"
    path.write_text("")
    train(trained(), "test", Interrupt())
    assert load_config(path) == trained()


@pytest.mark.parametrize("in_the_way", ["runs", "runs/tiny", "runs/tiny/journal.jsonl/x"])
def test_a_run_folder_that_cannot_be_made_is_one_line(
    tiny_config: Callable[..., Config], tmp_path: Path, in_the_way: str
) -> None:
    path = tmp_path / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    with pytest.raises(UserError, match=r"runs.*: cannot be written: .* give another"):
        open_run_folder(tiny_config(), 0, ())
    assert str(tmp_path / "runs") in refused(tiny_config())
    assert path.read_text() == "mine"


def test_a_copied_run_resumes_under_another_name(
    trained: Callable[..., Config], tmp_path: Path
) -> None:
    shutil.copytree(trained().run_dir, tmp_path / "runs/copy", symlinks=True)
    job, said = resumed(trained("name=copy"))
    assert job.state.step == 3
    assert "warning" not in said


# --------------------------------------------------------------------------------------------------
# One process at a time


HOLDER = """
import os, sys, time
from resnet_dist.config_file import load_config
from resnet_dist.run.folder import sole_process
with sole_process(load_config(sys.argv[1])):
    print("holds it", flush=True)
    if len(sys.argv) > 2 and os.fork() == 0:  # has the lock's file open, too
        os.closerange(0, 3)
        time.sleep(float(sys.argv[2]))
        os._exit(0)
    sys.stdin.readline()
print("released", flush=True)
sys.stdin.readline()
"""


@pytest.fixture
def holder(tiny_yaml: Path) -> Iterator[Callable[..., subprocess.Popen[str]]]:
    """Starts a process that holds the lock until it reads a line."""
    started: list[subprocess.Popen[str]] = []

    def start(*arguments: str) -> subprocess.Popen[str]:
        process = subprocess.Popen(
            [sys.executable, "-c", HOLDER, tiny_yaml, *arguments],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            cwd=REPO,
        )
        started.append(process)
        assert process.stdout is not None
        assert process.stdout.readline() == "holds it\n"
        return process

    yield start
    for process in started:
        process.kill()
        process.communicate()


def test_two_processes_do_not_share_a_run(
    tiny_config: Callable[..., Config],
    holder: Callable[..., subprocess.Popen[str]],
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    config = tiny_config(*ONE_EPOCH)
    process = holder()
    monkeypatch.setattr(run_folder, "LOCK_WAIT_SECONDS", 0.1)
    named = f"process {process.pid} on {os.uname().nodename}"
    assert refused(config) == (
        f"{config.run_dir}: {named} is training under this name; stop it, or use another name="
    )
    assert capsys.readouterr().out == f"{config.run_dir}: waiting for {named} to release it\n"
    assert not config.run_dir.exists()
    train(tiny_config(*ONE_EPOCH, "name=other"), "test", Interrupt())  # this one is free
    process.kill()  # a lock dies with its process
    process.wait(HANG_SECONDS)
    for _ in range(2):  # and ends with a run
        train(config, "test", Interrupt())
    assert newest(config).name == "step-00000003"


def test_a_run_waits_for_the_one_before(
    tiny_config: Callable[..., Config], holder: Callable[..., subprocess.Popen[str]]
) -> None:
    """Even where a process that it forked, as a data loader's, outlives it."""
    process = holder("20")
    assert process.stdin is not None
    release = threading.Timer(0.5, lambda: print(file=process.stdin, flush=True))
    release.start()
    began = time.monotonic()
    with run_folder.sole_process(tiny_config()):
        assert time.monotonic() - began > 0.4
    assert time.monotonic() - began < 15


def test_all_ranks_hear_of_another_process(
    tiny_config: Callable[..., Config], holder: Callable[..., subprocess.Popen[str]]
) -> None:
    process = holder()
    said = run_ranks(refusal_of_training, 2, tiny_config(*ONE_EPOCH), init_process_group=False)
    assert len(set(said)) == 1
    assert f"process {process.pid}" in said[0]


def refusal_of_training(rank: int, world_size: int, config: Config) -> str:
    run_folder.LOCK_WAIT_SECONDS = 0.1
    try:
        train(config, "test", Interrupt())
    except UserError as error:
        return str(error)
    return "not refused"


def test_without_a_lock_a_run_trains(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*ONE_EPOCH)
    config.run_dir.parent.mkdir()
    (config.run_dir.parent / ".locks").write_text("in the way")
    train(config, "test", Interrupt())
    assert newest(config).name == "step-00000003"


def test_a_dry_run_says_what_differs(
    trained: Callable[..., Config], tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tiny_yaml), "--dry-run", *ONE_EPOCH]
    cli.main(command)
    assert "resume-anyway" not in capsys.readouterr().out
    with pytest.raises(SystemExit) as left:
        cli.main([*command, "seed=7"])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert "peak lr" in out  # the plan is useful all the same
    assert err.startswith(
        f"resnet-dist: {trained().run_dir}: differs from the checkpoint of step 3: seed 0 -> 7; "
    )
    cli.main([*command, "seed=7", "--resume-anyway"])
    assert "peak lr" in capsys.readouterr().out


# --------------------------------------------------------------------------------------------------
# Through the launchers


def launch(cwd: Path, *command: object, **environment: str) -> subprocess.CompletedProcess[str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"OMP_NUM_THREADS": "1"} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


@pytest.mark.slow
@needs("submitit")
def test_submit_refuses_before_it_queues_and_hands_the_flag_on(
    trained: Callable[..., Config], tiny_yaml: Path, tmp_path: Path
) -> None:
    command = [sys.executable, REPO / "launch/submit.py", tiny_yaml, "--gpus-per-node", "0"]
    command += ["train.epochs=2", *ONE_EPOCH[1:]]
    done = launch(tmp_path, *command)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"resnet-dist: {trained().run_dir}: differs from the checkpoint of step 3: train.epochs"
        " 1.0 -> 2.0; undo that, use another name=, or add --resume-anyway"
    ]
    done = launch(tmp_path, *command, "--resume-anyway", "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: from here on this is a different run: train.epochs 1.0 -> 2.0\n" in done.stdout
    assert "finished at step 6" in done.stdout


def test_the_shell_launchers_hand_the_flag_on(tmp_path: Path) -> None:
    """The interpreter and Slurm's commands are scripts that note what they were called with."""
    notes = tmp_path / "notes"
    for name, body in {
        "python": 'case "$*" in *--dry-run*) echo plan;; esac',
        "srun": "",
        "scontrol": f"echo '   Command={REPO}/slurm/resnet50.sh NodeAddr=127.0.0.1 n0'",
    }.items():
        script = tmp_path / name
        script.write_text(
            f'#!/bin/sh\n[ "$0" = {tmp_path}/scontrol ] || echo "$@" >> {notes}\n{body}\n'
        )
        script.chmod(0o755)
    ours = {"PYTHON": f"{tmp_path}/python", "PATH": f"{tmp_path}:{os.environ['PATH']}"}
    ours["NPROC_PER_NODE"] = "1"
    given = ["seed=7", "--resume-anyway"]
    done = launch(tmp_path, REPO / "launch/torchrun.sh", "c.yaml", *given, **ours)
    assert done.returncode == 0, done.stderr
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_SUBMIT_DIR": str(REPO), "CONFIG": "c.yaml"}
    done = launch(tmp_path, REPO / "slurm/resnet50.sh", *given, **ours, **slurm)
    assert done.returncode == 0, done.stderr
    calls = notes.read_text().splitlines()
    assert sum("c.yaml seed=7 --resume-anyway --dry-run" in call for call in calls) == 2
    assert sum(call.endswith("c.yaml seed=7 --resume-anyway") for call in calls) == 2
