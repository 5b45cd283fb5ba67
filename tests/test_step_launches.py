"""One step of ResNet-50 on pretended tensors: the host never waits for a value, and how many
operations it starts.

Under FakeTensorMode tensors have shapes and no values: whatever would read one on the host
(`.item()`, `bool(tensor)`, a branch) raises. The tensors are pretended to be on a CPU, as torch
pretends no GPU where there is none: branches that only CUDA tensors take are not seen. A process
group that is pretended, too, takes the place of the other ranks.

An operation is a kernel launch on a GPU, a few more where it has several kernels; views, and
questions to the dispatcher, are none.
"""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from resnet_dist.checkpoint import TrainState
from resnet_dist.config import Config
from resnet_dist.config_file import load_config
from resnet_dist.data.dali import Batch
from resnet_dist.distributed import World
from resnet_dist.ema import AveragedNetwork
from resnet_dist.job import build_network
from resnet_dist.meter import Meter
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer, set_lr
from resnet_dist.plan import Plan
from resnet_dist.precision import DTYPES, grad_scaler
from resnet_dist.train import train_step

CPU = torch.device("cpu")
CLASSES = 1000
NO_KERNELS = {
    *("view", "_unsafe_view", "detach", "alias", "t", "transpose", "permute", "slice", "select"),
    *("expand", "unsqueeze", "squeeze", "as_strided", "split", "split_with_sizes", "reshape"),
    *("device", "promote_types", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "lift_fresh", "is_pinned", "wait_tensor"),
}


class Launches(TorchDispatchMode):
    """Counts the operations that are started in it, by name."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func._schema.name.partition("::")[2]
        if name not in NO_KERNELS:
            self.counts[name] += 1
        return func(*args, **(kwargs or {}))


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    """And a process group of four ranks for who asks for it."""
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()


class Pretended:
    """Steps on one rank of `ranks`."""

    def __init__(self, mode: FakeTensorMode, ranks: int, *overrides: str) -> None:
        sizes = ("train.global_batch_size=256", f"train.max_local_batch_size={256 // ranks}")
        config = load_config("configs/imagenet/resnet50.yaml", [*sizes, *overrides])
        plan = Plan.of(config, ranks, 1_281_167, 50_000)
        world = World(0, 0, ranks, ranks, CPU)
        network = build_network(config, world, CLASSES)
        same = build_model(config.model.name, CLASSES, config.model.zero_init_last_gamma)
        self.mode, self.meter = mode, Meter(world)
        with mode:
            tensors = {key: torch.empty_like(t) for key, t in network.state_dict().items()}
            network.load_state_dict(tensors, assign=True)
            self._build(config, plan, world, network, same)

    def _build(
        self, config: Config, plan: Plan, world: World, network: nn.Module, same: nn.Module
    ) -> None:
        optimizer = build_optimizer(network, config.optim, fused=True)  # as on a GPU
        set_lr(optimizer, 0.1)
        scaler = grad_scaler(CPU, config.train.precision)
        self.state = TrainState(network, optimizer, scaler)
        if config.train.ema_decay is not None:
            self.state.ema = AveragedNetwork(network, same, config.train.ema_decay)
        # train_step needs no more of a Job: the rest of one is loaders and a run folder. DDP's own
        # exchange is not in it.
        self.job: Any = SimpleNamespace(
            config=config,
            plan=plan,
            world=world,
            state=self.state,
            model=network,
            dropouts=(),
        )
        self.passes = [_batch(config, len(plan.places(0, i))) for i in range(plan.accumulation)]
        self.meter.sums = torch.zeros(3, dtype=torch.float64)

    def step(self) -> Counter[str]:
        with self.mode, Launches() as launches:
            train_step(self.job, self.passes, self.meter)
        self.state.step += 1
        return launches.counts


def _batch(config: Config, images: int) -> Batch:
    px = config.data.crop_px
    pixels = torch.empty(images, px, px, 3, dtype=DTYPES[config.train.precision])
    return Batch(pixels.permute(0, 3, 1, 2), torch.zeros(images, dtype=torch.int64))


# Of the second step (in the first, momentum and gradients are made). Exact counts of today: what
# adds to them must be wanted, and what takes away lowers them here.
CEILINGS = {
    "fp32": (1, ["train.precision=fp32"], 432),
    "tf32": (1, ["train.precision=tf32"], 432),
    "bf16": (1, ["train.precision=bf16"], 544),
    "bf16, averaged": (1, ["train.precision=bf16", "train.ema_decay=0.9999"], 546),
    "bf16, clipped": (1, ["train.precision=bf16", "optim.clip_grad_norm=1"], 872),
    "bf16, two passes": (1, ["train.precision=bf16", "train.max_local_batch_size=128"], 1242),
    "fp16, averaged, clipped": (
        1,
        ["train.precision=fp16", "train.ema_decay=0.9999", "optim.clip_grad_norm=1"],
        885,
    ),
    "fp32, SyncBN": (4, ["train.precision=fp32"], 2817),
    "bf16, SyncBN": (4, ["train.precision=bf16"], 3141),
    "bf16, SyncBN, averaged, clipped, two passes": (
        4,
        [
            "train.precision=bf16",
            "train.ema_decay=0.9999",
            "optim.clip_grad_norm=1",
            "train.max_local_batch_size=32",
        ],
        6766,
    ),
}


@pytest.mark.parametrize("variant", CEILINGS)
def test_a_step_reads_no_value_and_starts_no_more_than_this(
    mode: FakeTensorMode, variant: str
) -> None:
    ranks, overrides, ceiling = CEILINGS[variant]
    job = Pretended(mode, ranks, *overrides)
    job.step()
    counts = job.step()
    assert counts["_fused_sgd_"] == 2  # one for each group of parameters
    assert sum(counts.values()) <= ceiling, counts.most_common(20)


def test_a_value_that_is_read_is_seen(mode: FakeTensorMode) -> None:
    job = Pretended(mode, 1)
    job.step()
    with mode, pytest.raises(DataDependentOutputException):
        job.meter.drain()
