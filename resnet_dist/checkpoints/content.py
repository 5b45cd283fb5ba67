"""The content of a checkpoint: every field, its type and its meaning; and how one is loaded.

folders.py has the layout on disk and decides which checkpoints are kept; writer.py writes them.
"""

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
    """What is known before the first step and needed later, to use a checkpoint or to resume."""

    classes: tuple[str, ...]  # class names; a label is an index into them
    # What is fingerprinted -> SHA-256 (Index.fingerprints); older versions recorded less.
    fingerprints: dict[str, str] = field(default_factory=dict)
    decoder: str | None = None  # str() of the run's Decoding; None: saved by an older version
    # Versions, device and number of ranks (resume.made_with); empty: saved by an older version.
    made_with: dict[str, str] = field(default_factory=dict)
    bn_batch_size: int = 0  # images that BN normalizes together; 0: the network has no BN
    # With data.per_pixel_mean, what is subtracted from images: float32 [crop_px, crop_px, 3] on the
    # 0..1 scale. None: data.mean is subtracted.
    mean_image: Tensor | None = None


@dataclass(frozen=True, kw_only=True)
class Checkpoint(Facts):
    """Everything needed to resume a run, and everything needed to use its network.

    There is no loader, scheduler or RNG state: what comes next depends on the step alone.
    """

    config: dict[str, Any]  # nested plain values, from config.to_dict
    step: int  # optimizer steps done
    # The network's state dict, with torchvision's keys (no "module."): float32, counters int64.
    model: dict[str, Tensor]
    optimizer: dict[str, Any]  # torch.optim.SGD's state dict: momentum by parameter number
    scaler: dict[str, Any]  # torch.amp.GradScaler's state dict; empty except in fp16
    ema: dict[str, Tensor] | None = None  # state dict of the averaged network, if there is one
    # Sums of loss, correct answers and images since the last log line: float64 [ranks, 3].
    meter: Tensor = NO_SUMS
    train_loss: float | None = None  # mean loss in the last log line; None before there was one
    evaluated_step: int = 0  # step of the last evaluation; below `step` if one is still due
    best_acc1: float = -1.0  # in percent; -1 before the first evaluation
    best_step: int = -1  # step of the evaluation with best_acc1; -1 before the first
    lr_memory: LrMemory = field(default_factory=LrMemory)
    saved_at: str = ""  # local date and time, for people

    @property
    def weights(self) -> dict[str, Tensor]:
        """The weights to evaluate, export and fine-tune from: averaged if the run averaged them."""
        return self.model if self.ema is None else self.ema

    def with_weights(self, weights: dict[str, Tensor]) -> "Checkpoint":
        """Returns a copy whose `weights` are replaced."""
        return replace(self, model=weights) if self.ema is None else replace(self, ema=weights)

    @property
    def mean_loss(self) -> float | None:
        """Mean training loss since the last log line, or else in it; None before the first step."""
        return mean_loss(self.meter, self.train_loss)

    def to_dict(self) -> dict[str, Any]:
        """Returns the content of state.pt: only what torch.load accepts with weights_only=True."""
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
            KeyError, TypeError: a field is missing, unknown, or of a wrong type.
        """
        content = dict(content)
        if content.pop("format") != FORMAT:
            raise TypeError("a different format")
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
        """Loads a checkpoint folder to the CPU, after checking that it is not damaged.

        path: may also be a run folder, which means its best checkpoint, or the newest if there is
        no best one. Older formats are converted.

        Raises:
            UserError: there is no checkpoint, it is damaged, or its format is unknown.
        """
        path = folders.find(path)
        if (why := folders.why_damaged(path)) is not None:
            raise UserError(f"{path}: damaged ({why}); use another checkpoint")
        try:
            content: Any = torch.load(path / "state.pt", map_location="cpu", weights_only=True)
        except UnpicklingError:
            why = "contains more than tensors and plain data, so loading it could run code"
            raise UserError(f"{path}: {why}; use a checkpoint that `resnet-dist` wrote") from None
        written_as = content.get("format")
        while content.get("format") in MIGRATIONS:
            content = MIGRATIONS[content["format"]](content)
        if content.get("format") != FORMAT:
            raise UserError(
                f"{path}: checkpoint format {written_as}; this version reads {min(MIGRATIONS)} to "
                f"{FORMAT}: use the version of resnet-dist that wrote it, or start a new run "
                "with another name="
            )
        try:
            return cls.from_dict(content)
        except (KeyError, TypeError) as error:
            raise UserError(
                f"{path}: not the fields of a checkpoint of format {FORMAT} ({error}); use the "
                "version of resnet-dist that wrote it"
            ) from None


def mean_loss(meter: Tensor, last_loss: float | None) -> float | None:
    """Returns the mean loss of the images in `meter` (see Checkpoint; on the CPU).

    If there are no images, returns last_loss.
    """
    loss_sum, _, images = meter.sum(0).tolist()
    return loss_sum / images if images else last_loss


def leaf_values(content: Any) -> Iterator[Any]:
    """Yields the tensors and plain values in nested dictionaries and lists.

    Raises:
        TypeError: something else is in there.
    """
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for value in content:
            yield from leaf_values(value)
    elif isinstance(content, Tensor) or type(content) in PLAIN:
        yield content
    else:  # also a subclass of a plain type, which weights_only=True would refuse
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


MIGRATIONS = {2: _from_format_2}  # format n -> function that converts it to format n + 1
