"""Measures where the time goes between the start of this process and its first finished step."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Startup:
    """A stopwatch with named phases; it stops after the first step."""

    def __init__(self, began: float):
        """began: when the process started, on the clock of time.monotonic()."""
        self._began = began
        self._tenths = 0  # tenths of a second from the start to the last mark
        self._phases: dict[str, int] = {}  # tenths of a second, in the order of the first mark
        self._is_over = False

    def mark(self, phase: str) -> None:
        """Adds the time since the last mark to `phase`, which may have several such pieces."""
        if not self._is_over:
            # Points in time are rounded, not durations, so that the phases add up to the total.
            tenths = round(10 * (time.monotonic() - self._began))
            self._phases[phase] = self._phases.get(phase, 0) + tenths - self._tenths
            self._tenths = tenths

    def end(self, device: torch.device, say: Callable[[str], None]) -> None:
        """Reports the times after the first step of this process; later calls do nothing."""
        if self._is_over:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # CPU-GPU sync point, once in a process
        self.mark("first step")
        self._is_over = True
        phases = ", ".join(f"{phase} {tenths / 10:.1f}" for phase, tenths in self._phases.items())
        say(f"first step {self._tenths / 10:.1f} s after the start: {phases}")


def process_began() -> float:
    """Returns when this process started, on the clock of time.monotonic().

    If that cannot be found out, returns the present time.
    """
    try:
        stat = Path("/proc/self/stat").read_text()
        # Field 22: clock ticks since boot. Field 2, the name, may contain blanks and parentheses.
        ticks = int(stat.rpartition(")")[2].split()[22 - 3])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # no /proc, or no such clock
        age = 0.0
    return time.monotonic() - age
