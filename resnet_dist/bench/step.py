"""`bench step`: the time of a training step on images in memory, and of its parts.

The parts take turns. The step is the package's own train_step. The forward pass, both passes and
the optimizer are also timed alone. What synchronized BN and DDP add is the difference to a step
without them; a single rank communicates with itself, which costs their arithmetic and their calls,
but no waiting.
"""

import resource
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.bench.dearest import profiled
from resnet_dist.bench.machine_floor import Rates, measured_rates, work_of_a_step
from resnet_dist.bench.noise_job import CLASSES, NoiseJob, alone
from resnet_dist.bench.turns import Spread, Turn, figures_of, ratio, spread, take_turns
from resnet_dist.config import Config, ModelConfig, TrainConfig
from resnet_dist.distributed import World
from resnet_dist.models.build import build_model
from resnet_dist.models.sync_batchnorm import convert_sync_batchnorm
from resnet_dist.precision import DTYPES, autocast

TURN_SECONDS = 0.5  # a turn has at least as many steps as fill this
DEAREST = 10
STEP, FORWARD, BOTH = "step", "forward", "forward and backward"
OPTIMIZER, SYNC_BN, DDP = "optimizer", "step, synchronized BN", "step, DDP"
AS_TRAINED = "step, both, as in training"


@dataclass(frozen=True)
class Shape:
    """What is trained, and how."""

    model: str
    batch_size: int  # on each rank
    px: int
    precision: str
    layout: str  # "channels_last" or "contiguous"
    compile: bool

    def __str__(self) -> str:
        compiled = ", compiled" if self.compile else ""
        what = f"{self.model} at {self.px} px, batch {self.batch_size}"
        return f"{what}, {self.precision}, {self.layout}{compiled}"

    def config(self, world: World) -> Config:
        train = TrainConfig(
            global_batch_size=self.batch_size * world.size,
            max_local_batch_size=self.batch_size,
            precision=self.precision,  # type: ignore[arg-type]
        )
        return Config(model=ModelConfig(name=self.model), train=train)


def bench_step(
    world: World, shape: Shape, runs: int, with_profile: bool, output: Path | None
) -> None:
    """Prints the time of a step and its parts, next to the machine's floor. A collective."""
    device = world.device
    if world.size == 1 and not dist.is_initialized():  # for SyncBN and DDP
        backend = "nccl" if device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
    this_rank = alone(world)
    plain = _job(this_rank, shape)
    contestants = _parts(plain, this_rank, shape)
    synchronized = _job(this_rank, shape, compiled=False)
    convert_sync_batchnorm(synchronized.state.model, world.group)
    synchronized.synchronize_batchnorm()
    distributed = _job(this_rank, shape, compiled=False)
    distributed.distribute(world)
    for name, job in {SYNC_BN: synchronized, DDP: distributed}.items():
        if shape.compile:
            job.compile()
        contestants[name] = job.step
    if world.size > 1:
        contestants[AS_TRAINED] = _job(world, shape).step
    timed = {name: _timed(once, world) for name, once in contestants.items()}
    turns = take_turns(timed, runs, world)
    figures = _figures(turns, shape, world)
    if with_profile:
        figures["profile"] = profiled(plain.step, device, DEAREST)
    if world.is_main:
        print(describe_figures(figures, shape, world, runs))
        results.write(output, "step", figures)


def _job(world: World, shape: Shape, compiled: bool = True) -> NoiseJob:
    channels_last = shape.layout == "channels_last"
    job = NoiseJob(world, shape.config(world), shape.px, channels_last=channels_last)
    if shape.compile and compiled:
        job.compile()
    return job


def _parts(job: NoiseJob, world: World, shape: Shape) -> dict[str, Callable[[], Any]]:
    """Returns the step, and the parts that can be run alone."""

    def forward() -> torch.Tensor:
        with autocast(world.device, shape.precision):
            return F.cross_entropy(job.model(job.batch.images), job.batch.labels)

    def both() -> None:
        job.state.optimizer.zero_grad(set_to_none=True)
        forward().backward()

    both()  # the optimizer needs gradients
    return {STEP: job.step, FORWARD: forward, BOTH: both, OPTIMIZER: job.state.optimizer.step}


