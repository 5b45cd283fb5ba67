"""The checkpoint folders of a run: which exist, which are intact, and which are kept.

    RUN/checkpoints/step-00000440/            state.pt: a Checkpoint, see content.py
                                              meta.json: step, scores, soundness and config
                                              SHA256SUMS of both: `sha256sum -c` checks them
    RUN/checkpoints/latest, .../best          symbolic links, replaced atomically

A checkpoint is *intact* if its checksums match, and *sound* if its values are finite and the
training loss is no worse than a uniform guess. No torch here: a login node checks before a job is
queued.
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
from resnet_dist.files import PARTIAL, flush_folder, replace_link, temporary_name

STEP_NAME = re.compile(r"step-[0-9]{8}")  # anything else in the folder is the user's
PIECE_BYTES = 2**24  # large, because training waits for the GIL between two reads
SUMS_FORM = re.compile(r"(?:[0-9a-f]{64}  \w[\w.-]*\n)+", re.ASCII)
LINKS = ("latest", "best")
REPLACED = ".replaced-"
LEFTOVERS = (PARTIAL, ".removed-", REPLACED)  # prefixes of what a killed writer leaves


def name_of(step: int) -> str:
    """Returns the name of a step's checkpoint folder."""
    return f"step-{step:08d}"


def step_folders(run_dir: Path) -> list[Path]:
    """Returns a run's checkpoints, oldest first; an empty list if RUN/checkpoints does not exist.

    Raises:
        UserError: the folder cannot be listed, which does not mean that it is empty.
    """
    folder = run_dir / "checkpoints"
    try:
        with os.scandir(folder) as entries:
            names = sorted(entry.name for entry in entries if STEP_NAME.fullmatch(entry.name))
    except OSError as error:
        # A link without its target (say, on a disk that is not mounted) is not an empty folder.
        if isinstance(error, FileNotFoundError) and not os.path.islink(folder):
            return []
        raise UserError(
            f"{folder}: cannot be listed: {error.strerror}; make it readable, or move it away to "
            "start from scratch"
        ) from None
    return [folder / name for name in names]


def latest(run_dir: Path) -> Path | None:
    """Returns the newest checkpoint of a run, or None. Raises what step_folders raises.

    It goes by the names, not by the link `latest`, which is behind if the writer was killed before
    updating it, and missing if somebody copied the folder without links.
    """
    return max(step_folders(run_dir), default=None)


def best(run_dir: Path) -> Path | None:
    """Returns the best checkpoint of a run, else the newest, else None.

    Raises what step_folders raises.
    """
    folder = run_dir / "checkpoints"
    newest = latest(run_dir)
    if os.path.isdir(folder / "best"):
        return folder / "best"
    if newest is None:  # perhaps only `latest` was copied
        return folder / "latest" if os.path.isdir(folder / "latest") else None
    named = folder / name_of(best_step(newest))
    return named if os.path.isdir(named) else newest


def find(path: Path) -> Path:
    """Returns the checkpoint that a user means by `path`: a checkpoint, or a run folder's best one.

    Of a run folder without a best checkpoint, the newest.

    Raises:
        UserError: there is none. Whether it is damaged is not checked.
    """
    if os.path.isdir(path / "checkpoints"):
        path = best(path) or path
    if not all(os.path.isfile(path / name) for name in ("state.pt", "meta.json")):
        raise UserError(f"{path}: no checkpoint; give a folder such as RUN/checkpoints/best")
    return path


def newest_sound(run_dir: Path) -> Path | None:
    """Returns the newest checkpoint that is sound, or None. Raises what step_folders raises."""
    return max((path for path in step_folders(run_dir) if _is_sound(path)), default=None)


def best_step(path: Path) -> int:
    """Returns the step of the best evaluation before this checkpoint; -1 if there was none."""
    best = read_meta(path).get("best")
    step = best.get("step") if isinstance(best, dict) else None
    return step if isinstance(step, int) else -1


def read_meta(path: Path) -> dict[str, Any]:
    """Reads meta.json. If it cannot be read, the checkpoint counts as neither finite nor sound."""
    try:
        meta = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError):
        meta = None
    return meta if isinstance(meta, dict) else {"finite": False, "sound": False}


# --------------------------------------------------------------------------------------------------
# Is a checkpoint intact?


