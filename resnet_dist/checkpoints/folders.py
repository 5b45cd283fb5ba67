"""The checkpoints of a run: which there are, whether they are whole, and which of them stay.

    RUN/checkpoints/step-00000440/            state.pt: a Checkpoint, see content.py
                                              meta.json: step, scores, soundness and config
                                              SHA256SUMS of both: `sha256sum -c` checks them
    RUN/checkpoints/latest, .../best          symbolic links, replaced atomically

No torch here: a login node looks before a job is queued.
"""

import hashlib
import json
import os
import re
import shlex
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from resnet_dist.errors import UserError
from resnet_dist.files import PARTIAL, beside, replace_link

STEP_NAME = re.compile(r"step-[0-9]{8}")  # not what a user keeps beside them
PIECE_BYTES = 2**24  # large: each piece takes the interpreter from training
SUMS_FORM = re.compile(r"(?:[0-9a-f]{64}  \w[\w.-]*\n)+", re.ASCII)
LINKS = ("latest", "best")
RUBBISH = (PARTIAL, ".removed-")  # of a writer that was killed


def name_of(step: int) -> str:
    return f"step-{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """The checkpoints of a run, oldest first; none if RUN/checkpoints is not there.

    Raises:
        UserError: it cannot be listed, which does not say that there are none.
    """
    folder = run_dir / "checkpoints"
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if STEP_NAME.fullmatch(entry.name))
    except OSError as error:
        # A link whose target is missing (a disk that is not mounted) is not nothing.
        if isinstance(error, FileNotFoundError) and not os.path.islink(folder):
            return []
        raise UserError(
            f"{folder}: cannot be listed: {error.strerror}; make it readable, or move it away to "
            "start anew"
        ) from None
    return [folder / name for name in names]


def latest(run_dir: Path) -> Path | None:
    """The newest checkpoint of a run, or None. Raises what step_folders raises.

    By name, not by the link: that is one step behind if its writer died between the two, and lost
    if somebody copied the folder without links.
    """
    return max(step_folders(run_dir), default=None)


def best(run_dir: Path) -> Path | None:
    """The best checkpoint of a run; the newest if the best is not there; or None.

    Raises what step_folders raises.
    """
    folder = run_dir / "checkpoints"
    newest = latest(run_dir)
    if os.path.isdir(folder / "best"):
        return folder / "best"
    if newest is None:  # `latest` alone was copied
        return folder / "latest" if os.path.isdir(folder / "latest") else None
    named = folder / name_of(best_step(newest))
    return named if os.path.isdir(named) else newest


def best_step(path: Path) -> int:
    """The step of the best evaluation by the time of this checkpoint; -1: there was none."""
    best = read_meta(path).get("best")
    step = best.get("step") if isinstance(best, dict) else None
    return step if isinstance(step, int) else -1


def read_meta(path: Path) -> dict[str, Any]:
    """meta.json; one that cannot be read speaks against its checkpoint."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError):
        meta = None
    return meta if isinstance(meta, dict) else {"finite": False, "sound": False}


# --------------------------------------------------------------------------------------------------
# Whether one is whole


def why_damaged(path: Path) -> str | None:
    """Why the checkpoint folder cannot be what was written; None if it is.

    Raises:
        UserError: it cannot be read, which says nothing of what is in it.
    """
    try:
        if not (path / "SHA256SUMS").exists():
            return _why_damaged_format_2(path)
        sums = (path / "SHA256SUMS").read_bytes().decode("ascii")
        lines = sums.split("\n")[:-1]
        names = [line[66:] for line in lines]
        if not SUMS_FORM.fullmatch(sums) or not {"state.pt", "meta.json"} <= set(names):
            return "SHA256SUMS is not what it should be"
        for name, line in zip(names, lines, strict=True):
            if line != f"{sha256(path / name)}  {name}":
                return f"the SHA-256 of {name} differs from SHA256SUMS"
    except FileNotFoundError as error:
        return f"no {Path(error.filename).name}"
    except OSError as error:
        raise UserError(f"{path}: cannot be read: {error.strerror}") from None
    except UnicodeDecodeError:
        return "SHA256SUMS is not what it should be"
    return None


def _why_damaged_format_2(path: Path) -> str | None:
    """It had no SHA256SUMS: meta.json held the SHA-256 of state.pt."""
    try:
        expected = json.loads((path / "meta.json").read_bytes()).get("sha256")
    except (ValueError, AttributeError):
        return "meta.json is not what it should be"
    if expected is None:
        return "no SHA256SUMS"
    if sha256(path / "state.pt") != expected:
        return "the SHA-256 of state.pt differs from meta.json"
    return None


def sha256(path: Path) -> str:
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# What a run that goes on finds


