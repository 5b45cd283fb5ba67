"""`bench step`: the time of a training step on images in memory, and of its parts.

The parts take turns. The step is the package's own train_step. The forward pass, both passes and
the optimizer are also timed alone. What synchronized BN and DDP add is the difference to a step
without them; a single rank communicates with itself, which costs their arithmetic and their calls,
but no waiting.
"""

import resource
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.nn import functional as F

from resnet_dist.bench import results
from resnet_dist.bench.dearest import profiled
from resnet_dist.bench.machine_floor import floor_of_a_step
from resnet_dist.bench.noise_job import NoiseJob, alone
from resnet_dist.bench.turns import (
    Spread,
    Turn,
    figures_of,
    many,
    ratio,
    repeated,
    spread,
    take_turns,
)
from resnet_dist.config import Config, ModelConfig, TrainConfig
from resnet_dist.distributed import World
from resnet_dist.models.sync_batchnorm import convert_sync_batchnorm
from resnet_dist.precision import autocast

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
    synchronized = _job(this_rank, shape)
    convert_sync_batchnorm(synchronized.state.model, world.group)
    synchronized.synchronize_batchnorm()
    distributed = _job(this_rank, shape)
    distributed.distribute(world)
    changed = {SYNC_BN: synchronized, DDP: distributed}
    if world.size > 1:
        changed[AS_TRAINED] = _job(world, shape)
    if shape.compile:
        for job in (plain, *changed.values()):
            job.compile()
    contestants = _parts(plain, this_rank, shape)
    contestants |= {name: job.step for name, job in changed.items()}
    timed = {name: _timed(once, world) for name, once in contestants.items()}
    turns = take_turns(timed, runs, world)
    figures = _figures(turns, shape, world)
    if with_profile:
        figures["profile"] = profiled(plain.step, device, DEAREST)
    if world.is_main:
        print(describe_figures(figures, shape, world, runs))
        results.write(output, "step", figures)


def _job(world: World, shape: Shape) -> NoiseJob:
    channels_last = shape.layout == "channels_last"
    return NoiseJob(world, shape.config(world), shape.px, channels_last=channels_last)


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
    """Returns a function that measures the milliseconds of `once`."""
    seconds = repeated(many(once), world, TURN_SECONDS)
    return lambda: 1000 * seconds()


def _figures(turns: dict[str, list[Turn]], shape: Shape, world: World) -> dict[str, Any]:
    floor = floor_of_a_step(shape.model, shape.batch_size, shape.px, shape.precision, world.device)
    seconds = spread(turns[STEP]).median / 1000
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
        "images_per_sec": round(shape.batch_size / seconds, 2),
        "parts": rows,
        "floor": {
            **floor.figures(),
            "fraction_reached": round(floor.seconds / seconds, 4),
            # FLOPs per second, as a fraction of what this machine's matrix product reaches.
            "mfu": round(floor.work.flops / seconds / floor.rates.flops_per_sec, 4),
        },
        **_peak_memory(world.device),
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
