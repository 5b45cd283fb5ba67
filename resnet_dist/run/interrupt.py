"""Remembers a request to stop until the next step boundary.

Imports only the standard library: it must be listening before torch is imported, which takes
seconds.
"""

import contextlib
import os
import signal
from types import FrameType
from typing import Any

CTRL_C_LINE = "stopping after this step; once more to stop without saving"


class Interrupt:
    """Signal handlers that remember a request to stop, used as a context.

    The training loop asks at step boundaries, where all ranks agree on the answer. SIGTERM comes
    from schedulers and torchrun, SIGUSR1 and SIGUSR2 are early warnings from Slurm and submitit,
    SIGHUP means that the terminal is closed, and SIGINT is Ctrl-C. A second Ctrl-C stops at once,
    and so does SIGQUIT (Ctrl-\\).
    """

    SIGNALS = (
        *(signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGHUP),
        *(signal.SIGINT, signal.SIGQUIT),
    )

    def __init__(self) -> None:
        self.received: set[int] = set()  # signal numbers
        self.ends_at_once = False
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> "Interrupt":
        for number in self.SIGNALS:
            before = signal.getsignal(number)
            if number == signal.SIGHUP and before == signal.SIG_IGN:
                continue  # `nohup`: the run is to outlive the terminal
            self._before[number] = before
            signal.signal(number, self._remember)
        # run/ranks.py blocks them in a new rank until here, so that none of them kills it.
        signal.pthread_sigmask(signal.SIG_UNBLOCK, self.SIGNALS)
        return self

    def __exit__(self, kind: object, error: BaseException | None, _: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)
        self._before.clear()
        if error is not None and self.ends_at_once:
            # The error is perhaps another one: that another rank, which got it too, is not there.
            raise KeyboardInterrupt from None

    def _remember(self, number: int, frame: FrameType | None) -> None:
        is_second = number == signal.SIGINT and signal.SIGINT in self.received
        self.received.add(number)  # before anything that the next signal could interrupt
        if is_second or number == signal.SIGQUIT:
            self.ends_at_once = True
            raise KeyboardInterrupt
        if number == signal.SIGINT:
            _say(CTRL_C_LINE)


def _say(line: str) -> None:
    """Writes a line to the screen, on rank 0. For a signal handler, which may not use `print`.

    What it interrupts may be a `print`, whose buffer cannot be entered twice.
    """
    if os.environ.get("RANK", "0") == "0":
        with contextlib.suppress(OSError):
            erase = b"\r\x1b[K" if os.isatty(1) else b""  # the line that is rewritten in place
            os.write(1, erase + line.encode() + b"\n")
