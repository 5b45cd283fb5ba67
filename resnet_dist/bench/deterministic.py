"""`bench deterministic`: measures the cost of train.deterministic on the ranks it is started with.

Two things are timed, each with and without train.deterministic: a whole optimizer step (ResNet-50
on a GPU, the smaller ResNet-20 on a CPU), and the exchange of ResNet-50's gradients alone. The two
modes alternate, so that other load on the machine affects both alike. The images are noise in
memory, and there is no loader.

cuBLAS reads its setting only once per process, so both modes run with the deterministic setting.
This affects only the last layer.
"""

from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from typing import Any

import torch
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.bench.turns import figures_of, now, take_turns
from resnet_dist.config import Config, ModelConfig
from resnet_dist.determinism import fix_algorithms
from resnet_dist.distributed import World, sum_over_ranks
from resnet_dist.job import agree_after_step, build_network, distribute
from resnet_dist.models.build import build_model
from resnet_dist.optim import build_optimizer
from resnet_dist.precision import autocast

BUCKET_BYTES = 25 * 2**20  # DDP's default
MODES = {"fastest": False, "deterministic": True}
# name, crop_px, images per rank, precision
WORK = {"cuda": ("resnet50", 224, 128, "bf16"), "cpu": ("resnet20", 32, 32, "fp32")}


def bench_deterministic(world: World, runs: int, steps: int, output: Path | None) -> None:
    """Prints the milliseconds of a step and of an exchange in each mode, and the cost in percent.
    A collective.

    runs: number of timed runs per mode, each of `steps` optimizer steps or exchanges.
    """
    name, px, images, precision = WORK[world.device.type]
    what = f"step, {name} at {px} px, {images} images per rank, {precision}"
    measured = [measure(what, training_step(world), world, (runs, steps))]
    if world.size > 1:
        parameters = resnet50_parameters()
        what = f"exchange of {parameters:,} gradients (ResNet-50)"
        measured.append(measure(what, exchange(world, parameters), world, (runs, steps)))
    if not world.is_main:
        return
    rows = [["", *(f"{mode} ms" for mode in MODES), "cost", "range"]]
    for one in measured:
        medians = [one["ms"][mode]["median"] for mode in MODES]
        low, *_, high = sorted(one["cost_pct"])
        cost = [f"{median(one['cost_pct']):+.1f} %", f"{low:+.1f}..{high:+.1f}"]
        rows.append([one["what"], *(f"{ms:.1f}" for ms in medians), *cost])
    print(f"{world.size} x {world.device.type}, {runs} runs of {steps} in each mode; medians\n")
    print(results.columns(rows))
    figures = {"ranks": world.size, "threads_per_rank": torch.get_num_threads(), "parts": measured}
    results.write(output, "deterministic", figures)


def measure(
    what: str, once: Callable[[bool], None], world: World, repeats: tuple[int, int]
) -> dict[str, Any]:
    """Times `once` in both modes, which alternate.

    once: takes whether the mode is deterministic. repeats: number of runs, and calls per run.

    Returns the milliseconds per call, and the cost of each pair of runs in percent.
    """
    runs, calls = repeats

    def timed(deterministic: bool) -> float:
        fix_algorithms(deterministic)
        began = now(world)
        for _ in range(calls):
            once(deterministic)
        return 1000 * (now(world) - began) / calls

    # The warm-up is for autotuning and for DDP's buckets.
    modes = {mode: partial(timed, deterministic) for mode, deterministic in MODES.items()}
    turns = take_turns(modes, runs, world)
    fix_algorithms(False)
    ms = {mode: figures_of(of_this) for mode, of_this in turns.items()}
    pairs = zip(ms["deterministic"]["values"], ms["fastest"]["values"], strict=True)
    return {"what": what, "ms": ms, "cost_pct": [100 * (slow / fast - 1) for slow, fast in pairs]}


def training_step(world: World) -> Callable[[bool], None]:
    """Returns a function that runs one training step on images in memory."""
    name, px, images, precision = WORK[world.device.type]
    config = Config(model=ModelConfig(name=name))
    models, optimizers = {}, {}
    # Each mode has its own network, because the way DDP sums gradients is set when it is created.
    for deterministic in MODES.values():
        fix_algorithms(deterministic)
        network = build_network(config, world, num_classes=1000)
        optimizers[deterministic] = build_optimizer(network, config.optim)
        models[deterministic] = network, distribute(network, world)
    batch = torch.randn(images, 3, px, px, device=world.device)
    batch = batch.to(memory_format=torch.channels_last)
    labels = torch.randint(1000, (images,), device=world.device)

    def once(deterministic: bool) -> None:
        network, model = models[deterministic]
        optimizers[deterministic].zero_grad()
        with autocast(world.device, precision):
            loss = F.cross_entropy(model(batch), labels)
        loss.backward()
        optimizers[deterministic].step()
        agree_after_step(network, world)

    return once


def resnet50_parameters() -> int:
    with torch.device("meta"):
        model = build_model("resnet50", 1000, zero_init_last_gamma=False)
    return sum(p.numel() for p in model.parameters())


def exchange(world: World, parameters: int) -> Callable[[bool], None]:
    """Returns a function that sums as many float32 values over the ranks, in buckets of DDP's
    size."""
    gradients = torch.zeros(parameters, device=world.device)
    buckets = gradients.split(BUCKET_BYTES // gradients.element_size())

    def once(deterministic: bool) -> None:  # `measure` has already set the mode
        for bucket in buckets:
            sum_over_ranks(bucket, world.group)

    return once
