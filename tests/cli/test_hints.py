"""What a mistyped command line is answered: one line with the form that was probably meant."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

from resnet_dist import cli
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS

Captured = pytest.CaptureFixture[str]


def said(capsys: Captured, *arguments: object) -> str:
    """Returns what a refused command line says: one line on stderr, with exit code 2."""
    with pytest.raises(SystemExit) as left:
        cli.main([str(argument) for argument in arguments])
    assert left.value.code == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("resnet-dist: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("given", "hint"),
    [
        # Verbs
        (["trian", "x.yaml"], "trian: not a verb of resnet-dist; did you mean train?"),
        (["x.yaml"], "did you mean resnet-dist train x.yaml?"),
        (["bench", "laoder"], "not a verb of resnet-dist bench; did you mean loader?"),
        (["prepare", "shard", "a", "b"], "did you mean shards?"),
        (["frobnicate"], "frobnicate: not a verb of resnet-dist; one of train, status, evaluate,"),
        ([], "VERB; see resnet-dist --help"),
        # Options that are settings
        (["train", "x.yaml", "--lr", "0.2"], "write optim.base_lr=0.2\n"),
        (["train", "x.yaml", "--lr=0.2"], "write optim.base_lr=0.2\n"),
        (["train", "x.yaml", "-lr", "0.2"], "write optim.base_lr=0.2\n"),
        (["train", "x.yaml", "--lr"], "write optim.base_lr=VALUE\n"),
        (["train", "x.yaml", "--optim.base_lr=0.2"], "write optim.base_lr=0.2\n"),
        (["train", "x.yaml", "--optim.base-lr=0.2"], "write optim.base_lr=0.2\n"),
        (["train", "x.yaml", "--batch-size", "32"], "write train.global_batch_size=32\n"),
        (["train", "x.yaml", "--epochs=3", "seed=1"], "write train.epochs=3\n"),
        (["train", "x.yaml", "--epocs=3"], "write train.epochs=3\n"),
        (["train", "x.yaml", "--data-path", "/d"], "write data.root=/d\n"),
        (["evaluate", "x", "--data-path=/d"], "write data.root=/d\n"),
        # Options of ours
        (["train", "x.yaml", "--resum-anyway"], "did you mean --resume-anyway?"),
        (["train", "x.yaml", "--nproc_per_node=8"], "write --ranks 8\n"),
        (["train", "x.yaml", "--gpus", "8"], "write --ranks 8\n"),
        (["evaluate", "x", "--protocl", "ten-crop"], "did you mean --protocol?"),
        (["predict", "x", "y", "--topp=3"], "did you mean --top?"),
        (["train", "--config", "x.yaml"], "the config is the first argument; write it alone\n"),
        (["train", "x.yaml", "--zzz"], "--zzz: not an option of resnet-dist train; see resnet-dis"),
        (["evaluate", "--checkpoint", "x"], "see resnet-dist evaluate --help\n"),
        (["export", "x", "--to", "tensorflow"], "choose from"),
        (["models", "resnet50"], "resnet50: one argument too many\n"),
    ],
)
def test_the_nearest_right_form(given: list[str], hint: str, capsys: Captured) -> None:
    assert hint in said(capsys, *given)


@pytest.mark.parametrize("option", ["--resume", "--resume=x", "--auto-resume", "--resume-from"])
@pytest.mark.parametrize("config", [[], ["x.yaml"]])
def test_resume_is_not_resume_anyway(option: str, config: list[str], capsys: Captured) -> None:
    line = said(capsys, "train", *config, option)
    assert line.endswith("; the same command resumes by itself; leave it out\n")


@pytest.mark.parametrize("short", ["--resume-any", "--dry", "--world", "--rank"])
def test_no_option_can_be_abbreviated(short: str, tiny_yaml: Path, capsys: Captured) -> None:
    assert f"{short}: not an option" in said(capsys, "train", tiny_yaml, short, "2")


@pytest.mark.parametrize(
    ("override", "hint"),
    [
        ("lr=0.2", "lr=0.2: unknown key; did you mean optim.base_lr?"),
        ("batch_size=8", "did you mean train.global_batch_size?"),
        ("optim.learning_rate=8", "did you mean optim.base_lr?"),
        ("train.base_lr=8", "did you mean optim.base_lr?"),
        ("zzz=8", "zzz=8: unknown key; resnet_dist/config.py has all keys"),
        ("optim.base_lr", "'optim.base_lr' is not an override; write optim.base_lr=VALUE"),
        ("0.2", "'0.2' is not an override; write key.sub=value"),
    ],
)
def test_an_unknown_setting(override: str, hint: str, tiny_yaml: Path, capsys: Captured) -> None:
    assert hint in said(capsys, "train", tiny_yaml, override)


def test_weights_that_are_a_file_are_probably_torchvisions(
    tiny_yaml: Path, tmp_path: Path, capsys: Captured
) -> None:
    there = tmp_path / "weights"
    there.write_bytes(b"")
    for file in ("resnet50.pth", there):
        line = said(capsys, "train", tiny_yaml, "--init-from", file)
        assert (
            f"is not a checkpoint folder; for torchvision's weights write torchvision:{file}"
            in line
        )


def test_a_config_that_only_one_process_can_read(tiny_yaml: Path, tmp_path: Path) -> None:
    train = f"{sys.executable} -m resnet_dist train"
    line = f"{train} <(cat {tiny_yaml}) --ranks 2"
    done = subprocess.run(
        ["bash", "-c", line], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 2
    assert "is not a file, so the ranks cannot read it; write it to one" in done.stderr


def test_a_folder_that_is_gone(tmp_path: Path) -> None:
    here = tmp_path / "here"
    here.mkdir()
    line = f"cd {here}; rmdir {here}; {sys.executable} -m resnet_dist models"
    where = {"PYTHONPATH": str(REPO)}
    done = subprocess.run(
        ["bash", "-c", line],
        env=os.environ | where,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 2
    assert done.stderr == (
        "resnet-dist: the current folder: No such file or directory; cd to another one\n"
    )


def test_help_and_version_are_no_errors(capsys: Captured) -> None:
    for arguments in (["--help"], ["train", "--help"], ["bench", "loader", "-h"], ["--version"]):
        with pytest.raises(SystemExit) as left:
            cli.main(arguments)
        assert not left.value.code
        assert capsys.readouterr().err == ""


def test_what_needs_no_torch_does_not_import_it() -> None:
    """It takes seconds."""
    without = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy'])); "
    code = f"{without} from resnet_dist import cli; cli.main(['models'])"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stderr
    assert "resnet1202       1202     32   19,421,274     2,829,238,912" in done.stdout
