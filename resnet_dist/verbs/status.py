"""`status`: how a run ended, as a line and as an exit code. No torch here: launchers ask it."""

import fcntl
import os
from collections.abc import Sequence
from pathlib import Path

from resnet_dist.config_file import load_config
from resnet_dist.errors import UserError
from resnet_dist.run.folder import lock_of
from resnet_dist.run.outcome import OUTCOME, Ending, Outcome


def status(
    name: str, overrides: Sequence[str], run_root: Path, start: str | None
) -> tuple[str, int]:
    """A line about the run, and the exit code: 0 finished, 75 stopped, 2 bad input, 1 all else.

    name: a run folder, its name in run_root, or a config file, to which the overrides belong, as
    `train` has them. start: the token of the start that is meant; what another start wrote does
    not count.

    Raises:
        UserError: no such run, or an outcome.json that cannot be read.
    """
    run_dir = _run_dir(name, overrides, run_root)
    ending = Ending.read(run_dir)
    if start is not None and (ending is None or ending.start != start):
        # No bad input of whoever asks: it died, or was refused, before the run folder was its own.
        return f"{run_dir}: start {start} never held this run folder", Outcome.FAILED.exit_code
    if ending is None:
        raise UserError(f"{run_dir}: no {OUTCOME}: not started yet, or by an older version alone")
    at = "" if ending.step is None else f" at step {ending.step}"
    said = ending.outcome.value.replace("_", " ")
    if ending.outcome is Outcome.RUNNING and not _is_locked(run_dir):
        said = "killed"
        at = "" if ending.step is None else f", having started at step {ending.step}"
    line = f"{run_dir}: {said}{at}, {ending.time} (start {ending.start})"
    return line, ending.outcome.exit_code


def _run_dir(name: str, overrides: Sequence[str], run_root: Path) -> Path:
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return load_config(name, overrides).run_dir
    if overrides:
        raise UserError(f"command line: {overrides[0]}: overrides go with a config file")
    for folder in (Path(name), run_root / name):
        if folder.is_dir():
            return Path(os.path.abspath(folder))  # "." has no name, by which the lock is found
    raise UserError(f"{name}: no run folder, nor a name in {run_root}; give --run-root")


def _is_locked(run_dir: Path) -> bool:
    """Whether a process trains there; False where nobody can tell."""
    try:
        descriptor = os.open(lock_of(run_dir), os.O_RDONLY)
    except OSError:
        return False
    try:
        # Shared: two who ask at once must not take each other for the trainer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
