"""What holds for the whole process, in one place: set by a program at its start, never by a module
that is imported or by an object that is made."""

import ctypes
import resource
import warnings

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2
OPEN_FILES = 1 << 16

_libc = ctypes.CDLL(None)


def set_up_process() -> None:
    """Before the first other thread, and before DALI is imported: see the three functions below."""
    limit_arenas()
    allow_open_files()
    filter_warnings()


def limit_arenas() -> None:
    """Tells glibc's allocator not to keep what a loader is done with.

    Images come in all sizes and are allocated by some threads and freed by others. With an arena
    per thread, as glibc has it, that memory grows by a quarter over ten epochs before it settles.
    Elsewhere: nothing.
    """
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_ARENA_MAX, ARENAS)


def allow_open_files() -> None:
    """ImageNet has more shards than a process may open by default."""
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    wanted = OPEN_FILES if hard == resource.RLIM_INFINITY else min(OPEN_FILES, hard)
    if soft != resource.RLIM_INFINITY and soft < wanted:
        resource.setrlimit(resource.RLIMIT_NOFILE, (wanted, hard))


def filter_warnings() -> None:
    """Leaves out what tells a user nothing."""
    # Said once per process, when the first pipeline for a GPU is built where NPP or cuFFT is not
    # installed, and DALI's CUDA 13 build says "cuda120" too. No operator that we use needs either.
    warnings.filterwarnings(
        "ignore",
        "nvidia-dali-cuda120 is no longer shipped with CUDA runtime",
        module=r"nvidia\.dali",
    )
    # Pillow's, of large images: said once per place in the code, and it names no file. What is
    # larger than headers.MAX_PIXELS is refused by name.
    warnings.filterwarnings("ignore", r"Image size \(\d+ pixels\) exceeds limit")


def give_back() -> None:
    """Free pages go back to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
