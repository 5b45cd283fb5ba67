"""The promise of a resumed run: what is refused, in one line, and what --resume-anyway does."""

import hashlib
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

import mlflow
import pytest
import torch
from multirank import run_ranks
from PIL import Image

from resnet_dist import (
    checkpoint,
    checkpoint_folder,
    checkpoint_list,
    cli,
    distributed,
    run_folder,
)
from resnet_dist.config import Config, leaves
from resnet_dist.config_file import load_config
from resnet_dist.data.quarantine import write_quarantine
from resnet_dist.data.source import who_decodes
from resnet_dist.determinism import fix_algorithms
from resnet_dist.errors import UserError
from resnet_dist.interrupt import Interrupt
from resnet_dist.job import Job, build, restore, tags
from resnet_dist.resume import describe, made_with, not_bit_for_bit
from resnet_dist.run_folder import check_run_folder, differing_settings, open_run_folder
from resnet_dist.tracking import RunRecord
from resnet_dist.train import train

REPO = Path(__file__).resolve().parent.parent
ONE_EPOCH = ("train.epochs=1", "train.eval_every_iterations=100")  # 3 steps
FREE = {
    "name",
    *("data.root", "data.decode_threads", "data.read_threads", "data.prefetch_batches"),
    *("data.max_bad_samples", "train.max_local_batch_size", "train.log_every_steps"),
    *("train.save_every_epochs", "train.save_every_iterations"),
    *("train.keep_checkpoints", "train.keep_every_epochs"),
    *("tracking.run_root", "tracking.experiment", "tracking.mlflow"),
}