def why_damaged(path: Path) -> str | None:
    """Returns why a checkpoint folder is not what was written; None if it is intact.

    Raises:
        UserError: a file cannot be read, which does not tell whether it is damaged.
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
    """Does the same for format 2, whose meta.json has the SHA-256 of state.pt."""
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
    """Returns the SHA-256 of a file, in hexadecimal."""
    digest = hashlib.sha256()
    with open(path, "rb", buffering=0) as file:
        while piece := file.read(PIECE_BYTES):
            digest.update(piece)
    return digest.hexdigest()


# --------------------------------------------------------------------------------------------------
# Before a run resumes


def prepare_to_resume(run_dir: Path) -> list[str]:
    """Sets damaged checkpoints aside and repairs the links `latest` and `best`. One rank only.

    Returns lines of warning: about what was repaired, and about values that are not finite.

    Raises:
        UserError: there are checkpoints, but none that a run could resume from.
    """
    try:
        _put_back(run_dir / "checkpoints")
        warnings = [line for name in LINKS for line in _make_way(run_dir / "checkpoints" / name)]
    except OSError as error:
        raise UserError(
            f"{error.filename}: not a link, and cannot be renamed: {error.strerror}; move it away"
        ) from None
    warnings += set_damaged_aside(run_dir) + warn_of_infinite(run_dir)
    newest = latest(run_dir)
    return warnings + ([] if newest is None else set_links(newest, best_step(newest)))


def _put_back(folder: Path) -> None:
    """Renames what `replace` was about to replace when its process was killed."""
    for old in folder.glob(f"{REPLACED}*"):
        name = old.with_name(old.name.removeprefix(REPLACED))
        if not os.path.lexists(name):
            os.rename(old, name)


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Renames damaged checkpoints that are newer than the newest intact one.

    Returns a line of warning for each.

    Raises:
        UserError: no checkpoint is intact (then none is renamed), or one cannot be renamed.
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
            f"{folder}: none of the {len(paths)} checkpoints is intact ({reasons}): restore one "
            f"from a copy, or move {folder} away to start from scratch"
        )
    return [_set_aside(path, why) for path, why in damaged.items()]


def _set_aside(path: Path, why: str) -> str:
    aside = path.with_name(f"damaged-{path.name}")
    try:
        if aside.exists():
            shutil.rmtree(aside)
        os.rename(path, aside)  # frees the name, so that the step can be saved again
    except OSError as error:
        raise UserError(
            f"{path}: damaged ({why}), and cannot be renamed: {error.strerror}; move it away"
        ) from None
    return f"warning: {path}: damaged ({why}); renamed to {aside.name} and ignored"


def warn_of_infinite(run_dir: Path) -> list[str]:
    """Returns a line of warning if the newest checkpoint has a NaN or an infinity in it."""
    paths = step_folders(run_dir)
    if not paths or read_meta(paths[-1]).get("finite", True):
        return []
    line = f"warning: {paths[-1]}: some values are NaN or infinite, and will hardly recover; "
    sound = newest_sound(run_dir)
    if sound is None:
        return [line + "no sound checkpoint is left: start a new run with another name="]
    newer = " ".join(path.name for path in paths if path > sound)
    line += f"the newest sound one is {sound.name}; to go back to it: "
    folder = shlex.quote(str(sound.parent))
    return [
        f"{line}cd {folder} && mkdir aside && mv {newer} aside, then run the same command again"
    ]


# --------------------------------------------------------------------------------------------------
# After a checkpoint has been written: links, and which ones are kept


@dataclass(frozen=True)
class Retention:
    """Which checkpoints are kept. The best one always is; see `kept` for the others."""

    newest: int = 2
    every_steps: int | None = None  # interval of those that are kept for good; None: none are

    def kept(self, sound: Mapping[int, bool], best: int | None) -> set[int]:
        """Returns the steps to keep, of those in `sound`.

        sound: step -> whether its checkpoint is sound. The newest sound ones are kept as well as
        the newest ones, so that a diverging run does not push out the last good checkpoints.
        """
        steps = sorted(sound)
        return {
            *steps[-self.newest :],
            *[step for step in steps if sound[step]][-self.newest :],
            *(step for step in steps if self.every_steps and step % self.every_steps == 0),
            *(step for step in steps if step == best),
        }


def replace(final: Path, fresh: Path) -> None:
    """Renames `fresh` to `final`, in whose place it is from then on.

    A folder cannot be replaced in one go. If the process is killed in between, `prepare_to_resume`
    puts the old one back.
    """
    os.rename(final, final.with_name(f"{REPLACED}{final.name}"))
    os.rename(fresh, final)
    flush_folder(final.parent)


def set_links(newest: Path, best_at: int) -> list[str]:
    """Points the links `latest` and `best` to the right checkpoints. Returns lines of warning.

    Both are checked each time: a killed writer may have left one outdated, and a copy may have lost
    both.
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
            (folder / "best").unlink(missing_ok=True)  # it would point to the previous best
    except OSError as error:
        warnings += [f"warning: {folder}: latest and best cannot be set: {error.strerror}"]
    return warnings


def _point(link: Path, target: Path) -> list[str]:
    if os.path.islink(link) and os.readlink(link) == target.name:
        return []
    warnings = _make_way(link)
    replace_link(link, target.name)
    return warnings


def _make_way(link: Path) -> list[str]:
    """Renames a folder that has the name of a link, so that nothing is lost. Returns a warning.

    Copying with a program that follows links makes such folders. If there is no other checkpoint of
    its step, the folder becomes that checkpoint.
    """
    if not os.path.isdir(link) or os.path.islink(link):
        return []
    step = read_meta(link).get("step")
    new = link.with_name(name_of(step) if isinstance(step, int) else link.name)
    if os.path.lexists(new):
        new = link.with_name(f"copied-{temporary_name(link).name.removeprefix(PARTIAL)}")
    os.rename(link, new)
    return [f"warning: {link}: a folder instead of a link, perhaps a copy; renamed to {new.name}"]


def remove_old(run_dir: Path, retention: Retention, written: Path, best_at: int) -> None:
    """Removes the checkpoints that `retention` does not keep, and leftovers of killed writers.

    written: the checkpoint just written, which always stays. best_at: step of the best one.
    """
    paths = {int(path.name.removeprefix("step-")): path for path in step_folders(run_dir)}
    sound = {step: _is_sound(path) for step, path in paths.items()}
    kept = {paths[step] for step in retention.kept(sound, best_at)} | {written}
    for path in paths.values():
        if path not in kept:
            # Renamed first, so that a removal that is cut short leaves no damaged checkpoint.
            os.rename(path, path.with_name(f".removed-{path.name}"))
    for leftover in (path for path in written.parent.iterdir() if path.name.startswith(LEFTOVERS)):
        if leftover.is_dir() and not leftover.is_symlink():
            # What cannot be removed now (on NFS, a file that is open) is tried again next time.
            shutil.rmtree(leftover, ignore_errors=True)
        else:
            leftover.unlink(missing_ok=True)


def _is_sound(path: Path) -> bool:
    return bool(read_meta(path).get("sound", True))  # format 2 did not record it
