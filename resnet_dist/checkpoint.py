"""What a checkpoint holds, and how it is read, also in an older format.

checkpoint_folder.py keeps one on the disk, checkpoint_history.py those of a run. Model keys are
torchvision's: no `module.` prefix.
"""

import os
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist import checkpoint_list
from resnet_dist.checkpoint_folder import damage
from resnet_dist.config import Config, to_dict
from resnet_dist.ema import AveragedNetwork, weights_for_use
from resnet_dist.errors import UserError
from resnet_dist.meter import NO_SUMS
from resnet_dist.optim import load_optimizer_state
from resnet_dist.plan import LrMemory

FORMAT = 3


@dataclass
class TrainState:
    """All that changes in training. No loader, schedule or RNG state exists: see DESIGN.md."""

    model: nn.Module  # unwrapped
    optimizer: torch.optim.SGD
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    evaluated_step: int = 0  # of the last evaluation; one may be owed: see train.run
    best_acc1: float = -1.0
    best_step: int = -1
    lr_memory: LrMemory = field(default_factory=LrMemory)
    ema: AveragedNetwork | None = None  # with train.ema_decay
    meter: Tensor = NO_SUMS  # what Meter.gather gave when this was saved
    train_loss: float | None = None  # of the last log line then; None before there was one

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None if self.ema is None else self.ema.network.state_dict(),
            "meter": self.meter,
            "train_loss": self.train_loss,
            "step": self.step,
            "evaluated_step": self.evaluated_step,
            "best": {"acc1": self.best_acc1, "step": self.best_step},
            "lr_memory": asdict(self.lr_memory),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        load_optimizer_state(self.optimizer, saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step, self.evaluated_step = saved["step"], saved["evaluated_step"]
        self.best_acc1, self.best_step = saved["best"]["acc1"], saved["best"]["step"]
        self.lr_memory = LrMemory(**saved["lr_memory"])
        if self.ema is not None:
            self.ema.network.load_state_dict(weights_for_use(saved))
        self.meter, self.train_loss = saved["meter"], saved["train_loss"]


def content_of(state: TrainState, config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, and `load` returns. Tensors are the state's own, not copies.

    facts: what else must be known to use it ("classes", ...): tensors and plain values.
    """
    return state.state_dict() | {"format": FORMAT, "config": to_dict(config), **facts}


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint folder (or a run folder, whose best one it takes) to the CPU.

    Without a best one, a run's newest. Older formats are brought up to date.

    Raises:
        UserError: no checkpoint there, or one that is damaged or of another format.
    """
    if os.path.isdir(path / "checkpoints"):
        path = checkpoint_list.best(path) or path
    if not all(os.path.isfile(path / name) for name in ("state.pt", "meta.json")):
        raise UserError(f"{path}: no checkpoint; give a folder such as RUN/checkpoints/best")
    if (why := damage(path)) is not None:
        raise UserError(f"{path}: damaged ({why}); use another checkpoint")
    try:
        content: dict[str, Any] = torch.load(
            path / "state.pt", map_location="cpu", weights_only=True
        )
    except UnpicklingError:
        why = "holds more than tensors and plain data, which could run as a program: not loaded"
        raise UserError(f"{path}: {why}; use a checkpoint that `resnet-dist` wrote") from None
    written_as = content.get("format")
    while content.get("format") in MIGRATIONS:
        content = MIGRATIONS[content["format"]](content)
    if content.get("format") != FORMAT:
        raise UserError(
            f"{path}: checkpoint format {written_as}; this version reads {min(MIGRATIONS)} to "
            f"{FORMAT}: use the version of resnet-dist that wrote it, or start anew under another "
            "name="
        )
    return content


def _from_format_2(content: dict[str, Any]) -> dict[str, Any]:
    return content | {
        "format": 3,
        "meter": NO_SUMS,
        "train_loss": None,
        "evaluated_step": content["step"],
        "decoder": None,
        "fingerprints": {"training images": content["data_fingerprint"]},
        "made_with": {},
    }


MIGRATIONS = {2: _from_format_2}  # format n -> to n + 1
