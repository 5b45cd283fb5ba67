"""Measures streams of batches side by side: loaders, or trainers.

Each stream has a process of its own, and they take turns in an order that rotates (A B C, B C A,
...), so that other load on the machine affects all of them alike. A figure is the median over the
rounds, and a ratio is the median of the ratios within each round.
"""

import multiprocessing
import os
import resource
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from multiprocessing import forkserver
from pathlib import Path
from typing import Any

import torch

from resnet_dist.bench.peers.loaders import Stream, Work, index_of
from resnet_dist.bench.quiet import cpu_seconds_of_tree, undisturbed, wait_until_quiet
from resnet_dist.bench.turns import Spread
from resnet_dist.data.index.worker_pool import end_with_parent
from resnet_dist.process import deaf_to_ctrl_c

HEAD = ["img/s", "quartiles", "CPU ms/img", "start s", "ours is", "quartiles"]
WARM_BATCHES_PER_THREAD = 2  # torch's DataLoader prefetches this many batches per worker


@dataclass(frozen=True)
class Settings:
    """The settings that all loaders share."""

    batch_size: int
    threads: int
    images: int  # timed in each run
    runs: int
    # Reports of the probe of a GPU's decoders are read from run_root/.index. None: probes again.
    run_root: str | None = None
    # Number of untimed batches, both before and after the timed ones. None: so many that as many
    # batches are in flight at the end of the timing as at its start.
    warm: int | None = None

    @property
    def warm_batches(self) -> int:
        return 4 + WARM_BATCHES_PER_THREAD * self.threads if self.warm is None else self.warm

    @property
    def batches(self) -> int:
        """Number of batches that a stream must deliver."""
        return self.timed_batches + 2 * self.warm_batches

    @property
    def timed_batches(self) -> int:
        """Number of timed batches, a multiple of the number of threads.

        A worker process builds a whole batch by itself, so the workers deliver in cycles of one
        batch each.
        """
        cycle = self.batch_size * self.threads
        return max(1, round(self.images / cycle)) * self.threads


@dataclass(frozen=True)
class Run:
    """The measurements of one stream, from its start to its end."""

    images_per_sec: float  # over the timed batches
    # CPU time of all threads and processes over the timed batches.
    cpu_ms_per_image: float
    startup_seconds: float  # until the first batch
    peak_rss_mib: float  # of the process so far, excluding its worker processes
    # What else the machine did meanwhile, and how often the run was repeated because of that.
    steal_pct: float = 0.0
    others_pct: float = 0.0
    repeats: int = 0


@dataclass(frozen=True)
class Contestant:
    name: str
    stream: Callable[[Any], Stream]  # a function of a module in peers/
    work: Work


def warm_page_cache(*folders: Path) -> None:
    """Reads all files below the folders, so that the page cache holds them."""
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                with open(os.path.join(parent, name), "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass


def interleave(contestants: list[Contestant], settings: Settings) -> list[list[Run]]:
    """Runs the streams in turn, settings.runs times, and prints the speeds of each round.

    Returns a list of rounds, each a list with one Run per contestant.
    """
    # Forks from a server process that has imported everything but has not started any thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision", "resnet_dist.bench.peers.dali_reader"])
    with deaf_to_ctrl_c():
        forkserver.ensure_running()
    rounds = []
    with ExitStack() as stack:
        own = [
            stack.enter_context(ProcessPoolExecutor(1, context, initializer=end_with_parent))
            for _ in contestants
        ]
        stack.push(_end_all_on_ctrl_c)  # first, as leaving a pool waits for its process
        wait_until_quiet()
        for number in range(settings.runs):
            first = number % len(contestants)
            runs: dict[int, Run] = {}
            for i in [*range(first, len(contestants)), *range(first)]:
                runs[i] = _turn(own[i], contestants[i], settings)
            rounds.append([runs[i] for i in range(len(contestants))])
            figures = " ".join(f"{run.images_per_sec:.0f}" for run in rounds[-1])
            print(f"round {number + 1} of {settings.runs}: {figures} img/s", flush=True)
    return rounds


def _turn(process: ProcessPoolExecutor, one: Contestant, settings: Settings) -> Run:
    def run() -> Run:
        return process.submit(measure, one.stream, one.work, settings).result()

    measured, seen = undisturbed(run, say=partial(print, flush=True))
    return replace(
        measured, steal_pct=seen.steal_pct, others_pct=seen.others_pct, repeats=seen.repeats
    )


def _end_all_on_ctrl_c(kind: type[BaseException] | None, *_: object) -> None:
    if kind is KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()


def measure(stream: Callable[[Any], Stream], work: Work, settings: Settings) -> Run:
    """Runs one stream in this process, and measures it."""
    # Not timed: training makes the index once per run, and `bench index` measures it.
    index_of(work)
    first, last = settings.warm_batches, settings.warm_batches + settings.timed_batches
    began, times, cpu = time.perf_counter(), {}, {}
    batches = stream(work)
    for number in range(work.batches):
        next(batches)
        if number in (0, first, last):
            if work.device == "cuda":
                torch.cuda.synchronize()  # CPU-GPU sync point
            times[number] = time.perf_counter()
            cpu[number] = cpu_seconds_of_tree(os.getpid())  # workers, too
    batches.close()
    images = settings.timed_batches * work.batch_size
    return Run(
        images_per_sec=images / (times[last] - times[first]),
        cpu_ms_per_image=1000 * (cpu[last] - cpu[first]) / images,
        startup_seconds=times[0] - began,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def summary(
    one: Contestant, rounds: list[list[Run]], contestants: list[Contestant], ours: Contestant
) -> dict[str, Any]:
    """Returns a contestant's figures: each run, the medians, and how many times as fast `ours`
    is."""
    column, reference = contestants.index(one), contestants.index(ours)
    runs = [turns[column] for turns in rounds]
    speed = Spread.of([run.images_per_sec for run in runs])
    times = Spread.of(
        [turns[reference].images_per_sec / turns[column].images_per_sec for turns in rounds]
    )
    return {
        "device": one.work.device,
        "images_per_sec": round(speed.median, 2),
        "images_per_sec_quartiles": [round(speed.low, 2), round(speed.high, 2)],
        "cpu_ms_per_image": round(Spread.of([run.cpu_ms_per_image for run in runs]).median, 3),
        "startup_seconds": round(Spread.of([run.startup_seconds for run in runs]).median, 3),
        "ours_is_times_as_fast": round(times.median, 3),
        "ours_is_times_as_fast_quartiles": [round(times.low, 3), round(times.high, 3)],
        "runs": [{key: round(value, 3) for key, value in asdict(run).items()} for run in runs],
    }


def columns_of(row: dict[str, Any]) -> list[str]:
    """Formats a summary as cells of a table; the header is HEAD."""
    low, high = row["images_per_sec_quartiles"]
    times_low, times_high = row["ours_is_times_as_fast_quartiles"]
    return [
        f"{row['images_per_sec']:,.1f}",
        f"{low:,.1f}..{high:,.1f}",
        f"{row['cpu_ms_per_image']:.2f}",
        f"{row['startup_seconds']:.2f}",
        f"{row['ours_is_times_as_fast']:.3f} x as fast",
        f"{times_low:.3f}..{times_high:.3f}",
    ]
