"""How a run ended, in RUN/outcome.json, which rank 0 writes.

    {"outcome": "stopped", "step": 440, "start": "1234.0", "time": "2026-11-27 09:30:00+00:00",
     "reason": null}

It says "running" from the moment the process has locked the run folder until it ends. If it says
so and no process holds the lock, the process was killed. No torch here: launchers read this file.
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

from resnet_dist.errors import UserError, shortened
from resnet_dist.files import replace_file

OUTCOME = "outcome.json"
# A launcher sets this to recognize the start that it made; otherwise the token is random.
START_TOKEN = "RESNET_DIST_START"


class Outcome(Enum):
    RUNNING = "running"
    FINISHED = "finished"  # the last step of the plan is done and saved
    STOPPED = "stopped"  # stopped on request and saved; the same command resumes it
    FAILED = "failed"  # ended by a bug, a failing machine or a kill
    BAD_INPUT = "bad_input"  # refused: one line said what is wrong with config, data or run folder

    @property
    def exit_code(self) -> int:
        """The exit code of `resnet-dist status --exit-code`, and of training without a launcher.

        75 is EX_TEMPFAIL in sysexits.h: try again.
        """
        codes = {Outcome.FINISHED: 0, Outcome.STOPPED: 75, Outcome.BAD_INPUT: 2}
        return codes.get(self, 1)

    @property
    def mlflow_status(self) -> str:
        """The status of the MLflow run."""
        return {Outcome.FINISHED: "FINISHED", Outcome.STOPPED: "KILLED"}.get(self, "FAILED")


@dataclass(frozen=True)
class Ending:
    """The content of outcome.json."""

    outcome: Outcome
    step: int | None  # steps done; None until the run knows from which step it resumes
    start: str  # token of the start that wrote this
    time: str  # local time of writing
    reason: str | None = None  # the line that said why it failed or was refused

    @classmethod
    def read(cls, run_dir: Path) -> "Ending | None":
        """Reads RUN/outcome.json; returns None if there is no such file.

        Raises:
            UserError: it cannot be read.
        """
        path = run_dir / OUTCOME
        try:
            content = json.loads(path.read_bytes())
            outcome = Outcome(content["outcome"])
            known = content["step"], content["start"], content["time"], content.get("reason")
            return cls(outcome, *known)
        except FileNotFoundError:
            return None
        except (OSError, ValueError, KeyError, TypeError) as error:
            why = getattr(error, "strerror", None) or "not in the format that a run writes"
            raise UserError(f"{path}: cannot be read: {why}; remove it") from None


class OutcomeFile:
    """Keeps outcome.json up to date during a run; used as a context, while the run is locked.

    An exception that leaves the block is recorded as the outcome, and propagates. If the file
    cannot be written, the run continues with a warning.
    """

    def __init__(self, run_dir: Path, writes: bool, say: Callable[[str], None]):
        """writes: True on rank 0; other ranks do nothing. say: prints a warning."""
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
        """Records that the run has been built and that `step` steps were done before."""
        self._step = step
        self._write(Outcome.RUNNING)

    def end(self, outcome: Outcome, step: int) -> None:
        """Records that the run has finished or stopped, and that its state is saved."""
        self._step, self._has_ended = step, True
        self._write(outcome)

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None
    ) -> None:
        if error is not None and not self._has_ended:
            is_input = isinstance(error, UserError) and error.exit_code == UserError.exit_code
            reason = str(error) if isinstance(error, UserError) else repr(error)
            if isinstance(error, KeyboardInterrupt):
                reason = "ended by Ctrl-C, without saving"
            outcome = Outcome.BAD_INPUT if is_input else Outcome.FAILED
            self._write(outcome, shortened(" ".join(reason.split())))

    def _write(self, outcome: Outcome, reason: str | None = None) -> None:
        if not self._writes:
            return
        now = time.strftime("%Y-%m-%d %H:%M:%S%z")
        ending = asdict(Ending(outcome, self._step, self._start, now, reason))
        ending["outcome"] = outcome.value
        try:
            replace_file(self._run_dir / OUTCOME, json.dumps(ending, indent=1) + "\n")
        except OSError as error:
            with contextlib.suppress(OSError):
                self._say(
                    f"warning: {self._run_dir / OUTCOME}: cannot be written: {error.strerror}"
                )
