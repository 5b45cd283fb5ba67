"""`train --ranks N`: starts N ranks on this machine and ends as they end.

The ranks are started and watched by torchrun's own agent, in this process. Unlike under torchrun,
signals do not end the agent but are passed on to the ranks, and the ending is one line.
"""

import contextlib
import logging
import os
import signal
import sys
import uuid
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from torch.distributed.elastic.agent.server.api import RunResult, WorkerSpec
from torch.distributed.elastic.agent.server.local_elastic_agent import LocalElasticAgent
from torch.distributed.elastic.multiprocessing import DefaultLogsSpecs
from torch.distributed.elastic.rendezvous import RendezvousParameters
from torch.distributed.elastic.rendezvous.registry import get_rendezvous_handler

from resnet_dist.errors import RankFailure
from resnet_dist.process import LAUNCHER
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.outcome import START_TOKEN, Ending, Outcome

HERE = "127.0.0.1"
POLL_SECONDS = 0.1


def train_on_ranks(
    ranks: int, arguments: Sequence[str], run_dir: Path, interrupt: Interrupt
) -> int:
    """Runs `resnet-dist train` with these arguments on N ranks. Returns the exit code.

    interrupt: has been listening so far.

    Raises:
        RankFailure: a rank was killed.
        KeyboardInterrupt: the ranks were ended by a second Ctrl-C.
    """
    if interrupt.requested:
        return Outcome.STOPPED.exit_code  # there was nothing to save yet
    start = os.environ.setdefault(START_TOKEN, uuid.uuid4().hex[:12])
    os.environ[LAUNCHER] = str(os.getpid())
    cores = len(os.sched_getaffinity(0))
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, cores // ranks)))
    os.environ["TORCHELASTIC_SIGNALS_TO_HANDLE"] = "SIGTERM"  # it cannot be empty; see Relay
    logging.getLogger("torch.distributed.elastic").setLevel(logging.CRITICAL)

    run_id = uuid.uuid4().hex
    rendezvous = RendezvousParameters("c10d", f"{HERE}:0", run_id, 1, 1, HERE, is_host=True)
    spec = WorkerSpec(
        role="rank",
        local_world_size=ranks,
        rdzv_handler=get_rendezvous_handler(rendezvous),
        entrypoint=sys.executable,
        args=("-m", "resnet_dist", "train", *arguments),
        max_restarts=0,
        monitor_interval=POLL_SECONDS,
        local_addr=HERE,
    )
    relay = Relay(interrupt)
    agent = Agent(spec, DefaultLogsSpecs(os.devnull))
    agent.relay = relay
    with relay:
        result = agent.run()
    return _exit_code(result, relay, run_dir, start)


def _exit_code(result: RunResult, relay: "Relay", run_dir: Path, start: str) -> int:
    ending = Ending.read(run_dir)
    outcome = ending.outcome if ending is not None and ending.start == start else None
    if not result.is_failed():
        if outcome is None:  # stopped before the run was locked
            outcome = Outcome.STOPPED if relay.received else Outcome.FAILED
        return outcome.exit_code
    first = min(result.failures.values(), key=lambda failure: failure.timestamp)
    if relay.received.count(signal.SIGINT) > 1 or signal.SIGQUIT in relay.received:
        raise KeyboardInterrupt
    if first.exitcode < 0:
        name = signal.Signals(-first.exitcode).name
        raise RankFailure(
            f"rank {first.local_rank} was ended by {name}; the same command resumes the run"
        )
    return 2 if 2 in (first.exitcode, outcome and outcome.exit_code) else 1


class Agent(LocalElasticAgent):
    """torchrun's agent, which tells a Relay the process ids of the ranks that it starts."""

    relay: "Relay"

    def _start_workers(self, worker_group: Any) -> dict[int, Any]:
        # The ranks inherit the blocked signals, and Interrupt unblocks them in each: until a rank
        # can handle a signal, it waits there and does not kill the rank.
        signal.pthread_sigmask(signal.SIG_BLOCK, Interrupt.SIGNALS)
        try:
            pids = super()._start_workers(worker_group)
            self.relay.begin(list(pids.values()))
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, Interrupt.SIGNALS)
        return pids


class Relay:
    """Signal handlers that pass signals on to the ranks, used as a context.

    The ranks are in sessions of their own, so the terminal's Ctrl-C reaches this process alone. The
    first lets them save, the second ends them at once; the third kills them.
    """

    def __init__(self, interrupt: Interrupt) -> None:
        """interrupt: listens until there are ranks."""
        self.received: list[int] = []  # signal numbers, in order
        self._interrupt = interrupt
        self._pids: list[int] = []
        self._before: dict[int, Any] = {}

    def __enter__(self) -> "Relay":
        self._before = {number: signal.getsignal(number) for number in Interrupt.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def begin(self, pids: list[int]) -> None:
        """Passes on from now on. The agent has installed handlers of its own before."""
        self._pids = pids
        for number, before in self._before.items():
            if before != signal.SIG_IGN:  # `nohup` for SIGHUP, which the ranks ignore too
                signal.signal(number, self._pass_on)
        for number in self._interrupt.received:
            self._pass_on(number, None)

    def _pass_on(self, number: int, frame: object) -> None:
        self.received.append(number)
        presses = self.received.count(signal.SIGINT)
        if number == signal.SIGINT and presses > 1:
            # Not SIGINT again: a rank that is busy would take two for one.
            number = signal.SIGQUIT if presses == 2 else signal.SIGKILL
        for pid in self._pids:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, number)
