"""What a checkpoint holds: each field once, with its type and meaning; how one is read.

folders.py says where checkpoints stand and which of them stay, writer.py how one is written.
"""

import os
from collections.abc import Iterator
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from pickle import UnpicklingError
from typing import Any

import torch
from torch import Tensor

from resnet_dist.checkpoints import folders
from resnet_dist.errors import UserError
from resnet_dist.plan import LrMemory

FORMAT = 3
NO_SUMS = torch.zeros(1, 3, dtype=torch.float64)
PLAIN = (str, int, float, bool, type(None))


@dataclass(frozen=True, kw_only=True)
class Facts:
    """What is known before the first step, and needed to use a checkpoint or to go on from it."""

    classes: tuple[str, ...]  # by label
    # What -> SHA-256 of it, see Index.fingerprints; an older version noted less.
    fingerprints: dict[str, str] = field(default_factory=dict)
    decoder: str | None = None  # str() of the run's Decoding; None: an older version wrote it
    # Versions, device and number of ranks, see resume.made_with; empty: an older version wrote it.
    made_with: dict[str, str] = field(default_factory=dict)
    bn_batch_size: int = 0  # images that are normalized together; 0: the network has no BN
    # float32 [crop_px, crop_px, 3] on the 0..1 scale, subtracted from images; None: data.mean is.
    mean_image: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Facts):
    """All that a run goes on from, and all that it takes to use its network.

    No loader, schedule or RNG state exists: what comes depends on the step alone.
    """

    config: dict[str, Any]  # nested, as config.to_dict makes it
    step: int  # optimizer steps done
    # The network's state dict, with torchvision's keys (no "module."): float32, int64 for counters.
    model: dict[str, Tensor]
    optimizer: dict[str, Any]  # torch.optim.SGD's state dict: momentum by the parameter's number
    scaler: dict[str, Any]  # torch.amp.GradScaler's state dict; empty but in fp16
    ema: dict[str, Tensor] | None = None  # the averaged network's; None without train.ema_decay
    # Of the steps since the last log line: float64 [ranks, 3], sums of loss, right answers, images.
    meter: Tensor = NO_SUMS
    train_loss: float | None = None  # mean loss in the last log line; None before there was one
    evaluated_step: int = 0  # of the last evaluation; less than `step` where one is owed
    best_acc1: float = -1.0  # in percent; -1 before the first evaluation
    best_step: int = -1  # of the evaluation that gave best_acc1
    lr_memory: LrMemory = field(default_factory=LrMemory)
    saved_at: str = ""  # local date and time, for people

    @property
    def weights(self) -> dict[str, Tensor]:
        """What is evaluated, exported and fine-tuned from: the averaged weights, where the run
        kept them."""
        return self.model if self.ema is None else self.ema

    def with_weights(self, weights: dict[str, Tensor]) -> "Checkpoint":
        """The same with other `weights`."""
        return replace(self, model=weights) if self.ema is None else replace(self, ema=weights)

    @property
    def mean_loss(self) -> float | None:
        """Of training since the last log line, or in it; None before the first step."""
        return mean_loss(self.meter, self.train_loss)

    def to_dict(self) -> dict[str, Any]:
        """What state.pt holds: tensors and plain data, so that it loads with weights_only=True."""
        content = {item.name: getattr(self, item.name) for item in fields(self)}
        best = {"acc1": content.pop("best_acc1"), "step": content.pop("best_step")}
        return content | {
            "format": FORMAT,
            "classes": list(self.classes),
            "best": best,
            "lr_memory": self.lr_memory.to_dict(),
        }

    @classmethod
    def from_dict(cls, content: dict[str, Any]) -> "Checkpoint":
        """The inverse of `to_dict`.

        Raises:
            KeyError, TypeError: something is missing, or is not what it should be.
        """
        content = dict(content)
        if content.pop("format") != FORMAT:
            raise TypeError("another format")
        best = content.pop("best")
        content |= {
            "classes": tuple(content["classes"]),
            "best_acc1": best["acc1"],
            "best_step": best["step"],
            "lr_memory": LrMemory.from_dict(content["lr_memory"]),
        }
        return cls(**content)

    @classmethod
    def load(cls, path: Path) -> "Checkpoint":
        """Reads a checkpoint folder (or a run folder, whose best one it takes) to the CPU.

        Without a best one, a run's newest. Older formats are brought up to date.

        Raises:
            UserError: no checkpoint there, or one that is damaged or of another format.
        """
        if os.path.isdir(path / "checkpoints"):
            path = folders.best(path) or path
        if not all(os.path.isfile(path / name) for name in ("state.pt", "meta.json")):
            raise UserError(f"{path}: no checkpoint; give a folder such as RUN/checkpoints/best")
        if (why := folders.why_damaged(path)) is not None:
            raise UserError(f"{path}: damaged ({why}); use another checkpoint")
        try:
            content: Any = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except UnpicklingError:
            why = "holds more than tensors and plain data, which could run as a program: not loaded"
            raise UserError(f"{path}: {why}; use a checkpoint that `resnet-dist` wrote") from None
        written_as = content.get("format")
        while content.get("format") in MIGRATIONS:
            content = MIGRATIONS[content["format"]](content)
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path}: checkpoint format {written_as}; this version reads {min(MIGRATIONS)} to "
                f"{FORMAT}: use the version of resnet-dist that wrote it, or start anew under "
                "another name="
            )
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not what a checkpoint of format {FORMAT} holds ({error}); use the "
                "version of resnet-dist that wrote it"
            ) from None


def mean_loss(meter: Tensor, last_loss: float | None) -> float | None:
    """Of the images in `meter` (see Checkpoint; on the CPU); if there are none, last_loss."""
    loss_sum, _, images = meter.sum(0).tolist()
    return loss_sum / images if images else last_loss


def leaf_values(content: Any) -> Iterator[Any]:
    """The tensors and plain values in dictionaries and lists.

    Raises:
        TypeError: there is something else.
    """
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for part in content:
            yield from leaf_values(part)
    elif isinstance(content, Tensor) or type(content) in PLAIN:
        yield content
    else:  # subclasses neither: weights_only=True would refuse them
        raise TypeError(f"only tensors and plain data can be saved, not {content!r}")


def _from_format_2(content: dict[str, Any]) -> dict[str, Any]:
    fingerprint = content["data_fingerprint"]
    return {key: value for key, value in content.items() if key != "data_fingerprint"} | {
        "format": 3,
        "meter": NO_SUMS,
        "train_loss": None,
        "evaluated_step": content["step"],
        "decoder": None,
        "fingerprints": {"training images": fingerprint},
        "made_with": {},
        "saved_at": "",
    }


MIGRATIONS = {2: _from_format_2}  # format n -> to n + 1
