"""What a person sees: one living line on a terminal, plain lines elsewhere, from rank 0 only."""

import shutil
import sys
import time
from collections.abc import Mapping

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
    """Where a run speaks. Lines may come from several threads."""

    def __init__(self, speaks: bool):
        """speaks: on rank 0; the others are silent."""
        self._speaks = speaks
        self.lives = speaks and sys.stdout.isatty()  # a terminal, whose last line may be rewritten

    def say(self, text: str) -> None:
        """A line that stays."""
        if self._speaks:
            print("\r\x1b[K" + text if self.lives else text, flush=True)

    def rewrite(self, text: str) -> None:
        """The living line, in the place of what it was; nothing where there is none."""
        if self.lives:
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{text}"[: width + 4], end="", flush=True)


class Progress:
    """How far a run has come."""

    def __init__(self, console: Console, plan: Plan, first_step: int):
        self.console = console
        self.plan = plan
        self.first_step = first_step
        self.started = time.monotonic()
        self.refreshed = 0.0
        self.figures = ""

    def tick(self, step: int) -> None:
        """After each step: refreshes the living line from host clocks alone."""
        if self.console.lives and time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            self.console.rewrite(self._line(step))

    def update(self, step: int, metrics: Mapping[str, float]) -> None:
        """At a logging step: new figures."""
        self.figures = (
            f"loss {metrics[TRAIN_LOSS]:.4f}  acc1 {metrics[TRAIN_ACC1]:5.2f} %  "
            f"lr {metrics[TRAIN_LR]:.4g}  {metrics[IMAGES_PER_SEC]:,.0f} img/s  "
            f"data-wait {metrics[DATA_WAIT_PCT]:.0f} %"
        )
        if self.console.lives:
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
    """1:02:03 or 2:03."""
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    return f"{hours}:{minutes:02}:{rest:02}" if hours else f"{minutes}:{rest:02}"


def table(rows: list[tuple[str, str]]) -> str:
    """Two columns between rules."""
    width = max(len(name) for name, _ in rows)
    rule = "-" * min(100, width + 2 + max(len(text) for _, text in rows))
    return "\n".join([rule, *(f"{name:<{width}}  {text}" for name, text in rows), rule])
