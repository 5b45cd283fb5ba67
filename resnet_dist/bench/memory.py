"""`bench memory`: checks whether loading uses more memory with each epoch.

Each epoch loads the same training and evaluation batches as `train`, but without a network.
"""

import os
from dataclasses import replace
from pathlib import Path

import torch

from resnet_dist.bench import results
from resnet_dist.config import Config, OptimConfig
from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.protocol import CENTER_CROP
from resnet_dist.data.view.requests import eval_requests, train_requests
from resnet_dist.distributed import World
from resnet_dist.plan import Plan

COMPARED_EPOCHS = 5  # compares the peak of the last 5 epochs with the peak of the first 5
FLAT_WITHIN = 0.05  # thread timing alone changes the peak of an epoch by this much


def bench_memory(config: Config, world: World, epochs: int, output: Path | None) -> None:
    """Prints the peak memory of each epoch, and whether it stays flat.

    Raises:
        UserError: the config does not fit the data.
    """
    train_config = replace(config.train, epochs=float(epochs), iterations=None)
    config = replace(config, train=train_config, optim=OptimConfig())
    train, val = load_index(config, "train", world), load_index(config, "val", world)
    plan = Plan.of(config, world.size, len(train), len(val))
    train_loader, val_loader = (make_loader(index, config, world) for index in (train, val))
    peaks: list[list[float]] = []  # RSS and GPU memory in each epoch, in MiB
    print(f"{len(train):,} train and {len(val):,} val images; peak memory of each epoch in MiB:")
    for epoch in range(epochs):
        requests = train_requests(config, plan, train, world.rank, epoch * plan.steps_per_epoch)
        batches = train_loader.batches(requests)
        most = [0.0, 0.0]
        for _ in range(plan.steps_per_epoch * plan.accumulation):
            next(batches)
            most = list(map(max, most, memory_mib(world.device)))
        batches.close()  # before the evaluation, as in `train`
        requests = eval_requests(config, val, CENTER_CROP, world.rank, world.size)
        for _ in val_loader.batches(requests):
            most = list(map(max, most, memory_mib(world.device)))
        peaks.append(most)
        gpu = f"  GPU {most[1]:,.0f}" if world.device.type == "cuda" else ""
        print(f"epoch {epoch + 1:>2}  RSS {most[0]:,.1f}{gpu}", flush=True)
    growth = growth_of([one[0] for one in peaks])
    verdict = "flat" if growth <= FLAT_WITHIN else "NOT FLAT"
    print(f"{verdict}: peak RSS of the last {COMPARED_EPOCHS} epochs vs the first: {growth:+.1%}")
    figures = {
        "images": {"train": len(train), "val": len(val)},
        "format": config.data.format,
        "cache": config.data.cache,
        "rss_mib": [round(rss, 1) for rss, _ in peaks],
        "gpu_mib": [round(gpu, 1) for _, gpu in peaks] if world.device.type == "cuda" else None,
        "growth": round(growth, 4),
        "flat": growth <= FLAT_WITHIN,
    }
    results.write(output, "memory", figures)


def growth_of(rss_mib: list[float]) -> float:
    """Returns the relative growth from the peak of the first epochs to the peak of the last
    ones."""
    return max(rss_mib[-COMPARED_EPOCHS:]) / max(rss_mib[:COMPARED_EPOCHS]) - 1


def memory_mib(device: torch.device) -> tuple[float, float]:
    """Returns the resident memory of this process, and the GPU memory used by all processes."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    gpu = 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gpu = total - free
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, gpu / 2**20
