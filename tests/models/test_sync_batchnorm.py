"""SyncBatchNorm2d on real gloo ranks against nn.BatchNorm2d on the joined batch."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn

from resnet_dist.models.parts import freeze
from resnet_dist.models.sync_batchnorm import (
    SyncBatchNorm2d,
    average_running_stats,
    convert_sync_batchnorm,
)
from tests.support.multirank import run_ranks

CHANNELS = 5
EQUAL_2 = ((2, 4, 4),) * 2
UNEQUAL_3 = ((3, 4, 4), (2, 4, 4), (1, 4, 4))
UNEQUAL_4 = ((3, 4, 4), (1, 2, 5), (2, 3, 3), (1, 1, 1))
COLLECTIVES = ("all_reduce", "all_gather", "all_to_all_single", "broadcast", "reduce")


@dataclass(frozen=True)
class Case:
    """One layer and its data: two steps of one batch per rank, all derived from a fixed seed."""

    shapes: tuple[tuple[int, int, int], ...]  # (N, H, W) of each rank
    dtype: torch.dtype = torch.float64
    offset: float = 0.0  # mean of the inputs; their spread is 1
    momentum: float | None = 0.1
    affine: bool = True
    track: bool = True

    def layer(self) -> nn.BatchNorm2d:
        layer = nn.BatchNorm2d(
            CHANNELS,
            momentum=self.momentum,
            affine=self.affine,
            track_running_stats=self.track,
            dtype=self.dtype,
        )
        generator = torch.Generator().manual_seed(1)
        for parameter in layer.parameters():
            nn.init.normal_(parameter, generator=generator)
        return layer

    def steps(self) -> list[list[tuple[Tensor, Tensor]]]:
        """[step][rank] -> (x, dy)."""
        generator = torch.Generator().manual_seed(2)

        def batch(rank: int) -> tuple[Tensor, Tensor]:
            n, h, w = self.shapes[rank]
            x, dy = torch.randn(2, n, CHANNELS, h, w, generator=generator, dtype=torch.float64)
            # Ranks of different means: the spread between ranks must enter the variance too.
            return (x + rank + self.offset).to(self.dtype), (dy + rank).to(self.dtype)

        return [[batch(rank) for rank in range(len(self.shapes))] for _ in range(2)]


@dataclass
class Result:
    """What training left behind: per step the outputs and input gradients, then the rest."""

    outputs: list[Tensor]
    input_grads: list[Tensor]
    parameter_grads: list[Tensor]
    buffers: list[Tensor]


def train(layer: nn.Module, steps: list[tuple[Tensor, Tensor]]) -> Result:
    result = Result([], [], [], [])
    for x, dy in steps:
        x = x.clone().requires_grad_()
        y = layer(x)
        y.backward(dy)
        assert x.grad is not None
        result.outputs.append(y.detach())
        result.input_grads.append(x.grad)
    result.parameter_grads = [p.grad for p in layer.parameters() if p.grad is not None]
    result.buffers = list(layer.buffers())
    return result


def join(parts: list[Tensor]) -> Tensor:
    """All ranks' [N, C, H, W] as one [1, C, M, 1]; their N, H and W may differ."""
    flat = torch.cat([part.transpose(0, 1).reshape(CHANNELS, -1) for part in parts], dim=1)
    return flat.view(1, CHANNELS, -1, 1)


def reference(case: Case, dtype: torch.dtype | None = None) -> Result:
    """nn.BatchNorm2d on the joined batch, computed in dtype."""
    dtype = dtype or case.dtype
    steps = [
        (join([x for x, _ in step]).to(dtype), join([dy for _, dy in step]).to(dtype))
        for step in case.steps()
    ]
    return train(case.layer().to(dtype), steps)


def errors(ranks: list[Result], expected: Result) -> dict[str, float]:
    """Largest difference of each quantity between all ranks together and the reference."""

    def largest(actual: list[Tensor], wanted: list[Tensor]) -> float:
        pairs = zip(actual, wanted, strict=True)
        return max((float((a.double() - w.double()).abs().max()) for a, w in pairs), default=0.0)

    def joined(field: str) -> list[Tensor]:
        by_step = zip(*(getattr(rank, field) for rank in ranks), strict=True)
        return [join(list(parts)) for parts in by_step]

    by_parameter = zip(*(rank.parameter_grads for rank in ranks), strict=True)
    return {
        "outputs": largest(joined("outputs"), expected.outputs),
        "input_grads": largest(joined("input_grads"), expected.input_grads),
        # Local sums, which DistributedDataParallel would reduce.
        "parameter_grads": largest([sum(g) for g in by_parameter], expected.parameter_grads),
        "buffers": max(largest(rank.buffers, expected.buffers) for rank in ranks),
    }


