"""Measures one rung of a ladder: ResNet-50's training step with one more feature per rung.

    python benchmarks/gpu_ladder.py RUNG [--batch-size 256] [--steps 20] [--small] [--output FILE]

Up to `fused`, each rung adds one thing to the rung before. Each of the last five rungs is `fused`
with a single change.
"""

import argparse
import json
import time
import warnings
from dataclasses import dataclass
from pathlib import Path
from statistics import median
from typing import Any

import torch
import torch.distributed as dist
from noise_job import noise_job

from resnet_dist import distributed
from resnet_dist.bench.dearest import profiled
from resnet_dist.bench.noise_job import NoiseJob, force_synchronized_batchnorm
from resnet_dist.models.sync_batchnorm import convert_sync_batchnorm
from resnet_dist.process import set_up_process

HOST_STEPS = 3
TOP_KERNELS = 12


@dataclass(frozen=True)
class Rung:
    precision: str = "bf16"
    channels_last: bool = True
    fused: bool = True  # SGD in a few kernel launches
    ema: bool = False
    sync_batchnorm: bool = False  # its arithmetic, in a group of one rank
    deterministic: bool = False
    compiled: bool = False


RUNGS = {
    "nchw-fp32": Rung("fp32", channels_last=False, fused=False),
    "channels-last": Rung("fp32", fused=False),
    "tf32": Rung("tf32", fused=False),
    "bf16": Rung(fused=False),
    "fused": Rung(),
    "ema": Rung(ema=True),
    "sync-batchnorm": Rung(sync_batchnorm=True),
    "deterministic": Rung(deterministic=True),
    "compiled": Rung(compiled=True),
    "fp16": Rung("fp16"),
}


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("rung", choices=RUNGS)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--small", action="store_true", help="ResNet-18 at 64 px")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    figures = measure(RUNGS[given.rung], given.batch_size, given.steps, given.small)
    figures = {"rung": given.rung, **figures}
    if given.output is not None:
        given.output.write_text(json.dumps(figures, indent=1) + "\n")
    print(describe_figures(figures))


def measure(rung: Rung, batch_size: int, steps: int, small: bool) -> dict[str, Any]:
    world = distributed.start()
    overrides = [
        f"train.precision={rung.precision}",
        f"train.deterministic={str(rung.deterministic).lower()}",
        f"train.ema_decay={0.9999 if rung.ema else 'null'}",
    ]
    job = noise_job(world, batch_size, overrides, small=small, channels_last=rung.channels_last)
    if not rung.fused:
        for group in job.state.optimizer.param_groups:
            group["fused"], group["foreach"] = False, True
    if rung.sync_batchnorm:  # does all its arithmetic and calls, but waits for no other rank
        backend = "nccl" if world.device.type == "cuda" else "gloo"
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        force_synchronized_batchnorm(convert_sync_batchnorm(job.state.model))
    if rung.compiled:
        job.compile("inductor" if world.device.type == "cuda" else "aot_eager")

    first_seconds = seconds_of(job, 1, world.device)
    seconds_of(job, steps // 4, world.device)
    seconds = seconds_of(job, steps, world.device) / steps
    figures = {
        "batch_size": batch_size,
        "px": job.px,
        "ms_per_step": round(1000 * seconds, 3),
        "images_per_sec": round(batch_size / seconds, 1),
        "host_queue_ms": round(1000 * host_seconds(job, world.device), 3),
        "first_step_seconds": round(first_seconds, 2),
        "loss": round(job.mean_loss(), 4),
    }
    if world.device.type == "cuda":
        figures["peak_memory_gib"] = round(torch.cuda.max_memory_allocated() / 2**30, 2)
        figures["host_syncs"] = host_syncs(job)
    return figures | profiled(job.step, world.device, TOP_KERNELS)


def seconds_of(job: NoiseJob, steps: int, device: torch.device) -> float:
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        job.step()
    synchronize(device)
    return time.perf_counter() - began


def host_seconds(job: NoiseJob, device: torch.device) -> float:
    """Returns the seconds that the host needs to queue a step on an idle GPU.

    With many steps in the GPU's queue, the host would also wait for space in the queue.
    """
    times = []
    for _ in range(HOST_STEPS):
        synchronize(device)
        began = time.perf_counter()
        job.step()
        times.append(time.perf_counter() - began)
    return median(times)


def host_syncs(job: NoiseJob) -> int:
    """Returns how often the host waits for the GPU in a step, as far as torch can detect."""
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        try:
            torch.cuda.set_sync_debug_mode("warn")
            job.step()
        finally:
            torch.cuda.set_sync_debug_mode("default")
    return sum("called a synchronizing CUDA operation" in str(one.message) for one in caught)


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize()  # CPU-GPU sync point


def describe_figures(figures: dict[str, Any]) -> str:
    text = f"{figures['ms_per_step']:.1f} ms, {figures['images_per_sec']:,.0f} img/s, "
    text += f"host {figures['host_queue_ms']:.1f} ms"
    if "peak_memory_gib" in figures:
        text += f", {figures['host_syncs']} syncs, {figures['launches']:,} launches"
        text += f", peak {figures['peak_memory_gib']:.1f} GiB"
    most = [kernel["name"][:40] for kernel in figures["top_kernels"][:1]]
    text += f"; first step {figures['first_step_seconds']:.1f} s"
    return f"{text}; top kernel: {most[0] if most else 'none recorded by the profiler'}"


if __name__ == "__main__":
    main()
