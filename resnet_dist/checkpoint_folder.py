"""One checkpoint on the disk: written as a whole or not at all, and checked before it is used.

    step-00000440/state.pt     all of TrainState, loaded with weights_only=True
    step-00000440/meta.json    for what has no torch: step, scores, soundness, config
    step-00000440/SHA256SUMS   of both files; `sha256sum -c SHA256SUMS` checks them

A folder is written under another name, flushed to the disk and then renamed, so a name without a
leading dot is always whole.
"""

import errno
import hashlib
import json
import math
import os
import re
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from resnet_dist.disk import flush_folder
from resnet_dist.errors import UserError
from resnet_dist.meter import mean_loss

PIECE_BYTES = 2**24  # large: each piece takes the interpreter from training
PLAIN = (str, int, float, bool, type(None))
SUMS_FORM = re.compile(r"(?:[0-9a-f]{64}  \w[\w.-]*\n)+", re.ASCII)


def write(final: Path, content: dict[str, Any]) -> None:
    """Writes `content`, what `load` will return, to a folder that does not exist. One rank only.

    Raises:
        OSError: it is not written, and nothing of it stays.
    """
    if os.path.lexists(final):  # a rename would replace an empty folder
        raise FileExistsError(
            errno.EEXIST, "is there already, and is not a whole checkpoint", final
        )
    partial = beside(final)
    try:
        if not final.parent.exists():
            final.parent.mkdir(parents=True)
            flush_folder(final.parent.parent)
        partial.mkdir()
        state, note, sums = (partial / name for name in ("state.pt", "meta.json", "SHA256SUMS"))
        _write_state(state, content)
        state_sum = _flush_and_sum(state)
        note.write_text(json.dumps(_describe(content), indent=1))
        sums.write_text(state_sum + _flush_and_sum(note))
        _flush_and_sum(sums)
        flush_folder(partial)
        os.rename(partial, final)
    except BaseException:
        shutil.rmtree(partial, ignore_errors=True)
        raise
    flush_folder(final.parent)


def _write_state(path: Path, content: dict[str, Any]) -> None:
    """By torch's own writer: a Python file would take the interpreter from training, for each of
    some thousand pieces."""
    try:
        torch.save(content, path)
    except RuntimeError:  # its word for a full disk is "unexpected pos"
        with open(path, "ab") as file:
            file.write(bytes(2**20))  # raises the reason, if it is the disk
        raise


def _flush_and_sum(path: Path) -> str:
    """Its line in SHA256SUMS, once it is on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())
    return f"{_sha256(path)}  {path.name}\n"


def _describe(content: dict[str, Any]) -> dict[str, Any]:
    """meta.json. "sound": worth going on from, as far as can be told without the data."""
    loss = mean_loss(content["meter"], content["train_loss"])
    tensors = [leaf for leaf in leaves(content) if isinstance(leaf, Tensor)]
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
        "config": content["config"],
    }


def leaves(content: Any) -> Iterator[Any]:
    """The tensors and plain values in it.

    Raises:
        TypeError: there is something else.
    """
    if isinstance(content, dict):
        content = list(content.values())
    if isinstance(content, list | tuple):
        for part in content:
            yield from leaves(part)
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


def beside(path: Path) -> Path:
    """A name that was never used, for what will be renamed to `path`."""
    return path.with_name(f".partial-{path.name}-{uuid.uuid4().hex[:8]}")


def _sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()
