"""`bench e2e`: what limits a config on this machine: the step, the loader, or the network.

Measures the training step on noise in memory, the loader alone, and both together, as in training.
With several ranks also the step without any communication. They take turns.
"""

import math
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from resnet_dist.bench import results
from resnet_dist.bench.machine_floor import floor_of_a_step
from resnet_dist.bench.noise_job import NoiseJob, alone
from resnet_dist.bench.turns import Spread, figures_of, repeated, spread, take_turns
from resnet_dist.config import Config, OptimConfig
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.requests import train_requests
from resnet_dist.distributed import World
from resnet_dist.plan import Plan

SYNTHETIC, LOADER, BOTH, ALONE = "synthetic", "loader only", "both", "synthetic, no communication"
TURN_SECONDS = 4.0
SPARE_BATCHES = 2  # taken untimed at the start of a turn, beyond those that stand ready
WORTH_SAYING = 1.1  # a step this many times as long as without communication is network-bound


@dataclass(frozen=True)
class Verdict:
    """What limits training, and what to change."""

    bound: str  # "compute", "data" or "network"
    overlap: float  # of both together to the slower of the two
    text: str


def bench_end_to_end(config: Config, world: World, runs: int, output: Path | None) -> None:
    """Prints the three speeds, the overlap and the verdict. A collective.

    Raises:
        UserError: the config does not fit the data.
    """
    endless = replace(config.train, epochs=None, iterations=10**6)
    config = replace(config, train=endless, optim=OptimConfig())
    index = load_index(config, "train", world)
    plan = Plan.of(config, world.size, len(index), None)
    loader = make_loader(index, config, world)
    batches = loader.batches(train_requests(config, plan, index, world.rank, 0))
    px = config.data.crop_px
    images = plan.global_batch_size / plan.accumulation  # of a pass, over all ranks
    of_a_rank = replace(config.train, max_local_batch_size=math.ceil(images / world.size))
    config = replace(config, train=of_a_rank)
    job = NoiseJob(world, config, px)
    contestants: dict[str, Callable[[int], None]] = {
        SYNTHETIC: lambda count: _train(job, [job.batch] * count),
        LOADER: lambda count: _exhaust(batches, count),
        BOTH: lambda count: _train(job, _ahead(batches, count)),
    }
    if world.size > 1:
        by_itself = NoiseJob(alone(world), config, px)
        contestants[ALONE] = lambda count: _train(by_itself, [job.batch] * count)
    ready = config.data.prefetch_batches + SPARE_BATCHES

    def speed(name: str) -> Callable[[], float]:
        waits = ready if name in (LOADER, BOTH) else 0
        seconds = repeated(contestants[name], world, TURN_SECONDS, waits)
        return lambda: images / seconds()

    timed = {name: speed(name) for name in contestants}
    turns = take_turns(timed, runs, world)
    batches.close()
    speeds = {name: spread(of_this).median for name, of_this in turns.items()}
    verdict = judge(speeds, world.device.type == "cpu")
    model, precision = config.model.name, config.train.precision
    floor = floor_of_a_step(model, job.batch_size, px, precision, world.device)
    figures = {
        "config": config.name,
        "model": model,
        "precision": precision,
        "local_batch_size": job.batch_size,
        "ranks": world.size,
        "images_per_sec": {name: figures_of(of_this) for name, of_this in turns.items()},
        "verdict": asdict(verdict),
        "floor": floor.figures(),
    }
    if world.is_main:
        print(describe_figures(figures, runs))
        results.write(output, "e2e", figures)


def _train(job: NoiseJob, batches: Any) -> None:
    for batch in batches:
        job.step(batch)


def _exhaust(batches: Iterator[Batch], count: int) -> None:
    for _ in range(count):
        next(batches)


def _ahead(batches: Iterator[Batch], count: int) -> Iterator[Batch]:
    """Yields `count` batches, each fetched before the step on the one before, as in training."""
    upcoming = next(batches)
    for _ in range(count - 1):
        batch, upcoming = upcoming, next(batches)
        yield batch
    yield upcoming


def judge(images_per_sec: dict[str, float], on_cpu: bool) -> Verdict:
    """Says what limits training. images_per_sec: of each of the contestants."""
    synthetic, loader, both = (images_per_sec[name] for name in (SYNTHETIC, LOADER, BOTH))
    overlap = both / min(synthetic, loader)
    shared = ""
    if on_cpu:
        shared = (
            ". On a CPU the step and the loader share the cores, so that both together are slower "
            "than either"
        )
    if loader < synthetic:
        text = (
            f"data-bound: the loader makes {loader:,.1f} img/s, and the step could take "
            f"{synthetic:,.1f}; try `resnet-dist bench loader DATA --tune`, more "
            "data.decode_threads or cores per rank, smaller photos (`resnet-dist prepare shards "
            "--shortest-px`), or data.cache"
        )
        return Verdict("data", overlap, text + shared)
    alone = images_per_sec.get(ALONE, synthetic)
    if alone > WORTH_SAYING * synthetic:
        text = (
            f"network-bound: the ranks make {alone:,.1f} img/s without communication, and "
            f"{synthetic:,.1f} with it; try a larger train.max_local_batch_size, "
            "model.sync_batchnorm=node, or `resnet-dist bench allreduce` to see the network alone"
        )
        return Verdict("network", overlap, text + shared)
    text = (
        f"compute-bound: the step takes {synthetic:,.1f} img/s, and the loader could make "
        f"{loader:,.1f}; try train.precision=bf16 or a larger train.max_local_batch_size, and "
        "`resnet-dist bench step --profile` to see where the time goes"
    )
    return Verdict("compute", overlap, text + shared)


def describe_figures(figures: dict[str, Any], runs: int) -> str:
    most = figures["ranks"] * figures["floor"]["images_per_sec"]
    table = [["", "img/s", "quartiles", "of the step's floor"]]
    for name, found in figures["images_per_sec"].items():
        speed = Spread(*(found[key] for key in ("median", "low", "high")))
        fraction = "" if name == LOADER else f"{speed.median / most:.1%}"
        table.append([name, f"{speed.median:,.1f}", speed.text(), fraction])
    verdict = figures["verdict"]
    return "\n".join(
        [
            f"\n{figures['model']}, {figures['precision']}, batch {figures['local_batch_size']} on "
            f"each of {figures['ranks']} ranks; medians of {runs} runs\n",
            results.columns(table),
            f"\nfloor of a step on this machine: {most:,.1f} img/s over all ranks",
            f"overlap: {verdict['overlap']:.2f} of the slower of the two",
            verdict["text"],
        ]
    )
