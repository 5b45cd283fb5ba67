"""Process-wide settings: memory allocator, open files, warnings, what the screen cannot show.

A program sets them when it starts. Importing a module or creating an object never does.
"""

import codecs
import ctypes
import io
import resource
import sys
import warnings

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2
OPEN_FILES = 1 << 16

_libc = ctypes.CDLL(None)


def set_up_process() -> None:
    """Applies all settings below. Call it before starting threads and before importing DALI."""
    limit_arenas()
    allow_open_files()
    filter_warnings()
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


def give_back() -> None:
    """Returns free memory to the operating system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