@contextmanager
def recorded_collectives() -> Iterator[list[tuple[str, int]]]:
    """Record (name, number of elements) of each collective; the real ones still run."""
    calls: list[tuple[str, int]] = []
    real = {name: getattr(dist, name) for name in COLLECTIVES}

    def recording(name: str) -> Callable[..., Any]:
        def call(tensor: Any, *args: Any, **kwargs: Any) -> Any:
            calls.append((name, tensor.numel() if isinstance(tensor, Tensor) else -1))
            return real[name](tensor, *args, **kwargs)

        return call

    for name in COLLECTIVES:
        setattr(dist, name, recording(name))
    try:
        yield calls
    finally:
        for name in COLLECTIVES:
            setattr(dist, name, real[name])


def train_cases(rank: int, world_size: int, cases: list[Case]) -> list[Result]:
    return [
        train(convert_sync_batchnorm(case.layer()), [step[rank] for step in case.steps()])
        for case in cases
    ]


@pytest.mark.parametrize("shapes", [EQUAL_2, UNEQUAL_3, UNEQUAL_4], ids=["2", "3", "4"])
def test_equals_batchnorm_on_the_joined_batch(shapes: tuple[tuple[int, int, int], ...]) -> None:
    cases = [
        Case(shapes),
        Case(shapes, momentum=None),
        Case(shapes, affine=False),
        Case(shapes, track=False),
        Case(shapes, torch.float32),
    ]
    by_rank = run_ranks(train_cases, len(shapes), cases)
    for index, case in enumerate(cases):
        ranks = [results[index] for results in by_rank]
        expected = reference(case)
        assert len(expected.buffers) == (3 if case.track else 0)
        tolerance = 1e-12 if case.dtype == torch.float64 else 2e-5
        found = errors(ranks, expected)
        assert max(found.values()) <= tolerance, (case, found)
        for other in ranks[1:]:  # every rank holds the same bits
            assert all(map(torch.equal, ranks[0].buffers, other.buffers)), case


def train_forced(rank: int, world_size: int, case: Case) -> Result:
    layer = convert_sync_batchnorm(case.layer())
    assert isinstance(layer, SyncBatchNorm2d)
    layer.forward = layer.forward_joined
    with recorded_collectives() as calls:
        result = train(layer, [step[rank] for step in case.steps()])
    assert [name for name, _ in calls] == ["all_reduce"] * 4  # each way in both steps
    return result


def test_forced_in_a_group_of_one_it_is_batchnorm() -> None:
    case = Case(((3, 4, 4),))
    found = errors(run_ranks(train_forced, 1, case), reference(case))
    assert max(found.values()) <= 1e-12, found


def test_mean_far_larger_than_the_spread() -> None:
    cases = [Case(UNEQUAL_3, torch.float32, offset) for offset in (1e4, 1e5, 1e6)]
    by_rank = run_ranks(train_cases, 3, cases)
    for index, case in enumerate(cases):
        exact = reference(case, torch.float64)
        found = errors([results[index] for results in by_rank], exact)
        # What float32 itself costs: one rank, nn.BatchNorm2d, the same numbers.
        own = errors([reference(case)], exact)
        for quantity, error in found.items():
            assert error <= 5 * own[quantity] + 1e-5, (case.offset, quantity, error, own)
        assert found["outputs"] <= case.offset * 2**-23

        # The test has teeth: E[x^2] - E[x]^2 in float32 does not find a variance of about 1.
        x = join([x for x, _ in case.steps()[0]])
        naive = x.square().mean((0, 2, 3)) - x.mean((0, 2, 3)).square()
        true = x.double().var((0, 2, 3), correction=0)
        assert float(((naive - true) / true).abs().max()) > 0.5


