"""Checkpoints are whole or absent, hold all of the state, and load with weights_only=True."""

import hashlib
import json
import math
import os
import shutil
import subprocess
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from resnet_dist.checkpoints import folders, writer
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.config import Config, OptimConfig, to_dict
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer
from resnet_dist.plan import LrMemory
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.state import TrainState
from resnet_dist.train import train
from tests.support.checkpoints import (
    ALL,
    SPOILS,
    Spoil,
    content_of,
    flip_a_bit,
    lose_everything,
    make_state,
    small_state,
)
from tests.support.paths import GOLDEN

FORMAT_3 = GOLDEN / "format3"  # written by commit e63cd7d
FORMAT_2 = GOLDEN / "format2"  # written by commit 040c52f


def save(state: TrainState, config: Config, retention: Retention = ALL) -> Path:
    return writer.save(config.run_dir, content_of(state, config), retention)


def note(path: Path) -> Any:
    return json.loads((path / "meta.json").read_text())


def test_all_of_the_state_comes_back(
    tiny_config: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    config = tiny_config()
    state = make_state(0, step=7)
    state.best_acc1, state.best_step, state.train_loss = 12.5, 3, 0.75
    state.lr_memory = LrMemory((2, 5), 4, 7, (1, 2))
    state.meter = torch.tensor([[0.1, 2, 3], [4, 5, 6]], dtype=torch.float64)
    path = save(state, config)
    # The promise to users, spelled out: no pickle of ours is needed.
    content = torch.load(path / "state.pt", weights_only=True)
    assert content["config"] == to_dict(config)
    assert note(path)["config"] == json.loads(json.dumps(to_dict(config)))
    assert content["classes"] == ["a", "b", "c"]
    assert set(content) >= {"model", "optimizer", "scaler", "ema", "step", "best", "lr_memory"}
    assert list(content["model"]) == list(build_model("resnet20", 3).state_dict())

    other = make_state(1)
    other.restore(Checkpoint.load(path))
    both = (state.model.state_dict().values(), other.model.state_dict().values())
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs)
    momentum = [s["momentum_buffer"] for s in state.optimizer.state_dict()["state"].values()]
    restored = [s["momentum_buffer"] for s in other.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, restored, strict=True))
    record_difference("weights and momentum through a checkpoint", 0.0)
    assert other.scaler.state_dict() == state.scaler.state_dict()
    assert (other.step, other.best_acc1, other.best_step) == (7, 12.5, 3)
    assert other.lr_memory == LrMemory((2, 5), 4, 7, (1, 2))
    assert torch.equal(other.meter, state.meter)
    assert other.train_loss == 0.75


def test_latest_best_and_retention(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    assert folders.latest(config.run_dir) is None
    state = make_state(0)
    for step, acc1 in [(1, 10.0), (2, 50.0), (3, 20.0), (4, 30.0), (5, 40.0)]:
        state.step = step
        if acc1 > state.best_acc1:
            state.best_acc1, state.best_step = acc1, step
        path = save(state, config, Retention(2))
        assert folders.latest(config.run_dir) == path.resolve()
    folder = config.run_dir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best", "latest", "step-00000002", "step-00000004", "step-00000005"
    ]  # fmt: skip
    assert (folder / "best").resolve().name == "step-00000002"
    assert Checkpoint.load(config.run_dir).step == 2  # a run folder means its best
    assert note(folder / "best")["best"]["acc1"] == 50.0


