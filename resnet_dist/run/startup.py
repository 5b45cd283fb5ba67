"""Where the time goes from the start of this process to its first finished step."""

import os
import time
from collections.abc import Callable
from pathlib import Path

import torch


class Startup:
    """Called at the end of each phase; what comes after the first step is ignored."""

    def __init__(self, began: float):
        """began: on the clock of time.monotonic()."""
        self._began = began
        self._tenths = 0  # of a second, at the last mark
        self._phases: dict[str, int] = {}  # tenths of a second; in the order of their first mark
        self._is_over = False

    def mark(self, phase: str) -> None:
        """Since the last mark it was `phase`, which may come in pieces."""
        if not self._is_over:
            # The times are rounded, not what lies between them: so the phases add up to the total.
            tenths = round(10 * (time.monotonic() - self._began))
            self._phases[phase] = self._phases.get(phase, 0) + tenths - self._tenths
            self._tenths = tenths

    def end(self, device: torch.device, say: Callable[[str], None]) -> None:
        """After a step; the first one in this process is told."""
        if self._is_over:
            return
        if device.type == "cuda":
            torch.cuda.synchronize(device)  # CPU-GPU sync point, once in a process
        self.mark("first step")
        self._is_over = True
        phases = ", ".join(f"{phase} {tenths / 10:.1f}" for phase, tenths in self._phases.items())
        say(f"first step {self._tenths / 10:.1f} s after the start: {phases}")


def process_began() -> float:
    """When this process started, on the clock of time.monotonic(); now, if nobody knows."""
    try:
        stat = Path("/proc/self/stat").read_text()
        # Field 22: clock ticks since boot. Field 2, the name, may hold blanks and brackets.
        ticks = int(stat.rpartition(")")[2].split()[22 - 3])
        age = time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
    except (OSError, ValueError, IndexError, AttributeError):  # no /proc, or no such clock
        age = 0.0
    return time.monotonic() - age
