"""`bench index`: what an index of ImageNet's size costs each process of a node, and how long it
takes to shuffle."""

import time
from dataclasses import asdict
from multiprocessing.synchronize import Barrier
from pathlib import Path
from statistics import median
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np

from resnet_dist.bench import results
from resnet_dist.bench.quiet import undisturbed, wait_until_quiet
from resnet_dist.data.index.index import Index, Shards
from resnet_dist.data.index.index_file import load_index_file, save_index
from resnet_dist.data.index.worker_pool import DeafContext
from resnet_dist.data.view.order import block_order, epoch_order

CLASSES = 1000
IMAGES_PER_SHARD = 1000
GLOBAL_BATCH = 256
MEAN_BYTES = 110_000  # of an ImageNet photo
TIMES = 5  # number of measurements, whose median is reported


def bench_index(images: int, output: Path | None) -> None:
    """Prints the time and memory that a synthetic index takes, and writes them to `output`."""
    wait_until_quiet()
    figures, seen = undisturbed(lambda: measured(images))
    processes, orders = figures["loaded_by"], figures["order_seconds"]
    print(
        f"{images:,} images in shards: a file of {figures['file_mib']:.1f} MiB, "
        f"saved in {figures['save_seconds']:.2f} s\n"
    )
    table = [["processes", "load s", "RSS MiB", "due to the index", "private", "shared (PSS)"]]
    for count, costs in processes.items():
        worst = {key: max(cost[key] for cost in costs) for key in costs[0]}
        table.append(
            [
                count,
                f"{worst['seconds']:.3f}",
                f"{worst['rss_mib']:.1f}",
                f"{worst['index_rss_mib']:.1f}",
                f"{worst['index_private_mib']:.1f}",
                f"{worst['index_pss_mib']:.1f}",
            ]
        )
    print(results.columns(table))
    for order, seconds in orders.items():
        print(f"{order} of an epoch: {1000 * seconds:.0f} ms")
    results.write(output, "index", {**figures, **asdict(seen)})


def measured(images: int) -> dict[str, Any]:
    """Measures saving the index, loading it in one and in four processes, and an epoch's order."""
    with TemporaryDirectory(prefix="resnet-dist-bench-") as name:
        top = Path(name)
        path = top / "train" / "index.arrow"
        index = synthetic_index(images, top)
        began = time.perf_counter()
        save_index(index, path, top)
        saved = time.perf_counter() - began
        del index
        file_mib = path.stat().st_size / 2**20
        processes = {str(count): loaded_by(count, path, top) for count in (1, 4)}
    orders = {
        "epoch_order": order_seconds(lambda epoch: epoch_order(0, epoch, images)),
        "block_order": order_seconds(lambda epoch: block_order(0, epoch, images, GLOBAL_BATCH)),
    }
    return {
        "images": images,
        "file_mib": round(file_mib, 1),
        "save_seconds": round(saved, 3),
        "loaded_by": processes,
        "order_seconds": orders,
    }


def synthetic_index(images: int, top: Path) -> Index:
    """Returns an index sorted by class, with names, sizes and byte counts like ImageNet's.

    Its shards are sparse files of the right length without any content.
    """
    random = np.random.default_rng(0)
    labels = np.arange(images) * CLASSES // images
    number = np.arange(images)
    shard = (number // IMAGES_PER_SHARD).astype(np.int32)
    nbytes = random.integers(MEAN_BYTES // 2, MEAN_BYTES * 3 // 2, images)
    ends = np.cumsum(nbytes + 1536)  # 1536 bytes for the tar's headers
    starts = np.concatenate([[0], ends])[::IMAGES_PER_SHARD][: shard[-1] + 1]
    files = tuple(str(top / "train" / f"{i:06}.tar") for i in range(shard[-1] + 1))
    (top / "train").mkdir()
    for i, file in enumerate(files):
        with open(file, "wb") as created:
            created.truncate(int(ends[min((i + 1) * IMAGES_PER_SHARD, images) - 1] - starts[i]))
    sizes = random.integers(200, 600, (images, 2)).astype(np.int32)
    names = [f"{file}/{i:09}.jpg" for i, file in zip(number, np.array(files)[shard], strict=True)]
    offset = ends - nbytes - starts[shard]
    classes = tuple(f"n{i:08}" for i in range(CLASSES))
    shards = Shards(files, shard, offset)
    return Index(classes, labels, sizes, names, None, "0" * 64, nbytes, shards)


def loaded_by(count: int, path: Path, top: Path) -> list[dict[str, float]]:
    """Measures the cost of the index in each of `count` fresh processes that hold it at the same
    time."""
    context = DeafContext()
    barrier, answers = context.Barrier(count), context.Queue()
    started = [
        context.Process(target=_load_and_report, args=(path, top, barrier, answers))
        for _ in range(count)
    ]
    for process in started:
        process.start()
    costs = [answers.get(timeout=120) for _ in started]
    for process in started:
        process.join()
    return costs


def _load_and_report(path: Path, top: Path, barrier: Barrier, answers: Any) -> None:
    before = _memory_mib()
    barrier.wait()
    began = time.perf_counter()
    index = load_index_file(path, top)
    seconds = time.perf_counter() - began
    # Touches what a rank reads in the course of an epoch: everything except most of the names.
    assert index.nbytes is not None
    assert index.shards is not None
    for column in (index.labels, index.sizes, index.nbytes, index.shards.offset):
        column.max()
    index.paths[len(index) // 2]
    barrier.wait()
    after = _memory_mib()
    barrier.wait()
    private = [m["Private_Clean"] + m["Private_Dirty"] for m in (before, after)]
    cost = {
        "seconds": seconds,
        "rss_mib": after["Rss"],
        "index_rss_mib": after["Rss"] - before["Rss"],
        "index_private_mib": private[1] - private[0],
        "index_pss_mib": after["Pss"] - before["Pss"],
    }
    answers.put({key: round(value, 3) for key, value in cost.items()})


def _memory_mib() -> dict[str, float]:
    """Reads /proc/self/smaps_rollup (https://docs.kernel.org/filesystems/proc.html)."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()[1:]
    return {key: int(rest.split()[0]) / 1024 for key, rest in (line.split(":") for line in lines)}


def order_seconds(order: Any) -> float:
    """Returns the median seconds to compute the order of an epoch that is not cached."""
    seconds = []
    for epoch in range(TIMES):
        began = time.perf_counter()
        order(epoch)
        seconds.append(time.perf_counter() - began)
    return round(median(seconds), 4)
