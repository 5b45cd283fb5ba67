"""A pool of processes, for work that holds the GIL."""

import multiprocessing
import os
import signal
import threading
from concurrent.futures import ProcessPoolExecutor
from multiprocessing.connection import wait

from resnet_dist.process import filter_warnings


def worker_pool(workers: int) -> ProcessPoolExecutor:
    """Returns a pool whose processes ignore Ctrl-C, and end if their parent is killed."""
    # spawn rather than fork, as the caller and its libraries may have threads.
    spawn = multiprocessing.get_context("spawn")
    return ProcessPoolExecutor(workers, spawn, initializer=_start_worker)


def _start_worker() -> None:
    filter_warnings()
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    threading.Thread(target=_end_with_parent, daemon=True).start()


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)  # the pool itself would wait forever for a killed parent
