"""A run over data with bad files: it trains, the same on any world and after any stop."""

import io
import json
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image

from resnet_dist import cli
from resnet_dist.checkpoints import folders
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.outcome import Outcome
from resnet_dist.train import train
from tests.support.multirank import run_ranks

# Three steps that see each of the 30 images once.
CONFIG = (
    *("train.epochs=1", "train.global_batch_size=10", "train.max_local_batch_size=10"),
    *("optim.base_lr=0.05", "optim.clip_grad_norm=1.0"),
)


@pytest.fixture
def spoiled_folder(tiny_folder: Path, tmp_path: Path) -> Path:
    """The tiny folder with six kinds of bad training files and one bad validation file."""
    root = tmp_path / "spoiled"
    shutil.copytree(tiny_folder, root)
    train = root / "train"
    good = (train / "class0/0.jpg").read_bytes()
    scan = good.index(b"\xff\xda")
    (train / "class0/0.jpg").write_bytes(b"")
    (train / "class0/1.jpg").write_bytes(b"<html>404</html>")
    (train / "class0/2.jpg").write_bytes(good[:60])
    (train / "class1/3.jpg").write_bytes(good[: scan + 30])
    (train / "class1/4.jpg").write_bytes(good.replace(b"\xff\xdb", b"\xff\xef"))
    png = io.BytesIO()
    Image.new("RGB", (9, 9)).save(png, "PNG")
    (train / "class2/5.jpg").write_bytes(png.getvalue().replace(b"IDAT", b"IDAT\0", 1))
    (root / "val/class0/0.jpg").write_bytes(good[: scan + 30])
    # And what only looks odd.
    Image.new("CMYK", (50, 40), (10, 80, 20, 0)).save(train / "class0/5.jpg")
    Image.new("L", (50, 40), 90).save(train / "class0/6.jpg")
    Image.new("P", (50, 40), 90).save(train / "class1/6.jpg", "GIF")
    Image.new("RGB", (50, 40), (9, 8, 7)).save(train / "class0/7.jpg", "PNG")
    Image.new("RGB", (50, 40), (200, 8, 7)).save(train / "class0/8.jpg", progressive=True)
    return root


BAD_TRAIN = ("class0/0", "class0/1", "class0/2", "class1/3", "class1/4", "class2/5")


@pytest.fixture
def spoiled(tiny_config: Callable[..., Config], spoiled_folder: Path) -> Callable[..., Config]:
    return lambda *overrides: tiny_config(f"data.root={spoiled_folder}", *CONFIG, *overrides)