def train_in_groups(rank: int, world_size: int, case: Case) -> tuple[Result, Result]:
    pairs: list[Any] = [dist.new_group([0, 1]), dist.new_group([2, 3])]
    own, other = pairs[rank // 2], pairs[1 - rank // 2]
    singles: list[Any] = [dist.new_group([member]) for member in range(world_size)]
    alone = singles[rank]
    steps = [step[rank] for step in case.steps()]
    paired = train(convert_sync_batchnorm(case.layer(), own), steps)
    with recorded_collectives() as calls:
        single = train(convert_sync_batchnorm(case.layer(), alone), steps)
    assert not calls
    with pytest.raises(ValueError, match="not a member of its process group"):
        convert_sync_batchnorm(case.layer(), other)(steps[0][0])
    return paired, single


def test_limited_to_a_process_group() -> None:
    case = Case(((3, 4, 4), (1, 2, 5), (2, 3, 3), (2, 4, 4)))
    by_rank = run_ranks(train_in_groups, 4, case)

    def expected(ranks: slice) -> Result:
        steps = [
            (join([x for x, _ in step[ranks]]), join([dy for _, dy in step[ranks]]))
            for step in case.steps()
        ]
        return train(case.layer(), steps)

    for half in (slice(0, 2), slice(2, 4)):
        found = errors([paired for paired, _ in by_rank[half]], expected(half))
        assert max(found.values()) <= 1e-12, found
    for rank, (_, single) in enumerate(by_rank):
        found = errors([single], expected(slice(rank, rank + 1)))
        assert max(found.values()) <= 1e-12, found


def count_collectives(rank: int, world_size: int) -> dict[str, list[tuple[str, int]]]:
    layer = convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS))
    x = torch.randn(2, CHANNELS, 3, 3)
    counts = {}
    with recorded_collectives() as counts["forward"]:
        y = layer(x.requires_grad_())
    with recorded_collectives() as counts["backward"]:
        y.square().sum().backward()
    y = layer(x.detach())  # like the first layer of a network: nobody asks for dx
    with recorded_collectives() as counts["backward without dx"]:
        y.square().sum().backward()
    with recorded_collectives() as counts["eval"]:
        layer.eval()(x).sum().backward()
    layer.train()
    torch.use_deterministic_algorithms(True)
    with recorded_collectives() as counts["deterministic"]:
        layer(x).square().sum().backward()
    return counts


def test_one_packed_all_reduce_per_direction() -> None:
    for counts in run_ranks(count_collectives, 2):
        assert counts == {
            "forward": [("all_reduce", 2 * (2 * CHANNELS + 1))],
            "backward": [("all_reduce", 2 * CHANNELS)],
            "backward without dx": [],
            "eval": [],
            # Forward adds zeros to each rank's own row, which has one result in any order.
            "deterministic": [
                ("all_reduce", 2 * (2 * CHANNELS + 1)),
                ("all_to_all_single", 2 * CHANNELS),
                ("all_gather", -1),
            ],
        }


def train_low_precision(rank: int, world_size: int) -> list[dict[str, Any]]:
    results = []
    for dtype in (torch.bfloat16, torch.float16):
        torch.manual_seed(0)
        conv = nn.Conv2d(3, CHANNELS, 3, padding=1).to(memory_format=torch.channels_last)
        layer = convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS))
        images = torch.randn(world_size, 2, 3, 6, 6)[rank]
        grads: list[Tensor] = []
        with torch.autocast("cpu", dtype):
            x = conv(images.to(memory_format=torch.channels_last))
            x.register_hook(grads.append)  # as it comes: .grad would have a layout of its own
            y = layer(x)
        dy = (x.detach() + rank).to(y.dtype)
        y.backward(dy)
        (dx,) = grads
        results.append(
            {
                "x": x.detach(),
                "dy": dy,
                "y": y.detach(),
                "dx": dx,
                "grads": [p.grad for p in layer.parameters()],
                "buffers": list(layer.buffers()),
                "dtypes": (x.dtype, y.dtype, dx.dtype),
                "channels_last": [
                    t.is_contiguous(memory_format=torch.channels_last) for t in (x, y, dx)
                ],
            }
        )
    return results


