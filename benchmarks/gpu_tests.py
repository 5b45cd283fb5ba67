"""Runs each GPU test in its own process, so that one that crashes or hangs does not affect others.

    python benchmarks/gpu_tests.py [--jobs N] [--timeout S] [--limit S] [--logs FOLDER] [PYTEST ...]

PYTEST: pytest arguments that select tests, such as `-k NAME` or paths. `-m gpu` is added unless -m
is given (with a different -m this script works without a GPU). Prints a line for each test that did
not pass, and then the counts. A module that cannot be imported loses only its own tests, and has a
line, too. FOLDER receives the output of failures. Needs only pytest. Exit codes: 0 for success, 1
if a test failed or a module could not be collected, 2 if there is nothing to run.
"""

import argparse
import contextlib
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as ElementTree
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from pathlib import Path

PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider"]
# With pytest's default, xunit2, record_property warns, and warnings are errors in this project.
REPORT_FORMAT = ["-o", "junit_family=xunit1"]
COLLECT_TIMEOUT_S = 120
KILL_TIMEOUT_S = 5
REASON_CHARACTERS = 200
# pytest's heading of a collection error with the text below it, and the lines that have the error.
COLLECT_ERROR = re.compile(r"^_+ ERROR collecting (.+) _+\n((?:(?![_=]{3}).*\n)*)", re.MULTILINE)
ERROR_LINE = re.compile(r"^E +(\S.*)$", re.MULTILINE)


@dataclass(frozen=True)
class Result:
    test: str  # pytest's node id, or the module that could not be collected
    # "passed", "skipped", "failed", "crashed", "timed out", "not run" or "not collected"
    outcome: str
    reason: str = ""
    output: str = ""

    @property
    def is_failure(self) -> bool:
        return self.outcome not in ("passed", "skipped")


def main(argv: list[str] | None = None) -> int:
    arguments, selection = parse(argv)
    began = time.monotonic()
    runner = Runner(arguments.timeout, began + arguments.limit)
    # If this process is stopped with SIGTERM, for example by a time limit, its tests must stop too.
    signal.signal(signal.SIGTERM, lambda number, _: sys.exit(128 + number))
    counts: Counter[str] = Counter()
    is_failed = False
    tests, uncollected = collect(selection)
    with ThreadPoolExecutor(arguments.jobs) as pool:
        try:
            for result in chain(uncollected, pool.map(runner.run, tests)):
                counts[result.outcome] += 1
                is_failed |= result.is_failure
                if result.outcome != "passed":
                    line = f"{result.outcome.upper()} {result.test}: {result.reason}"
                    print(line.removesuffix(": "), flush=True)
                if result.is_failure and arguments.logs is not None:
                    keep(result, arguments.logs)
        finally:
            runner.stop()
    numbers = ", ".join(f"{count} {outcome}" for outcome, count in sorted(counts.items()))
    print(f"{numbers} in {time.monotonic() - began:.0f} s")
    return int(is_failed)


