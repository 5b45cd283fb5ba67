"""`bench loader`: compares data loaders on the same photos, batch size and number of threads.

Only loading is measured, without a network. Each loader has its own process, and the loaders take
turns (A B C A B C ...), so that other load on the machine affects all of them alike. A figure is
the median over the rounds, and a ratio is the median of the ratios within each round.
"""

import multiprocessing
import os
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from multiprocessing import forkserver
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resnet_dist.bench import peers, results
from resnet_dist.bench.peers import Work
from resnet_dist.bench.photos import as_shards, photo_folder
from resnet_dist.config import DataConfig
from resnet_dist.data.index.worker_pool import end_with_parent
from resnet_dist.data.load.build import agreed_decoding
from resnet_dist.errors import UserError
from resnet_dist.process import deaf_to_ctrl_c

IMAGES_PER_THREAD = 2000  # timed in each run: 5 to 10 seconds
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

    @property
    def warm_batches(self) -> int:
        """Number of untimed batches, both before and after the timed ones.

        They ensure that as many batches are in flight at the end of the timing as at its start.
        """
        return 4 + WARM_BATCHES_PER_THREAD * self.threads

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
    # CPU time of all threads and processes over the whole stream; hardly affected by other load.
    cpu_ms_per_image: float
    startup_seconds: float  # until the first batch
    peak_rss_mib: float  # of the process so far, excluding its worker processes


@dataclass(frozen=True)
class Loader:
    name: str
    stream: str  # name of a function in peers.py
    work: Work


def bench_loader(
    data: Path,
    shards: Path | None,
    settings: Settings,
    output: Path | None,
    with_peers: bool = True,
) -> None:
    """Prints a table of the loaders, and writes the figures to `output`.

    shards: a folder with the same photos as shards; None: makes temporary ones. with_peers: also
    measures torchvision, DALI's own reader and libjpeg-turbo.

    Raises:
        UserError: there are no photos in `data`, or the shards cannot be used.
    """
    with ExitStack() as stack:
        folder = stack.enter_context(photo_folder(data, settings.images))
        if shards is None:
            shards = as_shards(folder)
            stack.callback(shutil.rmtree, shards)
        loaders = side_by_side(folder, shards, settings)
        if not with_peers:
            loaders = [loader for loader in loaders if loader.stream == "ours"]
        warm_page_cache(folder, shards)
        runs = interleave(loaders, settings)
    rows = [summary(loader, runs, loaders) for loader in loaders]
    print(describe_results(rows, settings))
    results.write(output, "loader", {"settings": asdict(settings), "loaders": rows})


def side_by_side(folder: Path, shards: Path, settings: Settings) -> list[Loader]:
    """Returns the loaders that this machine can run."""
    gpu = torch.cuda.is_available()
    photos = sum(1 for _ in (folder / "train").glob("*/*"))
    try:
        peers.plain_c()
        has_limit = True
    except UserError as error:
        print(f"skipped: {error}")
        has_limit = False
    loaders = []
    for crop in ("random_resized", "scale"):
        files = DataConfig(
            root=str(folder),
            train_crop=crop,
            decode_threads=settings.threads,
        )
        work = Work(
            data=files,
            images=settings.images,
            batch_size=settings.batch_size,
            batches=settings.timed_batches + 2 * settings.warm_batches,
            device="cuda" if gpu else "cpu",
            run_root=settings.run_root or str(folder),
        )
        agreed_decoding(work.config, work.world)  # probes a GPU now, rather than while timing
        in_shards = replace(work, data=replace(files, format="shards", root=str(shards)))
        loaders += [
            Loader("ours, files", "ours", work),
            Loader("ours, shards", "ours", in_shards),
        ]
        if gpu:
            # Lists each photo only once per epoch, because the cache would keep a copy per listing.
            once = replace(work, images=max(photos, settings.batch_size))
            cached = replace(once, data=replace(files, cache="decoded"))
            loaders += [Loader("ours, cache=decoded", "ours", cached)]
        loaders += [Loader("torchvision, same windows", "torchvision_same_windows", work)]
        if crop == "random_resized":
            loaders += [
                Loader("torchvision, own windows", "torchvision_own_windows", work),
                Loader("DALI's reader, own windows", "dali_own_windows", work),
            ]
        if has_limit:
            loaders += [
                Loader("plain C, from memory", "plain_c_loader", work),
                Loader("libjpeg-turbo, decode only", "bare_libjpeg", work),
            ]
    return loaders


