"""CIFAR-10 and CIFAR-100 with a few made-up images, in the forms that Krizhevsky offers."""

import pickle
from pathlib import Path
from typing import Any

import numpy as np

TRAIN_IMAGES = 5

VAL_IMAGES = 3


def some_pixels(count: int, seed: int) -> np.ndarray:
    return np.random.default_rng(seed).integers(0, 256, (count, 3072), np.uint8)


def write_binary(root: Path, data_format: str) -> None:
    if data_format == "cifar10":
        folder, labels = root / "cifar-10-batches-bin", np.array([[3], [9], [0], [1], [2]])
        train = [(f"data_batch_{number}.bin", slice(number - 1, number)) for number in range(1, 6)]
        val = "test_batch.bin"
    else:
        folder = root / "cifar-100-binary"
        labels = np.array([[4, 0], [19, 99], [7, 50], [0, 1], [0, 2]])
        train, val = [("train.bin", slice(None))], "test.bin"
    folder.mkdir(parents=True)
    records = np.hstack([labels.astype(np.uint8), some_pixels(TRAIN_IMAGES, 1)])
    for name, part in train:
        records[part].tofile(folder / name)
    np.hstack([labels[:3].astype(np.uint8), some_pixels(VAL_IMAGES, 2)]).tofile(folder / val)


def write_python(root: Path, data_format: str, protocol: int = 2) -> None:
    """The same images as `write_binary`."""

    def write(name: str, labels: list[list[int]], pixels: np.ndarray) -> None:
        keys = ["labels"] if data_format == "cifar10" else ["coarse_labels", "fine_labels"]
        batch: dict[Any, Any] = {b"data": pixels, b"batch_label": b"training batch 1 of 5"}
        batch |= {key.encode(): [row[i] for row in labels] for i, key in enumerate(keys)}
        (folder / name).write_bytes(pickle.dumps(batch, protocol))

    pixels = some_pixels(TRAIN_IMAGES, 1)
    if data_format == "cifar10":
        folder, labels = root / "cifar-10-batches-py", [[3], [9], [0], [1], [2]]
        folder.mkdir(parents=True)
        for number in range(5):
            write(f"data_batch_{number + 1}", labels[number : number + 1], pixels[[number]])
        write("test_batch", labels[:3], some_pixels(VAL_IMAGES, 2))
    else:
        folder = root / "cifar-100-python"
        folder.mkdir(parents=True)
        labels = [[4, 0], [19, 99], [7, 50], [0, 1], [0, 2]]
        write("train", labels, pixels)
        write("test", labels[:3], some_pixels(VAL_IMAGES, 2))
