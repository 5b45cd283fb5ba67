"""Compares training on batches in DALI's memory with training on copies in torch's memory.

    python benchmarks/gpu_batch_copy.py [--batch-size 256] [--steps 30] [--small] [--output FILE]

"dlpack" shares DALI's memory, as the loader does. When torch is done with such a tensor, one of
DALI's threads synchronizes the whole device before the memory is used again. "copy" has DALI copy
each batch into a tensor of torch's own on the current stream; DALI's memory is then freed in the
order of that stream. Both train ResNet-50. The pixels are noise in host memory, so no decoder is
involved. On a GPU, this script also counts the device-wide synchronizations per step, and tests
whether a CUDA graph can be captured while a batch is freed. Each capture is tried in a separate
process after the other figures are written, because an error in DALI's thread may end the process.
"""

import argparse
import json
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from noise_job import noise_job
from nvidia.dali import types
from nvidia.dali.plugin.pytorch import feed_ndarray, to_torch_type
from torch.profiler import ProfilerActivity, profile

from resnet_dist import distributed
from resnet_dist.bench.noise_job import CLASSES, NoiseJob
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.dali_graphs import raw_graph
from resnet_dist.process import set_up_process

ROUNDS = 3  # each round measures both ways
HOST_STEPS = 5
PROFILED_STEPS = 5
MODES = ("thread_local", "global")  # capture modes; they differ in which threads' calls are errors
BEFORE_CAPTURE = 3  # batches to run first
WITHIN_CAPTURE_SECONDS = 0.1  # time for DALI's thread to act during the capture
CAPTURE_PX = 224
CAPTURE_LIMIT_SECONDS = 40  # mostly for the process to start
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
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--batch-size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=30, help="steps per way and round")
    parser.add_argument("--small", action="store_true", help="ResNet-18 at 64 px")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    parser.add_argument(
        "--capture",
        nargs=2,
        metavar=("WAY", "MODE"),
        help=f"only try to capture a graph; {' or '.join(WAYS)}, {' or '.join(MODES)}",
    )
    given = parser.parse_args()
    if given.capture is not None:
        way, mode = given.capture
        if way not in WAYS or mode not in MODES:
            parser.error(
                f"--capture {way} {mode}: give one of {', '.join(WAYS)} and one of "
                f"{', '.join(MODES)}"
            )
        print(capture(way, mode, given.batch_size), flush=True)
        return
    figures = measure(given.batch_size, given.steps, given.small)
    write(figures, given.output)
    if torch.cuda.is_available():
        for (way, mode), said in captures(given.batch_size).items():
            figures[way][f"capture_{mode}"] = said
        write(figures, given.output)
    print("; ".join(describe_way(way, figures[way]) for way in WAYS))


def write(figures: dict[str, Any], path: Path | None) -> None:
    if path is not None:
        path.write_text(json.dumps(figures, indent=1) + "\n")


def measure(batch_size: int, steps: int, small: bool) -> dict[str, Any]:
    world = distributed.start()
    device = world.device
    job = noise_job(world, batch_size, ["train.precision=bf16"], small=small)
    streams = {way: map(as_batch, outputs(way, batch_size, job.px, device)) for way in WAYS}
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
    return figures


def outputs(
    way: str, batch_size: int, px: int, device: torch.device
) -> Iterator[list[torch.Tensor]]:
    """Yields images [B, H, W, 3] and labels without end. The caller has the only reference."""
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
    while True:  # yields without assigning to a variable, which would keep the batch alive
        yield [WAYS[way](one.as_tensor(), device) for one in pipe.run(current_stream(device))]


def as_batch(output: list[torch.Tensor]) -> Batch:
    images, labels = output
    return Batch(images.permute(0, 3, 1, 2).to(torch.bfloat16), labels)


def train(
    job: NoiseJob, stream: Iterator[Batch], steps: int, device: torch.device, wait: bool = True
) -> float:
    """Returns the seconds per step; without `wait`, only the time in which the host queues it."""
    synchronize(device)
    began = time.perf_counter()
    for _ in range(steps):
        job.step(next(stream))
    if wait:
        synchronize(device)
    return (time.perf_counter() - began) / steps


def device_syncs(job: NoiseJob, stream: Iterator[Batch], device: torch.device) -> float:
    """Returns the number of device synchronizations per step, by any thread.

    If the profiler causes any of its own, they are the same for both ways.
    """
    with profile(activities=[ProfilerActivity.CPU, ProfilerActivity.CUDA], acc_events=True) as seen:
        for _ in range(PROFILED_STEPS):
            job.step(next(stream))
            torch.cuda.current_stream(device).synchronize()  # gives DALI's thread time to run
    count = sum(event.count for event in seen.key_averages() if event.key == DEVICE_SYNC)
    return count / PROFILED_STEPS


def captures(batch_size: int) -> dict[tuple[str, str], str]:
    """Tries a capture for each way and mode. Returns (way, mode) -> "ok" or the error."""
    script = [sys.executable, __file__, "--batch-size", str(batch_size), "--capture"]
    tries = list(product(WAYS, MODES))
    with ThreadPoolExecutor(len(tries)) as pool:  # all at once, because starting takes longest
        said = pool.map(lambda one: last_word([*script, *one], CAPTURE_LIMIT_SECONDS), tries)
        return dict(zip(tries, said, strict=True))


def last_word(command: list[str], limit_seconds: float) -> str:
    """Returns the line that a command prints, or the reason why it failed."""
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=limit_seconds)
    except subprocess.TimeoutExpired:
        return f"the process did not end within {limit_seconds:g} s"
    if done.returncode == 0:
        return done.stdout.strip()
    print(done.stderr, end="", file=sys.stderr)
    if done.returncode > 0:
        return done.stderr.strip().rpartition("\n")[2]
    when = f" after it had printed: {done.stdout.strip()}" if done.stdout else ""
    return f"the process ended with {signal.Signals(-done.returncode).name}{when}"


def capture(way: str, mode: str, batch_size: int) -> str:
    """Captures a CUDA graph while a batch is freed. Returns "ok", or why the capture failed."""
    device = distributed.start().device
    if device.type != "cuda":
        sys.exit("--capture: needs a GPU to capture a CUDA graph, and there is none")
    stream = outputs(way, batch_size, CAPTURE_PX, device)
    try:
        for _ in range(BEFORE_CAPTURE):
            next(stream)
        held = next(stream)
        counter = torch.zeros(1, device=device)
        with torch.cuda.graph(torch.cuda.CUDAGraph(), capture_error_mode=mode):
            held.clear()
            time.sleep(WITHIN_CAPTURE_SECONDS)
            counter += 1
    except RuntimeError as error:
        return str(error).partition("\n")[0]
    return "ok"


def current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None


def synchronize(device: torch.device) -> None:
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # CPU-GPU sync point


def describe_way(way: str, figures: dict[str, Any]) -> str:
    text = f"{way} {figures['ms_per_step']:.1f} ms, host {figures['host_queue_ms']:.1f} ms"
    if "device_syncs_per_step" in figures:
        text += f", {figures['device_syncs_per_step']:.1f} device syncs"
        text += f", graph capture {figures['capture_global']}"
    return text


if __name__ == "__main__":
    main()
