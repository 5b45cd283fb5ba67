"""A program on a terminal of its own, as a person at a keyboard has it."""

import fcntl
import os
import pty
import select
import signal
import struct
import termios
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress

from tests.support.waiting import HANG_SECONDS

CTRL_C = b"\x03"


class Terminal:
    """`open_terminal` gives one."""

    def __init__(self, pid: int, descriptor: int):
        self.pid = pid
        self.screen = ""  # all that was written so far
        self._descriptor = descriptor
        self._is_closed = False

    def wait_for(self, text: str) -> None:
        """Waits until the screen has shown this text."""
        deadline = time.monotonic() + HANG_SECONDS
        while text not in self.screen:
            goes_on = self._read() and time.monotonic() < deadline
            assert goes_on, f"no {text!r} in {self.screen}"

    def press(self, key: bytes) -> None:
        os.write(self._descriptor, key)

    def close(self) -> None:
        """Closes the window: the program gets SIGHUP, and its screen is gone."""
        if not self._is_closed:
            self._is_closed = True
            os.close(self._descriptor)

    def exit_code(self) -> int:
        """Waits for the end of the program. Returns its exit code, or minus the signal's number."""
        deadline = time.monotonic() + HANG_SECONDS
        while not (ended := os.waitpid(self.pid, os.WNOHANG))[0]:
            assert time.monotonic() < deadline, self.screen
            if self._is_closed or not self._read():
                time.sleep(0.05)
        while not self._is_closed and self._read(wait_seconds=0.0):
            pass
        self.pid = 0
        return os.waitstatus_to_exitcode(ended[1])

    def kill(self) -> None:
        if self.pid:
            with suppress(ProcessLookupError):
                os.killpg(self.pid, signal.SIGKILL)
            os.waitpid(self.pid, 0)
        self.close()

    def _read(self, wait_seconds: float = 0.1) -> bool:
        """Reads what there is. Returns False at the end of the program's output."""
        ready, _, _ = select.select([self._descriptor], [], [], wait_seconds)
        if not ready:
            return wait_seconds > 0
        try:
            data = os.read(self._descriptor, 1 << 16)
        except OSError:  # the program has closed its side
            return False
        self.screen += data.decode(errors="replace")
        return bool(data)


@contextmanager
def open_terminal(command: Sequence[object], columns: int = 120) -> Iterator[Terminal]:
    """Runs a command with a terminal of this width as its screen, keyboard and session."""
    pid, descriptor = pty.fork()
    if pid == 0:
        try:
            size = struct.pack("HHHH", 40, columns, 0, 0)
            fcntl.ioctl(1, termios.TIOCSWINSZ, size)
            os.environ["OMP_NUM_THREADS"] = "1"
            os.environ.pop("COLUMNS", None)  # it would count more than the terminal's width
            os.execvp(str(command[0]), [str(part) for part in command])
        finally:
            os._exit(127)
    terminal = Terminal(pid, descriptor)
    try:
        yield terminal
    finally:
        terminal.kill()
