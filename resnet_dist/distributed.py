"""The process group: which rank this is, how many there are, and the collectives they share.

The environment is the one that torchrun sets and every other launcher exports: RANK, LOCAL_RANK,
WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT. Without it the world is one process.
"""

import os
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from datetime import timedelta
from threading import Event, Thread
from typing import Any, TypeVar, cast

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.parallel import DistributedDataParallel

from resnet_dist.determinism import is_deterministic
from resnet_dist.errors import RankFailure, UserError

T = TypeVar("T")
# How long ranks wait for one that reads from, or saves to, a hanging disk. Applies to NCCL too: its
# default of ten minutes would kill all processes without a save.
LIMIT = timedelta(minutes=30)
# How long they wait for one that reads the headers of 1.28 M files from a slow disk.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """This rank's view of the process group, made once by `start` and passed along.

    Its methods are collectives: every rank must call them.
    """

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = (
        None  # for tensors on `device`; None: the default group (gloo)
    )
    host_group: dist.ProcessGroup | None = (
        None  # for flags and objects; None: the default group (gloo)
    )
    patient_group: dist.ProcessGroup | None = None  # replaces host_group inside `patiently`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on `device` over the ranks, in place, and returns it."""
        return sum_over_ranks(tensor, self.group) if self.size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """Returns True on every rank if `flag` is True on any. Uses gloo: no wait for the GPU."""
        return self.start_any(flag)()

    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Starts `any` without waiting. Returns a function that waits for the answer.

        Every rank must call that function too. Other collectives may run in between: gloo matches
        collectives by the order in which they start, which is the same on every rank.
        """
        if self.size == 1:
            return lambda: flag
        raised = torch.tensor(int(flag))
        work = dist.all_reduce(raised, dist.ReduceOp.MAX, self.host_group, async_op=True)

        def answer() -> bool:
            work.wait()
            return bool(raised)

        return answer

    @contextmanager
    def patiently(self, what: str, say_every_seconds: float = 30.0) -> Iterator["World"]:
        """Gives a world with a longer timeout, for work that may take long on some ranks.

        Such as reading headers from a slow disk: the other ranks wait for up to PATIENCE, and rank
        0 reports every `say_every_seconds` that `what` is still under way.
        """
        began, is_done = time.monotonic(), Event()

        def report() -> None:
            while not is_done.wait(say_every_seconds):
                seconds = time.monotonic() - began
                print(f"{what}: {seconds:.0f} s so far", file=sys.stderr, flush=True)

        thread = Thread(target=report, daemon=True, name="patience")
        if self.is_main:
            thread.start()
        try:
            yield replace(self, host_group=self.patient_group or self.host_group)
        finally:
            is_done.set()

    def gather(self, value: T) -> list[T]:
        """Returns the values of all ranks, by rank, on every rank. Pickles them and uses gloo."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.host_group)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0; returns its result, or raises its error, on every rank."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]  # result, failure
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as failure:  # otherwise the others would wait for an answer
                known = isinstance(failure, UserError)
                text = str(failure) if known else f"rank 0: {type(failure).__name__}: {failure}"
                dist.broadcast_object_list([None, (known, text)], 0, self.host_group)
                raise
        dist.broadcast_object_list(answer, 0, self.host_group)
        if answer[1] is not None:
            known, text = answer[1]
            raise UserError(text) if known else RuntimeError(text)
        return answer[0]

    def on_all(self, function: Callable[[], T]) -> T:
        """Runs `function` on every rank and returns this rank's result.

        If it fails on a rank, that rank raises its own error and all others raise a UserError that
        reports it.
        """
        if self.size == 1:
            return function()
        result: T | None = None
        failure: UserError | None = None
        try:
            result = function()
        except UserError as error:
            failure = error
        except Exception as error:  # otherwise the others would wait for this rank
            self.gather(RankFailure(f"{type(error).__name__}: {error}"))
            raise
        self.raise_any(failure)
        return cast(T, result)

    def raise_any(self, failure: UserError | None) -> None:
        """Raises the first failing rank's error on every rank. failure: None if there is none."""
        for rank, error in enumerate(self.gather(failure)):
            if error is not None:
                kind = RankFailure if isinstance(error, RankFailure) else UserError
                raise kind(str(error) if self.size == 1 else f"rank {rank}: {error}")

    def node_group(self) -> dist.ProcessGroup | None:
        """Returns the group of the ranks on this node; None if each node has a single rank.

        Raises:
            UserError: the nodes have different numbers of ranks.
        """
        local_sizes = self.gather(self.local_size)
        if set(local_sizes) != {self.local_size}:
            raise UserError(
                f"model.sync_batchnorm=node: nodes have different numbers of ranks: {local_sizes}; "
                "use the same number on each, or model.sync_batchnorm=world"
            )
        if self.local_size == 1:
            return None
        backend = None if self.group is None else "nccl"
        group, _ = dist.new_subgroups(self.local_size, backend=backend, timeout=LIMIT)
        return group


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums a tensor over the ranks of the group, in place, and returns it.

    In deterministic mode, the ranks are added strictly in order.
    """
    if is_deterministic():
        return sum_in_rank_order(tensor, group)
    dist.all_reduce(tensor, group=group)
    return tensor


def sum_in_rank_order(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Computes ((rank 0 + rank 1) + rank 2) + ... of each element, in place; returns the tensor.

    Floating-point addition is not associative, and an all-reduce adds in an order that depends on
    an element's offset in the buffer, on the algorithm (ring, tree, in-switch) and on the network.
    This result depends on the values alone, at the same traffic: each rank receives one chunk of
    every rank's tensor, adds the chunks in order, and sends the result to all. Any dtype that can
    be added; shape and dtype must be the same on every rank of the group. group: None is the world.
    """
    size = dist.get_world_size(group)
    flat = tensor.detach().flatten()
    chunks = flat.new_zeros(size, -(-len(flat) // size))  # of equal size, padded with zeros
    chunks.view(-1)[: len(flat)] = flat
    rows = torch.empty_like(chunks)  # row r will have rank r's values of this rank's chunk
    dist.all_to_all_single(rows, chunks, group=group)
    total = rows[0]
    for row in rows[1:]:  # not rows.sum(0), which may add in any order
        total += row
    dist.all_gather(list(chunks), total, group=group)
    return tensor.copy_(chunks.view(-1)[: len(flat)].view_as(tensor))


def reduce_gradients_in_rank_order(model: DistributedDataParallel) -> None:
    """Makes DDP average gradients in rank order, wherever a gradient is in a bucket.

    DDP rebuilds its buckets after the first step, in the order in which gradients arrived, and the
    order of an all-reduce's additions depends on the offset in a bucket. So the first step after a
    resume would differ in the last bits from the same step of an uninterrupted run (with three or
    more ranks, as two numbers have only one sum).
    """
    model.register_comm_hook(model.process_group, _mean_in_rank_order)


def _mean_in_rank_order(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    mean = sum_in_rank_order(bucket.buffer(), group).div_(group.size())
    # What follows is ordered by the GPU's stream; the future only has to know the device.
    done: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[mean.device] if mean.is_cuda else None
    )
    done.set_result(mean)
    return done


def start() -> World:
    """Joins the process group given by the environment and selects this rank's device.

    Raises:
        UserError: the environment is incomplete, or only some ranks have a GPU.
    """
    size = _from_environment("WORLD_SIZE", 1)
    rank = _from_environment("RANK", 0 if size == 1 else None)
    local_rank = _from_environment("LOCAL_RANK", 0 if size == 1 else None)
    local_size = _from_environment("LOCAL_WORLD_SIZE", size)
    if not rank < size:
        raise UserError(f"environment: RANK={rank}: must be below WORLD_SIZE={size}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Some launchers make only its own GPU visible to each rank, as number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, local_rank, size, local_size, device)
    if not dist.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"environment: {name} is not set; start the ranks with torchrun")
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=LIMIT)
    # The default group is gloo, for flags and objects on the CPU. Gradients and BN statistics use
    # NCCL, except where ranks share a GPU, which NCCL refuses: there they use gloo too, slowly.
    gpus = _gpus_of_all_ranks(device, size)
    group: Any = None
    if device.type == "cuda" and len(set(gpus)) == size:
        group = dist.new_group(backend="nccl", timeout=LIMIT)
    patient_group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank, local_rank, size, local_size, device, group, None, patient_group)


