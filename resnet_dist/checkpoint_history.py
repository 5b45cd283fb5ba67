"""The checkpoints of a run as they come and go: the damaged, the links, and which of them stay.

checkpoints/step-00000440/              see checkpoint_folder.py
checkpoints/latest, checkpoints/best    symbolic links, replaced atomically
"""

import os
import shlex
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

from resnet_dist.checkpoint_folder import beside, damage, write
from resnet_dist.checkpoint_list import best_step, latest, name_of, note, step_folders
from resnet_dist.disk import flush_folder
from resnet_dist.errors import UserError
from resnet_dist.retention import Retention

LINKS = ("latest", "best")
RUBBISH = (".partial-", ".removed-")  # of a writer that was killed


def save(
    run_dir: Path,
    content: dict[str, Any],
    retention: Retention,
    warn: Callable[[str], None] = print,
) -> Path:
    """Writes a checkpoint, points `latest` and `best` at what they mean, and removes old ones.

    A whole checkpoint of the same step is not written again. For one process only.

    warn: takes a line about what did not work once the checkpoint was written.

    Raises:
        OSError, UserError: it is not written (the disk is full, say). Older checkpoints stay as
            they are.
    """
    step = content["step"]
    final = run_dir / "checkpoints" / name_of(step)
    if damage(final) is not None or note(final).get("step") != step:
        write(final, content)
    # A file system without links, or a file that is held open, does not unmake the checkpoint.
    for line in _set_links(final, content["best"]["step"]):
        warn(line)
    try:
        _remove_old(run_dir, retention, final, content["best"]["step"])
    except (OSError, UserError) as error:
        warn(f"warning: not all old checkpoints are removed: {error}")
    return final


def look_over(run_dir: Path) -> list[str]:
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
    return warnings + ([] if newest is None else _set_links(newest, best_step(newest)))


def set_damaged_aside(run_dir: Path) -> list[str]:
    """Renames checkpoints that are newer than the newest whole one: a line of warning for each.

    Raises:
        UserError: none is whole (all keep their names), or one cannot be renamed.
    """
    damaged: dict[Path, str] = {}
    paths = step_folders(run_dir)
    for path in reversed(paths):
        why = damage(path)
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
    if not paths or note(paths[-1]).get("finite", True):
        return []
    line = f"warning: {paths[-1]}: not all values are finite, and will hardly become so; "
    sound = max((path for path in paths if _is_sound(path)), default=None)
    if sound is None:
        return [line + "no sound checkpoint is left: start anew under another name="]
    newer = " ".join(path.name for path in paths if path > sound)
    line += f"the newest sound one is {sound.name}; to go back to it: "
    folder = shlex.quote(str(sound.parent))
    return [f"{line}cd {folder} && mkdir aside && mv {newer} aside, and the same command again"]


def _set_links(newest: Path, best_at: int) -> list[str]:
    """Points `latest` and `best` at what they mean. Returns lines of warning.

    Each time: a writer that was killed may have left one behind, a copy may have lost both.
    """
    folder, best = newest.parent, newest.with_name(name_of(best_at))
    warnings = []
    try:
        warnings += _point(folder / "latest", newest)
        if note(best).get("step") == best_at:
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
    fresh = beside(link)
    try:
        fresh.symlink_to(target.name)
        os.replace(fresh, link)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    flush_folder(link.parent)
    return warnings


def _make_way(link: Path) -> list[str]:
    """Renames a folder that stands where a link should: a line of warning. Nothing of it is lost.

    Programs that follow links copy them so. If its step is nowhere else, it becomes its checkpoint.
    """
    if not os.path.isdir(link) or os.path.islink(link):
        return []
    step = note(link).get("step")
    new = link.with_name(name_of(step) if isinstance(step, int) else link.name)
    if os.path.lexists(new):
        new = link.with_name(f"copied-{beside(link).name.removeprefix('.partial-')}")
    os.rename(link, new)
    return [f"warning: {link}: a folder, not a link, so it was copied: it is {new.name} now"]


def _remove_old(run_dir: Path, retention: Retention, written: Path, best_at: int) -> None:
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
    return bool(note(path).get("sound", True))  # format 2 did not say