@pytest.mark.parametrize(
    ("steps", "unsound", "best", "retention", "kept"),
    [
        ([], [], None, Retention(2), []),
        ([1], [], None, Retention(2), [1]),
        ([1, 2, 3, 4], [], None, Retention(1), [4]),
        ([1, 2, 3, 4], [], None, Retention(3), [2, 3, 4]),
        ([1, 2, 3, 4], [], 1, Retention(1), [1, 4]),
        ([1, 2, 3, 4], [], 9, Retention(1), [4]),  # the best is not on the disk
        ([5, 10, 15, 20, 25], [], None, Retention(1, 10), [10, 20, 25]),
        ([5, 10, 15, 20, 25], [], 5, Retention(2, 10), [5, 10, 20, 25]),
        # An exploding run: the newest are there to look at, the sound ones to resume from.
        ([1, 2, 3, 4, 5, 6], [4, 5, 6], None, Retention(2), [2, 3, 5, 6]),
        ([2, 3, 5, 6, 7, 8], [5, 6, 7, 8], 1, Retention(2), [2, 3, 7, 8]),
        ([2, 3, 7, 8, 9], [7, 8], 1, Retention(2), [3, 8, 9]),  # it came back by itself
        ([1, 2, 3], [1, 2, 3], None, Retention(1), [3]),
    ],
)
def test_which_checkpoints_stay(
    steps: list[int], unsound: list[int], best: int | None, retention: Retention, kept: list[int]
) -> None:
    sound = {step: step not in unsound for step in steps}
    assert sorted(retention.kept(sound, best)) == kept


