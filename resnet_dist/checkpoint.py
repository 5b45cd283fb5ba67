"""Checkpoints: atomic folders, `latest` and `best` beside them, and what they hold.

    checkpoints/step-00000440/state.pt    all of TrainState, loaded with weights_only=True
    checkpoints/step-00000440/meta.json   step, scores, and the SHA-256 of state.pt
    checkpoints/latest, checkpoints/best  symbolic links, replaced atomically

A folder is written under another name, flushed to the disk and then renamed, so a name without a
leading dot is always whole. Model keys are torchvision's: no `module.` prefix.
"""

import hashlib
import json
import os
import shutil
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn

from resnet_dist.config import Config, to_dict
from resnet_dist.errors import UserError
from resnet_dist.plan import LrMemory

FORMAT = 2
STEP_NAMES = "step-" + "[0-9]" * 8  # not what a user keeps beside them


@dataclass
class TrainState:
    """All that changes in training. No loader, schedule or RNG state exists: see DESIGN.md."""

    model: nn.Module  # unwrapped
    optimizer: torch.optim.Optimizer
    scaler: torch.amp.GradScaler
    step: int = 0  # optimizer steps done
    best_acc1: float = -1.0
    best_step: int = -1
    lr_memory: LrMemory = field(default_factory=LrMemory)

    def state_dict(self) -> dict[str, Any]:
        return {
            "model": self.model.state_dict(),
            "optimizer": self.optimizer.state_dict(),
            "scaler": self.scaler.state_dict(),
            "ema": None,  # the place of the averaged weights
            "step": self.step,
            "best": {"acc1": self.best_acc1, "step": self.best_step},
            "lr_memory": asdict(self.lr_memory),
        }

    def load_state_dict(self, saved: dict[str, Any]) -> None:
        self.model.load_state_dict(saved["model"])
        self.optimizer.load_state_dict(saved["optimizer"])
        self.scaler.load_state_dict(saved["scaler"])
        self.step = saved["step"]
        self.best_acc1, self.best_step = saved["best"]["acc1"], saved["best"]["step"]
        self.lr_memory = LrMemory(**saved["lr_memory"])


def save(state: TrainState, config: Config, facts: dict[str, Any]) -> Path:
    """Writes a checkpoint of `state` and points `latest` (and `best`) at it. For one rank only.

    facts: what else must be known to use it (classes, the data's fingerprint): plain values.
    """
    folder = config.run_dir / "checkpoints"
    final = folder / f"step-{state.step:08d}"
    if not final.exists():
        content = state.state_dict() | {
            "format": FORMAT,
            "config": to_dict(config),
            **facts,
        }
        write(final, content)
    _point(folder / "latest", final)
    if state.best_step == state.step:
        _point(folder / "best", final)
    _remove_old(folder, config.train.keep_checkpoints)
    return final


def write(final: Path, content: dict[str, Any]) -> None:
    """Writes `content`, what `load` will return, to a folder that does not exist. One rank only."""
    partial = final.with_name(f".partial-{final.name}")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    with open(partial / "state.pt", "wb") as file:
        torch.save(content, file)
        os.fsync(file.fileno())
    meta = {
        "step": content["step"],
        "best": content["best"],
        "sha256": _sha256(partial / "state.pt"),
    }
    with open(partial / "meta.json", "w") as file:
        json.dump(meta, file, indent=1)
        file.flush()
        os.fsync(file.fileno())
    _flush_folder(partial)
    os.rename(partial, final)
    _flush_folder(final.parent)


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    By name, not by the link: that is one step behind if its writer died between the two, and lost
    if somebody copied the folder without links.
    """
    return max((run_dir / "checkpoints").glob(STEP_NAMES), default=None)


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Renames checkpoints that are newer than the newest whole one. For one rank only.

    Returns a line of warning for each.
    """
    folder = run_dir / "checkpoints"
    warnings: list[str] = []
    for path in sorted(folder.glob(STEP_NAMES), reverse=True):
        why = damage(path)
        if why is None:
            if warnings:
                _point(folder / "latest", path)
            break
        aside = path.with_name(f"damaged-{path.name}")
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)  # its name is free for the step to be saved anew
        warnings.append(
            f"warning: {path}: damaged ({why}); it is {aside.name} now, and passed over"
        )
    return warnings


def damage(path: Path) -> str | None:
    """Why the checkpoint folder cannot be what was written; None if it is.

    Raises:
        UserError: it cannot be read, which says nothing of what is in it.
    """
    try:
        expected = json.loads((path / "meta.json").read_bytes())["sha256"]
        if _sha256(path / "state.pt") == expected:
            return None
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except (ValueError, KeyError, TypeError):
        return "meta.json is not what it should be"
    return "the SHA-256 of state.pt differs from meta.json"


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint folder (or a run folder, whose `best` or `latest` it takes) to the CPU.

    Raises:
        UserError: no checkpoint there, or one that is damaged or of another format.
    """
    for inner in ("checkpoints/best", "checkpoints/latest"):
        if (path / inner).exists():
            path = path / inner
            break
    if not (path / "state.pt").is_file() or not (path / "meta.json").is_file():
        raise UserError(f"{path}: no checkpoint; give a folder such as RUN/checkpoints/best")
    if (why := damage(path)) is not None:
        raise UserError(f"{path}: damaged ({why}); use another checkpoint")
    content: dict[str, Any] = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
    if content.get("format") != FORMAT:
        raise UserError(f"{path}: format {content.get('format')}, this version reads {FORMAT}")
    return content


def _remove_old(folder: Path, keep: int) -> None:
    for leftover in (*folder.glob(".partial-*"), *folder.glob(".removed-*")):
        shutil.rmtree(leftover)  # of a writer that was killed
    checkpoints = sorted(folder.glob(STEP_NAMES))
    kept = {(folder / link).resolve() for link in ("latest", "best")} | {
        path.resolve() for path in checkpoints[-keep:]
    }
    for path in checkpoints:
        if path.resolve() not in kept:
            # Renamed first: a name that stands is whole, even if the removal is cut short.
            doomed = path.with_name(f".removed-{path.name}")
            os.rename(path, doomed)
            shutil.rmtree(doomed)


def _point(link: Path, target: Path) -> None:
    fresh = link.with_name(f".{link.name}")
    fresh.unlink(missing_ok=True)
    fresh.symlink_to(target.name)
    os.replace(fresh, link)
    _flush_folder(link.parent)


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    os.fsync(descriptor)
    os.close(descriptor)
