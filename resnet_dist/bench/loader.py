"""`bench loader`: loaders side by side, the same photos, batch and threads, nothing but loading.

Each loader has a process of its own, and they run in turn (A B C A B C ...), so that whatever else
the machine does meets all of them. A figure is the median of the rounds; a ratio the median of the
ratios within a round.
"""

import multiprocessing
import os
import resource
import shutil
import time
from concurrent.futures import ProcessPoolExecutor
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from statistics import median
from typing import Any

import torch

from resnet_dist.bench import peers, results
from resnet_dist.bench.peers import Work
from resnet_dist.bench.photos import as_shards, photo_folder
from resnet_dist.config import DataConfig
from resnet_dist.data.load.build import agreed_decoding
from resnet_dist.errors import UserError

IMAGES_PER_THREAD = 2000  # in a run: 5 to 10 seconds
WARM_BATCHES_PER_THREAD = 2  # what torch's DataLoader has under way per worker


@dataclass(frozen=True)
class Settings:
    """What all loaders are given alike."""

    batch_size: int
    threads: int
    images: int  # timed in each run
    runs: int
    # In whose .index runs keep what the probe of a GPU's decoders saw; None: it is probed anew.
    run_root: str | None = None

    @property
    def warm_batches(self) -> int:
        """Before the timed ones, and after: so that at both ends as much is under way."""
        return 4 + WARM_BATCHES_PER_THREAD * self.threads

    @property
    def timed_batches(self) -> int:
        """Whole turns of the threads: a worker process delivers its batch when it is whole."""
        turn = self.batch_size * self.threads
        return max(1, round(self.images / turn)) * self.threads


@dataclass(frozen=True)
class Run:
    """One stream, from its start to its end."""

    images_per_sec: float  # of the timed batches
    cpu_ms_per_image: (
        float  # of the whole stream, all threads and processes; other load hardly shows
    )
    startup_seconds: float  # to the first batch
    peak_rss_mib: float  # of the process so far, without worker processes


@dataclass(frozen=True)
class Loader:
    name: str
    stream: str  # a function of peers.py
    work: Work


def bench_loader(
    data: Path,
    shards: Path | None,
    settings: Settings,
    output: Path | None,
    with_peers: bool = True,
) -> None:
    """Prints the table, and writes the figures to `output`.

    shards: of the same photos; None: they are made. with_peers: torchvision's, DALI's and
    libjpeg-turbo's too.

    Raises:
        UserError: no photos in `data`, or shards that cannot be used.
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
    """The loaders that this machine can run."""
    gpu = torch.cuda.is_available()
    photos = sum(1 for _ in (folder / "train").glob("*/*"))
    try:
        peers.compiled_libjpeg()
        has_limit = True
    except UserError as error:
        print(f"left out: {error}")
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
        agreed_decoding(work.config, work.world)  # a GPU is probed here, not while it is timed
        in_shards = replace(work, data=replace(files, format="shards", root=str(shards)))
        loaders += [
            Loader("ours, files", "ours", work),
            Loader("ours, shards", "ours", in_shards),
        ]
        if gpu:
            # Each photo once in an epoch: the cache would keep it as often as it is listed.
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
            loaders += [Loader("libjpeg-turbo, decode only", "bare_libjpeg", work)]
    return loaders


def warm_page_cache(*folders: Path) -> None:
    for folder in folders:
        for parent, _, names in os.walk(folder):
            for name in names:
                with open(os.path.join(parent, name), "rb", buffering=0) as file:
                    while file.read(1 << 20):
                        pass


def interleave(loaders: list[Loader], settings: Settings) -> list[list[Run]]:
    """[runs][loaders]. Prints each round as it comes."""
    # Forks of a server that has imported everything, and has no threads yet.
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload([__name__, "torchvision", "resnet_dist.bench.dali_peer"])
    rounds = []
    with ExitStack() as stack:
        own = [stack.enter_context(ProcessPoolExecutor(1, context)) for _ in loaders]
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


def measure(stream: str, work: Work, settings: Settings) -> Run:
    peers.index_of(work)  # it is made once a run, and is measured by `bench index`
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
    """Of this process and of the worker processes that have ended."""
    return sum(os.times()[:4])


def summary(loader: Loader, rounds: list[list[Run]], loaders: list[Loader]) -> dict[str, Any]:
    """The figures of a loader: each run's, their medians, and how much faster `ours, files` is."""
    place = loaders.index(loader)
    crop = loader.work.data.train_crop
    ours = next(i for i, other in enumerate(loaders) if other.work.data.train_crop == crop)
    runs = [one[place] for one in rounds]
    return {
        "loader": loader.name,
        "train_crop": crop,
        "device": loader.work.device,
        "images_per_sec": round(median(run.images_per_sec for run in runs), 1),
        "cpu_ms_per_image": round(median(run.cpu_ms_per_image for run in runs), 3),
        "startup_seconds": round(median(run.startup_seconds for run in runs), 3),
        "ours_files_is_times_as_fast": round(
            median(one[ours].images_per_sec / one[place].images_per_sec for one in rounds), 3
        ),
        "runs": [{key: round(value, 3) for key, value in asdict(run).items()} for run in runs],
    }


def describe_results(rows: list[dict[str, Any]], settings: Settings) -> str:
    head = ["img/s", "lowest", "highest", "CPU ms/img", "start s", "ours, files is"]
    parts = [
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
        parts.append("\n" + results.columns(table))
    return "\n".join(parts)
