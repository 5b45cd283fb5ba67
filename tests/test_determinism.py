"""Deterministic mode: sums in rank order, the same bits wherever a run was stopped, and what would
differ without it."""

import json
import os
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import pairwise, product
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist import distributed
from resnet_dist.bench.deterministic import bench_deterministic
from resnet_dist.bench.quiet import measure_at_once
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.determinism import fix_algorithms
from resnet_dist.distributed import sum_in_rank_order
from resnet_dist.errors import UserError
from resnet_dist.job import (
    agree_after_step,
    agree_on_running_stats,
    build,
    build_network,
    check_deterministic_form,
    distribute,
)
from resnet_dist.models.build import build_model
from resnet_dist.models.dropout import KeyedDropout, set_dropout_keys
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train
from tests.support.multirank import run_ranks
from tests.support.slow import slow

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.int64)
SIZES = (1, 2, 3, 4, 5, 64, 1001)  # of which most do not divide by the ranks
# Autograd's names of what raises on a GPU, after the list in torch.use_deterministic_algorithms.
RAISING = ("AdaptiveAvgPool", "AdaptiveMaxPool", "FractionalMaxPool", "AvgPool3D", "Upsample")
RAISING += ("ReflectionPad", "MaxUnpool", "NllLoss2D", "CtcLoss", "EmbeddingBag", "GridSampler")


@pytest.fixture
def as_before() -> Iterator[None]:
    """Takes back what fix_algorithms does to this process."""
    cudnn = torch.backends.cudnn
    before = torch.are_deterministic_algorithms_enabled(), cudnn.deterministic, cudnn.benchmark
    fill = torch.utils.deterministic.fill_uninitialized_memory  # type: ignore[attr-defined]
    workspace = os.environ.get("CUBLAS_WORKSPACE_CONFIG")
    yield
    torch.use_deterministic_algorithms(before[0])
    cudnn.deterministic, cudnn.benchmark = before[1:]
    torch.utils.deterministic.fill_uninitialized_memory = fill  # type: ignore[attr-defined]
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    if workspace is not None:
        os.environ["CUBLAS_WORKSPACE_CONFIG"] = workspace


def values(rank: int, size: int, dtype: torch.dtype) -> Tensor:
    """Of very different sizes, so that the order in which ranks are added shows."""
    generator = torch.Generator().manual_seed(1000 * rank + size)
    x = torch.randn(size, generator=generator, dtype=torch.float64)
    x *= 10 ** torch.randint(0, 5, (size,), generator=generator)
    return x.to(dtype)


def explicit_sum(ranks: list[int], size: int, dtype: torch.dtype) -> Tensor:
    total = values(ranks[0], size, dtype)
    for rank in ranks[1:]:
        total = total + values(rank, size, dtype)
    return total


