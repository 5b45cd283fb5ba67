"""How a start of a run ended: RUN/outcome.json, kept by rank 0. No torch here: launchers ask it.

    {"outcome": "stopped", "step": 440, "start": "1234.0", "time": "2026-11-27 09:30:00+00:00"}

It says "running" from when the process has the run folder to itself until it ends. Where it says so
and no process holds the folder's lock, the process was killed.
"""

import contextlib
import json
import os
import time
import uuid
from collections.abc import Callable
from dataclasses import asdict, dataclass
from enum import Enum
from pathlib import Path
from types import TracebackType

from resnet_dist.errors import RankFailure, UserError
from resnet_dist.files import replace_file

OUTCOME = "outcome.json"
# Set by a launcher that wants to tell its own start from others; without it a start has a random
# token.
START_TOKEN = "RESNET_DIST_START"


class Outcome(Enum):
    RUNNING = "running"
    FINISHED = "finished"  # the plan's last step is done and saved
    STOPPED = "stopped"  # asked to; all is saved, and the same command goes on
    FAILED = "failed"  # by a bug, a machine, or a kill
    BAD_INPUT = "bad_input"  # config, data or run folder: one line said what to mend

    @property
    def exit_code(self) -> int:
        """Of `resnet-dist status --exit-code`, and of a start without a launcher.

        75 is EX_TEMPFAIL of sysexits.h: try again.
        """
        codes = {Outcome.FINISHED: 0, Outcome.STOPPED: 75, Outcome.BAD_INPUT: 2}
        return codes.get(self, 1)

    @property
    def mlflow_status(self) -> str:
        return {Outcome.FINISHED: "FINISHED", Outcome.STOPPED: "KILLED"}.get(self, "FAILED")


@dataclass(frozen=True)
class Ending:
    """What outcome.json holds."""

    outcome: Outcome
    step: int | None  # steps done; None before the run knows where it goes on
    start: str  # a token of the start that wrote this
    time: str  # when that was

    @classmethod
    def read(cls, run_dir: Path) -> "Ending | None":
        """None where there is none.

        Raises:
            UserError: it cannot be read.
        """
        path = run_dir / OUTCOME
        try:
            held = json.loads(path.read_bytes())
            return cls(Outcome(held["outcome"]), held["step"], held["start"], held["time"])
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = getattr(error, "strerror", None) or "not what a run writes"
            raise UserError(f"{path}: cannot be read: {why}; remove it") from None


class OutcomeFile:
    """Keeps outcome.json while a run goes on; used as a context, inside of the run folder's lock.

    An error that leaves the block is written down, and goes on its way. A disk that does not take
    the file ends no run.
    """

    def __init__(self, run_dir: Path, writes: bool, say: Callable[[str], None]):
        """writes: on rank 0; the others do nothing. say: takes a line of warning."""
        self._run_dir = run_dir
        self._writes = writes
        self._say = say
        self._start = os.environ.get(START_TOKEN) or uuid.uuid4().hex[:12]
        self._step: int | None = None
        self._has_ended = False

    def __enter__(self) -> "OutcomeFile":
        self._write(Outcome.RUNNING)
        return self

    def resumes_from(self, step: int) -> None:
        """The run has been built, and its next step is `step`."""
        self._step = step
        self._write(Outcome.RUNNING)

    def end(self, outcome: Outcome, step: int) -> None:
        """All is done and saved, or stopped and saved."""
        self._step, self._has_ended = step, True
        self._write(outcome)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None and not self._has_ended:
            is_input = isinstance(error, UserError) and not isinstance(error, RankFailure)
            self._write(Outcome.BAD_INPUT if is_input else Outcome.FAILED)

    def _write(self, outcome: Outcome) -> None:
        if not self._writes:
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S%z")
        ending = asdict(Ending(outcome, self._step, self._start, now)) | {"outcome": outcome.value}
        try:
            replace_file(self._run_dir / OUTCOME, json.dumps(ending, indent=1) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._say(f"warning: {self._run_dir / OUTCOME}: not written: {error.strerror}")