def prepare_to_resume(run_dir: Path) -> list[str]:
    """Before a run goes on: damaged checkpoints are set aside, lost links set. For one rank only.

    Returns lines of warning, about them and about values that are not finite.

    Raises:
        UserError: there are checkpoints, but none that can be gone on from.
    """
    try:
        warnings = [line for name in LINKS for line in _make_way(run_dir / "checkpoints" / name)]
    except OSError as error:
        raise UserError(
            f"{error.filename}: no link, and cannot be renamed: {error.strerror}; move it away"
        ) from None
    warnings += set_damaged_aside(run_dir) + warn_of_infinite(run_dir)
    newest = latest(run_dir)
    return warnings + ([] if newest is None else set_links(newest, best_step(newest)))


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Renames checkpoints that are newer than the newest whole one: a line of warning for each.

    Raises:
        UserError: none is whole (all keep their names), or one cannot be renamed.
    """
    damaged: dict[Path, str] = {}
    paths = step_folders(run_dir)
    for path in reversed(paths):
        why = why_damaged(path)
        if why is None:
            break
        damaged[path] = why
    if paths and len(damaged) == len(paths):
        reasons = "; ".join(f"{path.name}: {why}" for path, why in list(damaged.items())[:3])
        folder = run_dir / "checkpoints"
        raise UserError(
            f"{folder}: none of the {len(paths)} checkpoints is whole ({reasons}): restore one "
            f"from a copy, or move {folder} away to start anew"
        )
    return [_set_aside(path, why) for path, why in damaged.items()]


def _set_aside(path: Path, why: str) -> str:
    aside = path.with_name(f"damaged-{path.name}")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)  # its name is free for the step to be saved anew
    except OSError as error:
        raise UserError(
            f"{path}: damaged ({why}), and cannot be renamed: {error.strerror}; move it away"
        ) from None
    return f"warning: {path}: damaged ({why}); it is {aside.name} now, and passed over"


def warn_of_infinite(run_dir: Path) -> list[str]:
    """A line of warning where the newest checkpoint holds a NaN or an infinity; else none."""
    paths = step_folders(run_dir)
    if not paths or read_meta(paths[-1]).get("finite", True):
        return []
    line = f"warning: {paths[-1]}: not all values are finite, and will hardly become so; "
    sound = max((path for path in paths if _is_sound(path)), default=None)
    if sound is None:
        return [line + "no sound checkpoint is left: start anew under another name="]
    newer = " ".join(path.name for path in paths if path > sound)
    line += f"the newest sound one is {sound.name}; to go back to it: "
    folder = shlex.quote(str(sound.parent))
    return [f"{line}cd {folder} && mkdir aside && mv {newer} aside, and the same command again"]


# --------------------------------------------------------------------------------------------------
# After one was written: the links, and what stays


@dataclass(frozen=True)
class Retention:
    """The best one stays always; see `kept` for the rest."""

    newest: int = 2
    every_steps: int | None = None  # one in so many steps stays for good; None: none

    def kept(self, sound: Mapping[int, bool], best: int | None) -> set[int]:
        """The steps that stay, of those in `sound`.

        sound: step -> whether the state of that step was worth going on from. The newest sound
        ones stay as well as the newest ones, so that a run that explodes does not push them out.
        """
        steps = sorted(sound)
        return {
            *steps[-self.newest :],
            *[step for step in steps if sound[step]][-self.newest :],
            *(step for step in steps if self.every_steps and step % self.every_steps == 0),
            *(step for step in steps if step == best),
        }


def set_links(newest: Path, best_at: int) -> list[str]:
    """Points `latest` and `best` at what they mean. Returns lines of warning.

    Each time: a writer that was killed may have left one behind, a copy may have lost both.
    """
    folder, best = newest.parent, newest.with_name(name_of(best_at))
    warnings = []
    try:
        warnings += _point(folder / "latest", newest)
        if read_meta(best).get("step") == best_at:
            warnings += _point(folder / "best", best)
        elif best_at >= 0:
            warnings += [
                f"warning: {best}, the best checkpoint, is not on the disk: there is no "
                f"{folder / 'best'} until a better one is saved"
            ]
            warnings += _make_way(folder / "best")
            (folder / "best").unlink(missing_ok=True)  # to what was the best before
    except OSError as error:
        warnings += [f"warning: {folder}: latest and best are not set: {error.strerror}"]
    return warnings


def _point(link: Path, target: Path) -> list[str]:
    if os.path.islink(link) and os.readlink(link) == target.name:
        return []
    warnings = _make_way(link)
    replace_link(link, target.name)
    return warnings


def _make_way(link: Path) -> list[str]:
    """Renames a folder that stands where a link should: a line of warning. Nothing of it is lost.

    Programs that follow links copy them so. If its step is nowhere else, it becomes its checkpoint.
    """
    if not os.path.isdir(link) or os.path.islink(link):
        return []
    step = read_meta(link).get("step")
    new = link.with_name(name_of(step) if isinstance(step, int) else link.name)
    if os.path.lexists(new):
        new = link.with_name(f"copied-{beside(link).name.removeprefix(PARTIAL)}")
    os.rename(link, new)
    return [f"warning: {link}: a folder, not a link, so it was copied: it is {new.name} now"]


def remove_old(run_dir: Path, retention: Retention, written: Path, best_at: int) -> None:
    paths = {int(path.name.removeprefix("step-")): path for path in step_folders(run_dir)}
    sound = {step: _is_sound(path) for step, path in paths.items()}
    kept = {paths[step] for step in retention.kept(sound, best_at)} | {written}
    for path in paths.values():
        if path not in kept:
            # Renamed first: a name that stands is whole, even if the removal is cut short.
            os.rename(path, path.with_name(f".removed-{path.name}"))
    for leftover in (path for path in written.parent.iterdir() if path.name.startswith(RUBBISH)):
        if leftover.is_dir() and not leftover.is_symlink():
            # What cannot be removed now (on NFS, a file that is read) is tried again each time.
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_sound(path: Path) -> bool:
    return bool(read_meta(path).get("sound", True))  # format 2 did not say