def start_alone(verb: str) -> World:
    """Returns the world of a verb that runs in one process. Raises UserError under torchrun."""
    if _from_environment("WORLD_SIZE", 1) > 1:
        raise UserError(f"{verb}: runs in one process; start it without torchrun or srun")
    return start()


# Keeps the group alive after `stop`. Destroying a gloo group waits for its threads. If DDP drops
# the last reference, it does so while holding the GIL, which such a thread may need: with torch
# 2.11, a finished run sometimes never ended. With a reference here the group outlives DDP, and
# Python drops the last reference without holding the GIL.
_left_group: list[dist.ProcessGroup | None] = []


def stop() -> None:
    """Leaves the process group, if this process is in one."""
    if dist.is_initialized():
        _left_group[:] = [dist.group.WORLD]
        dist.destroy_process_group()


def _from_environment(name: str, default: int | None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(
            f"environment: {name}={text!r}: must be a whole number; start the ranks with torchrun, "
            "or export RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return int(text)


def _gpus_of_all_ranks(device: torch.device, size: int) -> list[str]:
    """Returns each rank's host and GPU. Raises UserError if only some ranks have a GPU."""
    mine = [os.uname().nodename, ""]
    if device.type == "cuda":
        mine[1] = str(torch.cuda.get_device_properties(device).uuid)
    all_ranks: list[Any] = [None] * size
    dist.all_gather_object(all_ranks, mine)
    hosts_without = sorted({host for host, gpu in all_ranks if not gpu})
    if hosts_without and any(gpu for _, gpu in all_ranks):
        raise UserError(
            f"no working GPU on {', '.join(hosts_without)}, while other ranks have one; "
            "check nvidia-smi there, or leave these hosts out"
        )
    return [f"{host} {gpu}" for host, gpu in all_ranks]
