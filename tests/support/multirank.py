"""Runs a function in several real processes that form a gloo process group, for the tests."""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import pickle
import tempfile
import time
import traceback
from collections.abc import Callable
from datetime import timedelta
from multiprocessing.connection import wait
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from tests.support.waiting import HANG_SECONDS

# A fork server that has imported torch and DALI starts a rank in milliseconds, not seconds, and
# unlike a fork of pytest's own process carries over none of its threads.
_CONTEXT = multiprocessing.get_context("forkserver")
_CONTEXT.set_forkserver_preload(["torch", "torch.distributed", "resnet_dist.train"])


class RankError(RuntimeError):
    """A rank raised, died or hung; the message holds what the ranks reported."""


def run_ranks(
    function: Callable[..., Any],
    world_size: int,
    *args: Any,
    timeout_s: float = HANG_SECONDS,
    init_process_group: bool = True,
) -> list[Any]:
    """Run function(rank, world_size, *args) in world_size processes; return results by rank.

    function must be importable (module-level); args and results are pickled by value. Each rank
    has one torch thread, this process's environment and RANK, LOCAL_RANK, WORLD_SIZE and
    LOCAL_WORLD_SIZE. With init_process_group False there is no group yet, but, as under torchrun,
    this process serves the ranks' store at MASTER_ADDR and MASTER_PORT. The first rank to fail ends
    all the others. Raises RankError with the ranks' tracebacks, or with the stacks of those still
    running at timeout_s.
    """
    env = dict(os.environ, WORLD_SIZE=str(world_size), LOCAL_WORLD_SIZE=str(world_size))
    if not init_process_group:
        _store, where = serve_store()
        env.update(where)
    # By value: multiprocessing's own pickler would move tensors to shared memory.
    call = pickle.dumps((function, args))
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        ranks = [
            _CONTEXT.Process(
                target=_rank_main,
                args=(rank, world_size, call, folder, env, timeout_s, init_process_group),
                name=f"rank{rank}",
            )
            for rank in range(world_size)
        ]
        started: list[Any] = []
        try:
            for process in ranks:
                process.start()
                started.append(process)
            _await(ranks, folder, time.monotonic() + timeout_s, timeout_s)
        finally:
            for process in started:
                process.kill()  # does nothing to one that has ended
                process.join()
                process.close()
        return [pickle.loads((folder / f"{r}.result").read_bytes()) for r in range(world_size)]


def serve_store() -> tuple[dist.TCPStore, dict[str, str]]:
    """Serves a store for ranks, as torchrun's agent does.

    Returns the store, which serves while it exists, and the environment variables that lead the
    ranks to it. (A port chosen for rank 0 to listen on could be another process's by then.)
    """
    store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    return store, {
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(store.port),
        "TORCHELASTIC_USE_AGENT_STORE": "True",
    }


def _await(ranks: list[Any], folder: Path, deadline: float, timeout_s: float) -> None:
    """Return when every rank has ended well; raise RankError at the first that has not."""
    running = dict(enumerate(ranks))
    while running:
        wait([p.sentinel for p in running.values()], timeout=max(0, deadline - time.monotonic()))
        ended = {rank: p for rank, p in running.items() if p.exitcode is not None}
        if not ended and time.monotonic() >= deadline:
            stacks = _reports(folder, "stack")
            raise RankError(f"ranks {list(running)} still running after {timeout_s} s\n{stacks}")
        failed = {rank: p.exitcode for rank, p in ended.items() if p.exitcode != 0}
        if failed:
            reports = _reports(folder, "error") or "no traceback: killed or crashed"
            raise RankError(f"exit codes of failed ranks: {failed}\n{reports}")
        running = {rank: p for rank, p in running.items() if rank not in ended}


def _reports(folder: Path, kind: str) -> str:
    """The ranks' reports, oldest first: a peer's lost connection comes after its cause."""
    paths = sorted(folder.glob(f"*.{kind}"), key=lambda path: path.stat().st_mtime_ns)
    return "\n".join(f"--- rank {p.stem} ---\n{p.read_text()}" for p in paths if p.stat().st_size)


def _rank_main(
    rank: int,
    world_size: int,
    call: bytes,
    folder: Path,
    env: dict[str, str],
    timeout_s: float,
    init_process_group: bool,
) -> None:
    # The fork server's environment is that of its own start, not that of the present test.
    os.environ.clear()
    os.environ.update(env, RANK=str(rank), LOCAL_RANK=str(rank))
    torch.set_num_threads(1)
    try:
        with (folder / f"{rank}.stack").open("w") as stack:
            # Shortly before the parent kills a hanging rank, have it say where it hangs.
            faulthandler.dump_traceback_later(0.9 * timeout_s, file=stack)
            try:
                function, args = pickle.loads(call)
                if init_process_group:
                    dist.init_process_group(
                        "gloo",
                        init_method=f"file://{folder}/rendezvous",
                        rank=rank,
                        world_size=world_size,
                        timeout=timedelta(seconds=timeout_s),
                    )
                result = pickle.dumps(function(rank, world_size, *args))
            finally:
                faulthandler.cancel_dump_traceback_later()
        (folder / f"{rank}.result").write_bytes(result)
        if dist.is_initialized():
            dist.destroy_process_group()
    except BaseException:
        # Written before the group closes, so before any peer can notice and report.
        (folder / f"{rank}.error").write_text(traceback.format_exc())
        raise SystemExit(1) from None
