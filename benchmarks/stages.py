"""Runs commands one after another, each in its own process, which may fail, crash or hang.

Uses only the standard library, because it must not depend on the packages that the commands test. A
full disk or a missing folder loses only what was to be written there; later stages still run.
"""

import contextlib
import json
import os
import re
import resource
import shlex
import signal
import subprocess
import time
import uuid
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

OUTPUT = "OUTPUT"  # placeholder in a command: the JSON file for its figures
LOGS = "LOGS"  # placeholder in a command: a folder for additional logs
MARK = "RESNET_DIST_STAGE"  # environment variable that identifies all processes of a stage
STACKS_SECONDS = 5  # time that a stage over its limit has to write its stack traces
ERRORS = r"(resnet-dist|Fatal Python error|[\w.]*(Error|Exception))"
ERROR_LINE = re.compile(rf"^(\[?rank ?\d+\]?: *)?{ERRORS}: \S.*$", re.MULTILINE)
ROW = "{:24}  {:20}  {:>5}  {}"


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    limit_seconds: float  # about twice the expected duration
    lines: int = 1  # the table shows this many of the last lines of its output
    line: Callable[[Any], str] | None = None  # if given, formats its figures for the table instead


@dataclass(frozen=True)
class Record:
    """The result of a stage."""

    stage: str
    command: str
    outcome: str  # ok, failed (exit code 1), crashed (SIGSEGV), over its limit, not started
    seconds: float
    said: list[str]  # lines for the table
    figures: Any  # the JSON content of OUTPUT; None if it wrote none


class Runner:
    """Runs stages within a total time limit, and writes all results so far after each stage."""

    def __init__(self, path: Path, scratch: Path, limit_seconds: float, env: dict[str, str]):
        """path: the JSON file for the results; all output of the stages goes to the .log file next
        to it. env: added to the environment of this process."""
        self.path = path
        self.records: list[Record] = []
        self._log = path.with_suffix(".log")
        self._scratch = scratch
        self._began = time.monotonic()
        self._limit = limit_seconds
        # The fault handler prints the Python stacks of a stage that crashes or exceeds its limit.
        self._env = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **env}
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        # No core dumps: those of a process that uses a GPU take many GB.
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))

    @property
    def seconds_left(self) -> float:
        return self._limit - (time.monotonic() - self._began)

    def run(self, stage: Stage, cwd: Path) -> Record:
        """Runs a stage, unless the time left is less than half of the stage's own limit."""
        output = self._scratch / f"figures-{len(self.records)}.json"
        places = {OUTPUT: str(output), LOGS: str(self._scratch / "logs" / stage.name)}
        command = [places.get(word, word) for word in stage.command]
        began = time.monotonic()
        if self.seconds_left < stage.limit_seconds / 2:
            outcome, said = "not started", [f"{max(0, self.seconds_left):.0f} s left"]
        else:
            limit = min(stage.limit_seconds, self.seconds_left)
            outcome, said = self._run(command, stage, limit, cwd)
        figures = None
        with contextlib.suppress(OSError, ValueError):
            figures = json.loads(output.read_text())
        if stage.line is not None and figures is not None:
            said = [stage.line(figures), *(said if outcome != "ok" else [])]
        seconds = round(time.monotonic() - began, 1)
        record = Record(stage.name, shlex.join(command), outcome, seconds, said, figures)
        self.records.append(record)
        with told(self.path):
            self.write()
        print(describe_record(record), flush=True)
        return record

    def write(self) -> None:
        """Writes all results so far. Replaces the file atomically."""
        temporary = self.path.with_suffix(".part")
        content = {
            "limit_seconds": self._limit,
            "seconds": round(time.monotonic() - self._began, 1),
            "stages": [asdict(record) for record in self.records],
        }
        temporary.write_text(json.dumps(content, indent=1) + "\n")
        temporary.replace(self.path)

    def table(self) -> str:
        head = ROW.format("stage", "outcome", "s", "")
        return "\n".join([head, "-" * 100, *(describe_record(record) for record in self.records)])

    def _run(
        self, command: list[str], stage: Stage, limit_seconds: float, cwd: Path
    ) -> tuple[str, list[str]]:
        """Runs a command. Returns the outcome and the last lines of its output and, unless it
        succeeded, its error."""
        mark = uuid.uuid4().hex
        out, err = self._scratch / "stdout", self._scratch / "stderr"
        try:
            with open(out, "wb") as stdout, open(err, "wb") as stderr:
                process = subprocess.Popen(
                    command,
                    cwd=cwd,
                    env={**self._env, MARK: mark},
                    stdin=subprocess.DEVNULL,
                    stdout=stdout,
                    stderr=stderr,
                    start_new_session=True,
                )
        except OSError as error:
            return f"failed ({error.strerror})", [str(error)]
        try:
            process.wait(limit_seconds)
            outcome = outcome_of(process.returncode)
        except subprocess.TimeoutExpired:
            outcome = "over its limit"
            send(signal.SIGABRT, mark)  # makes Python write all stacks to stderr
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_SECONDS)
        finally:
            send(signal.SIGKILL, mark)  # also ends processes that it left running
            # A process that is stuck in a broken driver cannot be killed, and is left behind.
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_SECONDS)
        with told(self._log), open(self._log, "a") as log:
            print(f"\n== {stage.name}: {outcome}\n+ {shlex.join(command)}", file=log)
            more = sorted((self._scratch / "logs" / stage.name).rglob("*.log"))
            print(*(text_of(path) for path in (out, err, *more)), sep="\n", file=log)
        said = last_lines(text_of(out), stage.lines)
        return outcome, said if outcome == "ok" else [*said, *why(text_of(err))]


def outcome_of(returncode: int) -> str:
    if returncode == 0:
        return "ok"
    # Shells, torchrun and others report a child's signal as exit code 128 + signal number.
    number = -returncode if returncode < 0 else returncode - 128
    if number in set(signal.Signals):
        return f"crashed ({signal.Signals(number).name})"
    return f"failed (exit code {returncode})"


def send(number: signal.Signals, mark: str) -> None:
    """Sends a signal to all processes of a stage, including those of other sessions."""
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # the process has ended or belongs to another user
            if wanted in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), number)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """Prints a line instead of raising if `path` cannot be written."""
    try:
        yield
    except OSError as error:
        print(f"{path}: not written: {error}", flush=True)


def text_of(path: Path) -> str:
    try:
        return path.read_text(errors="replace")
    except OSError as error:
        return f"not read: {error}\n"


def last_lines(text: str, count: int) -> list[str]:
    return [line.rstrip() for line in text.splitlines() if re.search(r"\w", line)][-count:]


def why(errors: str) -> list[str]:
    """Returns the last line that names an error, since launchers may print more after it, or else
    the last line."""
    named = [match[0] for match in ERROR_LINE.finditer(errors)]
    return named[-1:] or last_lines(errors, 1)


def describe_record(record: Record) -> str:
    """Formats a record as rows of the table."""
    said = record.said or [""]
    rows = [ROW.format(record.stage, record.outcome, f"{record.seconds:.0f}", said[0][:200])]
    return "\n".join([*rows, *(ROW.format("", "", "", line[:200]) for line in said[1:])])