def sums(rank: int, world_size: int) -> None:
    """Against the explicit sum, in the world and in groups of 2 and 3 of 4 ranks."""
    pair, _ = dist.new_subgroups(2)
    three = dist.new_group([0, 1, 3])
    groups = [(None, [0, 1, 2, 3]), (pair, [rank // 2 * 2, rank // 2 * 2 + 1]), (three, [0, 1, 3])]
    for (group, ranks), size, dtype in product(groups, SIZES, DTYPES):
        if rank in ranks:
            x = values(rank, size, dtype)
            assert sum_in_rank_order(x, group) is x  # in place
            assert torch.equal(x, explicit_sum(ranks, size, dtype))
    # Any shape and layout; a scalar.
    x = values(rank, 60, torch.float32).view(3, 4, 5).transpose(0, 2)
    wanted = explicit_sum([0, 1, 2, 3], 60, torch.float32).view(3, 4, 5).transpose(0, 2)
    assert torch.equal(sum_in_rank_order(x), wanted)
    assert int(sum_in_rank_order(torch.tensor(rank))) == 6


def test_sums_are_in_rank_order(record_difference: Callable[[str, float], None]) -> None:
    run_ranks(sums, 4)
    what = "sum_in_rank_order against an explicit sum, 4 ranks and groups of 2 and 3"
    record_difference(f"{what}", 0.0)


def sums_at_all_places(rank: int, world_size: int) -> list[int]:
    """How many places of a buffer give other bits for the same values; in each mode."""
    number, others = values(rank, 1, torch.float32).item() / 3, []
    for deterministic in (True, False):
        fix_algorithms(deterministic)
        buffer = distributed.start().sum(torch.full((10_000,), number))
        others.append(int((buffer != buffer[0]).sum()))
    return others


def test_the_place_in_a_buffer_does_not_matter() -> None:
    for in_rank_order, all_reduce in run_ranks(sums_at_all_places, 4):
        assert in_rank_order == 0
        # The enemy: an all-reduce adds in another order at another place; not on two ranks.
        assert all_reduce > 0
    assert run_ranks(sums_at_all_places, 2) == [[0, 0]] * 2


def gradients(rank: int, world_size: int, config: Config) -> tuple[list[int], list[int]]:
    """Of the same images and weights three times, as DDP makes its buckets anew after the first.

    How many of the network's tensors have other bits: in deterministic mode each time against the
    mean that is added up in rank order; without it from one time to the next.
    """
    world = distributed.start()
    network = build_network(config, world, num_classes=10)
    images = torch.randn(2, 3, 32, 32, generator=torch.Generator().manual_seed(rank))

    def one(model: nn.Module) -> list[Tensor]:
        model.zero_grad()
        model(images).square().sum().backward()
        return [p.grad.clone() for p in network.parameters() if p.grad is not None]

    def differing(a: list[Tensor], b: list[Tensor]) -> int:
        return sum(not torch.equal(x, y) for x, y in zip(a, b, strict=True))

    first, *others = world.gather(one(network))
    for other in others:
        first = [a + b for a, b in zip(first, other, strict=True)]
    mean = [total / world_size for total in first]
    fix_algorithms(True)
    model = distribute(network, world)
    ours = [differing(one(model), mean) for _ in range(3)]
    fix_algorithms(False)
    model = distribute(network, world)
    theirs = [one(model) for _ in range(3)]
    return ours, [differing(a, b) for a, b in pairwise(theirs)]


@pytest.mark.parametrize("world_size", [2, slow(4)])
def test_gradients_do_not_depend_on_ddps_buckets(
    tiny_config: Callable[..., Config],
    world_size: int,
    record_difference: Callable[[str, float], None],
) -> None:
    # With synchronized BN a rank's own gradients would not be what is added up.
    config = tiny_config("model.sync_batchnorm=none")
    for ours, theirs in run_ranks(gradients, world_size, config):
        assert ours == [0, 0, 0]
        # The enemy: the second time adds in another order, which shows from three ranks on.
        assert (theirs[0] > 0) == (world_size > 2)
        assert theirs[1] == 0
    what = f"gradients in DDP's first and later buckets, {world_size} ranks, deterministic"
    record_difference(f"{what}", 0.0)


def run(rank: int, world_size: int, config: Config) -> str:
    return train(config, "test", Interrupt()).name


def run_on(world_size: int, config: Config) -> dict[str, Any]:
    outcomes = run_ranks(run, world_size, config, init_process_group=False)
    assert outcomes == ["FINISHED"] * world_size
    content = Checkpoint.load(config.run_dir / "checkpoints" / "latest").to_dict()
    moments = content["optimizer"]["state"]
    return content["model"] | {
        f"momentum {key}": m["momentum_buffer"] for key, m in moments.items()
    }


def largest_difference(a: dict[str, Tensor], b: dict[str, Tensor]) -> float:
    """0 only if all bits are equal."""
    assert list(a) == list(b)
    if all(torch.equal(a[key], b[key]) for key in a):
        return 0.0
    return max((a[key].double() - b[key].double()).abs().max().item() for key in a)


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_resume_on_four_ranks(
    tiny_config: Callable[..., Config],
    deterministic: bool,
    record_difference: Callable[[str, float], None],
) -> None:
    """From the checkpoint of step 1. The first step after it has DDP's first buckets again."""
    mode = f"train.deterministic={str(deterministic).lower()}"
    settings = (mode, "train.iterations=3", "train.save_every_iterations=1")
    config = tiny_config(*settings, "train.keep_checkpoints=9")
    whole = run_on(4, config)
    if deterministic:
        again = run_on(4, tiny_config("name=again", *settings))
        assert largest_difference(again, whole) == 0
        record_difference(f"two fresh runs with one seed, 4 ranks, {mode}", 0.0)
    for step in (2, 3):
        shutil.rmtree(config.run_dir / f"checkpoints/step-{step:08d}")
    difference = largest_difference(run_on(4, config), whole)
    if deterministic:
        assert difference == 0
        what = f"weights, BN, momentum: resumed and unbroken run, 4 ranks, {mode}"
        record_difference(f"{what}", difference)
    else:  # the enemy is real
        assert 0 < difference < 1e-2


@pytest.mark.slow
@pytest.mark.parametrize("deterministic", [True, False])
def test_a_save_changes_nothing_with_local_batchnorm(
    tiny_config: Callable[..., Config],
    deterministic: bool,
    record_difference: Callable[[str, float], None],
) -> None:
    """Three ranks: the average of their BN statistics is rounded."""
    mode = f"train.deterministic={str(deterministic).lower()}"
    settings = (mode, "model.sync_batchnorm=none", "train.iterations=3")
    settings += ("train.eval_every_iterations=3", "train.global_batch_size=9")
    often = run_on(3, tiny_config("name=often", "train.save_every_iterations=1", *settings))
    once = run_on(3, tiny_config("name=once", "train.save_every_iterations=3", *settings))
    difference = largest_difference(often, once)
    if deterministic:
        assert difference == 0
        what = "a run that saves at each step and one that does not, local BN, 3 ranks"
        record_difference(f"{what}, deterministic", difference)
    else:
        assert 0 < difference < 1e-5


def where_statistics_are_averaged(rank: int, world_size: int, configs: list[Config]) -> list[float]:
    """A running mean that is this rank's number, after an evaluation and after a step."""
    means = []
    for config in configs:
        fix_algorithms(config.train.deterministic)
        job = build(config, distributed.start())
        mean = job.state.model.get_buffer("bn1.running_mean").fill_(rank)
        agree_on_running_stats(job)
        means.append(mean[0].item())
        agree_after_step(job.state.model, job.world)
        means.append(mean[0].item())
    return means


def test_where_statistics_are_averaged(tiny_config: Callable[..., Config]) -> None:
    """Once, and in one place: an average of averages may be rounded again (with 7 ranks it is)."""
    local = "model.sync_batchnorm=none"
    configs = [tiny_config(local), tiny_config(local, "train.deterministic=true")]
    for rank, means in enumerate(run_ranks(where_statistics_are_averaged, 2, configs)):
        assert means == [0.5, 0.5, rank, 0.5]


@pytest.mark.parametrize("world_size", [1, 2])  # four ranks: above
def test_two_fresh_runs_with_one_seed(
    tiny_config: Callable[..., Config],
    world_size: int,
    record_difference: Callable[[str, float], None],
) -> None:
    settings = ("train.deterministic=true", "train.iterations=2")
    first, again = (run_on(world_size, tiny_config(f"name={n}", *settings)) for n in ("a", "b"))
    difference = largest_difference(first, again)
    what = f"two fresh runs with one seed, {world_size} ranks, train.deterministic=true"
    record_difference(f"{what}", difference)
    assert difference == 0
    if world_size == 1:
        other = run_on(1, tiny_config("name=other", "seed=7", *settings))
        assert largest_difference(first, other) > 1e-3


def operations(root: Any) -> set[str]:
    """The names of all nodes of an autograd graph."""
    names, seen, left = set(), {root}, [root]
    while left:
        node = left.pop()
        names.add(node.name())
        ahead = [n for n, _ in node.next_functions if n is not None and n not in seen]
        seen.update(ahead)
        left += ahead
    return names


@pytest.mark.parametrize("name", ["resnet50", "resnet20", "vgg19_bn"])
def test_no_layer_lacks_a_deterministic_form(name: str) -> None:
    """On "meta": autograd's graph without the arithmetic."""
    px = 32 if name == "resnet20" else 224
    with torch.device("meta"):
        model = build_model(name, 10, zero_init_last_gamma=False)
        for layer in model.modules():
            if isinstance(layer, KeyedDropout):
                layer.eval()
        labels = torch.zeros(2, dtype=torch.int64)
        loss = nn.functional.cross_entropy(model(torch.randn(2, 3, px, px)), labels)
    names = operations(loss.grad_fn)
    assert any("Convolution" in n for n in names)
    assert [n for n in names if n.startswith(RAISING)] == []


def test_vgg_of_another_size_is_refused_on_a_gpu(tiny_config: Callable[..., Config]) -> None:
    vgg = tiny_config("model.name=vgg19_bn", "train.deterministic=true")
    check_deterministic_form(vgg, torch.device("cpu"))
    with pytest.raises(UserError, match=r"train\.deterministic=true: .* at data\.crop_px=224 only"):
        check_deterministic_form(vgg, torch.device("cuda"))
    at_224 = replace(vgg, data=replace(vgg.data, crop_px=224))
    check_deterministic_form(at_224, torch.device("cuda"))


def test_the_switches(as_before: None) -> None:
    cudnn = torch.backends.cudnn
    os.environ.pop("CUBLAS_WORKSPACE_CONFIG", None)
    fix_algorithms(True)
    assert torch.are_deterministic_algorithms_enabled()
    assert (cudnn.deterministic, cudnn.benchmark) == (True, False)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":4096:8"
    os.environ["CUBLAS_WORKSPACE_CONFIG"] = ":16:8"
    fix_algorithms(True)
    assert os.environ["CUBLAS_WORKSPACE_CONFIG"] == ":16:8"  # a user's own
    fix_algorithms(False)
    assert not torch.are_deterministic_algorithms_enabled()
    assert (cudnn.deterministic, cudnn.benchmark) == (False, True)


def bench(rank: int, world_size: int, output: Path) -> None:
    measure_at_once()
    bench_deterministic(distributed.start(), runs=2, steps=1, output=output)


@pytest.mark.slow
def test_the_benchmark_runs(tmp_path: Path) -> None:
    run_ranks(bench, 2, tmp_path / "figures.json")
    written = json.loads((tmp_path / "figures.json").read_text())
    assert (written["benchmark"], written["ranks"]) == ("deterministic", 2)
    assert [part["what"].split()[0].strip(",") for part in written["parts"]] == ["step", "exchange"]
    assert "25,557,032 gradients" in written["parts"][1]["what"]  # torchvision's resnet50
    for part in written["parts"]:
        assert [len(ms["values"]) for ms in part["ms"].values()] == [2, 2]
        assert len(part["cost_pct"]) == 2


@pytest.mark.gpu
@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("name", ["resnet50", "resnet20", "vgg19_bn"])
def test_gpu_gradients_are_the_same_bits(
    as_before: None,
    name: str,
    precision: torch.dtype,
    record_difference: Callable[[str, float], None],
) -> None:
    fix_algorithms(True)
    torch.manual_seed(0)
    px = 32 if name == "resnet20" else 224
    model = build_model(name, 100, zero_init_last_gamma=False)
    model = model.to("cuda", memory_format=torch.channels_last)  # type: ignore[call-overload]
    dropouts = tuple(m for m in model.modules() if isinstance(m, KeyedDropout))
    images = torch.randn(16, 3, px, px, device="cuda").to(memory_format=torch.channels_last)
    labels = torch.arange(16, device="cuda")

    def gradient() -> Tensor:
        model.zero_grad()
        set_dropout_keys(dropouts, 0, 0, range(16), torch.device("cuda"))
        with torch.autocast("cuda", precision, enabled=precision != torch.float32):
            loss = nn.functional.cross_entropy(model(images), labels)
        loss.backward()
        return torch.cat([p.grad.flatten() for p in model.parameters() if p.grad is not None])

    first = gradient()
    for _ in range(3):
        assert torch.equal(gradient(), first)
    record_difference(f"gradients of {name}, {precision}, one GPU", 0.0)
