"""What rank 0 prints during a run: a line that updates in place on a terminal, or plain lines."""

import shutil
import sys
import time
from collections.abc import Mapping

from resnet_dist.errors import shortened
from resnet_dist.plan import Plan
from resnet_dist.tracking.metrics import (
    DATA_WAIT_PCT,
    IMAGES_PER_SEC,
    TRAIN_ACC1,
    TRAIN_LOSS,
    TRAIN_LR,
)

REFRESH_SECONDS = 0.5


class Console:
    """Prints the lines of a run. Threads may share it."""

    def __init__(self, speaks: bool):
        """speaks: True on rank 0; other ranks print nothing."""
        self._speaks = speaks
        self.is_terminal = speaks and sys.stdout.isatty()  # then the last line can be rewritten

    def say(self, text: str) -> None:
        """Prints a line that stays, or several."""
        text = "\n".join(map(shortened, text.split("\n")))
        if self._speaks:
            print("\r\x1b[K" + text if self.is_terminal else text, flush=True)

    def rewrite(self, text: str) -> None:
        """Rewrites the last line on a terminal; elsewhere does nothing."""
        if self.is_terminal:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text}"[: width + 4], end="", flush=True)


class Progress:
    """Shows how far a run has got."""

    def __init__(self, console: Console, plan: Plan, first_step: int):
        self.console = console
        self.plan = plan
        self.first_step = first_step
        self.started = time.monotonic()
        self.refreshed = 0.0
        self.figures = ""

    def tick(self, step: int) -> None:
        """Called after each step: refreshes the line now and then, without asking the GPU."""
        if self.console.is_terminal and time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            self.console.rewrite(self._line(step))

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """Called at a logging step: shows the new figures."""
        self.figures = (
            f"loss {metrics[TRAIN_LOSS]:.4f}  acc1 {metrics[TRAIN_ACC1]:5.2f} %  "
            f"lr {metrics[TRAIN_LR]:.4g}  {metrics[IMAGES_PER_SEC]:,.0f} img/s  "
            f"data-wait {metrics[DATA_WAIT_PCT]:.0f} %"
        )
        if self.console.is_terminal:
            self.refreshed = 0.0
            self.tick(step)
        else:
            self.console.say(self._line(step))

    def _line(self, step: int) -> str:
        plan = self.plan
        elapsed = time.monotonic() - self.started
        left = elapsed / max(1, step - self.first_step) * (plan.total_steps - step)
        return (
            f"epoch {plan.epoch_at(step):.2f}/{plan.epoch_at(plan.total_steps):g}  "
            f"step {step}/{plan.total_steps}  {self.figures}  ETA {duration(left)}"
        )


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
