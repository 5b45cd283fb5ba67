"""What a person sees: one living line on a terminal, plain lines elsewhere, from rank 0 only."""

import shutil
import sys
import time

from resnet_dist.plan import Plan

REFRESH_SECONDS = 0.5


class Progress:
    def __init__(self, plan: Plan, first_step: int, speaks: bool):
        self.plan = plan
        self.first_step = first_step
        self.speaks = speaks
        self.lives = speaks and sys.stdout.isatty()
        self.started = time.monotonic()
        self.refreshed = 0.0
        self.figures = ""

    def say(self, text: str) -> None:
        """A line that stays."""
        if self.speaks:
            print("\r\x1b[K" + text if self.lives else text, flush=True)

    def tick(self, step: int) -> None:
        """After each step: refreshes the living line from host clocks alone."""
        if self.lives and time.monotonic() - self.refreshed > REFRESH_SECONDS:
            self.refreshed = time.monotonic()
            width = shutil.get_terminal_size().columns - 1
            print(f"\r\x1b[K{self._line(step)}"[: width + 4], end="", flush=True)

    def update(self, step: int, metrics: dict[str, float]) -> None:
        """At a logging step: new figures."""
        self.figures = (
            f"loss {metrics['train/loss']:.4f}  acc1 {metrics['train/acc1']:5.2f} %  "
            f"lr {metrics['train/lr']:.4g}  {metrics['perf/images_per_sec']:,.0f} img/s  "
            f"data-wait {metrics['perf/data_wait_pct']:.0f} %"
        )
        if self.lives:
            self.refreshed = 0.0
            self.tick(step)
        else:
            self.say(self._line(step))

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