def _timed(once: Callable[[], Any], world: World) -> Callable[[], float]:
    """Returns a function that measures the milliseconds of `once`, over TURN_SECONDS."""
    count = 0

    def measure() -> float:
        nonlocal count
        began = _now(world)
        if not count:  # the warm-up: compiles, allocates, and finds out how often
            once()
            once()
            began = _now(world)
            once()
            needed = round(TURN_SECONDS / (_now(world) - began))
            # The ranks must agree, because a step communicates.
            count = max(1, *world.gather(needed))
            return 0.0
        for _ in range(count):
            once()
        return 1000 * (_now(world) - began) / count

    return measure


def _now(world: World) -> float:
    """Returns the time when all ranks and their devices have done their work. A collective."""
    if world.device.type == "cuda":
        torch.cuda.synchronize(world.device)  # CPU-GPU sync point
    world.any(False)
    return time.perf_counter()


def _figures(turns: dict[str, list[Turn]], shape: Shape, world: World) -> dict[str, Any]:
    rates = measured_rates(world.device, shape.precision)
    with torch.device("meta"):
        model = build_model(shape.model, CLASSES, zero_init_last_gamma=False)
    work = work_of_a_step(model, shape.batch_size, shape.px, DTYPES[shape.precision])
    step = spread(turns[STEP])
    rows: list[dict[str, Any]] = []
    for name, of_this in turns.items():
        rows.append({"part": name, "ms": figures_of(of_this)})
        if name == BOTH:
            pairs = zip(of_this, turns[FORWARD], strict=True)
            backward = Spread.of([both.value - forward.value for both, forward in pairs])
            rows.append({"part": "backward", "ms": backward.figures()})
        if name in (SYNC_BN, DDP, AS_TRAINED):
            rows[-1]["times_the_step"] = round(ratio(of_this, turns[STEP]).median, 3)
    return {
        "shape": asdict(shape),
        "ranks": world.size,
        "threads_per_rank": torch.get_num_threads(),
        "images_per_sec": round(1000 * shape.batch_size / step.median, 2),
        "parts": rows,
        "floor": _floor(rates, work, step.median / 1000, shape.batch_size),
        **_peak_memory(world.device),
    }


def _floor(rates: Rates, work: Any, seconds: float, batch_size: int) -> dict[str, float]:
    least = rates.seconds(work)
    return {
        **rates.figures(),
        "step_tflop": round(work.flops / 1e12, 4),
        "step_gb": round(work.nbytes / 1e9, 3),
        "step_ms": round(1000 * least, 3),
        "images_per_sec": round(batch_size / least, 2),
        "fraction_reached": round(least / seconds, 4),
        # FLOPs per second, as a fraction of what this machine's matrix product reaches.
        "mfu": round(work.flops / seconds / rates.flops_per_sec, 4),
    }


def _peak_memory(device: torch.device) -> dict[str, float]:
    if device.type == "cuda":
        return {"peak_gpu_gib": round(torch.cuda.max_memory_allocated(device) / 2**30, 3)}
    peak_kib = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {"peak_rss_gib": round(peak_kib / 2**20, 3)}


def describe_figures(figures: dict[str, Any], shape: Shape, world: World, runs: int) -> str:
    table = [["", "ms", "quartiles", ""]]
    for row in figures["parts"]:
        ms = Spread(*(row["ms"][key] for key in ("median", "low", "high")))
        times = f"{row['times_the_step']:.3f} x the step" if "times_the_step" in row else ""
        table.append([row["part"], f"{ms.median:,.1f}", ms.text(), times])
    floor = figures["floor"]
    peak = next(f"{key}: {value}" for key, value in figures.items() if key.startswith("peak"))
    lines = [
        f"\n{shape}; {world.size} x {world.device.type}, medians of {runs} runs\n",
        results.columns(table),
        f"\n{figures['images_per_sec']:,.1f} img/s per rank; {peak}",
        f"floor of this machine: {floor['step_ms']:,.1f} ms, {floor['images_per_sec']:,.1f} img/s, "
        f"from {floor['bandwidth_gb_per_sec']:,.1f} GB/s and {floor['matrix_tflops']:.3f} TFLOP/s; "
        f"the step reaches {floor['fraction_reached']:.0%} of it, MFU {floor['mfu']:.0%}",
    ]
    if "profile" in figures:
        dearest = [["dearest operations", "ms", "calls"]]
        for kernel in figures["profile"]["top_kernels"]:
            dearest.append([kernel["name"][:60], f"{kernel['ms']:,.1f}", str(kernel["calls"])])
        lines.append("\n" + results.columns(dearest))
    return "\n".join(lines)
