"""What it costs to train on batches in DALI's memory, and on copies of them in torch's.

    python benchmarks/gpu_batch_copy.py [--batch-size 256] [--steps 30] [--small] [--output FILE]

"dlpack": as the loader hands them over. When torch is done with such a tensor, a thread of DALI's
synchronizes the whole device before the memory is used again. "copy": DALI copies each batch into a
tensor of torch's own, on the current stream, and its own memory is freed in that stream's order.
Both train ResNet-50; the pixels are noise in host memory, so that no decoder stands in the way.
On a GPU also: how many device-wide synchronizations there are in a step, and whether a CUDA graph
can be captured while a batch is freed.
"""

import argparse
import json
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from noise_job import CLASSES, NoiseJob
from nvidia.dali import types
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from torch.profiler import ProfilerActivity, profile

from resnet_dist import distributed
from resnet_dist.data.dali import Batch
from resnet_dist.data.dali_graphs import raw_graph

ROUNDS = 3  # in each, both ways in turn
HOST_STEPS = 5
PROFILED_STEPS = 5
WITHIN_CAPTURE_SECONDS = 0.1  # for DALI's thread to do what it does
DEVICE_SYNC = "cudaDeviceSynchronize"


def by_dlpack(tensor: Any, device: torch.device) -> torch.Tensor:
    return torch.from_dlpack(tensor)


def by_copy(tensor: Any, device: torch.device) -> torch.Tensor:
    own = torch.empty(tensor.shape(), dtype=to_torch_type[tensor.dtype], device=device)
    return feed_ndarray(tensor, own, cuda_stream=current_stream(device))


WAYS: dict[str, Callable[[Any, torch.device], torch.Tensor]] = {
    "dlpack": by_dlpack,
    "copy": by_copy,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="of each way, in each round")
    parser.add_argument("--small", action="store_true", help="ResNet-18 at 64 px")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    figures = measure(given.batch_size, given.steps, given.small)
    if given.output is not None:
        given.output.write_text(json.dumps(figures, indent=1) + "\n")
    print("; ".join(describe(way, figures[way]) for way in WAYS))


def measure(batch_size: int, steps: int, small: bool) -> dict[str, Any]:
    world = distributed.start()
    device = world.device
    job = NoiseJob(world, batch_size, ["train.precision=bf16"], small=small)
    streams = {way: batches(way, batch_size, job.px, device) for way in WAYS}
    rounds: dict[str, list[float]] = {way: [] for way in WAYS}
    for way in WAYS:
        train(job, streams[way], max(1, steps // 4), device)
    for _ in range(ROUNDS):
        for way in WAYS:
            rounds[way].append(1000 * train(job, streams[way], steps, device))
    figures: dict[str, Any] = {"batch_size": batch_size, "px": job.px}
    for way in WAYS:
        host = [1000 * train(job, streams[way], 1, device, wait=False) for _ in range(HOST_STEPS)]
        figures[way] = {
            "ms_per_step": round(median(rounds[way]), 3),
            "ms_per_step_of_rounds": [round(ms, 3) for ms in rounds[way]],
            "host_queue_ms": round(median(host), 3),
        }
        if device.type == "cuda":
            figures[way]["device_syncs_per_step"] = device_syncs(job, streams[way], device)
    if device.type == "cuda":  # last: a capture that fails may leave errors behind
        for way in WAYS:
            for mode in ("thread_local", "global"):
                figures[way][f"capture_{mode}"] = capture(streams[way], mode)
    return figures


def batches(way: str, batch_size: int, px: int, device: torch.device) -> Iterator[Batch]:
    rng = np.random.default_rng(0)
    inputs = (
        rng.integers(0, 256, (batch_size, px, px, 3), np.uint8),
        np.zeros((batch_size, 2), np.int32),
        np.full((batch_size, 2), px, np.int32),
        np.arange(batch_size, dtype=np.int32) % 2,
        rng.integers(0, CLASSES, batch_size),
    )
    gpu = device.type == "cuda"
    pipe = raw_graph(
        lambda: inputs,
        mean=np.full(3, 127.5, np.float32),
        normalisation={"std": [64.0] * 3, "dtype": types.FLOAT16},
        batch_size=batch_size,
        num_threads=2,
        device_id=torch.cuda.current_device() if gpu else None,
        prefetch_queue_depth=2,
    )
    while True:
        images, labels = (
            WAYS[way](output.as_tensor(), device) for output in pipe.run(current_stream(device))
        )
        yield Batch(images.permute(0, 3, 1, 2).to(torch.bfloat16), labels)


def train(
    job: NoiseJob, stream: Iterator[Batch], steps: int, device: torch.device, wait: bool = True
) -> float:
    """Seconds of a step; without `wait`, only those in which the host queues it."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        job.step(next(stream))
    if wait:
        synchronize(device)
    return (time.perf_counter() - began) / steps


def device_syncs(job: NoiseJob, stream: Iterator[Batch], device: torch.device) -> float:
    """By any thread, per step. The profiler's own, if it has any, are in both ways alike."""
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(PROFILED_STEPS):
            job.step(next(stream))
            torch.cuda.current_stream(device).synchronize()  # so that DALI's thread comes to run
    count = sum(event.count for event in seen.key_averages() if event.key == DEVICE_SYNC)
    return count / PROFILED_STEPS


def capture(stream: Iterator[Batch], mode: str) -> str:
    """ "ok", or why a CUDA graph could not be captured while a batch is freed."""
    held: list[Batch | None] = [next(stream)]
    counter = torch.zeros(1, device="cuda")
    try:
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
            held[0] = None
            time.sleep(WITHIN_CAPTURE_SECONDS)
            counter += 1
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return "ok"


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)


def describe(way: str, figures: dict[str, Any]) -> str:
    text = f"{way} {figures['ms_per_step']:.1f} ms, host {figures['host_queue_ms']:.1f} ms"
    if "device_syncs_per_step" in figures:
        text += f", {figures['device_syncs_per_step']:.1f} device syncs"
        text += f", graph capture {figures['capture_global']}"
    return text


if __name__ == "__main__":
    main()
