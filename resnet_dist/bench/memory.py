"""`bench memory`: does loading take more memory with each epoch? Training and evaluation batches in
turn, as `train` asks for them, without a network."""

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

COMPARED_EPOCHS = 5  # the highest of the last ones against the highest of the first ones
FLAT_WITHIN = 0.05  # how threads meet changes the peak of an epoch by as much


def bench_memory(config: Config, world: World, epochs: int, output: Path | None) -> None:
    """Prints the most memory that was held in each epoch, and whether it is flat.

    Raises:
        UserError: the config does not fit the data.
    """
    lasting = replace(config.train, epochs=float(epochs), iterations=None)
    config = replace(config, train=lasting, optim=OptimConfig())
    train, val = load_index(config, "train", world), load_index(config, "val", world)
    plan = Plan.of(config, world.size, len(train), len(val))
    train_loader, val_loader = (make_loader(index, config, world) for index in (train, val))
    held: list[list[float]] = []  # RSS, GPU; MiB
    print(f"{len(train):,} train and {len(val):,} val images; the most MiB held in each epoch:")
    for epoch in range(epochs):
        requests = train_requests(config, plan, train, world.rank, epoch * plan.steps_per_epoch)
        batches = train_loader.batches(requests)
        most = [0.0, 0.0]
        for _ in range(plan.steps_per_epoch * plan.accumulation):
            next(batches)
            most = list(map(max, most, memory_mib(world.device)))
        batches.close()  # before the evaluation, as `train` does
        requests = eval_requests(config, val, CENTER_CROP, world.rank, world.size)
        for _ in val_loader.batches(requests):
            most = list(map(max, most, memory_mib(world.device)))
        held.append(most)
        gpu = f"  GPU {most[1]:,.0f}" if world.device.type == "cuda" else ""
        print(f"epoch {epoch + 1:>2}  RSS {most[0]:,.1f}{gpu}", flush=True)
    growth = growth_of([one[0] for one in held])
    verdict = "flat" if growth <= FLAT_WITHIN else "NOT FLAT"
    print(f"{verdict}: the last {COMPARED_EPOCHS} epochs against the first: {growth:+.1%}")
    figures = {
        "images": {"train": len(train), "val": len(val)},
        "format": config.data.format,
        "cache": config.data.cache,
        "rss_mib": [round(rss, 1) for rss, _ in held],
        "gpu_mib": [round(gpu, 1) for _, gpu in held] if world.device.type == "cuda" else None,
        "growth": round(growth, 4),
        "flat": growth <= FLAT_WITHIN,
    }
    results.write(output, "memory", figures)


def growth_of(rss_mib: list[float]) -> float:
    """The highest of the last epochs against the highest of the first ones: a share of it."""
    return max(rss_mib[-COMPARED_EPOCHS:]) / max(rss_mib[:COMPARED_EPOCHS]) - 1


def memory_mib(device: torch.device) -> tuple[float, float]:
    """Resident memory of this process, and what is taken of the GPU, by anyone."""
    with open("/proc/self/statm") as file:
        pages = int(file.read().split()[1])
    gpu = 0
    if device.type == "cuda":
        free, total = torch.cuda.mem_get_info(device)
        gpu = total - free
    return pages * os.sysconf("SC_PAGE_SIZE") / 2**20, gpu / 2**20
