"""Remembers a request to stop until the next step boundary.

Imports only the standard library: it must be listening before torch is imported, which takes
seconds.
"""

import signal
from types import FrameType
from typing import Any


class Interrupt:
    """Signal handlers that remember a request to stop, used as a context.

    The training loop asks at step boundaries, where all ranks agree on the answer. SIGTERM comes
    from schedulers and torchrun, SIGUSR1 and SIGUSR2 are early warnings from Slurm and submitit,
    and SIGINT is Ctrl-C; a second Ctrl-C stops at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.received: set[int] = set()  # signal numbers
        self._before: dict[signal.Signals, Any] = {}

    @property
    def requested(self) -> bool:
        return bool(self.received)

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.received.add(number)
