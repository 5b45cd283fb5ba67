"""glibc's allocator, told not to keep what a loader is done with.

Images come in all sizes and are allocated by some threads and freed by others. With an arena per
thread, as glibc has it, that memory grows by a quarter over ten epochs before it settles.
"""

import ctypes

M_ARENA_MAX = -8  # malloc.h
ARENAS = 2

_libc = ctypes.CDLL(None)


def limit_arenas() -> None:
    """Before the first other thread: glibc then settles on a number. Elsewhere: nothing."""
    if hasattr(_libc, "mallopt"):
        _libc.mallopt(M_ARENA_MAX, ARENAS)


def give_back() -> None:
    """Free pages go back to the system."""
    if hasattr(_libc, "malloc_trim"):
        _libc.malloc_trim(0)
