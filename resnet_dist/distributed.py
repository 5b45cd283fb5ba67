"""The world: who am I, how many are we, and the few verbs that all ranks say together.

One environment contract: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
which torchrun sets and every other launcher exports. Without them the world is one process.
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
# How long ranks wait for one that reads, or saves, on a disk that hangs. Over NCCL, too, whose own
# ten minutes end all processes without a save.
LIMIT = timedelta(minutes=30)
# The same for one that looks at 1.28 M files on a slow disk.
PATIENCE = timedelta(hours=2)


@dataclass(frozen=True)
class World:
    """Made once by `start` and passed along. Methods are collectives: every rank calls them."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # for tensors on `device`; None: the default, gloo
    host_group: dist.ProcessGroup | None = None  # for flags and objects; None: the default, gloo
    patient_group: dist.ProcessGroup | None = None  # in place of host_group in `patiently`

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on `device` over the ranks, in place, and returns it."""
        return sum_over_ranks(tensor, self.group) if self.size > 1 else tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one. Over gloo: the GPU is not waited for."""
        return self.start_any(flag)()

    def start_any(self, flag: bool) -> Callable[[], bool]:
        """Starts `any`; what is returned waits for the answer, on every rank, and gives it.

        Meanwhile the ranks may do other things together: gloo tells collectives apart by the order
        in which they are started, which is the same on every rank.
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
        """The world for what may take long on some ranks, such as reading headers from a slow disk:
        the others wait for up to PATIENCE, and rank 0 says that it is still at `what`."""
        began, is_done = time.monotonic(), Event()

        def tell() -> None:
            while not is_done.wait(say_every_seconds):
                seconds = time.monotonic() - began
                print(f"{what}: {seconds:.0f} s so far", file=sys.stderr, flush=True)

        thread = Thread(target=tell, daemon=True, name="patience")
        if self.is_main:
            thread.start()
        try:
            yield replace(self, host_group=self.patient_group or self.host_group)
        finally:
            is_done.set()

    def gather(self, value: T) -> list[T]:
        """Each rank's value, by rank, on every rank. Over gloo, pickled."""
        values: list[Any] = [value] * self.size
        if self.size > 1:
            dist.all_gather_object(values, value, self.host_group)
        return values

    def on_main(self, function: Callable[[], T]) -> T:
        """Runs `function` on rank 0 and gives its result, or its error, to every rank."""
        if self.size == 1:
            return function()
        answer: list[Any] = [None, None]  # result, failure
        if self.is_main:
            try:
                answer[0] = function()
            except Exception as failure:  # the others must not wait for an answer for ever
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
        """Runs `function` on every rank; if it fails on one, that rank raises its error, and all
        others a UserError that tells of it."""
        if self.size == 1:
            return function()
        result: T | None = None
        failure: UserError | None = None
        try:
            result = function()
        except UserError as error:
            failure = error
        except Exception as error:  # the others must not wait for this rank for ever
            self.gather(RankFailure(f"{type(error).__name__}: {error}"))
            raise
        self.raise_any(failure)
        return cast(T, result)

    def raise_any(self, failure: UserError | None) -> None:
        """Raises the first rank's failure on every rank; None is no failure."""
        for rank, error in enumerate(self.gather(failure)):
            if error is not None:
                kind = RankFailure if isinstance(error, RankFailure) else UserError
                raise kind(str(error) if self.size == 1 else f"rank {rank}: {error}")

    def node_group(self) -> dist.ProcessGroup | None:
        """The group of the ranks of this node; None where each node has one rank alone.

        Raises:
            UserError: the nodes have different numbers of ranks.
        """
        local_sizes = self.gather(self.local_size)
        if set(local_sizes) != {self.local_size}:
            raise UserError(
                f"model.sync_batchnorm=node: nodes have different numbers of ranks: {local_sizes}; "
                "give each node as many, or model.sync_batchnorm=world"
            )
        if self.local_size == 1:
            return None
        backend = None if self.group is None else "nccl"
        group, _ = dist.new_subgroups(self.local_size, backend=backend, timeout=LIMIT)
        return group