def test_autocast_and_channels_last() -> None:
    by_rank = run_ranks(train_low_precision, 2)
    for index, dtype in enumerate((torch.bfloat16, torch.float16)):
        ranks = [results[index] for results in by_rank]
        for rank in ranks:
            assert rank["dtypes"] == (dtype,) * 3
            assert rank["channels_last"] == [True] * 3
            assert {t.dtype for t in rank["grads"] + rank["buffers"][:2]} == {torch.float32}
        joined = {key: join([rank[key] for rank in ranks]) for key in ("x", "dy", "y", "dx")}
        steps = [(joined["x"].float(), joined["dy"].float())]
        expected = train(nn.BatchNorm2d(CHANNELS), steps)
        rounding = torch.finfo(dtype).eps  # that of one store in the low precision
        for actual, wanted in (
            (joined["y"], expected.outputs[0]),
            (joined["dx"], expected.input_grads[0]),
        ):
            torch.testing.assert_close(actual.float(), wanted, rtol=rounding, atol=rounding)
        # Statistics and parameter gradients saw no low precision but that of x and dy.
        for found, wanted in zip(ranks[0]["buffers"], expected.buffers, strict=True):
            torch.testing.assert_close(found, wanted, rtol=1e-5, atol=1e-6)
        for local, wanted in zip(
            zip(*(rank["grads"] for rank in ranks), strict=True),
            expected.parameter_grads,
            strict=True,
        ):
            torch.testing.assert_close(sum(local), wanted, rtol=1e-5, atol=1e-4)


def train_edge_cases(rank: int, world_size: int) -> Tensor:
    layer = SyncBatchNorm2d(CHANNELS)
    with pytest.raises(ValueError, match=r"more than 1 value per channel.* got 1 over 2 ranks"):
        layer(torch.ones(1 if rank == 0 else 0, CHANNELS, 1, 1))
    assert layer.num_batches_tracked == 0  # a refused batch leaves no trace
    # An empty local batch takes part in both collectives, and contributes nothing.
    x = torch.arange(4.0 * CHANNELS).view(4, CHANNELS, 1, 1)[: 4 if rank == 0 else 0]
    x = x.clone().requires_grad_()
    layer(x).square().sum().backward()
    assert x.grad is not None
    assert x.grad.shape == x.shape
    assert layer.running_mean is not None
    return layer.running_mean


def test_single_value_is_refused_and_empty_local_batch_counts_zero() -> None:
    joined = torch.arange(4.0 * CHANNELS).view(4, CHANNELS)
    for running_mean in run_ranks(train_edge_cases, 2):
        torch.testing.assert_close(running_mean, 0.1 * joined.mean(0))


def small_net(sync: bool) -> nn.Module:
    torch.manual_seed(3)
    net = nn.Sequential(
        nn.Conv2d(3, 4, 3, bias=False),
        nn.BatchNorm2d(4),
        nn.ReLU(),
        nn.Sequential(nn.Conv2d(4, 6, 3, bias=False), nn.BatchNorm2d(6), nn.ReLU()),
        nn.AdaptiveAvgPool2d(1),
        nn.Flatten(),
        nn.Linear(6, 2),
    ).double()
    return convert_sync_batchnorm(net) if sync else net


def small_data() -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(4)
    images = torch.randn(8, 3, 8, 8, generator=generator, dtype=torch.float64)
    return images, torch.arange(8) % 2


def train_ddp(rank: int, world_size: int) -> tuple[list[Tensor | None], list[Tensor]]:
    net = nn.parallel.DistributedDataParallel(small_net(sync=True))
    images, labels = (part.chunk(world_size)[rank] for part in small_data())
    nn.functional.cross_entropy(net(images), labels).backward()
    return [p.grad for p in net.parameters()], list(net.buffers())


def test_ddp_gradients_equal_one_process_on_the_joined_batch() -> None:
    net = small_net(sync=False)
    images, labels = small_data()
    nn.functional.cross_entropy(net(images), labels).backward()
    for grads, buffers in run_ranks(train_ddp, 2):
        for found, parameter in zip(grads, net.parameters(), strict=True):
            torch.testing.assert_close(found, parameter.grad, rtol=0, atol=1e-12)
        for found, wanted in zip(buffers, net.buffers(), strict=True):
            torch.testing.assert_close(found, wanted, rtol=0, atol=1e-12)


