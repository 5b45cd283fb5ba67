"""The world: who am I, how many are we, and the few verbs that all ranks say together.

One environment contract: RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT,
which torchrun sets and every other launcher exports. Without them the world is one process.
"""

import os
import signal
from collections.abc import Callable
from dataclasses import dataclass
from types import FrameType
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from resnet_dist.errors import UserError

T = TypeVar("T")


@dataclass(frozen=True)
class World:
    """Made once by `start` and passed along. Methods are collectives: every rank calls them."""

    rank: int
    local_rank: int
    size: int
    local_size: int
    device: torch.device
    group: dist.ProcessGroup | None = None  # for tensors on `device`; None: the default, gloo

    @property
    def is_main(self) -> bool:
        return self.rank == 0

    def sum(self, tensor: Tensor) -> Tensor:
        """Sums a tensor on `device` over the ranks, in place, and returns it."""
        if self.size > 1:
            dist.all_reduce(tensor, group=self.group)
        return tensor

    def any(self, flag: bool) -> bool:
        """True on every rank if it is true on one. Over gloo: the GPU is not waited for."""
        if self.size == 1:
            return flag
        raised = torch.tensor(int(flag))
        dist.all_reduce(raised, dist.ReduceOp.MAX)
        return bool(raised)

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
                dist.broadcast_object_list([None, (known, text)], src=0)
                raise
        dist.broadcast_object_list(answer, src=0)
        if answer[1] is not None:
            known, text = answer[1]
            raise UserError(text) if known else RuntimeError(text)
        return answer[0]

    def node_group(self) -> dist.ProcessGroup | None:
        """The group of the ranks of this node; None where that is this rank alone."""
        if self.local_size == 1:
            return None
        if self.size % self.local_size:
            raise UserError(
                f"model.sync_batchnorm=node: {self.size} ranks are no whole number of nodes of "
                f"{self.local_size}; give each node as many, or model.sync_batchnorm=world"
            )
        backend = None if self.group is None else "nccl"
        group, _ = dist.new_subgroups(self.local_size, backend=backend)
        return group


def start() -> World:
    """Joins the process group that the environment names, and takes this rank's device.

    Raises:
        UserError: the environment is half set.
    """
    size = _from_environment("WORLD_SIZE", 1)
    rank = _from_environment("RANK", 0 if size == 1 else None)
    local_rank = _from_environment("LOCAL_RANK", 0 if size == 1 else None)
    local_size = _from_environment("LOCAL_WORLD_SIZE", size)
    device = torch.device("cpu")
    if torch.cuda.is_available():
        # Some launchers show each rank its own GPU only, as number 0.
        device = torch.device("cuda", local_rank % torch.cuda.device_count())
        torch.cuda.set_device(device)
    if size == 1:
        return World(rank, local_rank, size, local_size, device)
    if not dist.is_initialized():
        dist.init_process_group("gloo", rank=rank, world_size=size)
    # The default group is gloo, for flags and objects on the CPU; gradients and BN statistics go
    # over NCCL, which refuses two ranks on one GPU: there gloo carries them too, slowly.
    group: Any = None
    if device.type == "cuda" and _has_own_gpu(device, size):
        group = dist.new_group(backend="nccl")
    return World(rank, local_rank, size, local_size, device, group)


def stop() -> None:
    if dist.is_initialized():
        dist.destroy_process_group()


def _from_environment(name: str, default: int | None) -> int:
    text = os.environ.get(name, "" if default is None else str(default))
    if not text.isdigit():
        raise UserError(
            f"environment: {name}={text!r}: must be a whole number; start the ranks with torchrun, "
            "or export RANK, LOCAL_RANK, WORLD_SIZE, LOCAL_WORLD_SIZE, MASTER_ADDR and MASTER_PORT"
        )
    return int(text)


def _has_own_gpu(device: torch.device, size: int) -> bool:
    gpus: list[Any] = [None] * size
    dist.all_gather_object(
        gpus, (os.uname().nodename, torch.cuda.get_device_properties(device).uuid)
    )
    return len(set(map(str, gpus))) == size


class Interrupt:
    """Remembers a request to stop; the loop asks at a step boundary, where all ranks agree.

    SIGTERM: schedulers and torchrun. SIGUSR1, SIGUSR2: Slurm's and submitit's early warnings.
    SIGINT: Ctrl-C; a second one stops at once.
    """

    SIGNALS = (signal.SIGTERM, signal.SIGUSR1, signal.SIGUSR2, signal.SIGINT)

    def __init__(self) -> None:
        self.requested = False
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> "Interrupt":
        self._before = {number: signal.signal(number, self._remember) for number in self.SIGNALS}
        return self

    def __exit__(self, *_: object) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    def _remember(self, number: int, frame: FrameType | None) -> None:
        if number == signal.SIGINT and self.requested:
            raise KeyboardInterrupt
        self.requested = True
