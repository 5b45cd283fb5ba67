"""Process-wide settings: memory allocator, open files, warnings, and the screen.

A program sets them when it starts. Importing a module or creating an object never does.
"""

import codecs
import ctypes
import io
import os
import resource
import select
import signal
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2
OPEN_FILES = 1 << 16
SCREEN_PATIENCE_SECONDS = 5
PR_SET_PDEATHSIG = 1  # sys/prctl.h
LAUNCHER = "RESNET_DIST_LAUNCHER"  # process id of `train --ranks`, for the ranks that it starts

_libc = ctypes.CDLL(None)


def set_up_process() -> None:
    """Applies all settings below. Call it before starting threads and before importing DALI."""
    limit_arenas()
    allow_open_files()
    filter_warnings()
    open_standard_streams()
    print_any_name()


def limit_arenas() -> None:
    """Limits the arenas of glibc's allocator, which would keep memory that a loader has freed.

    Images have all sizes, and are allocated in some threads and freed in others. With glibc's
    default of an arena per thread, memory grows by a quarter over ten epochs before it settles.
    With another C library this does nothing.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_ARENA_MAX, ARENAS)


def allow_open_files() -> None:
    """Raises the limit of open files: ImageNet can have more shards than the default allows."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def filter_warnings() -> None:
    """Hides warnings that are of no use to a user."""
    # DALI warns once per process, when the first GPU pipeline is built and NPP or cuFFT is missing
    # (its CUDA 13 build says "cuda120" too). None of the operators that we use needs either.
    warnings.filterwarnings(
        "ignore",
        "nvidia-dali-cuda120 is no longer shipped with CUDA runtime",
        module=r"nvidia\.dali",
    )
    # Pillow warns about damaged metadata and large images, without naming the file.
    warnings.filterwarnings("ignore", module=r"PIL\.")


def open_standard_streams() -> None:
    """Opens the null device in place of stdin, stdout and stderr where they are closed (`>&-`).

    Otherwise the next file to be opened, such as a checkpoint, would get the number of the screen,
    and what libraries print would be written into it.
    """
    for descriptor in range(3):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest free number
    # Python has None in place of a stream that was closed at its start.
    sys.stdout = sys.stdout or open(os.devnull, "w")  # noqa: SIM115 (until the end)
    sys.stderr = sys.stderr or open(os.devnull, "w")  # noqa: SIM115


def print_any_name() -> None:
    """Lets names of files and classes be printed that the encoding of the screen lacks.

    Names that are not in this encoding are printed as the bytes that they are, and characters that
    it does not have as escapes.
    """
    codecs.register_error("any_name", _print_anyway)
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="any_name")


def _print_anyway(error: UnicodeError) -> tuple[str | bytes, int]:
    try:
        return codecs.lookup_error("surrogateescape")(error)
    except UnicodeEncodeError:
        return codecs.lookup_error("backslashreplace")(error)


def outlive_the_screen() -> None:
    """Lets the program continue when its screen goes away; what it prints is then dropped.

    For training, whose record is in files. A verb that prints a result must fail if it cannot. Only
    a program calls it, once.
    """
    for name in ("stdout", "stderr"):
        stream = getattr(sys, name)
        if isinstance(stream, io.TextIOWrapper):
            coding: Any = {"encoding": stream.encoding, "errors": stream.errors}
            buffer = io.BufferedWriter(_LenientScreen(stream))
            setattr(sys, name, io.TextIOWrapper(buffer, **coding, line_buffering=True))


class _LenientScreen(io.RawIOBase):
    """Drops what cannot be written: the terminal is closed or stopped, nobody reads the pipe, or
    the disk is full."""

    def __init__(self, stream: io.TextIOWrapper):
        with suppress(OSError):
            stream.flush()
        self._is_stuck = False
        self._stream = stream  # it would close its file if it were dropped
        # With PYTHONUNBUFFERED there is no buffer in between.
        self._file: Any = getattr(stream.buffer, "raw", stream.buffer)

    def write(self, data: Any) -> int:
        """Also drops what a stopped screen (Ctrl-S, a reader that is stuck) does not take in time.

        Training never waits for it longer than SCREEN_PATIENCE_SECONDS, and that once.
        """
        piece = memoryview(data)[: select.PIPE_BUF]  # a pipe that is ready takes as many bytes
        try:
            screen = select.poll()
            screen.register(self._file.fileno(), select.POLLOUT)
            self._is_stuck = not screen.poll(
                0 if self._is_stuck else 1000 * SCREEN_PATIENCE_SECONDS
            )
            if not self._is_stuck:
                return self._file.write(piece) or memoryview(data).nbytes
        except OSError:
            pass
        return memoryview(data).nbytes

    def writable(self) -> bool:
        return True

    def fileno(self) -> int:
        return self._file.fileno()

    def isatty(self) -> bool:
        return self._file.isatty()


@contextmanager
def deaf_to_ctrl_c() -> Iterator[None]:
    """Keeps Ctrl-C from the processes that are started in this block; this one gets it afterwards.

    They would show a traceback, and this process ends them anyway.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
    try:
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def stop_with_launcher() -> None:
    """Asks the kernel for SIGTERM when the process that started this rank ends (`train --ranks`).

    Even if that was killed, the ranks save and stop. Otherwise they would train on, unseen.
    """
    launcher = os.environ.get(LAUNCHER)
    if launcher is not None and hasattr(_libc, "prctl"):
        _libc.prctl(PR_SET_PDEATHSIG, signal.SIGTERM)
        if os.getppid() != int(launcher):  # it ended before
            os.kill(os.getpid(), signal.SIGTERM)


def give_back() -> None:
    """Returns free memory to the operating system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