@pytest.fixture
def trained(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """tiny_config, in whose run folder three steps have been done."""
    train(tiny_config(*ONE_EPOCH), "test", Interrupt())
    return lambda *overrides: tiny_config(*ONE_EPOCH, *overrides)


@pytest.fixture
def other_data(tiny_folder: Path, tmp_path: Path) -> Path:
    """Of the same names and classes; one image has another size."""
    root = tmp_path / "other"
    shutil.copytree(tiny_folder, root)
    Image.new("RGB", (90, 90)).save(root / "train/class0/0.jpg")
    return root


def refused(config: Config, resume_anyway: bool = False) -> str:
    with pytest.raises(UserError) as caught:
        train(config, "test", Interrupt(), resume_anyway)
    assert "\n" not in str(caught.value)
    return str(caught.value)


def resumed(config: Config, resume_anyway: bool = False) -> tuple[Job, str]:
    job = build(config, distributed.start(), resume_anyway)
    return job, str(restore(job))


def newest(config: Config) -> Path:
    path = checkpoint_list.latest(config.run_dir)
    assert path is not None
    return path


def rewrite(config: Config, **changed: Any) -> None:
    """The newest checkpoint, as if it had been made by another machine or version."""
    path = newest(config)
    content = checkpoint.load(path) | changed
    content = {key: value for key, value in content.items() if value is not ...}
    shutil.rmtree(path)
    checkpoint_folder.write(path, content)


def files_of(folder: Path) -> dict[Path, str]:
    paths = [p for p in folder.rglob("*") if p.is_file()]
    return {p: hashlib.sha256(p.read_bytes()).hexdigest() for p in paths}


def another(value: Any) -> Any:
    if isinstance(value, bool):
        return not value
    return "another" if isinstance(value, str) or value is None else ("another", value)


@pytest.mark.parametrize("key", leaves(Config()))
def test_every_setting_counts_but_for_those_that_change_no_result(key: str) -> None:
    section, _, name = key.rpartition(".")
    now = Config()
    value = another(leaves(now)[key])
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


def test_one_refusal_lists_all_that_differs(
    trained: Callable[..., Config], other_data: Path, tiny_folder: Path
) -> None:
    """And nothing in the run folder is touched."""
    rewrite(trained(), decoder="mixed")
    before = files_of(trained().run_dir)
    # The batch is larger than the data: this would be told first, had the plan been made before.
    now = trained("optim.base_lr=0.2", "train.global_batch_size=1000", f"data.root={other_data}")
    line = refused(now)
    parts = re.fullmatch(
        r"(.+): cannot go on from step 3, as these differ: (.+)\. Go on as it was, give another "
        r"name=, or add --resume-anyway",
        line,
    )
    assert parts is not None, line
    assert parts[1] == str(trained().run_dir)
    old = checkpoint.load(newest(trained()))["fingerprints"]["training images"]
    new = build(replace(now, name="x", train=trained().train), distributed.start()).facts
    new = new["fingerprints"]["training images"]
    assert parts[2].split("; ") == [
        "optim.base_lr 0.4 -> 0.2",
        "train.global_batch_size 8 -> 1000",
        f"data: other training images ({tiny_folder} {old[:12]} -> {other_data} {new[:12]})",
        "decoder mixed -> cpu",
    ]
    assert files_of(trained().run_dir) == before


def test_all_ranks_refuse_alike(trained: Callable[..., Config]) -> None:
    lines = run_ranks(refusal_of, 2, trained("seed=5"), init_process_group=False)
    assert len(set(lines)) == 1
    assert "cannot go on from step 3, as these differ: seed 0 -> 5. Go on" in lines[0]


def refusal_of(rank: int, world_size: int, config: Config) -> str:
    try:
        build(config, distributed.start())
    except UserError as error:
        return str(error)
    return "not refused"


def test_a_run_folder_without_a_checkpoint_is_guarded_too(
    tiny_config: Callable[..., Config],
) -> None:
    open_run_folder(tiny_config(), 0, ())
    now = tiny_config("seed=1", "optim.base_lr=1.0")
    differ = "cannot go on, as these differ: seed 0 -> 1; optim.base_lr 0.4 -> 1.0. Go on as it was"
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


def test_the_line_says_from_where_and_by_whom(trained: Callable[..., Config]) -> None:
    job, said = resumed(trained())
    assert re.fullmatch(
        rf"resumes at step 3 \(epoch 1\.00\) from {newest(trained())}, "
        r"saved 20\d\d-\d\d-\d\d \d\d:\d\d \S+ by 1 rank",
        said,
    )
    saved = {"step": 5, "made_with": {"world_size": "4"}, "saved_at": "on Monday"}
    assert describe(Path("x"), saved, job.plan) == (
        "resumes at step 5 (epoch 1.67) from x, saved on Monday by 4 ranks"
    )


def test_an_older_checkpoint_says_less_and_is_not_refused(trained: Callable[..., Config]) -> None:
    """Format 2 told neither the decoder nor who made it, and when: as its migration fills it in."""
    rewrite(trained(), decoder=None, made_with={}, saved_at=...)
    _, said = resumed(trained())
    assert said == f"resumes at step 3 (epoch 1.00) from {newest(trained())}"


def test_resume_anyway_goes_on_and_keeps_a_record(
    tiny_yaml: Path,
    other_data: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)
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
        "optim.weight_decay 0.0001 -> 0.0; train.epochs 1.0 -> 2.0; data: other training images"
    )
    assert f"\nwarning: not the same run from here on: {listed}" in said
    assert "finished at step 6" in said
    record = (config.run_dir / "changes.txt").read_text()
    assert record.startswith(f"from step 3: {listed}")
    assert record.count("\n") == 1
    assert load_config(config.run_dir / "config.yaml") == config
    run = RunRecord.read(config.run_dir)
    assert run is not None
    logged = mlflow.MlflowClient(run.tracking_uri).get_run(run.run_id).data
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
    line = "cannot go on from step 3, as these differ: seed 0 -> 5"
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
        (lambda path: path.write_text("- a\n- b\n"), "must hold keys and values"),
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
    assert line.endswith("; mend it or move it away, or give another name=")


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


def test_a_copied_run_goes_on_under_another_name(
    trained: Callable[..., Config], tmp_path: Path
) -> None:
    shutil.copytree(trained().run_dir, tmp_path / "runs/copy", symlinks=True)
    job, said = resumed(trained("name=copy"))
    assert job.state.step == 3
    assert "warning" not in said


# --------------------------------------------------------------------------------------------------
# The data


@pytest.fixture
def own_data(tiny_folder: Path, tmp_path: Path) -> Path:
    return Path(shutil.copytree(tiny_folder, tmp_path / "own"))


@pytest.mark.parametrize(
    ("image", "other"),
    [
        ("train/class0/0.jpg", "training images in bytes"),
        ("val/class0/0.jpg", "validation images in bytes"),
    ],
)
def test_images_that_were_encoded_anew_are_other_data(
    trained: Callable[..., Config], own_data: Path, image: str, other: str
) -> None:
    """Of the same names and sizes in pixels."""
    assert "warning" not in resumed(trained(f"data.root={own_data}"))[1]  # a copy is the same
    with Image.open(own_data / image) as opened:
        opened.load()
        opened.save(own_data / image, quality=50)
    assert differing_data(trained(f"data.root={own_data}")) == [other]


