"""Checkpoints are whole or absent, hold all of the state, and load with weights_only=True."""

import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from resnet_dist import checkpoint
from resnet_dist.checkpoint import TrainState
from resnet_dist.config import Config, OptimConfig, to_dict
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer, set_lr
from resnet_dist.plan import LrMemory


def make_state(seed: int, step: int = 0) -> TrainState:
    torch.manual_seed(seed)
    model = build_model("resnet20", num_classes=3)
    state = TrainState(model, build_optimizer(model, OptimConfig()), torch.amp.GradScaler("cpu"))
    set_lr(state.optimizer, 0.1)
    state.scaler.scale(model(torch.randn(4, 3, 32, 32)).square().sum()).backward()
    state.scaler.step(state.optimizer)
    state.scaler.update()
    state.step = step
    return state


def save(state: TrainState, config: Config) -> Path:
    return checkpoint.save(state, config, {"classes": ["a", "b", "c"]})


def test_all_of_the_state_comes_back(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config()
    state = make_state(0, step=7)
    state.best_acc1, state.best_step = 12.5, 3
    state.lr_memory = LrMemory([2, 5], 4, 7, [1, 2])
    path = save(state, config)
    # The promise to users, spelled out: no pickle of ours is needed.
    content = torch.load(path / "state.pt", weights_only=True)
    assert content["config"] == to_dict(config)
    assert content["classes"] == ["a", "b", "c"]
    assert set(content) >= {"model", "optimizer", "scaler", "ema", "step", "best", "lr_memory"}
    assert list(content["model"]) == list(build_model("resnet20", 3).state_dict())

    other = make_state(1)
    other.load_state_dict(checkpoint.load(path))
    both = (state.model.state_dict().values(), other.model.state_dict().values())
    for ours, theirs in zip(*both, strict=True):
        assert torch.equal(ours, theirs)
    momentum = [s["momentum_buffer"] for s in state.optimizer.state_dict()["state"].values()]
    restored = [s["momentum_buffer"] for s in other.optimizer.state_dict()["state"].values()]
    assert all(torch.equal(a, b) for a, b in zip(momentum, restored, strict=True))
    assert other.scaler.state_dict() == state.scaler.state_dict()
    assert (other.step, other.best_acc1, other.best_step) == (7, 12.5, 3)
    assert other.lr_memory == LrMemory([2, 5], 4, 7, [1, 2])


def test_latest_best_and_retention(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.keep_checkpoints=2")
    assert checkpoint.latest(config.run_dir) is None
    state = make_state(0)
    for step, acc1 in [(1, 10.0), (2, 50.0), (3, 20.0), (4, 30.0), (5, 40.0)]:
        state.step = step
        if acc1 > state.best_acc1:
            state.best_acc1, state.best_step = acc1, step
        path = save(state, config)
        assert checkpoint.latest(config.run_dir) == path.resolve()
    folder = config.run_dir / "checkpoints"
    assert sorted(p.name for p in folder.iterdir()) == [
        "best", "latest", "step-00000002", "step-00000004", "step-00000005"
    ]  # fmt: skip
    assert (folder / "best").resolve().name == "step-00000002"
    assert checkpoint.load(config.run_dir)["step"] == 2  # a run folder means its best
    assert json.loads((folder / "best" / "meta.json").read_text())["best"]["acc1"] == 50.0


@pytest.mark.parametrize("call", ["mkdir", "fsync", "rename", "replace", "symlink", "sendfile"])
def test_cut_anywhere_the_last_whole_checkpoint_stands(
    tiny_config: Callable[..., Config], monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    """Dies in the n-th system call of a save, for each n; what `latest` names always loads."""
    config = tiny_config("train.keep_checkpoints=1")
    state = make_state(0, step=1)
    save(state, config)
    for survives in range(10):
        state.step += 1
        left = survives
        real = getattr(os, call)

        def dying(*args, real=real, **kwargs):  # type: ignore[no-untyped-def]
            nonlocal left
            if left == 0:
                raise KeyboardInterrupt
            left -= 1
            return real(*args, **kwargs)

        monkeypatch.setattr(os, call, dying)
        try:
            save(state, config)
            done = True
        except KeyboardInterrupt:
            done = False
        monkeypatch.setattr(os, call, real)
        newest = checkpoint.latest(config.run_dir)
        assert newest is not None
        assert checkpoint.load(newest)["step"] in (state.step, state.step - 1)
        save(state, config)  # the next incarnation goes on
        assert checkpoint.load(config.run_dir / "checkpoints" / "latest")["step"] == state.step
        if done:
            return
    raise AssertionError(f"{call} was called ten times in one save")


def test_copied_without_links_and_with_leftovers(tiny_config: Callable[..., Config]) -> None:
    config = tiny_config("train.keep_checkpoints=1")
    state = make_state(0)
    for step in (1, 2):
        state.step = step
        path = save(state, config)
    (path.parent / "latest").unlink()
    (path.parent / ".partial-step-00000003").mkdir()
    (path.parent / ".removed-step-00000002").mkdir()
    assert checkpoint.latest(config.run_dir) == path
    state.step = 3
    save(state, config)
    assert {p.name for p in path.parent.iterdir()} == {"latest", "step-00000003"}


def test_damage_is_named(tiny_config: Callable[..., Config], tmp_path: Path) -> None:
    config = tiny_config()
    path = save(make_state(0, step=1), config)
    with pytest.raises(UserError, match="no checkpoint; give a folder such as"):
        checkpoint.load(tmp_path)
    content = bytearray((path / "state.pt").read_bytes())
    content[len(content) // 2] ^= 1
    (path / "state.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"damaged \(the SHA-256 of state\.pt differs"):
        checkpoint.load(path)


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def cut_short(path: Path) -> None:
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size // 2)


def lose_the_state(path: Path) -> None:
    (path / "state.pt").unlink()


def tear_the_note(path: Path) -> None:
    (path / "meta.json").write_text('{"step": 3, "sh')


@pytest.mark.parametrize("spoil", [flip_a_bit, cut_short, lose_the_state, tear_the_note])
def test_a_damaged_checkpoint_is_passed_over(
    tiny_config: Callable[..., Config], spoil: Callable[[Path], None]
) -> None:
    config = tiny_config("train.keep_checkpoints=3")
    paths = [save(make_state(0, step), config) for step in (1, 2, 3)]
    assert checkpoint.set_damaged_aside(config.run_dir) == []
    for path in paths[1:]:
        spoil(path)
    warnings = checkpoint.set_damaged_aside(config.run_dir)
    assert [str(path) in line for path, line in zip(paths[:0:-1], warnings, strict=True)] == [
        True
    ] * 2
    assert checkpoint.latest(config.run_dir) == paths[0]
    assert checkpoint.load(config.run_dir)["step"] == 1
    assert checkpoint.set_damaged_aside(config.run_dir) == []
    again = save(make_state(0, 3), config)  # its name is free
    assert checkpoint.load(again)["step"] == 3
    spoil(paths[0])  # older than a whole one: left alone
    assert checkpoint.set_damaged_aside(config.run_dir) == []
