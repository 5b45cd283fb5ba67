"""One step of ResNet-50 on pretended tensors: the host never waits for a value, and how many
operations it starts.

Under FakeTensorMode tensors have shapes and no values: whatever would read one on the host
(`.item()`, `bool(tensor)`, a branch) raises. A process group that is pretended, too, takes the
place of the other ranks. DDP is not there: its exchange, in C++, wants real tensors. (On GPUs its
logger waits for events of its own, in the first ten steps and in every hundredth.)

Most steps are pretended to be on a CPU, whole; branches that only CUDA tensors take are not seen.
Some are pretended to be on a GPU, also where there is none. There each copy between host and GPU is
seen as well, except for indices that are on the host; but the backward pass is left out, as torch's
engine wants a GPU that is there, and what CUDA's kernels do inside is not seen: that is for the
tests marked `gpu`.

An operation is a kernel launch on a GPU, a few more where it has several kernels; views, and
questions to the dispatcher, are none. Clipping is counted tensor by tensor: torch takes its grouped
form for real tensors alone.
"""

from collections import Counter
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode

from benchmarks.noise_job import noise_job
from resnet_dist import distributed
from resnet_dist.config_file import load_config
from resnet_dist.data.load.batch import Batch
from resnet_dist.determinism import fix_algorithms
from resnet_dist.distributed import World
from resnet_dist.ema import AveragedNetwork
from resnet_dist.job import build_network
from resnet_dist.models.build import build_model
from resnet_dist.models.dropout import KeyedDropout, set_dropout_keys
from resnet_dist.optim import build_optimizer, load_optimizer_state, set_lr
from resnet_dist.plan import Plan
from resnet_dist.precision import DTYPES, grad_scaler
from resnet_dist.run.meter import Meter
from resnet_dist.state import TrainState
from resnet_dist.train import train_step
from tests.support.host_sync import no_host_sync

CPU, GPU = torch.device("cpu"), torch.device("cuda", 0)
CLASSES = 1000
NO_KERNELS = {
    *("view", "_unsafe_view", "detach", "alias", "t", "transpose", "permute", "slice", "select"),
    *("expand", "unsqueeze", "squeeze", "as_strided", "split", "split_with_sizes", "reshape"),
    *("device", "promote_types", "empty", "empty_like", "empty_strided", "new_empty"),
    *("new_empty_strided", "lift_fresh", "is_pinned", "wait_tensor"),
    *("_record_function_enter_new", "_record_function_exit"),
}


class Launches(TorchDispatchMode):
    """Counts the operations that are started in it, by name; a copy between host and GPU raises."""

    def __init__(self) -> None:
        super().__init__()
        self.counts: Counter[str] = Counter()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.name().partition("::")[2].partition(".")[0]
        if name not in NO_KERNELS:
            self.counts[name] += 1
        if name == "_fused_sgd_" and args[0][0].is_cuda:
            return None  # torch cannot pretend it on a GPU; it changes values alone
        result = func(*args, **(kwargs or {}))
        if name in ("_to_copy", "copy_", "_copy_from"):
            source = args[1] if name == "copy_" else args[0]
            if source.device.type != result.device.type:
                raise AssertionError(f"{name}: {source.device} -> {result.device}")
        return result


@pytest.fixture
def mode() -> Iterator[FakeTensorMode]:
    """And a process group of four ranks for who asks for it. torch's switches stay as they were."""
    cuda, cudnn, deterministic = (
        torch.backends.cuda,
        torch.backends.cudnn,
        torch.utils.deterministic,
    )
    tf32 = cuda.matmul.allow_tf32, cudnn.allow_tf32
    algorithms = cudnn.deterministic, cudnn.benchmark, deterministic.fill_uninitialized_memory
    dist.init_process_group("fake", rank=0, world_size=4, store=FakeStore())
    try:
        with torch.random.fork_rng(), pytest.MonkeyPatch.context() as patch:
            patch.setenv("CUBLAS_WORKSPACE_CONFIG", ":4096:8")  # as deterministic mode would
            yield FakeTensorMode(allow_non_fake_inputs=True)
    finally:
        dist.destroy_process_group()
        torch.use_deterministic_algorithms(False)
        cuda.matmul.allow_tf32, cudnn.allow_tf32 = tf32
        cudnn.deterministic, cudnn.benchmark, deterministic.fill_uninitialized_memory = algorithms