def test_evaluate_names_what_it_counts_as_wrong(
    spoiled: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = spoiled("name=one")
    train_on_rank(0, 1, config)
    capfd.readouterr()
    cli.main(["evaluate", str(config.run_dir)])
    out, err = capfd.readouterr()
    assert "of 17 correct" in out
    told = [line for line in err.splitlines() if line.startswith("bad sample")]
    assert len(told) == 1
    assert told[0].startswith("bad sample: val/class0/0.jpg: ")
    assert told[0].endswith("; it counts as wrong")


def train_on_rank(rank: int, world_size: int, config: Config) -> str:
    with Interrupt() as interrupt:
        return train(config, "test", interrupt).name


class StopAt(Interrupt):
    """Asks to stop before the step `polls` (counted from 0)."""

    def __init__(self, polls: int) -> None:
        super().__init__()
        self.polls = polls

    @property
    def requested(self) -> bool:
        self.polls -= 1
        return self.polls < 0

    @requested.setter
    def requested(self, _: Any) -> None: ...


def weights(config: Config) -> dict[str, torch.Tensor]:
    return Checkpoint.load(config.run_dir / "checkpoints/latest").model


def metrics(config: Config, name: str) -> list[float]:
    lines = (config.run_dir / "journal.jsonl").read_text().splitlines()
    return [m[name] for m in (json.loads(line)["metrics"] for line in lines) if name in m]


def test_it_trains_through_them_and_says_so_once(
    spoiled: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    config = spoiled("name=one")
    assert train_on_rank(0, 1, config) == "FINISHED"
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("bad sample")]
    assert sorted(line.split(":")[1].strip() for line in told) == sorted(
        [*(f"train/{name}.jpg" for name in BAD_TRAIN), "val/class0/0.jpg"]
    )
    listed = (config.run_dir / "bad_samples.tsv").read_text().splitlines()
    assert len(listed) == 7
    assert metrics(config, "data/bad_samples")[-1] == 7
    # 17 validation images are 17, whatever can be read.
    for acc1 in metrics(config, "val/acc1"):
        assert acc1 * 17 / 100 == pytest.approx(round(acc1 * 17 / 100))


@pytest.mark.slow
def test_ranks_see_the_same_stand_ins(spoiled: Callable[..., Config]) -> None:
    one, many = spoiled("name=one"), spoiled("name=many")
    run_ranks(train_on_rank, 1, one, init_process_group=False)
    run_ranks(train_on_rank, 3, many, init_process_group=False)
    assert metrics(many, "train/loss") == pytest.approx(metrics(one, "train/loss"), rel=1e-3)
    assert metrics(many, "data/bad_samples")[-1] == 7


def test_a_resumed_run_sees_the_same_stand_ins(
    spoiled: Callable[..., Config], capfd: pytest.CaptureFixture[str]
) -> None:
    straight, stopped = spoiled("name=straight"), spoiled("name=stopped")
    train_on_rank(0, 1, straight)
    capfd.readouterr()
    with StopAt(2) as interrupt:
        assert train(stopped, "test", interrupt) is Outcome.STOPPED
    assert train_on_rank(0, 1, stopped) == "FINISHED"
    told = [line for line in capfd.readouterr().out.splitlines() if line.startswith("bad sample")]
    assert len(told) == len(set(told)) == 7  # not again after the stop
    assert all(torch.equal(weights(stopped)[n], value) for n, value in weights(straight).items())


def test_past_the_budget_it_stops_with_one_line_and_a_checkpoint(
    spoiled: Callable[..., Config],
) -> None:
    config = spoiled("name=few", "data.max_bad_samples=5")
    with pytest.raises(UserError, match=r"data\.max_bad_samples=5") as error:
        train_on_rank(0, 1, config)
    assert "\n" not in str(error.value)
    assert folders.latest(config.run_dir) is not None  # nothing is lost


def test_the_epoch_before_such_an_evaluation_is_not_lost(
    tiny_config: Callable[..., Config], tiny_folder: Path, tmp_path: Path
) -> None:
    shutil.copytree(tiny_folder, tmp_path / "data")
    config = tiny_config(f"data.root={tmp_path}/data", *CONFIG, "data.max_bad_samples=2")
    files: dict[Path, bytes] = {}
    for number in range(4):
        path = tmp_path / f"data/val/class1/{number}.jpg"
        good = path.read_bytes()
        path.write_bytes(good[: good.index(b"\xff\xda") + 30])  # found when it is decoded
        files[path] = good
    with pytest.raises(UserError, match=r"max_bad_samples=2"):
        train_on_rank(0, 1, config)
    assert Checkpoint.load(config.run_dir).step == 3
    # The evaluation is owed: once the images are mended it is made up for. They are others then.
    for path, good in files.items():
        path.write_bytes(good)
    assert metrics(config, "val/acc1") == []
    with pytest.raises(UserError, match="validation images"):
        train_on_rank(0, 1, config)
    with Interrupt() as interrupt:
        train(config, "test", interrupt, resume_anyway=True)
    whole = replace(config, name="whole")
    train_on_rank(0, 1, whole)
    assert metrics(config, "val/acc1") == metrics(whole, "val/acc1")
    ours, theirs = (Checkpoint.load(c.run_dir) for c in (config, whole))
    best = [(c.run_dir / "checkpoints/best").resolve().name for c in (config, whole)]
    assert best == ["step-00000003"] * 2
    assert all(torch.equal(ours.model[key], theirs.model[key]) for key in theirs.model)


def test_what_an_earlier_try_met_counts(spoiled: Callable[..., Config]) -> None:
    config = spoiled("name=again")
    with StopAt(2) as interrupt:
        train(config, "test", interrupt)
    before = metrics(config, "data/bad_samples")[-1]
    train_on_rank(0, 1, config)
    assert min(metrics(config, "data/bad_samples")[2:]) >= before > 3
