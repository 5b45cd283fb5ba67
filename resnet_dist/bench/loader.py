"""`bench loader`: compares data loaders on the same photos, batch size and number of threads.

Only loading is measured, without a network.
"""

import shutil
from contextlib import ExitStack
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import torch

from resnet_dist.bench import results
from resnet_dist.bench.peers import loaders as peers
from resnet_dist.bench.peers.loaders import Work
from resnet_dist.bench.photos import as_shards, photo_folder
from resnet_dist.bench.streams import (
    HEAD,
    Contestant,
    Run,
    Settings,
    columns_of,
    interleave,
    summary,
    warm_page_cache,
)
from resnet_dist.config import DataConfig
from resnet_dist.data.load.build import agreed_decoding
from resnet_dist.errors import UserError

IMAGES_PER_THREAD = 2000  # timed in each run: 5 to 10 seconds


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
            loaders = [loader for loader in loaders if loader.stream is peers.ours]
        warm_page_cache(folder, shards)
        runs = interleave(loaders, settings)
    rows = [summary_of(loader, runs, loaders) for loader in loaders]
    print(describe_results(rows, settings))
    results.write(output, "loader", {"settings": asdict(settings), "loaders": rows})


def side_by_side(folder: Path, shards: Path, settings: Settings) -> list[Contestant]:
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
            batches=settings.batches,
            device="cuda" if gpu else "cpu",
            run_root=settings.run_root or str(folder),
        )
        agreed_decoding(work.config, work.world)  # probes a GPU now, rather than while timing
        in_shards = replace(work, data=replace(files, format="shards", root=str(shards)))
        loaders += [
            Contestant("ours, files", peers.ours, work),
            Contestant("ours, shards", peers.ours, in_shards),
        ]
        if gpu:
            # Lists each photo only once per epoch, because the cache would keep a copy per listing.
            once = replace(work, images=max(photos, settings.batch_size))
            cached = replace(once, data=replace(files, cache="decoded"))
            loaders += [Contestant("ours, cache=decoded", peers.ours, cached)]
        loaders += [Contestant("torchvision, same windows", peers.torchvision_same_windows, work)]
        if crop == "random_resized":
            loaders += [
                Contestant("torchvision, own windows", peers.torchvision_own_windows, work),
                Contestant("DALI's reader, own windows", peers.dali_own_windows, work),
            ]
        if has_limit:
            loaders += [
                Contestant("plain C, from memory", peers.plain_c_loader, work),
                Contestant("libjpeg-turbo, decode only", peers.bare_libjpeg, work),
            ]
    return loaders


def summary_of(
    loader: Contestant, rounds: list[list[Run]], loaders: list[Contestant]
) -> dict[str, Any]:
    """Returns a loader's figures, next to `ours, files` with the same crops."""
    crop = loader.work.data.train_crop
    ours = next(other for other in loaders if other.work.data.train_crop == crop)
    names = {"loader": loader.name, "train_crop": crop}
    return {**names, **summary(loader, rounds, loaders, ours)}


def describe_results(rows: list[dict[str, Any]], settings: Settings) -> str:
    blocks = [
        f"\nmedian of {settings.runs} runs of {settings.timed_batches * settings.batch_size:,} "
        f"images, batch {settings.batch_size}, {settings.threads} threads, {rows[0]['device']}"
    ]
    for crop in dict.fromkeys(row["train_crop"] for row in rows):
        mine = [row for row in rows if row["train_crop"] == crop]
        table = [[crop, *HEAD], *([row["loader"], *columns_of(row)] for row in mine)]
        blocks.append("\n" + results.columns(table))
    return "\n".join(blocks)
