"""The progress of `prepare`: a line that updates in place on a terminal, or occasional lines."""

import sys
import time

from resnet_dist.run.progress import duration

PLAIN_LINE_SECONDS = 30.0


class ShardProgress:
    """Counts images and prints how far `prepare` has got."""

    def __init__(self, images: int) -> None:
        self._images = images
        self._done = self._fresh = self._fresh_bytes = 0
        self._started = self._said = time.monotonic()

    def add(self, images: int, nbytes: int, fresh: bool) -> None:
        """Called after each shard. fresh: it was written now."""
        self._done += images
        if fresh:
            self._fresh += images
            self._fresh_bytes += nbytes
        if sys.stdout.isatty():
            print(f"\r\x1b[K{self._line()}", end="", flush=True)
        elif time.monotonic() - self._said >= PLAIN_LINE_SECONDS:
            self._said = time.monotonic()
            print(self._line(), flush=True)

    def finish(self) -> None:
        """Prints the last line."""
        print(f"\r\x1b[K{self._line()}" if sys.stdout.isatty() else self._line(), flush=True)

    def _line(self) -> str:
        seconds = max(1e-9, time.monotonic() - self._started)
        left = seconds / max(1, self._fresh) * (self._images - self._done)
        return (
            f"{self._done:,}/{self._images:,} images  {100 * self._done // self._images} %  "
            f"{self._fresh / seconds:,.0f} img/s  {self._fresh_bytes / seconds / 1e6:,.0f} MB/s  "
            + (f"ETA {duration(left)}" if left else f"in {duration(seconds)}")
        )
