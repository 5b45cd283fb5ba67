"""A pool of processes, for work that holds the GIL."""

import multiprocessing
import os
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait
from multiprocessing.context import SpawnContext, SpawnProcess

from resnet_dist.process import deaf_to_ctrl_c, filter_warnings


class DeafProcess(SpawnProcess):
    """A process that never gets Ctrl-C, not even while it starts."""

    def start(self) -> None:
        with deaf_to_ctrl_c():
            super().start()


class DeafContext(SpawnContext):
    """Starts processes that never get Ctrl-C.

    By spawn rather than fork, as the caller and its libraries may have threads.
    """

    Process = DeafProcess


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Returns a pool whose processes never get Ctrl-C, and end if their parent is killed."""
    return ProcessPoolExecutor(workers, DeafContext(), initializer=_start_worker)


def _start_worker() -> None:
    filter_warnings()
    end_with_parent()


def end_with_parent() -> None:
    """Ends this process when its parent has ended: a pool's process would wait forever for it."""
    threading.Thread(target=_wait_for_parent, daemon=True).start()


def _wait_for_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)
