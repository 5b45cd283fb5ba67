"""Small training states, and ways in which a checkpoint folder gets damaged."""

import os
import shutil
from collections.abc import Callable
from pathlib import Path

import torch

from resnet_dist.checkpoints.content import Checkpoint, Facts
from resnet_dist.checkpoints.folders import Retention
from resnet_dist.config import Config, OptimConfig
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer, set_lr
from resnet_dist.state import TrainState

ALL = Retention(newest=99)

Spoil = Callable[[Path], None]


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


def small_state(step: int) -> TrainState:
    """Of a few kB."""
    torch.manual_seed(step)
    model = torch.nn.Linear(3, 2)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    state = TrainState(model, build_optimizer(model, OptimConfig()), scaler, step)
    set_lr(state.optimizer, 0.1)
    model(torch.ones(1, 3)).sum().backward()
    state.optimizer.step()
    return state


def content_of(state: TrainState, config: Config) -> Checkpoint:
    return state.checkpoint(config, Facts(classes=("a", "b", "c")))


def flip_a_bit(path: Path) -> None:
    data = bytearray((path / "state.pt").read_bytes())
    data[len(data) // 2] ^= 1
    (path / "state.pt").write_bytes(data)


def zero_a_page(path: Path) -> None:
    with open(path / "state.pt", "r+b") as file:
        file.write(bytes(4096))


def cut_short(path: Path) -> None:
    os.truncate(path / "state.pt", (path / "state.pt").stat().st_size // 2)


def lose_the_state(path: Path) -> None:
    (path / "state.pt").unlink()


def lose_the_sums(path: Path) -> None:
    (path / "SHA256SUMS").unlink()


def tear_the_note(path: Path) -> None:
    (path / "meta.json").write_text('{"step": 3, "sh')


def lose_everything(path: Path) -> None:
    shutil.rmtree(path)
    path.mkdir()


SPOILS = [flip_a_bit, zero_a_page, cut_short, lose_the_state, lose_the_sums, tear_the_note]
