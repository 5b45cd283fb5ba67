"""A run that was stopped and resumed is the run that nobody touched, to the last bit.

All of it in deterministic mode; one rank on a GPU too (several ranks stay on the CPU: what they add
is proved with gloo). train() takes its own way to stop.
"""

import math
import os
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from PIL import Image
from torch import Tensor

from resnet_dist import distributed
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.config_file import load_config
from resnet_dist.data.prepare.write_shards import Settings, prepare_shards
from resnet_dist.determinism import fix_algorithms
from tests.support.multirank import run_ranks
from tests.support.recorded import (
    Run,
    global_batches,
    journal,
    loss_differences,
    record,
    relative_difference,
)
from tests.support.slow import slow

TRAIN_IMAGES, VAL_IMAGES, PX = 44, 12, 32
STEPS = 12

# 5 steps an epoch. Lines of the log, evaluations, saves and ends of epochs fall on different steps;
# the schedule drops the lr more than once.
CONFIG = f"""
name: whole
model: {{name: resnet20}}
data:
  train_crop: scale
  scale_px: [16, 20]
  crop_px: 16
  eval_resize_px: 18
  eval_crop_px: 16
  decode_threads: 1
optim: {{base_lr: 2.0, schedule: plateau, plateau_patience_evals: 1, warmup_epochs: 0.4}}
train:
  epochs: null
  iterations: {STEPS}
  global_batch_size: 8
  max_local_batch_size: 8
  deterministic: true
  ema_decay: 0.8
  log_every_steps: 3
  eval_every_epochs: null
  eval_every_iterations: 2
  save_every_epochs: null
  save_every_iterations: 5
tracking: {{mlflow: false}}
"""
FORMATS = {
    "folder": [],
    "shards": ["data.format=shards"],
    "cifar10": ["data.format=cifar10", "data.train_crop=pad", "data.per_pixel_mean=true",
                "data.crop_px=32", "data.eval_resize_px=32", "data.eval_crop_px=32"],
}  # fmt: skip
STOPS = {
    "before the first step": 0,
    "after the first": 1,
    "after the last of an epoch, and a save": 5,
    "in the middle of an epoch": 7,
    "before the last": STEPS - 1,
}


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The same images as files, as shards and as CIFAR; the colour hints at the class."""
    root, rng = tmp_path_factory.mktemp("data"), np.random.default_rng(0)
    images: dict[str, list[tuple[int, np.ndarray]]] = {}
    for split, count in {"train": TRAIN_IMAGES, "val": VAL_IMAGES}.items():
        images[split] = []
        for number in range(count):
            pixels = rng.integers(0, 200, (PX, PX, 3))
            pixels[..., number % 3] += 55
            images[split].append((number % 3, pixels.astype(np.uint8)))
            path = root / "folder" / split / f"class{number % 3}" / f"{number}.jpg"
            path.parent.mkdir(parents=True, exist_ok=True)
            Image.fromarray(pixels.astype(np.uint8)).save(path, quality=95)
    settings = Settings(images_per_shard=7, limit=None)
    prepare_shards(root / "folder", root / "shards", settings, workers=1)
    folder = root / "cifar10" / "cifar-10-batches-bin"
    folder.mkdir(parents=True)
    parts = {f"data_batch_{n + 1}.bin": images["train"][n::5] for n in range(5)}
    for name, part in (parts | {"test_batch.bin": images["val"]}).items():
        records = [bytes([label]) + p.transpose(2, 0, 1).tobytes() for label, p in part]
        (folder / name).write_bytes(b"".join(records))
    return root


@pytest.fixture
def config_of(root: Path, tmp_path: Path, run_root: Path) -> Callable[..., Config]:
    """config_of("shards", "name=x", ...)"""
    yaml = tmp_path / "config.yaml"
    yaml.write_text(f"{CONFIG}tracking.run_root: {run_root}\n")

    def config_of(data_format: str, *overrides: str) -> Config:
        settings = [f"data.root={root / data_format}", *FORMATS[data_format], *overrides]
        return load_config(yaml, settings)

    return config_of


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    """Takes deterministic mode back from this process."""
    yield
    fix_algorithms(False)


def differing(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two contents of a checkpoint are not the same bits."""
    if isinstance(theirs, Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [place]
    if isinstance(theirs, dict):
        if list(ours) != list(theirs):
            return [f"{place}: {list(ours)} {list(theirs)}"]
        return [d for key in theirs for d in differing(ours[key], theirs[key], f"{place}.{key}")]
    if isinstance(theirs, list | tuple):
        if len(ours) != len(theirs):
            return [place]
        pairs = enumerate(zip(ours, theirs, strict=True))
        return [d for number, pair in pairs for d in differing(*pair, f"{place}.{number}")]
    return [] if ours == theirs else [f"{place}: {ours} {theirs}"]


def content(config: Config, which: str = "latest") -> dict[str, Any]:
    """All of a checkpoint, but for the run's name and the time."""
    saved = Checkpoint.load(config.run_dir / "checkpoints" / which).to_dict()
    saved["config"].pop("name")
    saved.pop("saved_at")
    return saved


def assert_same_run(ours: Config, theirs: Config) -> None:
    """All of the last and of the best checkpoint, and the journal."""
    assert differing(content(ours), content(theirs)) == []
    assert differing(content(ours, "best"), content(theirs, "best")) == []
    assert journal(ours) == journal(theirs)


def assert_same_steps(pieces: list[Run], whole: Run) -> None:
    """Each step once, and the same samples, windows, labels and pixels in it."""
    assert [step for piece in pieces for step in piece.steps] == list(whole.steps)
    for piece in pieces:
        for step, passes in piece.steps.items():
            assert len(passes) == len(whole.steps[step])
            assert all(a.equals(b) for a, b in zip(passes, whole.steps[step], strict=True))


def test_the_comparison_sees_a_bit(config_of: Callable[..., Config]) -> None:
    config = config_of("folder", "train.iterations=2")
    record(config)
    ours, theirs = content(config), content(config)
    ours["optimizer"]["state"][0]["momentum_buffer"].view(torch.int32)[0, 0, 0, 0] ^= 1
    ours["ema"]["fc.bias"].view(torch.int32)[0] ^= 1
    ours["lr_memory"]["plateau_drops"].append(1)
    ours["train_loss"] = math.nextafter(ours["train_loss"], 0)
    del ours["model"]["fc.bias"]
    places = [place.partition(":")[0] for place in differing(ours, theirs)]
    momentum = ".optimizer.state.0.momentum_buffer"
    changed = [".model", momentum, ".ema.fc.bias", ".train_loss", ".lr_memory.plateau_drops"]
    assert places == changed


ALL = tuple(STOPS.values())
# On a GPU each precision, and each format, has one case with all stops.
ALL_ON_GPU = {("folder", "fp32"), ("shards", "bf16"), ("cifar10", "fp16")}
QUICK = [("folder", "fp32"), ("cifar10", "bf16")]


@pytest.mark.parametrize(
    ("device", "data_format", "precision", "stops"),
    [
        *(("cpu", *case, ALL) for case in QUICK),
        *(
            slow("cpu", *case, ALL)
            for case in product(FORMATS, ("fp32", "bf16"))
            if case not in QUICK
        ),
        *(
            pytest.param("cuda", *case, ALL if case in ALL_ON_GPU else (7,), marks=pytest.mark.gpu)
            for case in product(FORMATS, ("fp32", "bf16", "fp16"))
        ),
    ],
    ids=str,
)
def test_stopped_once(
    config_of: Callable[..., Config],
    device: str,
    data_format: str,
    precision: str,
    stops: list[int],
    record_difference: Callable[[str, float], None],
) -> None:
    assert distributed.start().device.type == device
    config = config_of(data_format, f"train.precision={precision}")
    whole = record(config)
    assert content(config)["lr_memory"]["plateau_drops"]
    for step in stops:
        parts = replace(config, name=f"stop{step}")
        pieces = [record(parts, step), record(parts)]
        assert [piece.outcome for piece in pieces] == ["STOPPED", "FINISHED"]
        assert f"resumes at step {step} (epoch {step / 5:.2f}) from " in pieces[1].said
        assert "warning" not in pieces[1].said
        assert_same_steps(pieces, whole)
        assert_same_run(parts, config)
    steps = ", ".join(map(str, stops))
    what = f"stopped before step {steps} of {STEPS}, and not: {data_format}, {precision}, 1 rank"
    where = "" if device == "cpu" else " on a GPU"
    record_difference(f"{what}{where}: checkpoint, journal, batches", 0.0)


def test_stopped_in_fp16(
    config_of: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """A few small images, as a CPU is slow at it. Its scale changes: the first steps overflow."""
    small = ("data.scale_px=[8,10]", "data.crop_px=8", "data.eval_resize_px=8")
    small += ("data.eval_crop_px=8", "train.global_batch_size=4", "train.iterations=5")
    settings = (*small, "train.precision=fp16", "train.eval_every_iterations=5")
    config = config_of("folder", *settings)
    whole = record(config)
    scaler = content(config)["scaler"]
    assert scaler["scale"] < 65536
    assert 0 < scaler["_growth_tracker"] < 5
    for step in (1, 3):
        parts = replace(config, name=f"stop{step}")
        assert_same_steps([record(parts, step), record(parts)], whole)
        assert_same_run(parts, config)
    what = "stopped before step 1, 3 of 5, and not: folder, fp16, 1 rank"
    record_difference(f"{what}: checkpoint, journal, batches", 0.0)


def test_stopped_before_each_step(
    config_of: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """And twice at one place."""
    config = config_of("folder")
    parts, whole = replace(config, name="parts"), record(config)
    pieces = [record(parts, step) for step in (0, 0, *range(1, STEPS))]
    assert [len(piece.steps) for piece in pieces] == [0, 0] + [1] * (STEPS - 1)
    pieces.append(record(parts))
    assert_same_steps(pieces, whole)
    assert_same_run(parts, config)
    what = f"stopped {len(pieces) - 1} times, and not: folder, fp32, 1 rank"
    record_difference(f"{what}: checkpoint, journal, batches", 0.0)


# --------------------------------------------------------------------------------------------------
# Several ranks


def runs(
    rank: int, world_size: int, folder: Path, pieces: list[tuple[Config, int | None]]
) -> list[Run]:
    """Run after run, each in a process group of its own."""
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    found = []
    for number, (config, stop_before) in enumerate(pieces):
        if config.model.sync_batchnorm == "node":
            os.environ.update(LOCAL_RANK=str(rank % 2), LOCAL_WORLD_SIZE="2")
        meeting = f"file://{folder}/{number}"
        dist.init_process_group("gloo", init_method=meeting, rank=rank, world_size=world_size)
        found.append(record(config, stop_before))
    return found


@pytest.mark.parametrize(
    ("world_size", "data_format", "stops", "settings"),
    [
        (2, "folder", [0, STEPS - 1], []),
        (2, "shards", [7], ["train.precision=bf16"]),
        slow(2, "cifar10", [5], ["train.max_local_batch_size=2"]),
        slow(3, "folder", [7], ["model.sync_batchnorm=none"]),
        slow(4, "folder", [7], []),
        slow(4, "folder", [7], ["model.sync_batchnorm=node"]),  # two nodes of two
    ],
    ids=str,
)
def test_stopped_on_several_ranks(
    config_of: Callable[..., Config],
    tmp_path: Path,
    world_size: int,
    data_format: str,
    stops: list[int],
    settings: list[str],
    record_difference: Callable[[str, float], None],
) -> None:
    config = config_of(data_format, *settings)
    pieces: list[tuple[Config, int | None]] = [(config, None)]
    for step in stops:
        parts = replace(config, name=f"stop{step}")
        pieces += [(parts, step), (parts, None)]
    ranks = run_ranks(runs, world_size, tmp_path, pieces, init_process_group=False)
    for whole, *rest in ranks:
        assert [r.outcome for r in rest] == ["STOPPED", "FINISHED"] * len(stops)
        for number in range(len(stops)):
            assert_same_steps(rest[2 * number : 2 * number + 2], whole)
    for parts, _ in pieces[1:]:
        assert_same_run(parts, config)
    steps, how = ", ".join(map(str, stops)), ", ".join([data_format, *settings])
    what = f"stopped before step {steps} of {STEPS}, and not: {how}, {world_size} ranks"
    record_difference(f"{what}: checkpoint, journal, batches", 0.0)


def in_float64(rank: int, world_size: int, config: Config, stop_before: int | None) -> Run:
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    return record(config, stop_before, float64=True)


def piece(world_size: int, config: Config, stop_before: int | None = None) -> list[Run]:
    """In processes of its own."""
    return run_ranks(in_float64, world_size, config, stop_before, init_process_group=False)


# 4 steps of 11 images see each of the 44 once; averaged weights would be evaluated in float32.
FOUR_TWO_THREE = ("train.global_batch_size=11", "train.max_local_batch_size=11")
FOUR_TWO_THREE += ("train.iterations=8", "train.ema_decay=null")


@pytest.mark.slow
def test_the_world_changes_in_the_middle_of_an_epoch(
    config_of: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """4 ranks until step 2, 2 until step 5, then 3; against one rank that is left alone."""
    config = config_of("folder", *FOUR_TWO_THREE)
    parts = replace(config, name="parts")
    whole = global_batches(piece(1, config))
    pieces = [piece(4, parts, 2), piece(2, parts, 5), piece(3, parts)]
    assert [r.outcome for ranks in pieces for r in ranks] == ["STOPPED"] * 6 + ["FINISHED"] * 3
    seen = [(step, batch) for ranks in pieces for step, batch in global_batches(ranks).items()]
    assert [step for step, _ in seen] == list(range(8))
    assert all(batch.equals(whole[step]) for step, batch in seen)
    for epoch in range(2):
        samples = [batch.samples for _, batch in seen[4 * epoch : 4 * epoch + 4]]
        assert sorted(np.concatenate(samples)) == list(range(TRAIN_IMAGES))

    assert "resumes at step 2 (epoch 0.50) from " in pieces[1][0].said
    assert "by 4 ranks\n" in pieces[1][0].said
    assert "resumes at step 5 (epoch 1.25) from " in pieces[2][0].said
    for ranks, line in zip(pieces[1:], ["world_size 4 -> 2", "world_size 2 -> 3"], strict=True):
        assert f"warning: not bit-exact from here on: {line}\n" in ranks[0].said
        assert "BN normalizes" not in ranks[0].said  # 11 images, on any world

    of_losses = loss_differences(journal(parts), journal(config)).max()
    of_weights = relative_difference(content(parts)["model"], content(config)["model"])
    assert len(loss_differences(journal(parts), journal(config))) == 3  # after steps 3, 6 and 8
    assert of_losses < 1e-12
    assert of_weights < 1e-12
    what = "4, 2 and 3 ranks in one run, and 1 rank, float64"
    record_difference(f"{what}: samples, windows, pixels", 0.0)
    record_difference(f"{what}: loss", of_losses)
    record_difference(f"{what}: weights and BN statistics", of_weights)


@pytest.mark.slow
def test_another_bn_batch_is_warned_of(
    config_of: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    """With local BN it is what a rank takes at once, and that may stay on another world."""
    local = ("model.sync_batchnorm=none", "train.max_local_batch_size=3")
    config = config_of("folder", *FOUR_TWO_THREE, *local)
    parts = replace(config, name="parts")
    piece(4, config, 6)
    piece(4, parts, 2)
    same = piece(2, parts, 6)  # in two passes
    assert "BN batch         3 images = " in same[0].said
    assert "BN now normalizes" not in same[0].said
    of_losses = loss_differences(journal(parts), journal(config)).max()
    assert of_losses < 1e-12
    what = "2 ranks x 2 passes after 4 x 1, local BN, float64: loss"
    record_difference(f"{what}", of_losses)
    more = replace(parts, train=replace(parts.train, max_local_batch_size=6))
    line = (
        "warning: BN now normalizes 6 images together instead of 3: the number of ranks or "
        "train.max_local_batch_size has changed; train.max_local_batch_size=3 keeps it, if that "
        "fits in memory\n"
    )
    assert line in piece(2, more)[0].said
