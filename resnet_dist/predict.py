"""What a trained network says of image files: classes and probabilities, a row per image."""

import csv
import os
import sys
import warnings
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnet_dist import distributed
from resnet_dist.config import DataConfig
from resnet_dist.data.augment import Request, eval_windows
from resnet_dist.data.dali import Batch, Loader
from resnet_dist.data.headers import displayed_size
from resnet_dist.data.index import HEADER_THREADS, Index
from resnet_dist.data.listing import IMAGE_SUFFIXES, images_below
from resnet_dist.data.source import make_loader
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.precision import autocast
from resnet_dist.trained import Trained, load_trained


def predict(path: Path, inputs: Sequence[str], top: int, as_csv: bool) -> bool:
    """Prints the `top` likeliest classes of each image, as soon as its batch is done.

    path: a checkpoint or run folder. inputs: image files, and folders to look for them. An image
    that cannot be read is a line on stderr, and the others are predicted all the same.

    Returns whether all were read.

    Raises:
        UserError: no checkpoint, no images, or more classes asked for than there are.
    """
    world = distributed.start_alone("predict")
    trained = load_trained(path, [], world)
    classes = trained.classes
    if top > len(classes):
        raise UserError(f"--top {top}: {path} has {len(classes)} classes; give at most as many")
    files = find_images(inputs)
    places = [""] if top == 1 else [str(place) for place in range(1, top + 1)]
    header = ["path", *(f"{name}{n}" for n in places for name in ("class", "probability"))]
    write = _csv_row if as_csv else _table_row(header, files, classes)
    write(header)
    # Pillow's doubts about headers name no file; what cannot be read is said below.
    warnings.filterwarnings("ignore", module="PIL")
    all_read = True
    for file, answer in classify(trained, files, world):
        if isinstance(answer, str):
            print(f"{file}: {answer}", file=sys.stderr)
            all_read = False
        else:
            best = answer.topk(top)
            pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
            write([file, *(text for n, p in pairs for text in (classes[n], f"{p:.6f}"))])
    return all_read


def find_images(inputs: Sequence[str]) -> list[str]:
    """Files as they are given; in place of a folder, the image files below it, sorted."""
    found: list[str] = []
    for given in inputs:
        inner = sorted(images_below(given, "")) if os.path.isdir(given) else [""]
        found += [os.path.join(given, file) if file else given for file in inner]
    if not found:
        raise UserError(f"{', '.join(inputs)}: no image files below ({', '.join(IMAGE_SUFFIXES)})")
    return found


def classify(
    trained: Trained, files: Sequence[str], world: World
) -> Iterator[tuple[str, Tensor | str]]:
    """Each file with its probabilities, float32 [num_classes] on the CPU, or why there are none.

    In the order of `files`, but for those whose header cannot be read: they come first.
    """
    readable, sizes = [], []
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for file, size in zip(files, pool.map(_size, files), strict=True):
            if isinstance(size, str):
                yield file, size
            else:
                readable.append(file)
                sizes.append(size)
    config = trained.config
    index = Index(
        classes=trained.classes,
        labels=np.zeros(len(readable), np.int64),  # nobody knows them
        sizes=np.array(sizes, np.int32).reshape(-1, 2),
        paths=tuple(os.path.abspath(file) for file in readable),
        pixels=None,
        fingerprint="",
    )
    loader = make_loader(index, config, world, trained.mean_image)
    # DALI 2.4 parses the headers of more images than this in several threads at once, and where one
    # of them is bad, the process may crash: the others go on with memory that is no longer theirs.
    safe = 4 * (config.data.decode_threads + 1)
    batch_size = min(safe, config.train.max_local_batch_size)
    for samples, batch in _batches(loader, index, config.data, batch_size):
        if isinstance(batch, str):
            yield readable[samples[0]], batch
            continue
        with torch.inference_mode(), autocast(world.device, config.train.precision):
            logits = trained.network(batch.images)
        probabilities = logits.float().softmax(dim=1).cpu()  # CPU-GPU sync point
        for sample, answer in zip(samples, probabilities, strict=True):
            yield readable[sample], answer


def _size(file: str) -> tuple[int, int] | str:
    try:
        return displayed_size(file)
    except UserError as error:
        return str(error).removeprefix(f"{file}: ")


def _batches(
    loader: Loader, index: Index, data: DataConfig, batch_size: int
) -> Iterator[tuple[np.ndarray, Batch | str]]:
    """Sample numbers and their batch; a sample that cannot be decoded comes alone, with the reason.

    DALI fails a whole batch and does not say for which image: that batch is decoded one by one.
    """

    def request(samples: np.ndarray) -> Request:
        sizes = index.sizes[samples]
        return samples, eval_windows(data, sizes)

    numbers = np.arange(len(index))
    waiting = deque(numbers[i : i + batch_size] for i in range(0, len(index), batch_size))
    while waiting:
        try:
            for batch in loader.batches(map(request, list(waiting))):
                yield waiting.popleft(), batch
        except RuntimeError:
            for sample in np.split(failed := waiting.popleft(), len(failed)):
                try:
                    (alone,) = loader.batches([request(sample)])
                    yield sample, alone
                except RuntimeError as error:
                    reason = str(error).partition(", in a batch of")[0].rstrip(" :")
                    yield sample, f"not a readable image (DALI: {reason}); remove or replace it"


def _csv_row(cells: Sequence[str]) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(cells)
    sys.stdout.flush()


def _table_row(
    header: Sequence[str], files: Sequence[str], classes: Sequence[str]
) -> Callable[[Sequence[str]], None]:
    """Prints rows in columns as wide as the widest that may come."""
    longest = {"path": max(map(len, files)), "class": max(map(len, classes)), "probability": 0}
    widths = [max(len(name), longest[name.rstrip("0123456789")]) for name in header]

    def write(cells: Sequence[str]) -> None:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip(), flush=True)

    return write
