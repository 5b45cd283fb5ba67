"""Proof on a GPU that the host does not wait for it, for the tests."""

import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def no_host_sync() -> Iterator[None]:
    """In here an operation of torch that waits on the host for the GPU raises RuntimeError.

    In all threads of this process. Collectives, torch.sparse and explicit waits, such as
    torch.cuda.synchronize and Event.synchronize, are not seen. Whatever is raised, the mode from
    before is back afterwards.
    """
    before = torch.cuda.get_sync_debug_mode()
    try:
        _set_sync_debug_mode("error")
        yield
    finally:
        _set_sync_debug_mode(before)


def _set_sync_debug_mode(mode: int | str) -> None:
    with warnings.catch_warnings():
        # Once per process, and after the mode was set: as an error it would leave the mode on.
        warnings.filterwarnings("ignore", "Synchronization debug mode is a prototype", UserWarning)
        torch.cuda.set_sync_debug_mode(mode)