def test_other_validation_images_are_other_data(
    trained: Callable[..., Config], own_data: Path
) -> None:
    """They choose the best checkpoint, and drop the plateau schedule's lr."""
    (own_data / "val/class0/0.jpg").unlink()
    assert differing_data(trained(f"data.root={own_data}")) == ["validation images"]


def differing_data(config: Config) -> list[str]:
    return re.findall(r"data: other ([a-z ]+) \(", refused(config))


def test_a_quarantine_is_no_other_data(trained: Callable[..., Config], own_data: Path) -> None:
    write_quarantine(own_data, {f"{part}/class0/1.jpg": "truncated" for part in ("train", "val")})
    job, said = resumed(trained(f"data.root={own_data}"))
    assert len(job.train_index.bad) == len(job.val_index.bad) == 1
    assert "warning" not in said


def test_format_2_knew_the_training_images_alone(
    trained: Callable[..., Config], own_data: Path
) -> None:
    known = checkpoint.load(newest(trained()))["fingerprints"]
    assert len(known) == 4
    rewrite(trained(), fingerprints={"training images": known["training images"]})
    (own_data / "val/class0/0.jpg").unlink()
    assert "warning" not in resumed(trained(f"data.root={own_data}"))[1]
    rewrite(trained(), fingerprints={"training images": "0" * 64})
    assert differing_data(trained()) == ["training images"]


# --------------------------------------------------------------------------------------------------
# One process at a time


