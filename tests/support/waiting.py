"""How long a test waits for what another process or thread does."""

import time
from collections.abc import Callable

# Ends a test that hangs. It measures no speed: a busy machine may be ten times slower than an idle
# one.
HANG_SECONDS = 600.0


def wait_until(happened: Callable[[], object], what: str) -> None:
    """Fails with `what`, as in "no step was done", if `happened` stays false."""
    deadline = time.monotonic() + HANG_SECONDS
    while not happened():
        assert time.monotonic() < deadline, what
        time.sleep(0.05)
