"""The checkpoints of a run: the newest, the best, the damaged, and which of them stay.

checkpoints/step-00000440/              see checkpoint_folder.py
checkpoints/latest, checkpoints/best    symbolic links, replaced atomically
"""

import os
import shlex
import shutil
from pathlib import Path
from typing import Any

from resnet_dist.checkpoint_folder import beside, damage, flush_folder, note, write
from resnet_dist.retention import Retention

STEP_NAMES = "step-" + "[0-9]" * 8  # not what a user keeps beside them
RUBBISH = (".partial-*", ".removed-*")  # of a writer that was killed


def save(run_dir: Path, content: dict[str, Any], retention: Retention) -> Path:
    """Writes a checkpoint, points `latest` and `best` at what they mean, and removes old ones.

    A whole checkpoint of the same step is not written again. For one process only.

    Raises:
        OSError: it is not written (the disk is full, say). Older checkpoints stay as they are.
    """
    folder = run_dir / "checkpoints"
    step, best_step = content["step"], content["best"]["step"]
    final, best = (folder / f"step-{number:08d}" for number in (step, best_step))
    if damage(final) is not None or note(final).get("step") != step:
        write(final, content)
    _point(folder / "latest", final)
    if best.is_dir():  # each time: a writer that was killed may have left the link behind
        _point(folder / "best", best)
    _remove_old(folder, retention)
    return final


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
    if newest is None or note(newest).get("finite", True):
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
    return bool(note(path).get("sound", True))  # format 2 did not say


def _point(link: Path, target: Path) -> None:
    if link.is_symlink() and os.readlink(link) == target.name:
        return
    fresh = beside(link)
    fresh.symlink_to(target.name)
    os.replace(fresh, link)
    flush_folder(link.parent)