def train_local_and_average(rank: int, world_size: int) -> dict[str, Any]:
    net = small_net(sync=False)
    often = copy.deepcopy(net)
    generator = torch.Generator().manual_seed(rank)
    for _ in range(3):
        images = torch.randn(2, 3, 8, 8, generator=generator, dtype=torch.float64) + rank
        net(images)
        often(images)
        average_running_stats(often)
    local = copy.deepcopy(net)
    with recorded_collectives() as calls:
        average_running_stats(net)
    return {
        "local": list(local.buffers()),
        "averaged": list(net.buffers()),
        "often": list(often.buffers()),
        "calls": calls,
    }


def test_average_running_stats() -> None:
    ranks = run_ranks(train_local_and_average, 3)
    for rank in ranks:
        assert rank["calls"] == [("all_reduce", 2 * (4 + 6))]
        for index, found in enumerate(rank["averaged"]):
            assert torch.equal(found, ranks[0]["averaged"][index])
            wanted = torch.stack([other["local"][index] for other in ranks]).double().mean(0)
            torch.testing.assert_close(found.double(), wanted, rtol=0, atol=1e-12)
            # When and how often it happens does not change the final average.
            torch.testing.assert_close(rank["often"][index], found, rtol=0, atol=1e-12)
    assert not torch.allclose(ranks[0]["local"][0], ranks[1]["local"][0])


def average_equal_ones(rank: int, world_size: int) -> list[bool]:
    """Which of a synchronized, a frozen and a local layer keep their statistics to the bit."""
    frozen, layers = nn.BatchNorm2d(1000), nn.ModuleList()
    freeze(frozen)
    for layer in (convert_sync_batchnorm(nn.BatchNorm2d(1000)), frozen, nn.BatchNorm2d(1000)):
        assert isinstance(layer, nn.BatchNorm2d)
        assert layer.running_mean is not None
        layer.running_mean.copy_(torch.rand(1000, generator=torch.Generator().manual_seed(1)))
        layers.append(layer)
    before = [layer.running_mean.clone() for layer in layers]
    average_running_stats(layers)
    return [torch.equal(layer.running_mean, b) for layer, b in zip(layers, before, strict=True)]


def test_statistics_that_are_equal_already_are_not_rounded() -> None:
    assert run_ranks(average_equal_ones, 3) == [[True, True, False]] * 3


def test_without_a_process_group_it_is_batchnorm() -> None:
    net, plain = small_net(sync=True), small_net(sync=False)
    images, _ = small_data()
    assert torch.equal(net(images), plain(images))
    before = copy.deepcopy(net.state_dict())
    average_running_stats(net)  # nothing to do with one rank
    for key, value in net.state_dict().items():
        assert torch.equal(value, before[key])
        assert torch.equal(value, plain.state_dict()[key])
    net.eval()
    plain.eval()
    assert torch.equal(net(images), plain(images))


def test_convert_keeps_everything_but_the_class() -> None:
    class OwnNorm(nn.BatchNorm2d):
        pass

    net = nn.Sequential(small_net(sync=False), OwnNorm(2)).eval().requires_grad_(False)
    parameters, buffers = dict(net.named_parameters()), dict(net.named_buffers())
    assert convert_sync_batchnorm(net) is net
    assert sum(type(layer) is SyncBatchNorm2d for layer in net.modules()) == 2
    assert sum(type(layer) is OwnNorm for layer in net.modules()) == 1
    assert dict(net.named_parameters()).keys() == parameters.keys()
    assert all(p is parameters[name] for name, p in net.named_parameters())
    assert all(b is buffers[name] for name, b in net.named_buffers())
    assert not any(layer.training for layer in net.modules())
    assert not any(p.requires_grad for p in net.parameters())
    alone = convert_sync_batchnorm(nn.BatchNorm2d(CHANNELS, eps=1e-3, momentum=None))
    assert isinstance(alone, SyncBatchNorm2d)
    assert (alone.eps, alone.momentum, alone.process_group) == (1e-3, None, None)


def test_state_dict_is_that_of_batchnorm() -> None:
    sync, plain = small_net(sync=True), small_net(sync=False)
    assert list(sync.state_dict()) == list(plain.state_dict())
    sync.load_state_dict(plain.state_dict(), strict=True)
    plain.load_state_dict(sync.state_dict(), strict=True)
