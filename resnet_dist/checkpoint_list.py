"""Which checkpoints a run has, by their names, and what their meta.json says.

No torch here: a login node looks before a job is queued.
"""

import json
import os
import re
from pathlib import Path
from typing import Any

from resnet_dist.errors import UserError

STEP_NAME = re.compile(r"step-[0-9]{8}")  # not what a user keeps beside them


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
    best = note(path).get("best")
    step = best.get("step") if isinstance(best, dict) else None
    return step if isinstance(step, int) else -1


def note(path: Path) -> dict[str, Any]:
    """meta.json; one that cannot be read speaks against its checkpoint."""
    try:
        note = json.loads((path / "meta.json").read_bytes())
    except (OSError, ValueError):
        note = None
    return note if isinstance(note, dict) else {"finite": False, "sound": False}