def sum_over_ranks(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """Sums a tensor over the ranks of the group, in place, and returns it.

    In deterministic mode strictly in the order of the ranks.
    """
    if is_deterministic():
        return sum_in_rank_order(tensor, group)
    dist.all_reduce(tensor, group=group)
    return tensor


def sum_in_rank_order(tensor: Tensor, group: dist.ProcessGroup | None = None) -> Tensor:
    """((rank 0 + rank 1) + rank 2) + ... of each element, in place; returns the tensor.

    An all-reduce adds in an order that depends on an element's place in the buffer, on the
    algorithm (ring, tree, in the switch) and on the network between the ranks. This depends on
    nothing but the values, and sends as much: each rank gets one part of all ranks' tensors, adds
    it up, and gives it to all. Any dtype that can be added; shape and dtype are the same on every
    rank of the group, None being the world.
    """
    size = dist.get_world_size(group)
    flat = tensor.detach().flatten()
    parts = flat.new_zeros(size, -(-len(flat) // size))  # of equal size: padded with zeros
    parts.view(-1)[: len(flat)] = flat
    rows = torch.empty_like(parts)  # row r: rank r's values of this rank's part
    dist.all_to_all_single(rows, parts, group=group)
    total = rows[0]
    for row in rows[1:]:  # no rows.sum(0), which may add in any order
        total += row
    dist.all_gather(list(parts), total, group=group)
    return tensor.copy_(parts.view(-1)[: len(flat)].view_as(tensor))


def reduce_gradients_in_rank_order(model: DistributedDataParallel) -> None:
    """DDP's mean over the ranks, the same wherever a gradient stands in a bucket.

    DDP makes its buckets anew after the first step, in the order in which gradients came. An
    all-reduce adds in an order that depends on the place in the buffer. So the first step after a
    resume would differ in the last bit from the same step of a run that was not stopped: with
    three ranks or more, since a sum of two has one order.
    """
    model.register_comm_hook(model.process_group, _mean_in_rank_order)


def _mean_in_rank_order(
    group: dist.ProcessGroup, bucket: dist.GradBucket
) -> torch.futures.Future[Tensor]:
    mean = sum_in_rank_order(bucket.buffer(), group).div_(group.size())
    # The GPU's stream orders what follows; the future only has to say which device that is.
    done: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[mean.device] if mean.is_cuda else None
    )
    done.set_result(mean)
    return done


def start() -> World:
    """Joins the process group that the environment names, and takes this rank's device.

    Raises:
        UserError: the environment is half set.
    """
    size = _from_environment("WORLD_SIZE", 1)
    rank = _from_environment("RANK", 0 if size == 1 else None)
    local_rank = _from_environment("LOCAL_RANK", 0 if size == 1 else None)
    local_size = _from_environment("LOCAL_WORLD_SIZE", size)
    if not rank < size:
        raise UserError(f"environment: RANK={rank}: must be below WORLD_SIZE={size}")
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Some launchers show each rank its own GPU only, as number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, local_rank, size, local_size, device)
    if not dist.is_initialized():
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            if not os.environ.get(name):
                raise UserError(f"environment: {name} is not set; start the ranks with torchrun")
        dist.init_process_group("gloo", rank=rank, world_size=size, timeout=LIMIT)
    # The default group is gloo, for flags and objects on the CPU; gradients and BN statistics go
    # over NCCL, which refuses two ranks on one GPU: there gloo carries them too, slowly.
    gpus = _gpus_of_all_ranks(device, size)
    group: Any = None
    if device.type == "cuda" and len(set(gpus)) == size:
        group = dist.new_group(backend="nccl", timeout=LIMIT)
    patient_group: Any = dist.new_group(backend="gloo", timeout=PATIENCE)
    return World(rank, local_rank, size, local_size, device, group, None, patient_group)


def start_alone(verb: str) -> World:
    """The world of a verb that runs in one process. Raises UserError under torchrun."""
    if _from_environment("WORLD_SIZE", 1) > 1:
        raise UserError(f"{verb}: runs in one process; start it without torchrun or srun")
    return start()


# The group that was left last. Whoever lets go of a gloo group last waits for its threads, and DDP
# does so while it holds Python's lock (GIL), which such a thread may want: with torch 2.11 a run
# that was done now and then never ended. Held here, the group outlives DDP, and Python's own
# reference lets go of it without the lock.
_left_group: list[dist.ProcessGroup | None] = []


def stop() -> None:
    """Leaves the process group, if there is one."""
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
    """Each rank's host and GPU. Raises UserError where only some ranks have one."""
    mine = [os.uname().nodename, ""]
    if device.type == "cuda":
        mine[1] = str(torch.cuda.get_device_properties(device).uuid)
    all_ranks: list[Any] = [None] * size
    dist.all_gather_object(all_ranks, mine)
    hosts_without = sorted({host for host, gpu in all_ranks if not gpu})
    if hosts_without and any(gpu for _, gpu in all_ranks):
        raise UserError(
            f"no working GPU on {', '.join(hosts_without)}, while other ranks have one; "
            "look at nvidia-smi there, or leave these hosts out"
        )
    return [f"{host} {gpu}" for host, gpu in all_ranks]
