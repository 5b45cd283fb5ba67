"""Runs commands one after the other, each in a process of its own that may fail, crash or hang.

Standard library only: what runs them must not depend on what they try. A disk that is full, or a
folder that is gone, costs what was to be written there, and no stage that comes after.
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

OUTPUT = "OUTPUT"  # in a command: the JSON file that its figures go to
LOGS = "LOGS"  # in a command: a folder for more logs than its output
MARK = "RESNET_DIST_STAGE"  # in the environment of all processes of a stage
STACKS_SECONDS = 5  # for a stage at its limit to write where it stands
ERRORS = r"(resnet-dist|Fatal Python error|[\w.]*(Error|Exception))"
ERROR_LINE = re.compile(rf"^(\[?rank ?\d+\]?: *)?{ERRORS}: \S.*$", re.MULTILINE)
ROW = "{:24}  {:20}  {:>5}  {}"


@dataclass(frozen=True)
class Stage:
    name: str
    command: tuple[str, ...]
    limit_seconds: float  # about twice what it should take
    lines: int = 1  # of its output, the last ones, that the table shows
    line: Callable[[Any], str] | None = None  # makes the table's line from its figures instead


@dataclass(frozen=True)
class Record:
    """What became of a stage."""

    stage: str
    command: str
    outcome: str  # ok, failed (exit code 1), crashed (SIGSEGV), over its limit, not started
    seconds: float
    said: list[str]
    figures: Any  # what it wrote to OUTPUT; None: nothing


class Runner:
    """Runs stages within a time for all of them, and writes what is known after each."""

    def __init__(self, path: Path, scratch: Path, limit_seconds: float, env: dict[str, str]):
        """path: of the JSON; the stages' whole output goes beside it, to .log. env: added to this
        process's."""
        self.path = path
        self.records: list[Record] = []
        self._log = path.with_suffix(".log")
        self._scratch = scratch
        self._began = time.monotonic()
        self._limit = limit_seconds
        # Where in the Python code a crash came, or what was waited for at the limit.
        self._env = {**os.environ, "PYTHONFAULTHANDLER": "1", "PYTHONUNBUFFERED": "1", **env}
        hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
        resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # of a process with a GPU: many GB

    @property
    def seconds_left(self) -> float:
        return self._limit - (time.monotonic() - self._began)

    def run(self, stage: Stage, cwd: Path) -> Record:
        """Runs it, unless less than half of its limit is left for all stages."""
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
        """All that is known so far; the old file or the new one is there, never a part."""
        beside = self.path.with_suffix(".part")
        content = {
            "limit_seconds": self._limit,
            "seconds": round(time.monotonic() - self._began, 1),
            "stages": [asdict(record) for record in self.records],
        }
        beside.write_text(json.dumps(content, indent=1) + "\n")
        beside.replace(self.path)

    def table(self) -> str:
        head = ROW.format("stage", "outcome", "s", "")
        return "\n".join([head, "-" * 100, *(describe_record(record) for record in self.records)])

    def _run(
        self, command: list[str], stage: Stage, limit_seconds: float, cwd: Path
    ) -> tuple[str, list[str]]:
        """The outcome, and the last lines of its output; of its errors, unless all went well."""
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
            send(signal.SIGABRT, mark)  # Python writes all stacks to stderr
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(STACKS_SECONDS)
        finally:
            send(signal.SIGKILL, mark)  # what it left running, too
            # A process that waits for a broken driver cannot be killed: it is left behind.
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
    # A shell, torchrun and others pass on a child's signal as 128 + its number.
    number = -returncode if returncode < 0 else returncode - 128
    if number in set(signal.Signals):
        return f"crashed ({signal.Signals(number).name})"
    return f"failed (exit code {returncode})"


def send(number: signal.Signals, mark: str) -> None:
    """To all processes of a stage, whoever started them and in whatever session."""
    wanted = f"{MARK}={mark}".encode()
    for path in Path("/proc").glob("[0-9]*/environ"):
        with contextlib.suppress(OSError):  # it has ended, or is another user's
            if wanted in path.read_bytes().split(b"\0"):
                os.kill(int(path.parent.name), number)


@contextlib.contextmanager
def told(path: Path) -> Iterator[None]:
    """An error of the file system is one line instead."""
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
    """The last line that names an error, or the last one: launchers say more after it."""
    named = [match[0] for match in ERROR_LINE.finditer(errors)]
    return named[-1:] or last_lines(errors, 1)


def describe_record(record: Record) -> str:
    """Rows of the table."""
    said = record.said or [""]
    rows = [ROW.format(record.stage, record.outcome, f"{record.seconds:.0f}", said[0][:200])]
    return "\n".join([*rows, *(ROW.format("", "", "", line[:200]) for line in said[1:])])
