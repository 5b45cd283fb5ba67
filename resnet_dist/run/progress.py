"""What rank 0 shows of a run: a line that updates in place on a terminal, or plain lines elsewhere.

RUN/log.txt keeps what was shown, over all starts.
"""

import contextlib
import os
import shutil
import sys
import threading
import time
import traceback
from collections.abc import Mapping, Sequence
from pathlib import Path

from resnet_dist.errors import UserError, shortened
from resnet_dist.plan import Plan
from resnet_dist.tracking.metrics import (
    DATA_WAIT_PCT,
    IMAGES_PER_SEC,
    TRAIN_ACC1,
    TRAIN_LOSS,
    TRAIN_LR,
)

LOG = "log.txt"
REFRESH_SECONDS = 0.5
WIDE = 79  # columns from which on fields have two blanks between them


class Console:
    """Prints the lines of a run and keeps them in RUN/log.txt. Threads may share it.

    Used as a context: an exception that leaves the block is kept in the log, and propagates.
    """

    def __init__(self, speaks: bool):
        """speaks: True on rank 0; other ranks print nothing."""
        self._speaks = speaks
        # Then the last line can be rewritten.
        self.is_terminal = speaks and sys.stdout.isatty() and os.environ.get("TERM") != "dumb"
        self._lock = threading.Lock()
        self._early = ""  # what was said before there was a run folder
        self._log: int | None = None  # file descriptor of log.txt

    def __enter__(self) -> "Console":
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        if isinstance(error, UserError):  # the command line prints it
            self._keep(shortened(f"resnet-dist: {error}"))
        elif isinstance(error, Exception):
            self._keep("".join(traceback.format_exception(error)).rstrip())
        elif isinstance(error, KeyboardInterrupt):
            self._keep("ended by Ctrl-C, without saving")
        with self._lock:
            if self._log is not None:
                os.close(self._log)
            self._log = None

    def keep_in(self, run_dir: Path) -> None:
        """Keeps what is said, and what was said before, in RUN/log.txt."""
        if self._speaks:
            with self._lock, contextlib.suppress(OSError):  # the screen still has it
                self._log = os.open(run_dir / LOG, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o666)
            early, self._early = self._early, ""
            self._keep(f"--- {clock()}, process {os.getpid()} on {os.uname().nodename}\n{early}")

    def say(self, text: str) -> None:
        """Prints a line that stays, or several."""
        text = "\n".join(map(shortened, text.split("\n")))
        self._print(text)
        self._keep(text)

    def say_at(self, text: str) -> None:
        """Prints a line that stays, with the time of day in front of it except on a terminal."""
        stamped = f"{clock()}  {text}"
        self._print(text if self.is_terminal else stamped)
        self._keep(stamped)

    def rewrite(self, text: str) -> None:
        """Rewrites the last line on a terminal; elsewhere does nothing."""
        if self.is_terminal:
            print(f"\r\x1b[K{text}", end="", flush=True)

    def keep(self, text: str) -> None:
        """Adds a line with the time of day to the log, and does not print it."""
        self._keep(f"{clock()}  {text}")

    @property
    def columns(self) -> int:
        """How many characters fit in a line that is rewritten: the last column stays free."""
        return shutil.get_terminal_size().columns - 1

    def _print(self, text: str) -> None:
        if self._speaks:
            print("\r\x1b[K" + text if self.is_terminal else text, flush=True)

    def _keep(self, text: str) -> None:
        if not self._speaks:
            return
        with self._lock:
            if self._log is None:
                self._early += text + "\n"
                return
            with contextlib.suppress(OSError):  # the log is a convenience, the journal the record
                os.write(self._log, (text + "\n").encode(errors="backslashreplace"))


class Progress:
    """Shows how far a run has got."""

    def __init__(self, console: Console, plan: Plan, first_step: int):
        self.console = console
        self.plan = plan
        self.first_step = first_step
        self.started = time.monotonic()
        self.refreshed = 0.0
        self.first: list[str] = []  # the latest figures that come first in the line
        self.last: list[str] = []  # and those that come last

    def tick(self, step: int) -> None:
        """Called after each step: refreshes the line now and then, without asking the GPU."""
        if self.console.is_terminal and time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            self.console.rewrite(fitting(self._fields(step), self.console.columns))

    def update(self, step: int, metrics: Mapping[str, float], best_acc1: float) -> None:
        """Called at a logging step: shows the new figures. best_acc1: -1 if there is none yet."""
        self.first = [
            f"loss {metrics[TRAIN_LOSS]:.4f}",
            f"acc1 {metrics[TRAIN_ACC1]:.1f}%",
            f"{metrics[IMAGES_PER_SEC]:,.0f} img/s",
        ]
        self.last = [
            *([f"best {best_acc1:.2f}%"] if best_acc1 >= 0 else []),
            f"step {step}/{self.plan.total_steps}",
            f"lr {metrics[TRAIN_LR]:.4g}",
            f"data-wait {metrics[DATA_WAIT_PCT]:.0f}%",
        ]
        if self.console.is_terminal:
            self.refreshed = 0.0
            self.tick(step)
            self.console.keep("  ".join(self._fields(step)))
        else:
            self.console.say_at("  ".join(self._fields(step)))

    def _fields(self, step: int) -> list[str]:
        """Returns the parts of the line, the most wanted ones first."""
        plan = self.plan
        elapsed = time.monotonic() - self.started
        left = elapsed / max(1, step - self.first_step) * (plan.total_steps - step)
        epoch = f"epoch {plan.epoch_at(step):.1f}/{plan.epoch_at(plan.total_steps):g}"
        return [epoch, *self.first, f"ETA {time_left(left)}", *self.last]


def fitting(fields: Sequence[str], columns: int) -> str:
    """Joins the fields that fit into a line, from the first one on."""
    gap = "  " if columns >= WIDE else " "
    count = len(fields)
    while count > 1 and len(gap.join(fields[:count])) > columns:
        count -= 1
    return gap.join(fields[:count])[:columns]


def clock() -> str:
    """Returns the local date and time."""
    return time.strftime("%Y-%m-%d %H:%M:%S")


def time_left(seconds: float) -> str:
    """Formats a duration in few characters: 26h13, or 2:03 below an hour."""
    minutes = round(seconds / 60)
    return duration(seconds) if seconds < 3599.5 else f"{minutes // 60}h{minutes % 60:02}"


def duration(seconds: float) -> str:
    """Formats a duration as 1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: list[tuple[str, str]]) -> str:
    """Formats rows as two columns between horizontal rules."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * min(100, width + 2 + max(len(text) for _, text in rows))
    return "\n".join([rule, *(f"{name:<{width}}  {text}" for name, text in rows), rule])