HOLDER = """
import os, sys, time
from resnet_dist.config_file import load_config
from resnet_dist.run_folder import sole_process
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
        f"{config.run_dir}: {named} trains under this name; end it, or give another name="
    )
    assert capsys.readouterr().out == f"{config.run_dir}: waits for {named}, which trains it\n"
    assert not config.run_dir.exists()
    train(tiny_config(*ONE_EPOCH, "name=other"), "test", Interrupt())  # this one is free
    process.kill()  # a lock dies with its process
    process.wait(60)
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


def test_without_a_lock_a_run_goes_on(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config(*ONE_EPOCH)
    config.run_dir.parent.mkdir()
    (config.run_dir.parent / ".locks").write_text("in the way")
    train(config, "test", Interrupt())
    assert newest(config).name == "step-00000003"


def test_resume_anyway_takes_the_new_settings_and_keeps_the_state(
    trained: Callable[..., Config],
) -> None:
    """torch would put back momentum and weight decay as they were saved."""
    saved = checkpoint.load(newest(trained()))
    now = trained("optim.momentum=0.5", "optim.weight_decay=0.01", "train.epochs=2")
    job, _ = resumed(now, resume_anyway=True)
    groups = job.state.optimizer.param_groups
    assert {group["momentum"] for group in groups} == {0.5}
    assert [group["weight_decay"] for group in groups] == [0.01, 0.0]
    state = job.state.optimizer.state_dict()["state"]
    assert state.keys() == saved["optimizer"]["state"].keys()
    assert len(state) > 50
    for number, of in saved["optimizer"]["state"].items():
        assert torch.equal(state[number]["momentum_buffer"], of["momentum_buffer"])
    assert all(
        torch.equal(value, saved["model"][key])
        for key, value in job.state.model.state_dict().items()
    )


@pytest.mark.parametrize(
    "change",
    [
        "train.precision=fp16",
        "train.ema_decay=0.9",
        "data.per_pixel_mean=true",
        "optim.lr_scales={stem: 0, fc: 10}",
        "optim.schedule=plateau",
        "train.global_batch_size=10",
        "data.holdout_images=5",
        "model.sync_batchnorm=none",
    ],
)
def test_resume_anyway_goes_on_with_any_setting(
    trained: Callable[..., Config], capsys: pytest.CaptureFixture[str], change: str
) -> None:
    now = trained(change, "train.epochs=2")
    key = change.partition("=")[0]
    assert key in refused(now)
    capsys.readouterr()
    train(now, "test", Interrupt(), resume_anyway=True)
    said = capsys.readouterr().out
    assert f"{key} " in said[said.index("warning: not the same run") :]
    assert ("momentum starts from zero" in said) == (key == "optim.lr_scales")
    assert checkpoint.load(newest(now))["step"] > 3
    # And back: what was made with it goes on without it.
    train(trained("train.epochs=3"), "test", Interrupt(), resume_anyway=True)


def test_what_does_not_fit_is_refused_even_so(
    trained: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    two = tmp_path / "two"
    for split in ("train", "val"):
        for name in ("class0", "class1"):
            shutil.copytree(tiny_folder / split / name, two / split / name)
    for override, part in (
        ("model.name=resnet32", "model.name resnet20 -> resnet32"),
        (f"data.root={two}", "classes 3 -> 2"),
    ):
        for anyway in (False, True):
            line = refused(trained(override), anyway)
            assert part in line
            assert line.endswith(". Go on as it was, or give another name=")


def test_only_deterministic_mode_minds_who_made_it(
    trained: Callable[..., Config], tiny_config: Callable[..., Config]
) -> None:
    strict = tiny_config("name=strict", "train.deterministic=true", *ONE_EPOCH)
    (said,) = run_ranks(trained_and_resumed, 1, strict, init_process_group=False)
    assert said.startswith("resumes at step 3")
    assert "warning" not in said
    version = checkpoint.load(newest(strict))["made_with"]["torch"]
    for config in (strict, trained()):
        rewrite(config, made_with=checkpoint.load(newest(config))["made_with"] | {"torch": "2.13"})
    (said, _) = run_ranks(resumed_on, 2, strict, init_process_group=False)
    assert said.endswith(
        f"\nwarning: not bit for bit from here on: torch 2.13 -> {version}, world_size 1 -> 2"
    )
    assert "warning" not in resumed(trained())[1]


def trained_and_resumed(rank: int, world_size: int, config: Config) -> str:
    train(config, "test", Interrupt())
    return resumed(config)[1]


def resumed_on(rank: int, world_size: int, config: Config) -> str:
    fix_algorithms(config.train.deterministic)
    return resumed(config)[1]


def test_made_with_is_plain_and_compared_by_name(tmp_path: Path) -> None:
    now = made_with(distributed.start())
    torch.save(now, tmp_path / "now.pt")
    assert torch.load(tmp_path / "now.pt", weights_only=True) == now
    assert set(now) == {"torch", "dali", "device", "world_size", "threads"}
    assert not_bit_for_bit(now, now) == []
    assert not_bit_for_bit({}, now) == []
    before = now | {"threads": "64", "device": "NVIDIA H100"}
    assert not_bit_for_bit(before, now) == [
        "warning: not bit for bit from here on: "
        f"device NVIDIA H100 -> {now['device']}, threads 64 -> {now['threads']}"
    ]


def test_who_decodes(tiny_config: Callable[..., Config]) -> None:
    cpu, gpu = torch.device("cpu"), torch.device("cuda", 0)
    photos, cached = tiny_config(), tiny_config("data.cache=decoded")
    cifar = tiny_config(
        "data.format=cifar10", "data.train_crop=pad", "data.eval_resize_px=32", "data.crop_px=32"
    )
    assert who_decodes(photos, cpu) == "cpu"
    assert who_decodes(photos, gpu) == "mixed"
    assert who_decodes(tiny_config("data.cache=encoded"), gpu) == "mixed"
    assert who_decodes(cached, gpu) == who_decodes(cifar, gpu) == "cpu"


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
def test_a_run_of_the_cpu_s_decoder_is_not_the_gpu_s(trained: Callable[..., Config]) -> None:
    assert checkpoint.load(newest(trained()))["decoder"] == "mixed"
    rewrite(trained(), decoder="cpu")
    assert "as these differ: decoder cpu -> mixed." in refused(trained())


def test_a_dry_run_says_what_differs(
    trained: Callable[..., Config], tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    command = ["train", str(tiny_yaml), "--dry-run", *ONE_EPOCH]
    cli.main(command)
    assert "resume-anyway" not in capsys.readouterr().out
    for flag in ([], ["--resume-anyway"]):
        cli.main([*command, "seed=7", *flag])
        said = capsys.readouterr().out
        assert "peak lr" in said
        assert said.endswith(
            "\nto be trained under another name=, or with --resume-anyway: not as "
            f"{trained().run_dir} has it: seed 0 -> 7\n"
        )


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
        timeout=100,
    )


def test_submit_refuses_before_it_queues_and_hands_the_flag_on(
    trained: Callable[..., Config], tiny_yaml: Path, tmp_path: Path
) -> None:
    command = [sys.executable, REPO / "launch/submit.py", tiny_yaml, "--gpus-per-node", "0"]
    command += ["train.epochs=2", *ONE_EPOCH[1:]]
    done = launch(tmp_path, *command)
    assert done.returncode == 2
    assert done.stderr.splitlines() == [
        f"resnet-dist: {trained().run_dir}: cannot go on from step 3, as these differ: train.epochs"
        " 1.0 -> 2.0. Go on as it was, give another name=, or add --resume-anyway"
    ]
    done = launch(tmp_path, *command, "--resume-anyway", "--local")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "warning: not the same run from here on: train.epochs 1.0 -> 2.0\n" in done.stdout
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
