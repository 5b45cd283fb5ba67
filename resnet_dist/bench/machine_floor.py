"""The floor of a machine: how long a training step must take at its measured speed.

Two rates are measured, and the step's operations are counted. Each operation of eager mode reads
its inputs once and writes its outputs once, so it takes at least its bytes over the bandwidth, or
its FLOPs over the matrix rate, whichever is longer. The floor is the sum over the operations.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from resnet_dist.bench.noise_job import CLASSES
from resnet_dist.models.build import build_model
from resnet_dist.precision import DTYPES

RUNS = 5
COPY_BYTES = {"cuda": 2**30, "cpu": 2**28}  # far beyond any cache
MATRIX_SIDE = {"cuda": 8192, "cpu": 1536}


@dataclass(frozen=True)
class Rates:
    """What the machine can do."""

    bytes_per_sec: float  # read and written, by a copy
    flops_per_sec: float  # of a large matrix product, in the precision of the step

    def seconds(self, work: "Work") -> float:
        return sum(
            max(flops / self.flops_per_sec, nbytes / self.bytes_per_sec)
            for flops, nbytes in work.operations
        )


@dataclass(frozen=True)
class Work:
    """FLOPs and bytes of each operation of a step."""

    operations: list[tuple[int, int]]

    @property
    def flops(self) -> int:
        return sum(flops for flops, _ in self.operations)

    @property
    def nbytes(self) -> int:
        return sum(nbytes for _, nbytes in self.operations)


@dataclass(frozen=True)
class Floor:
    """The shortest time of a step on this machine."""

    rates: Rates
    work: Work
    batch_size: int

    @property
    def seconds(self) -> float:
        return self.rates.seconds(self.work)

    @property
    def images_per_sec(self) -> float:
        return self.batch_size / self.seconds

    def figures(self) -> dict[str, float]:
        return {
            "bandwidth_gb_per_sec": round(self.rates.bytes_per_sec / 1e9, 2),
            "matrix_tflops": round(self.rates.flops_per_sec / 1e12, 4),
            "step_tflop": round(self.work.flops / 1e12, 4),
            "step_gb": round(self.work.nbytes / 1e9, 3),
            "step_ms": round(1000 * self.seconds, 3),
            "images_per_sec": round(self.images_per_sec, 2),
        }


def floor_of_a_step(
    model: str, batch_size: int, px: int, precision: str, device: torch.device
) -> Floor:
    """Measures the rates, and counts the work of a step of the network named `model`."""
    with torch.device("meta"):
        network = build_model(model, CLASSES, zero_init_last_gamma=False)
    work = work_of_a_step(network, batch_size, px, DTYPES[precision])
    return Floor(measured_rates(device, precision), work, batch_size)


def measured_rates(device: torch.device, precision: str) -> Rates:
    """Measures the best of RUNS of each. Takes a few seconds."""
    dtype, kind = DTYPES[precision], device.type
    source = torch.ones(COPY_BYTES[kind] // 4, device=device)
    target = torch.empty_like(source)
    side = MATRIX_SIDE[kind]
    left, right = (torch.randn(side, side, device=device).to(dtype) for _ in range(2))
    copy_seconds = _best_seconds(lambda: target.copy_(source), device)
    matrix_seconds = _best_seconds(lambda: left @ right, device)
    return Rates(2 * source.nbytes / copy_seconds, 2 * side**3 / matrix_seconds)


def _best_seconds(once: Callable[[], Any], device: torch.device) -> float:
    times = []
    for _ in range(RUNS + 1):  # the first is a warm-up
        _synchronize(device)
        began = time.perf_counter()
        once()
        _synchronize(device)
        times.append(time.perf_counter() - began)
    return min(times[1:])


def _synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # CPU-GPU sync point


def work_of_a_step(model: nn.Module, batch_size: int, px: int, dtype: torch.dtype) -> Work:
    """Counts the forward and backward pass of `model`, which is on the meta device.

    dtype: of activations and gradients. The optimizer is not counted.
    """
    model = model.to(dtype)
    images = torch.empty(batch_size, 3, px, px, device="meta", dtype=dtype)
    labels = torch.zeros(batch_size, dtype=torch.long, device="meta")
    with _Counting() as counting:
        F.cross_entropy(model(images), labels).backward()
    return Work(counting.operations)


class _Counting(TorchDispatchMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations: list[tuple[int, int]] = []

    def __torch_dispatch__(
        self, function: Any, types: Any, args: Any = (), kwargs: Any = None
    ) -> Any:
        result = function(*args, **(kwargs or {}))
        if function.is_view or function.overloadpacket in FREE:
            return result
        counter = flop_registry.get(function.overloadpacket)
        flops = counter(*args, **(kwargs or {}), out_val=result) if counter else 0
        inputs, outputs = (
            [t for t in tree_leaves(x) if isinstance(t, Tensor)] for x in (args, result)
        )
        # An output that is written in place is an input, too, and is both read and written.
        nbytes = sum(tensor.nbytes for tensor in [*inputs, *outputs])
        self.operations.append((flops, nbytes))
        return result


# Operations that move nothing.
FREE = {torch.ops.aten.detach, torch.ops.aten.empty, torch.ops.aten.empty_like}