class Pretended:
    """Steps on one rank of `ranks`."""

    def __init__(
        self, mode: FakeTensorMode, ranks: int, *overrides: str, device: torch.device = CPU
    ) -> None:
        sizes = ("train.global_batch_size=256", f"train.max_local_batch_size={256 // ranks}")
        config = load_config("configs/imagenet/resnet50.yaml", [*sizes, *overrides])
        fix_algorithms(config.train.deterministic)
        plan = Plan.of(config, ranks, 1_281_167, 50_000)
        world = World(0, 0, ranks, ranks, device)
        network = build_network(config, World(0, 0, ranks, ranks, CPU), CLASSES)
        with torch.device("meta"):
            same = build_model(config.model.name, CLASSES, config.model.zero_init_last_gamma)
        self.mode = mode
        with mode:
            tensors = {
                key: torch.empty_like(tensor, device=device)
                for key, tensor in network.state_dict().items()
            }
            network.load_state_dict(tensors, assign=True)
            # As on a GPU.
            optimizer = build_optimizer(network, config.optim, fused=device == CPU or None)
            set_lr(optimizer, 0.1)
            scaler = grad_scaler(device, config.train.precision)
            self.state = TrainState(network, optimizer, scaler)
            if config.train.ema_decay is not None:
                self.state.ema = AveragedNetwork(network, same, config.train.ema_decay)
            self.meter = Meter(world)
            px, dtype = config.data.crop_px, DTYPES[config.train.precision]
            self.passes = []
            for number in range(plan.accumulation):
                images = len(plan.positions(0, number))
                pixels = torch.empty(images, px, px, 3, dtype=dtype, device=device)
                labels = torch.zeros(images, dtype=torch.int64, device=device)
                positions = plan.positions(0, number)
                self.passes.append(Batch(pixels.permute(0, 3, 1, 2), labels, 0, positions))
        # train_step needs no more of a Job: the rest of one is loaders and a run folder.
        self.job: Any = SimpleNamespace(
            config=config, plan=plan, world=world, state=self.state, model=network, dropouts=()
        )

    def step(self) -> Counter[str]:
        with self.mode, Launches() as launches:
            train_step(self.job, self.passes, self.meter)
        self.state.step += 1
        return launches.counts


