"""Checkpoints: atomic folders, `latest` and `best` beside them, and what they hold.

    checkpoints/step-00000440/state.pt     all of TrainState, loaded with weights_only=True
    checkpoints/step-00000440/meta.json    for people and for retention: step, scores, soundness
    checkpoints/step-00000440/SHA256SUMS   of both files; `sha256sum -c SHA256SUMS` checks them
    checkpoints/latest, checkpoints/best   symbolic links, replaced atomically

A folder is written under another name, flushed to the disk and then renamed, so a name without a
leading dot is always whole. Model keys are torchvision's: no `module.` prefix.
"""

import errno
import hashlib
import json
import math
import os
import re
import shlex
import shutil
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, field
from pathlib import Path
from pickle import UnpicklingError
from typing import Any, BinaryIO

import torch
from torch import Tensor, nn

from resnet_dist.config import Config, to_dict
from resnet_dist.ema import AveragedNetwork, weights_for_use
from resnet_dist.errors import UserError
from resnet_dist.meter import NO_SUMS, mean_loss
from resnet_dist.plan import LrMemory
from resnet_dist.retention import Retention

FORMAT = 3
STEP_NAMES = "step-" + "[0-9]" * 8  # not what a user keeps beside them
PLAIN = (str, int, float, bool, type(None))
RUBBISH = (".partial-*", ".removed-*")  # of a writer that was killed
SUMS_FORM = re.compile(r"(?:[0-9a-f]{64}  \w[\w.-]*\n)+", re.ASCII)


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
        if self.ema is not None:
            self.ema.network.load_state_dict(weights_for_use(saved))
        self.meter, self.train_loss = saved["meter"], saved["train_loss"]


def content_of(state: TrainState, config: Config, facts: dict[str, Any]) -> dict[str, Any]:
    """What a checkpoint holds, and `load` returns. Tensors are the state's own, not copies.

    facts: what else must be known to use it ("classes", ...): tensors and plain values.
    """
    return state.state_dict() | {"format": FORMAT, "config": to_dict(config), **facts}


def save(run_dir: Path, content: dict[str, Any], retention: Retention) -> Path:
    """Writes a checkpoint, points `latest` and `best` at what they mean, and removes old ones.

    A whole checkpoint of the same step is not written again. For one process only.

    Raises:
        OSError: it is not written (the disk is full, say). Older checkpoints stay as they are.
    """
    folder = run_dir / "checkpoints"
    step, best_step = content["step"], content["best"]["step"]
    final, best = (folder / f"step-{number:08d}" for number in (step, best_step))
    if damage(final) is not None or _note(final).get("step") != step:
        write(final, content)
    _point(folder / "latest", final)
    if best.is_dir():  # each time: a writer that was killed may have left the link behind
        _point(folder / "best", best)
    _remove_old(folder, retention)
    return final


def write(final: Path, content: dict[str, Any]) -> None:
    """Writes `content`, what `load` will return, to a folder that does not exist. One rank only.

    Raises:
        OSError: it is not written, and nothing of it stays.
    """
    if os.path.lexists(final):  # a rename would replace an empty folder
        raise FileExistsError(
            errno.EEXIST, "is there already, and is not a whole checkpoint", final
        )
    partial = _beside(final)
    try:
        if not final.parent.exists():
            final.parent.mkdir(parents=True)
            _flush_folder(final.parent.parent)
        partial.mkdir()
        state_sum = _write_file(partial / "state.pt", lambda file: torch.save(content, file))
        note = json.dumps(_describe(content), indent=1).encode()
        note_sum = _write_file(partial / "meta.json", lambda file: file.write(note))
        sums = f"{state_sum}  state.pt\n{note_sum}  meta.json\n".encode()
        _write_file(partial / "SHA256SUMS", lambda file: file.write(sums))
        _flush_folder(partial)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    _flush_folder(final.parent)


class _HashedFile:
    """A file whose SHA-256 grows as it is written: of what was meant, not of what was read back."""

    def __init__(self, file: BinaryIO):
        self.file = file
        self.sha256 = hashlib.sha256()
        self.failure: OSError | None = None
        self.flush = file.flush

    def write(self, data: Any) -> int:
        self.sha256.update(data)
        try:
            return self.file.write(data)
        except OSError as failure:
            self.failure = failure
            raise


def _write_file(path: Path, fill: Callable[[Any], object]) -> str:
    """Makes a file, has it filled, and flushes it to the disk. Returns its SHA-256."""
    with open(path, "xb") as file:
        hashed = _HashedFile(file)
        try:
            fill(hashed)
        except RuntimeError as error:  # torch.save's word for a full disk: "unexpected pos"
            raise hashed.failure or error from None
        file.flush()
        os.fsync(file.fileno())
    return hashed.sha256.hexdigest()


def _describe(content: dict[str, Any]) -> dict[str, Any]:
    """meta.json. "sound": worth going on from, as far as can be told without the data."""
    loss = mean_loss(content["meter"], content["train_loss"])
    tensors = [leaf for leaf in _leaves(content) if isinstance(leaf, Tensor)]
    finite = all(_is_finite(tensor) for tensor in tensors)
    finite = finite and (loss is None or math.isfinite(loss))
    # A blind guess has the loss ln(classes), whatever the label smoothing. A network that does
    # worse may be exploding, or in its first steps: a false alarm costs some disk space, no more.
    blind = math.log(max(1, len(content["classes"])))
    return {
        "format": content["format"],
        "step": content["step"],
        "best": content["best"],
        "train_loss": loss if finite else None,
        "finite": finite,
        "sound": finite and (loss is None or loss <= blind),
    }


