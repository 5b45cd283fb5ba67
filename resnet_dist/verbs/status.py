"""`status`: reports how a run ended, as a line of text and as an exit code.

This module must not import torch, because launchers call it.
"""

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
    """Returns a line about the run, and an exit code: 0 finished, 75 stopped, 2 bad input, 1
    anything else.

    name: a run folder, its name in run_root, or a config file. overrides: for the config file, as
    in `train`. start: the token of a particular start; the outcome of any other start is ignored.

    Raises:
        UserError: there is no such run, or its outcome.json cannot be read.
    """
    run_dir = _run_dir(name, overrides, run_root)
    ending = Ending.read(run_dir)
    if start is not None and (ending is None or ending.start != start):
        # This is not an input error of the caller: the start died, or was refused, before it had
        # the run folder to itself.
        return f"{run_dir}: start {start} never locked this run folder", Outcome.FAILED.exit_code
    if ending is None:
        raise UserError(
            f"{run_dir}: no {OUTCOME}: the run has not started yet, or only under an older version"
        )
    at = "" if ending.step is None else f" at step {ending.step}"
    said = ending.outcome.value.replace("_", " ")
    if ending.outcome is Outcome.RUNNING and not _is_locked(run_dir):
        said = "killed"
        at = "" if ending.step is None else f" after starting at step {ending.step}"
    line = f"{run_dir}: {said}{at}, {ending.time} (start {ending.start})"
    if ending.reason is not None:
        line += f": {ending.reason}"
    return line, ending.outcome.exit_code


def _run_dir(name: str, overrides: Sequence[str], run_root: Path) -> Path:
    if name.endswith((".yaml", ".yml")) or Path(name).is_file():
        return load_config(name, overrides).run_dir
    if overrides:
        raise UserError(f"command line: {overrides[0]}: overrides need a config file, not a run")
    for folder in (Path(name), run_root / name):
        if folder.is_dir():
            # The lock file is named after the folder, and Path(".") has no name.
            return Path(os.path.abspath(folder))
    raise UserError(f"{name}: neither a run folder nor a name in {run_root}; give --run-root")


def _is_locked(run_dir: Path) -> bool:
    """Returns whether a process is training in this run folder; False if that is unknown."""
    try:
        descriptor = os.open(lock_of(run_dir), os.O_RDONLY)
    except OSError:
        return False
    try:
        # A shared lock, so that two `status` processes do not mistake each other for the trainer.
        fcntl.flock(descriptor, fcntl.LOCK_SH | fcntl.LOCK_NB)
    except BlockingIOError:
        return True
    except OSError:
        return False
    finally:
        os.close(descriptor)
    return False