def parse(argv: list[str] | None) -> tuple[argparse.Namespace, list[str]]:
    cores = len(os.sched_getaffinity(0))
    parser = argparse.ArgumentParser(
        description="Runs each GPU test in its own process.",
        epilog="Other arguments are passed to pytest and select the tests; default: -m gpu",
        allow_abbrev=False,
    )
    parser.add_argument(
        "--jobs",
        type=int,
        default=max(1, min(4, cores // 2)),
        metavar="N",
        help="number of tests at a time; default: half the number of cores, but at most 4",
    )
    parser.add_argument(
        "--timeout", type=float, default=120, metavar="S", help="seconds per test; default: 120"
    )
    parser.add_argument(
        "--limit", type=float, default=float("inf"), metavar="S", help="seconds for all tests"
    )
    parser.add_argument(
        "--logs", type=Path, metavar="FOLDER", help="folder for the output of failures"
    )
    arguments, selection = parser.parse_known_args(argv)
    if not any(text.startswith("-m") for text in selection):
        selection += ["-m", "gpu"]
    # Without this setting, each process would start one thread per core.
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // arguments.jobs)))
    return arguments, selection


def collect(selection: list[str]) -> tuple[list[str], list[Result]]:
    """Returns the node ids that pytest selects, and the modules that it could not collect.

    Exits with code 2 if no test is selected.
    """
    command = [*PYTEST, "--collect-only", *selection]
    done = subprocess.run(command, capture_output=True, text=True, timeout=COLLECT_TIMEOUT_S)
    tests = [line for line in done.stdout.partition("\n\n")[0].splitlines() if "::" in line]
    if not tests:
        print(done.stdout, done.stderr, sep="", end="", file=sys.stderr)
        print(f"nothing to run: {' '.join(command)}", file=sys.stderr)
        sys.exit(2)
    uncollected = [not_collected(*found) for found in COLLECT_ERROR.findall(done.stdout)]
    if done.returncode != 0 and not uncollected:  # an unknown error must not look like success
        code, output = f"exit code {done.returncode}", done.stdout + done.stderr
        uncollected = [Result("some tests", "not collected", code, output)]
    return tests, uncollected


def not_collected(module: str, said: str) -> Result:
    reason = " ".join(ERROR_LINE.findall(said) or said.split())
    return Result(module, "not collected", reason[:REASON_CHARACTERS], said)


class Runner:
    """Runs each test in its own process. May be used from any thread."""

    def __init__(self, timeout_s: float, deadline: float):
        """timeout_s: limit per test. deadline: for all tests, on the clock of time.monotonic()."""
        self._timeout_s = timeout_s
        self._deadline = deadline
        self._running: set[subprocess.Popen[bytes]] = set()

    def run(self, test: str) -> Result:
        seconds = min(self._timeout_s, self._deadline - time.monotonic())
        if seconds <= 0:
            return Result(test, "not run", "no time left")
        with tempfile.TemporaryDirectory() as name:
            report, log = Path(name, "report.xml"), Path(name, "log")
            command = [*PYTEST, *REPORT_FORMAT, f"--junit-xml={report}", test]
            with open(log, "wb") as output:
                process = subprocess.Popen(
                    command, stdout=output, stderr=subprocess.STDOUT, start_new_session=True
                )
                self._running.add(process)
                try:
                    code: int | None = process.wait(seconds)
                except subprocess.TimeoutExpired:
                    code = None
                finally:
                    end_all(process)
                    # A process stuck in a broken driver cannot be killed, and is left behind.
                    with contextlib.suppress(subprocess.TimeoutExpired):
                        process.wait(KILL_TIMEOUT_S)
                    self._running.discard(process)
            outcome, reason = judge(code, verdict(report), seconds)
            return Result(test, outcome, reason, log.read_text(errors="replace"))

    def stop(self) -> None:
        """Ends all running tests, and prevents new ones from starting."""
        self._deadline = 0.0
        for process in list(self._running):
            end_all(process)


def end_all(process: subprocess.Popen[bytes]) -> None:
    """Kills a test with all processes that it started, which may still hold GPU memory."""
    with contextlib.suppress(ProcessLookupError):
        os.killpg(process.pid, signal.SIGKILL)


def judge(code: int | None, said: tuple[str, str] | None, seconds: float) -> tuple[str, str]:
    """Returns outcome and reason, from pytest's exit code (None: timed out) and its report."""
    if code is None:
        return "timed out", f"after {seconds:.0f} s"
    if code < 0:
        when = "" if said is None else f" after the test had {said[0]}"
        return "crashed", f"{signal.Signals(-code).name}{when}"
    if said is None:
        return "crashed", f"exit code {code} without a report"
    if code != 0 and said[0] in ("passed", "skipped"):
        return "failed", f"exit code {code} after the test had {said[0]}"
    return said


def verdict(report: Path) -> tuple[str, str] | None:
    """Reads outcome and reason from pytest's report. Returns None if pytest wrote no report."""
    try:
        cases = list(ElementTree.parse(report).iter("testcase"))
    except (OSError, ElementTree.ParseError):
        return None
    if not cases:
        return None
    found = {part.tag: part.get("message", "") for case in cases for part in case}
    for tag, outcome in (("error", "failed"), ("failure", "failed"), ("skipped", "skipped")):
        if tag in found:
            return outcome, " ".join(found[tag].split())[:REASON_CHARACTERS]
    return "passed", ""


def keep(result: Result, folder: Path) -> None:
    """Writes the output of a test to a file in `folder`."""
    folder.mkdir(parents=True, exist_ok=True)
    name = re.sub(r"[^\w.-]+", "_", result.test.rpartition("/")[2])
    (folder / f"{name}.log").write_text(result.output)


if __name__ == "__main__":
    sys.exit(main())
