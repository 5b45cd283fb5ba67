"""What is refused before torch is imported, and what a finished run answers."""

import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist import cli
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.run.folder import open_run_folder
from resnet_dist.run.preflight import check_start, check_writable
from tests.support.resuming import ONE_EPOCH, newest
from tests.support.waiting import HANG_SECONDS

WITHOUT = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy']));"
Trained = Callable[..., Config]


def without_torch(*arguments: object) -> subprocess.CompletedProcess[str]:
    """Runs the command line where importing torch or NumPy fails."""
    code = f"{WITHOUT} from resnet_dist import cli; cli.main()"
    return subprocess.run(
        [sys.executable, "-c", code, *map(str, arguments)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


def refused(*arguments: object) -> str:
    done = without_torch(*arguments)
    assert done.returncode == 2, done.stderr
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1, done.stderr
    return done.stderr


@pytest.mark.parametrize("verb", ["evaluate", "predict", "export", "analyze"])
def test_a_wrong_checkpoint(verb: str, tmp_path: Path, trained: Trained) -> None:
    rest = {"predict": ["x.jpg"], "export": ["--to", "pt2"], "analyze": []}.get(verb, [])
    verbs = ["analyze", "responses"] if verb == "analyze" else [verb]
    (tmp_path / "empty").mkdir()
    for path in (tmp_path / "nowhere", tmp_path / "empty", newest(trained()) / "state.pt"):
        line = refused(*verbs, path, *rest)
        assert f"{path}: no checkpoint; give a folder such as RUN/checkpoints/best" in line
    if verb in ("evaluate", "analyze"):
        line = refused(*verbs, trained().run_dir, "data.flipp=true")
        assert "data.flipp=true: unknown key; did you mean data.flip?" in line


def test_weights_of_another_network(trained: Trained, tiny_yaml: Path, tmp_path: Path) -> None:
    start = ("train", tiny_yaml, "name=tuned", "--init-from")
    assert "no checkpoint" in refused(*start, tmp_path / "nowhere")
    line = refused(*start, trained().run_dir, "model.name=resnet32")
    assert "holds a resnet20, this run trains a resnet32; give model.name=resnet20" in line
    line = refused(*start, "torchvision:nowhere.pth", "model.name=resnet18")
    assert "torchvision:nowhere.pth: cannot be read: No such file" in line
    assert "torchvision has no resnet20" in refused(*start, "torchvision:nowhere.pth")


def test_other_settings_than_the_run_folders(trained: Trained, tiny_yaml: Path) -> None:
    outcome = trained().run_dir / "outcome.json"
    before = outcome.read_bytes()
    line = refused("train", tiny_yaml, *ONE_EPOCH, "seed=3")
    assert "differs from the checkpoint of step 3: seed 0 -> 3; undo that" in line
    assert outcome.read_bytes() == before  # it is still the outcome of the run


@pytest.mark.parametrize("in_the_way", ["runs", "runs/tiny", "runs/tiny/checkpoints"])
def test_a_run_folder_that_cannot_be_written(
    tiny_yaml: Path, tmp_path: Path, in_the_way: str
) -> None:
    path = tmp_path / in_the_way
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text("mine")
    line = refused("train", tiny_yaml)
    assert f"{path}: " in line
    assert path.read_text() == "mine"


def test_a_read_only_disk(tiny_yaml: Path, disk: Path) -> None:
    subprocess.run(["mount", "-o", "remount,ro", str(disk)], check=True)
    line = refused("train", tiny_yaml, f"tracking.run_root={disk}/a/b")
    assert f"{disk}: cannot be written: Read-only file system; fix that, or give another" in line


@pytest.mark.skipif(os.geteuid() != 0, reason="only root can become another user")
def test_a_folder_that_may_not_be_entered(tmp_path: Path) -> None:
    locked = tmp_path / "locked"
    locked.mkdir(mode=0o700)
    os.chmod(tmp_path, 0o755)
    os.seteuid(65534)  # nobody
    try:
        with pytest.raises(UserError, match="cannot be written: Permission denied; fix that"):
            check_writable(locked / "runs" / "tiny")
    finally:
        os.seteuid(0)


def test_only_the_node_of_rank_0_needs_the_weights(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config("model.init_from=torchvision:nowhere.pth", "model.name=resnet18")
    check_start(config, False, is_main=False)
    with pytest.raises(UserError, match=r"nowhere\.pth: cannot be read"):
        check_start(config, False, is_main=True)


def test_a_look_at_the_disk_leaves_nothing_behind(
    tiny_yaml: Path, tmp_path: Path, trained: Trained
) -> None:
    before = sorted(tmp_path.rglob("*"))
    refused("train", tiny_yaml, "name=new", "model.init_from=nowhere")
    assert sorted(tmp_path.rglob("*")) == before


# --------------------------------------------------------------------------------------------------
# A finished run


@pytest.mark.parametrize("flag", [[], ["--resume-anyway"], ["--ranks", "2"]])
def test_a_finished_run_answers_at_once(trained: Trained, tiny_yaml: Path, flag: list[str]) -> None:
    run_dir = trained().run_dir
    before = {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()}
    done = without_torch("train", tiny_yaml, *ONE_EPOCH, *flag)
    assert done.returncode == 0, done.stderr
    rows = dict(line.split("  ", 1) for line in done.stdout.splitlines() if "  " in line)
    assert "tiny, already finished at step 3" in rows["run"]
    assert rows["last val"].split()[0] == "acc1"
    assert "% at step 3" in rows["best val"]
    assert rows["checkpoint"].strip() == str(run_dir / "checkpoints/best")
    assert {path: path.read_bytes() for path in run_dir.rglob("*") if path.is_file()} == before


@pytest.mark.parametrize(
    "begun", [["train.epochs=2"], ["seed=1", "name=other"], ["tracking.mlflow=true"]]
)
def test_whoever_has_work_to_do_does_it(
    trained: Trained, tiny_yaml: Path, begun: list[str]
) -> None:
    """More epochs, another run, and metrics that MLflow has not got."""
    trained()
    arguments = ["train", tiny_yaml, *ONE_EPOCH, *begun, "--resume-anyway"]
    done = without_torch(*arguments)
    assert "already finished" not in done.stdout
    assert "torch" in done.stderr  # it is wanted


def test_a_launcher_that_waits_for_an_outcome_gets_its_own(
    trained: Trained, tiny_yaml: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    trained()
    monkeypatch.setenv("RESNET_DIST_START", "another")
    assert "torch" in without_torch("train", tiny_yaml, *ONE_EPOCH).stderr


def test_the_config_of_a_finished_run_stays(trained: Trained) -> None:
    path = trained().run_dir / "config.yaml"
    before = path.read_bytes()
    open_run_folder(trained("seed=1"), 3, ("seed 0 -> 1",), is_finished=True)
    assert path.read_bytes() == before
    assert not (path.parent / "changes.txt").exists()
    shutil.move(path, path.with_name("moved"))
    open_run_folder(trained(), 3, (), is_finished=True)
    assert path.read_bytes() == before


def test_a_finished_run_resumed_anyway_stays_as_it_is(
    trained: Trained, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = trained().run_dir / "config.yaml"
    before = path.read_bytes()
    capsys.readouterr()
    cli.main(["train", str(tiny_yaml), *ONE_EPOCH, "seed=1", "--resume-anyway"])
    said = capsys.readouterr().out
    assert "\nalready finished at step 3 (epoch 1.00) from " in said
    assert "\nwarning: no step is left to do, so this has no effect: seed 0 -> 1\n" in said
    assert path.read_bytes() == before
    assert not (path.parent / "changes.txt").exists()