EMA, CLIPPED, TWO_PASSES = (
    "train.ema_decay=0.9999",
    "optim.clip_grad_norm=1",
    "train.max_local_batch_size=128",
)
LOCAL_BN = ("model.sync_batchnorm=none", "train.deterministic=true")
# Of the second step (in the first, momentum and gradients are made): ranks, settings, the most
# operations. Exact counts of today: what adds to them must be wanted, and what takes away lowers
# them here.
CEILINGS = {
    "fp32": (1, ["train.precision=fp32"], 429),
    "tf32": (1, ["train.precision=tf32"], 429),
    "bf16": (1, ["train.precision=bf16"], 541),
    "bf16, averaged": (1, ["train.precision=bf16", EMA], 543),
    "bf16, clipped": (1, ["train.precision=bf16", CLIPPED], 869),
    "bf16, two passes": (1, ["train.precision=bf16", TWO_PASSES], 1240),
    "fp16": (1, ["train.precision=fp16"], 551),
    "fp16, averaged, clipped": (1, ["train.precision=fp16", EMA, CLIPPED], 882),
    "fp32, SyncBN": (4, ["train.precision=fp32"], 2814),
    "bf16, SyncBN": (4, ["train.precision=bf16"], 3138),
    "bf16, SyncBN, averaged, clipped, two passes": (
        4,
        ["train.precision=bf16", EMA, CLIPPED, "train.max_local_batch_size=32"],
        6764,
    ),
    "fp16, SyncBN, averaged, clipped": (4, ["train.precision=fp16", EMA, CLIPPED], 3479),
    "bf16, SyncBN, deterministic": (4, ["train.precision=bf16", "train.deterministic=true"], 3615),
    "bf16, local BN, deterministic": (4, ["train.precision=bf16", *LOCAL_BN], 659),
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


@pytest.fixture
def gpu_mode(mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch) -> FakeTensorMode:
    """What torch asks before it pretends a GPU, answered; gradients without a backward pass."""
    monkeypatch.setattr(torch.cuda.amp.common, "amp_definitely_not_available", lambda: False)
    return mode


def step_on_gpu(job: Pretended, monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    def backward(loss: torch.Tensor) -> None:
        assert loss.is_cuda
        for parameter in job.state.model.parameters():
            parameter.grad = torch.zeros_like(parameter)

    with monkeypatch.context() as patch:
        patch.setattr(torch.Tensor, "backward", backward)
        return job.step()


@pytest.mark.parametrize(
    ("ranks", "overrides"),
    [
        (1, ["train.precision=fp32"]),
        (1, ["train.precision=fp16"]),
        (1, ["train.precision=fp16", EMA, CLIPPED, TWO_PASSES, "optim.label_smoothing=0.1"]),
        (4, ["train.precision=fp16", EMA, CLIPPED]),
        (4, ["train.precision=fp16", EMA, CLIPPED, *LOCAL_BN]),
    ],
)
def test_on_a_gpu_nothing_is_read_or_copied_by_the_host(
    gpu_mode: FakeTensorMode,
    monkeypatch: pytest.MonkeyPatch,
    ranks: int,
    overrides: list[str],
) -> None:
    """But for the backward pass."""
    job = Pretended(gpu_mode, ranks, *overrides, device=GPU)
    assert job.state.scaler.is_enabled() == ("train.precision=fp16" in overrides)
    for _ in range(2):
        counts = step_on_gpu(job, monkeypatch)
        assert counts["_fused_sgd_"] == 2


def test_a_resumed_fp16_run_reads_no_value(
    gpu_mode: FakeTensorMode, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Of a checkpoint from before SGD was fused."""
    job = Pretended(gpu_mode, 1, "train.precision=fp16", device=GPU)
    with gpu_mode:
        before = build_optimizer(job.state.model, job.job.config.optim, fused=False)
        load_optimizer_state(job.state.optimizer, before.state_dict())
    assert step_on_gpu(job, monkeypatch)["_fused_sgd_"] == 2


def test_dropout_reads_and_copies_nothing(mode: FakeTensorMode) -> None:
    """VGG's."""
    dropout = KeyedDropout(1)
    with mode, Launches():
        x = torch.ones(4, 4096, device=GPU)
        set_dropout_keys([dropout], 2**63 - 1, 7, range(4), GPU)
        assert dropout(x).device == GPU


def test_a_value_that_is_read_is_seen(mode: FakeTensorMode) -> None:
    job = Pretended(mode, 1)
    job.step()
    with mode, pytest.raises(DataDependentOutputException):
        job.meter.drain()


def test_a_copy_to_the_host_is_seen(mode: FakeTensorMode) -> None:
    with mode, Launches():
        x = torch.ones(3, device=GPU)
        for copy in (lambda: x.cpu(), lambda: x.copy_(torch.ones(3))):
            with pytest.raises(AssertionError, match="->"):
                copy()


@pytest.mark.gpu
@pytest.mark.parametrize("precision", ["fp32", "tf32", "bf16", "fp16"])
def test_the_host_does_not_wait_for_the_gpu(precision: str) -> None:
    """A whole step, but for the other ranks, after cuDNN has chosen its kernels."""
    overrides = [f"train.precision={precision}", "train.ema_decay=0.9", "optim.clip_grad_norm=1"]
    job = noise_job(distributed.start(), 16, overrides, small=True)
    assert all(group["fused"] for group in job.state.optimizer.param_groups)
    for _ in range(2):
        job.step()
    with no_host_sync():
        for _ in range(3):
            job.step()
    assert 0 < job.mean_loss() < 20