def _leaves(content: Any) -> Iterator[Any]:
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for part in content:
            yield from _leaves(part)
    elif isinstance(content, Tensor) or type(content) in PLAIN:
        yield content
    else:  # subclasses neither: weights_only=True would refuse them
        raise TypeError(f"only tensors and plain data can be saved, not {content!r}")


def _is_finite(tensor: Tensor) -> bool:
    if not tensor.is_floating_point() or tensor.numel() == 0:
        return True
    # By NumPy, in this thread alone: torch would take all cores from the training beside it.
    values = tensor.detach().float().cpu().numpy()
    return math.isfinite(values.min()) and math.isfinite(values.max())  # NaN is both


def latest(run_dir: Path) -> Path | None:
    """The newest complete checkpoint of a run, or None.

    By name, not by the link: that is one step behind if its writer died between the two, and lost
    if somebody copied the folder without links.
    """
    return max((run_dir / "checkpoints").glob(STEP_NAMES), default=None)


def look_over(run_dir: Path) -> list[str]:
    """Before a run goes on: damaged checkpoints are set aside. For one rank only.

    Returns lines of warning, about them and about values that are not finite.
    """
    return set_damaged_aside(run_dir) + warn_of_infinite(run_dir)


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Renames checkpoints that are newer than the newest whole one: a line of warning for each."""
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


def warn_of_infinite(run_dir: Path) -> list[str]:
    """A line of warning where the newest checkpoint holds a NaN or an infinity; else none."""
    newest = latest(run_dir)
    if newest is None or _note(newest).get("finite", True):
        return []
    line = f"warning: {newest}: not all values are finite, and will hardly become so; "
    paths = sorted(newest.parent.glob(STEP_NAMES))
    sound = max((path for path in paths if _is_sound(path)), default=None)
    if sound is None:
        return [line + "no sound checkpoint is left: start anew under another name="]
    newer = " ".join(path.name for path in paths if path > sound)
    line += f"the newest sound one is {sound.name}; to go back to it: "
    folder = shlex.quote(str(newest.parent))
    return [f"{line}cd {folder} && mkdir aside && mv {newer} aside, and the same command again"]


def damage(path: Path) -> str | None:
    """Why the checkpoint folder cannot be what was written; None if it is.

    Raises:
        UserError: it cannot be read, which says nothing of what is in it.
    """
    try:
        if not (path / "SHA256SUMS").exists():
            return _damage_in_format_2(path)
        sums = (path / "SHA256SUMS").read_bytes().decode("ascii")
        lines = sums.split("\n")[:-1]
        names = [line[66:] for line in lines]
        if not SUMS_FORM.fullmatch(sums) or not {"state.pt", "meta.json"} <= set(names):
            return "SHA256SUMS is not what it should be"
        for name, line in zip(names, lines, strict=True):
            if line != f"{_sha256(path / name)}  {name}":
                return f"the SHA-256 of {name} differs from SHA256SUMS"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        return "SHA256SUMS is not what it should be"
    return None


def _damage_in_format_2(path: Path) -> str | None:
    """It had no SHA256SUMS: meta.json held the SHA-256 of state.pt."""
    try:
        expected = json.loads((path / "meta.json").read_bytes()).get("sha256")
    except (ValueError, AttributeError):
        return "meta.json is not what it should be"
    if expected is None:
        return "no SHA256SUMS"
    if _sha256(path / "state.pt") != expected:
        return "the SHA-256 of state.pt differs from meta.json"
    return None


def load(path: Path) -> dict[str, Any]:
    """Reads a checkpoint folder (or a run folder, whose `best` or `latest` it takes) to the CPU.

    Older formats are brought up to date.

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
        "decoder": None,
        "made_with": {},
    }


MIGRATIONS = {2: _from_format_2}  # format n -> to n + 1


def _remove_old(folder: Path, retention: Retention) -> None:
    paths = {int(path.name.removeprefix("step-")): path for path in folder.glob(STEP_NAMES)}
    best = (folder / "best").resolve().name.removeprefix("step-")
    sound = {step: _is_sound(path) for step, path in paths.items()}
    kept = retention.kept(sound, int(best) if best.isdigit() else None)
    for step, path in paths.items():
        if step not in kept:
            # Renamed first: a name that stands is whole, even if the removal is cut short.
            os.rename(path, path.with_name(f".removed-{path.name}"))
    for leftover in (path for pattern in RUBBISH for path in folder.glob(pattern)):
        if leftover.is_dir() and not leftover.is_symlink():
            # What cannot be removed now (on NFS, a file that is read) is tried again each time.
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_sound(path: Path) -> bool:
    return bool(_note(path).get("sound", True))  # format 2 did not say


def _note(path: Path) -> dict[str, Any]:
    """meta.json; one that cannot be read speaks against its checkpoint."""
    try:
        note = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError):
        note = None
    return note if isinstance(note, dict) else {"finite": False, "sound": False}


def _point(link: Path, target: Path) -> None:
    if link.is_symlink() and os.readlink(link) == target.name:
        return
    fresh = _beside(link)
    fresh.symlink_to(target.name)
    os.replace(fresh, link)
    _flush_folder(link.parent)


def _beside(path: Path) -> Path:
    """A name that was never used, for what will be renamed to `path`."""
    return path.with_name(f".partial-{path.name}-{uuid.uuid4().hex[:8]}")


def _sha256(path: Path) -> str:
    with open(path, "rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _flush_folder(folder: Path) -> None:
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
