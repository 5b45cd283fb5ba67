"""Keeps other load out of a measurement: waits until the machine is idle, watches, and repeats.

On shared virtual machines a kernel thread may hold a core for a minute after a large process has
ended, and the host may take the cores away (steal). Neither shows among one's own processes.
"""

import ctypes
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

from resnet_dist.distributed import World

T = TypeVar("T")
LIBC = ctypes.CDLL(None)
TICKS = os.sysconf("SC_CLK_TCK")  # per second, of the times in /proc
QUIET_SHARE = 0.05  # of all cores, for others: daemons take less
LOOK_SECONDS = 1.0
QUIET_LOOKS = 2  # in a row
MAX_WAIT_SECONDS = 120
REPEATS = 3  # of a disturbed measurement
at_once = False  # what `measure_at_once` sets, in this process


def measure_at_once() -> None:
    """From now on this process neither waits nor repeats, but still watches."""
    global at_once
    at_once = True


@dataclass(frozen=True)
class Disturbance:
    """What else happened on the machine during a measurement, in percent of all cores' time."""

    steal_pct: float  # taken away by the host of this virtual machine
    others_pct: float  # used by other processes, or by the kernel for itself
    repeats: int = 0  # how often the measurement had been disturbed and was made again

    @property
    def is_disturbed(self) -> bool:
        return self.steal_pct + self.others_pct > 100 * QUIET_SHARE

    def __str__(self) -> str:
        return f"steal {self.steal_pct:.1f} %, others {self.others_pct:.1f} %"


class Watch:
    """Counts the CPU time of everybody else from its creation on. Linux only."""

    def __init__(self, root: int | None = None) -> None:
        """root: the process whose descendants are measured, and not others; None: this one."""
        self._root = os.getpid() if root is None else root
        self._began = self._now()

    def _now(self) -> tuple[float, float, float, float]:
        # Ours first: what we use in between then counts as others', never the reverse.
        return cpu_seconds_of_tree(self._root), *busy_seconds(), time.monotonic()

    def seen(self, repeats: int = 0) -> Disturbance:
        ours, busy, steal, seconds = (
            now - began for now, began in zip(self._now(), self._began, strict=True)
        )
        cores = os.cpu_count() or 1
        all_time = max(seconds, 1 / TICKS) * cores
        # The clocks tick every 10 ms, each for itself.
        others = max(0.0, busy - ours - 2 * cores / TICKS)
        return Disturbance(
            round(100 * steal / all_time, 2), round(100 * others / all_time, 2), repeats
        )


def busy_seconds() -> tuple[float, float]:
    """Returns the CPU time that all cores have spent, and that was stolen, since the boot."""
    with open("/proc/stat") as file:
        user, nice, system, _, _, irq, softirq, steal, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / TICKS, steal / TICKS


def cpu_seconds_of_tree(root: int) -> float:
    """Returns the CPU time of a process and all its descendants, also of those that have ended.

    The time of descendants that have ended is known in ticks only, other times to the microsecond.
    """
    parents: dict[int, int] = {}
    seconds: dict[int, float] = {}
    for path in Path("/proc").glob("[0-9]*/stat"):
        pid = int(path.parent.name)
        try:
            # The name, in parentheses, may contain blanks.
            fields = path.read_bytes().rpartition(b")")[2].split()
            own = time.clock_gettime(_cpu_clock_of(pid))
        except OSError:  # it has just ended
            continue
        parents[pid] = int(fields[1])
        seconds[pid] = own + sum(map(int, fields[13:15])) / TICKS  # those of its ended children

    def is_ours(pid: int) -> bool:
        while pid > 0 and pid != root:
            pid = parents.get(pid, 0)
        return pid == root

    return sum(used for pid, used in seconds.items() if is_ours(pid))


def _cpu_clock_of(pid: int) -> int:
    """Returns the number of the clock that counts the CPU time of all threads of a process."""
    clock = ctypes.c_int()
    code = LIBC.clock_getcpuclockid(pid, ctypes.byref(clock))
    if code:
        raise OSError(code, os.strerror(code))
    return clock.value


def wait_until_quiet(root: int | None = None) -> None:
    """Waits until others use less than QUIET_SHARE, but no longer than MAX_WAIT_SECONDS."""
    ends = time.monotonic() + (0 if at_once else MAX_WAIT_SECONDS)
    quiet_looks = 0
    while quiet_looks < QUIET_LOOKS and time.monotonic() < ends:
        watch = Watch(root)
        time.sleep(LOOK_SECONDS)
        quiet_looks = 0 if watch.seen().is_disturbed else quiet_looks + 1


def root_of(world: World | None) -> int:
    """Returns the process whose descendants measure: with several ranks, their launcher."""
    return os.getpid() if world is None or world.size == 1 else os.getppid()


def undisturbed(
    measure: Callable[[], T],
    world: World | None = None,
    say: Callable[[str], None] = print,
) -> tuple[T, Disturbance]:
    """Measures on a quiet machine, and again, up to REPEATS times, if it was disturbed.

    Returns the last measurement, with what disturbed it. world: of the ranks that measure together;
    with more than one, a collective.
    """
    root = root_of(world)
    for repeats in range(1 if at_once else REPEATS + 1):
        if repeats:
            wait_until_quiet(root)
        watch = Watch(root)
        result = measure()
        seen = watch.seen(repeats)
        again = seen.is_disturbed if world is None else world.any(seen.is_disturbed)
        if not again:
            break
        if world is None or world.is_main:
            what = "measured again" if repeats < REPEATS and not at_once else "kept"
            say(f"disturbed ({seen}): {what}")
    return result, seen