def test_an_exploding_run_does_not_push_out_the_good_checkpoints(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config()
    state = small_state(0)
    for step, loss in enumerate([0.9, 0.8, 0.7, 5.0, 80.0, math.nan, math.nan], start=1):
        state.step, state.train_loss = step, loss
        if step == 7:
            state.model.weight.data[0, 0] = math.inf
        save(state, config, Retention(2))
    names = sorted(p.name for p in (config.run_dir / "checkpoints").glob("step-*"))
    assert names == [f"step-0000000{step}" for step in (2, 3, 6, 7)]
    # The next try is told, and how to go back.
    (line,) = folders.prepare_to_resume(config.run_dir)
    assert "step-00000007: some values are NaN or infinite" in line
    assert "the newest sound one is step-00000003" in line
    way_back = line.partition("to go back to it: ")[2].partition(", then run the same")[0]
    subprocess.run(way_back, shell=True, check=True)
    assert folders.prepare_to_resume(config.run_dir) == []
    newest = folders.latest(config.run_dir)
    assert newest is not None
    assert Checkpoint.load(newest).step == 3


def spoil_weight(state: TrainState) -> None:
    state.model.weight.data[1, 2] = math.nan


def spoil_momentum(state: TrainState) -> None:
    first = state.optimizer.param_groups[0]["params"][0]
    state.optimizer.state[first]["momentum_buffer"][0, 0] = -math.inf


def lose(loss: float | None) -> Callable[[TrainState], None]:
    return lambda state: setattr(state, "train_loss", loss)


def lose_since_the_line(state: TrainState) -> None:
    """The line was good, the steps since then are not."""
    state.train_loss = 0.5
    state.meter = torch.tensor([[40.0, 0, 8], [10, 1, 8]], dtype=torch.float64)


@pytest.mark.parametrize(
    ("change", "finite", "sound", "loss"),
    [
        (lose(None), True, True, None),
        (lose(0.5), True, True, 0.5),
        (lose(math.log(3) - 1e-6), True, True, math.log(3) - 1e-6),
        (lose(math.log(3) + 1e-6), True, False, math.log(3) + 1e-6),
        (lose(math.nan), False, False, None),
        (lose_since_the_line, True, False, 3.125),
        (spoil_weight, False, False, None),
        (spoil_momentum, False, False, None),
    ],
)
def test_soundness_is_noted(
    tiny_config: Callable[..., Config],
    change: Callable[[TrainState], None],
    finite: bool,
    sound: bool,
    loss: float | None,
) -> None:
    state = small_state(1)
    change(state)
    meta = note(save(state, tiny_config()))
    assert (meta["finite"], meta["sound"], meta["train_loss"]) == (finite, sound, loss)


def test_averaged_weights_that_are_not_finite_are_noted(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    content = replace(content_of(small_state(1), config), ema={"weight": torch.tensor([math.nan])})
    assert not note(writer.save(config.run_dir, content, Retention()))["finite"]


def test_copied_without_links_and_with_leftovers(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    state = small_state(0)
    for step in (1, 2):
        state.step = step
        path = save(state, config, Retention(1))
    (path.parent / "latest").unlink()
    (path.parent / ".partial-step-00000003-0123abcd").mkdir()
    (path.parent / ".removed-step-00000002").mkdir()
    (path.parent / ".partial-latest").symlink_to("step-00000002")
    assert folders.latest(config.run_dir) == path
    state.step = 3
    save(state, config, Retention(1))
    assert {p.name for p in path.parent.iterdir()} == {"latest", "step-00000003"}


def test_the_checksums_are_those_of_coreutils(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(folders, "PIECE_BYTES", 1000)  # more pieces than one
    path = save(small_state(1), tiny_config())
    assert sorted(p.name for p in path.iterdir()) == ["SHA256SUMS", "meta.json", "state.pt"]
    check = ["sha256sum", "--strict", "-c", "SHA256SUMS"]
    done = subprocess.run(check, cwd=path, capture_output=True, text=True)
    assert (done.returncode, done.stdout) == (0, "state.pt: OK\nmeta.json: OK\n")


@pytest.mark.parametrize("name", ["state.pt", "meta.json", "SHA256SUMS"])
def test_a_bit_flipped_anywhere_is_found(tiny_config: Callable[..., Config], name: str) -> None:
    """Each bit of SHA256SUMS; a bit of each byte of meta.json, of each fifth byte of state.pt."""
    path = save(small_state(1), tiny_config())
    whole = (path / name).read_bytes()
    for place in range(0, len(whole), 5 if name == "state.pt" else 1):
        for bit in range(8) if name == "SHA256SUMS" else [place % 8]:
            flipped = bytearray(whole)
            flipped[place] ^= 1 << bit
            (path / name).write_bytes(flipped)
            assert folders.why_damaged(path) is not None, (place, bit)
    (path / name).write_bytes(whole)
    assert folders.why_damaged(path) is None


@pytest.mark.parametrize("name", ["state.pt", "meta.json", "SHA256SUMS"])
def test_a_file_cut_anywhere_is_found(tiny_config: Callable[..., Config], name: str) -> None:
    path = save(small_state(1), tiny_config())
    whole = (path / name).read_bytes()
    for length in range(0, len(whole), 17 if name == "state.pt" else 1):
        (path / name).write_bytes(whole[:length])
        assert folders.why_damaged(path) is not None, length


def test_damage_is_named(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    path = save(small_state(1), tiny_config())
    with pytest.raises(UserError, match="no checkpoint; give a folder such as"):
        Checkpoint.load(tmp_path)
    flip_a_bit(path)
    with pytest.raises(UserError, match=r"damaged \(the SHA-256 of state\.pt differs"):
        Checkpoint.load(path)


@pytest.mark.parametrize("spoil", [*SPOILS, lose_everything])
def test_a_damaged_checkpoint_is_passed_over(
    tiny_config: Callable[..., Config], spoil: Spoil
) -> None:
    config = tiny_config()
    paths = [save(small_state(step), config) for step in (1, 2, 3)]
    assert folders.prepare_to_resume(config.run_dir) == []
    for path in paths[1:]:
        spoil(path)
    warnings = folders.prepare_to_resume(config.run_dir)
    assert [str(path) in line for path, line in zip(paths[:0:-1], warnings, strict=True)] == [
        True
    ] * 2
    assert folders.latest(config.run_dir) == paths[0]
    assert Checkpoint.load(config.run_dir).step == 1
    assert folders.prepare_to_resume(config.run_dir) == []
    again = save(small_state(3), config)  # its name is free
    assert Checkpoint.load(again).step == 3
    spoil(paths[0])  # older than a whole one: left alone
    assert folders.prepare_to_resume(config.run_dir) == []


def test_the_same_step_again_is_written_once(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    path = save(small_state(4), config)
    written = (path / "state.pt").stat()
    (path.parent / "latest").unlink()
    save(small_state(4), config)
    assert (path / "state.pt").stat() == written
    assert (path.parent / "latest").resolve() == path.resolve()


@pytest.mark.parametrize("spoil", [*SPOILS, lose_everything])
def test_nothing_is_written_into_a_folder_that_exists(
    tiny_config: Callable[..., Config], spoil: Spoil
) -> None:
    """Not even an empty one, which a rename would replace."""
    config = tiny_config()
    path = save(small_state(4), config)
    spoil(path)
    before = {file.name: file.read_bytes() for file in path.iterdir()}
    with pytest.raises(FileExistsError, match="exists, and is not an intact"):
        save(small_state(4), config)
    assert {file.name: file.read_bytes() for file in path.iterdir()} == before
    assert sorted(p.name for p in path.parent.iterdir()) == ["latest", "step-00000004"]


def test_another_step_under_this_name_is_not_taken_for_it(
    tiny_config: Callable[..., Config],
) -> None:
    config = tiny_config()
    path = save(small_state(4), config)
    os.rename(path, path.with_name("step-00000005"))
    with pytest.raises(FileExistsError):
        save(small_state(5), config)


def test_best_is_pointed_at_after_a_kill(tiny_config: Callable[..., Config]) -> None:
    """A writer that died between its folder and the link leaves the link behind."""
    config = tiny_config()
    state = small_state(1)
    state.best_step = 1
    save(state, config)
    state.step = state.best_step = 2
    path = save(state, config)
    (path.parent / "best").unlink()
    (path.parent / "best").symlink_to("step-00000001")
    state.step = 3
    save(state, config, Retention(1))
    assert (path.parent / "best").resolve().name == "step-00000002"
    names = sorted(p.name for p in path.parent.iterdir())
    assert names == ["best", "latest", "step-00000002", "step-00000003"]


class Canary:
    """What an attacker would put into a pickle."""

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        return os.mkdir, ("canary-flew",)


def with_sums(path: Path) -> None:
    names = ("state.pt", "meta.json")
    sums = [f"{hashlib.sha256((path / n).read_bytes()).hexdigest()}  {n}\n" for n in names]
    (path / "SHA256SUMS").write_text("".join(sums))


def test_a_program_in_a_checkpoint_does_not_run(
    tiny_config: Callable[..., Config], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    config = tiny_config()
    path = save(small_state(1), config)
    torch.save(
        torch.load(path / "state.pt", weights_only=True) | {"x": Canary()}, path / "state.pt"
    )
    with_sums(path)
    with pytest.raises(UserError, match="more than tensors and plain data"):
        Checkpoint.load(path)
    assert not (tmp_path / "canary-flew").exists()
    # Nor is one written.
    with pytest.raises(TypeError, match="only tensors and plain data can be saved"):
        writer.write(
            tmp_path / "new", replace(content_of(small_state(1), config), scaler={"x": Canary()})
        )
    assert not (tmp_path / "new").exists()


@pytest.mark.parametrize("number", [1, 4])
def test_another_format_is_refused_by_name(tiny_config: Callable[..., Config], number: int) -> None:
    """Not set aside as damaged: a newer version's may have more files."""
    config = tiny_config()
    path = save(small_state(1), config)
    content = torch.load(path / "state.pt", weights_only=True)
    torch.save(content | {"format": number}, path / "state.pt")
    with_sums(path)
    extra = hashlib.sha256(b"more").hexdigest()
    (path / "more.pt").write_bytes(b"more")
    with open(path / "SHA256SUMS", "a") as sums:
        sums.write(f"{extra}  more.pt\n")
    assert folders.prepare_to_resume(config.run_dir) == []
    with pytest.raises(UserError, match=f"format {number}; this version reads 2 to 3: use the ver"):
        Checkpoint.load(path)


def test_format_3_is_read_and_written_to_the_bit(tmp_path: Path) -> None:
    """A folder written by the code from before fields had a schema."""
    checkpoint = Checkpoint.load(FORMAT_3)
    assert (checkpoint.step, checkpoint.evaluated_step) == (7, 6)
    assert (checkpoint.best_acc1, checkpoint.best_step) == (50.0, 6)
    assert checkpoint.lr_memory == LrMemory((3, 5), 1, None, (4, 2))
    assert (checkpoint.classes, checkpoint.decoder) == (("a", "b", "c"), "cpu")
    assert checkpoint.mean_loss == 0.75 / 6
    assert torch.equal(checkpoint.weights["weight"], torch.ones(2, 3))  # the averaged ones
    writer.write(tmp_path / "again", checkpoint)
    ours, theirs = (
        torch.load(path / "state.pt", weights_only=True) for path in (tmp_path / "again", FORMAT_3)
    )
    assert ours.keys() == theirs.keys()
    assert different(ours, theirs) == []
    assert note(tmp_path / "again") == note(FORMAT_3)


def different(ours: Any, theirs: Any, place: str = "") -> list[str]:
    """Where two contents are not the same bits, types and order."""
    if isinstance(theirs, dict):
        assert list(ours) == list(theirs) or not place
        return [d for key in theirs for d in different(ours[key], theirs[key], f"{place}.{key}")]
    if isinstance(theirs, list):
        pairs = zip(ours, theirs, strict=True)
        return [d for n, pair in enumerate(pairs) for d in different(*pair, f"{place}.{n}")]
    if isinstance(theirs, torch.Tensor):
        same = ours.dtype == theirs.dtype and torch.equal(ours, theirs)
        return [] if same else [place]
    return [] if type(ours) is type(theirs) and ours == theirs else [place]


def test_format_2_is_read(tmp_path: Path) -> None:
    """A folder written by the code of then."""
    content = Checkpoint.load(FORMAT_2)
    assert (content.step, content.best_acc1, content.best_step) == (7, 50.0, 7)
    assert torch.equal(content.meter, torch.zeros(1, 3, dtype=torch.float64))
    added = {key: getattr(content, key) for key in ("ema", "train_loss", "decoder", "made_with")}
    assert added == {"ema": None, "train_loss": None, "decoder": None, "made_with": {}}
    torch.manual_seed(0)
    model = torch.nn.Linear(3, 2)
    state = TrainState(model, build_optimizer(model, OptimConfig()), torch.amp.GradScaler("cpu"))
    start = model.weight.detach().clone()
    # Its scaler was off then.
    state.restore(replace(content, scaler=state.scaler.state_dict()))
    expected = start - 0.1 * (1 + 1e-4 * start)  # one step: lr, gradient, weight decay
    assert torch.allclose(model.weight, expected, rtol=0, atol=1e-7)
    # Written again, it is of today's format.
    writer.write(tmp_path / "new", content)
    assert note(tmp_path / "new")["format"] == 3
    assert folders.why_damaged(tmp_path / "new") is None


@pytest.mark.parametrize("name", ["state.pt", "meta.json"])
def test_damage_in_format_2_is_found(tmp_path: Path, name: str) -> None:
    path = tmp_path / "step-00000007"
    shutil.copytree(FORMAT_2, path)
    assert folders.why_damaged(path) is None
    os.truncate(path / name, (path / name).stat().st_size - 5)
    assert folders.why_damaged(path) is not None


def as_format_2(path: Path) -> None:
    """Rewrites a checkpoint the way of commit 040c52f (see FORMAT_2)."""
    content = Checkpoint.load(path).to_dict()
    content["data_fingerprint"] = content["fingerprints"]["training images"]
    known = torch.load(FORMAT_2 / "state.pt", weights_only=True)
    content = {key: content[key] for key in known} | {"format": 2, "ema": None}
    shutil.rmtree(path)
    path.mkdir()
    torch.save(content, path / "state.pt")
    digest = hashlib.sha256((path / "state.pt").read_bytes()).hexdigest()
    meta = {"step": content["step"], "best": content["best"], "sha256": digest}
    (path / "meta.json").write_text(json.dumps(meta, indent=1))
    assert meta.keys() == note(FORMAT_2).keys()


def test_a_run_goes_on_from_format_2(
    tiny_config: Callable[..., Config], record_difference: Callable[[str, float], None]
) -> None:
    config = tiny_config("train.save_every_iterations=2", "train.keep_checkpoints=9")
    train(config, "test", Interrupt())
    folder = config.run_dir / "checkpoints"
    whole = Checkpoint.load(folder / "latest")
    for path in folder.glob("step-*"):
        if int(path.name.removeprefix("step-")) > 4:
            shutil.rmtree(path)
    as_format_2(folder / "step-00000004")
    train(config, "test", Interrupt())
    again = Checkpoint.load(folder / "latest")
    assert again.step == whole.step == 6
    assert all(torch.equal(again.model[key], whole.model[key]) for key in whole.model)
    record_difference("weights, resumed from a checkpoint of format 2", 0.0)
    assert note(folder / "step-00000006")["format"] == 3
