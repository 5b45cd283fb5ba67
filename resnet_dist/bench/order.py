"""`bench order`: how well batches from class-sorted shards are mixed, and how sequential the disk
reads are.

This is a simulation of shards like ImageNet's: samples sorted by class, all of the same length.
"""

from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.bench import results
from resnet_dist.data.view.order import (
    BLOCK_IMAGES,
    WINDOW_IMAGES,
    block_order,
    epoch_order,
    slice_of,
)

CLASSES, IMAGE_BYTES = 1000, 110_000
BATCHES = (256, 1024)
RANKS = (1, 8)
POOLED_BATCHES = 16


def bench_order(images: int, output: Path | None) -> None:
    """Prints how mixed batches are and how ranks read, for a block shuffle and a full shuffle.

    images: number in an epoch; ImageNet's, or fewer for a quick look.
    """
    labels = np.arange(images) * CLASSES // images
    mixing: list[dict[str, Any]] = []
    reads: list[dict[str, Any]] = []
    for batch in BATCHES:
        orders = {
            "block shuffle": block_order(0, 0, images, batch),
            "full shuffle": epoch_order(0, 0, images),
        }
        for name, order in orders.items():
            one, pooled = (class_entropy(labels[order], batch * n) for n in (1, POOLED_BATCHES))
            mixing.append(
                {
                    "batch": batch,
                    "order": name,
                    "entropy_bits": round(one, 4),
                    f"entropy_bits_of_{POOLED_BATCHES}_batches": round(pooled, 4),
                }
            )
            for ranks in RANKS:
                figures = reads_of(order, batch, ranks, in_blocks=name == "block shuffle")
                reads.append({"batch": batch, "order": name, "ranks": ranks, **figures})
    table = [["batch", "order", "bits", f"bits of {POOLED_BATCHES} batches"]]
    table += [[str(value) for value in row.values()] for row in mixing]
    print(f"class entropy of a batch, mean over an epoch; {CLASSES} classes, samples sorted\n")
    print(results.columns(table))
    burst = f"most read in {POOLED_BATCHES} steps"
    table = [["batch", "order", "ranks", "kB per seek", "read / used", burst]]
    for row in reads:
        kb, share, most = (row[key] for key in ("kb_per_seek", "read_per_used", "burst"))
        cells = [f"{kb:,.0f}", f"{share:.3f}", f"{most:.1f} x the mean"]
        table.append([*(str(row[key]) for key in ("batch", "order", "ranks")), *cells])
    print(f"\nreads of each rank; {IMAGE_BYTES // 1000} kB an image, blocks of {BLOCK_IMAGES}\n")
    print(results.columns(table))
    shape = {"images": images, "classes": CLASSES, "image_bytes": IMAGE_BYTES}
    blocks = {"block_images": BLOCK_IMAGES, "window_images": WINDOW_IMAGES}
    results.write(output, "order", {**shape, **blocks, "mixing": mixing, "reads": reads})


def class_entropy(labels: np.ndarray, batch: int) -> float:
    """Returns the entropy of the classes in a batch, in bits, averaged over all full batches.

    labels: int64 [images].
    """
    entropies = []
    for start in range(0, len(labels) // batch * batch, batch):
        counts = np.bincount(labels[start : start + batch])
        share = counts[counts > 0] / batch
        entropies.append(-(share * np.log2(share)).sum())
    return float(np.mean(entropies))


def reads_of(order: np.ndarray, batch: int, ranks: int, in_blocks: bool) -> dict[str, float]:
    """Simulates the reads that the Reader makes.

    in_blocks: a rank reads a whole block when it first needs an image of that block; otherwise it
    reads each image separately. What has been read stays in memory until it is used.

    Returns the mean kB per seek, where a seek is a read that does not start where the rank's
    previous read ended; the ratio of images read to images used; and the burst, the largest number
    of images that all ranks read in POOLED_BATCHES consecutive steps, relative to the mean.
    """
    steps = len(order) // batch
    samples = order[: steps * batch].reshape(steps, batch)
    seeks, read_by_step = 0, np.zeros(steps)
    for rank in range(ranks):
        positions = slice_of(np.arange(batch), rank, ranks)
        mine = samples[:, positions].reshape(-1)
        start, when, count = mine, np.arange(len(mine)), np.ones(len(mine), np.int64)
        if in_blocks:
            blocks, first = np.unique(mine // BLOCK_IMAGES, return_index=True)
            when, blocks = np.sort(first), blocks[np.argsort(first)]
            start = blocks * BLOCK_IMAGES
            count = np.minimum(start + BLOCK_IMAGES, len(order)) - start
        seeks += 1 + int(np.count_nonzero(start[1:] != (start + count)[:-1]))
        read_by_step += np.bincount(when // len(positions), count, minlength=steps)
    pooled = np.convolve(read_by_step, np.ones(min(POOLED_BATCHES, steps)), "valid")
    return {
        "kb_per_seek": round(read_by_step.sum() * IMAGE_BYTES / seeks / 1000, 1),
        "read_per_used": round(read_by_step.sum() / (steps * batch), 4),
        "burst": round(float(pooled.max() / (read_by_step.mean() * min(POOLED_BATCHES, steps))), 2),
    }