def warm_page_cache(*folders: Path) -> None:
    """Reads all files below the folders, so that the page cache holds them."""
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                with open(os.path.join(parent, name), "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass


def interleave(loaders: list[Loader], settings: Settings) -> list[list[Run]]:
    """Runs the loaders in turn, settings.runs times, and prints the speeds of each round.

    Returns a list of rounds, each a list with one Run per loader.
    """
    # Forks from a server process that has imported everything but has not started any thread.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision", "resnet_dist.bench.dali_peer"])
    with deaf_to_ctrl_c():
        forkserver.ensure_running()
    rounds = []
    with ExitStack() as stack:
        own = [
            stack.enter_context(ProcessPoolExecutor(1, context, initializer=end_with_parent))
            for _ in loaders
        ]
        stack.push(_end_all_on_ctrl_c)  # first, as leaving a pool waits for its process
        for number in range(settings.runs):
            rounds.append(
                [
                    process.submit(measure, loader.stream, loader.work, settings).result()
                    for process, loader in zip(own, loaders, strict=True)
                ]
            )
            figures = " ".join(f"{run.images_per_sec:.0f}" for run in rounds[-1])
            print(f"round {number + 1} of {settings.runs}: {figures} img/s", flush=True)
    return rounds


def _end_all_on_ctrl_c(kind: type[BaseException] | None, *_: object) -> None:
    if kind is KeyboardInterrupt:
        for process in multiprocessing.active_children():
            process.kill()


def measure(stream: str, work: Work, settings: Settings) -> Run:
    """Runs one stream in this process, and measures it."""
    # Not timed: training makes the index once per run, and `bench index` measures it.
    peers.index_of(work)
    first, last = settings.warm_batches, settings.warm_batches + settings.timed_batches
    cpu, began, times = _cpu_seconds(), time.perf_counter(), {}
    batches = getattr(peers, stream)(work)
    for number in range(work.batches):
        next(batches)
        if number in (0, first, last):
            if work.device == "cuda":
                torch.cuda.synchronize()
            times[number] = time.perf_counter()
    batches.close()
    return Run(
        images_per_sec=settings.timed_batches * work.batch_size / (times[last] - times[first]),
        cpu_ms_per_image=1000 * (_cpu_seconds() - cpu) / (work.batches * work.batch_size),
        startup_seconds=times[0] - began,
        peak_rss_mib=resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
    )


def _cpu_seconds() -> float:
    """Returns the CPU time of this process and of its worker processes that have ended."""
    return sum(os.times()[:4])


def summary(loader: Loader, rounds: list[list[Run]], loaders: list[Loader]) -> dict[str, Any]:
    """Returns a loader's figures: each run, the medians, and how many times as fast `ours, files`
    is."""
    column = loaders.index(loader)
    crop = loader.work.data.train_crop
    ours = next(i for i, other in enumerate(loaders) if other.work.data.train_crop == crop)
    runs = [one[column] for one in rounds]
    return {
        "loader": loader.name,
        "train_crop": crop,
        "device": loader.work.device,
        "images_per_sec": round(median(run.images_per_sec for run in runs), 1),
        "cpu_ms_per_image": round(median(run.cpu_ms_per_image for run in runs), 3),
        "startup_seconds": round(median(run.startup_seconds for run in runs), 3),
        "ours_files_is_times_as_fast": round(
            median(one[ours].images_per_sec / one[column].images_per_sec for one in rounds), 3
        ),
        "runs": [{key: round(value, 3) for key, value in asdict(run).items()} for run in runs],
    }


def describe_results(rows: list[dict[str, Any]], settings: Settings) -> str:
    head = ["img/s", "lowest", "highest", "CPU ms/img", "start s", "ours, files is"]
    blocks = [
        f"\nmedian of {settings.runs} runs of {settings.timed_batches * settings.batch_size:,} "
        f"images, batch {settings.batch_size}, {settings.threads} threads, {rows[0]['device']}"
    ]
    for crop in dict.fromkeys(row["train_crop"] for row in rows):
        table = [[crop, *head]]
        for row in (row for row in rows if row["train_crop"] == crop):
            speeds = [run["images_per_sec"] for run in row["runs"]]
            table.append(
                [
                    row["loader"],
                    f"{row['images_per_sec']:,.0f}",
                    f"{min(speeds):,.0f}",
                    f"{max(speeds):,.0f}",
                    f"{row['cpu_ms_per_image']:.2f}",
                    f"{row['startup_seconds']:.2f}",
                    f"{row['ours_files_is_times_as_fast']:.2f} x as fast",
                ]
            )
        blocks.append("\n" + results.columns(table))
    return "\n".join(blocks)
