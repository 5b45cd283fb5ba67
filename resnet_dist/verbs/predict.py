"""`predict`: prints the classes and probabilities that a trained network gives for image files."""

import csv
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from resnet_dist import distributed
from resnet_dist.data.index.image_file import UnreadableImage, open_image_file
from resnet_dist.data.index.index import HEADER_THREADS, Index
from resnet_dist.data.index.listing import IMAGE_SUFFIXES, images_below
from resnet_dist.data.index.pillow import displayed_size
from resnet_dist.data.load.build import make_loader
from resnet_dist.data.view.augment import Request, eval_windows
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.precision import autocast
from resnet_dist.verbs.trained import Trained, load_trained


def predict(path: Path, inputs: Sequence[str], top: int, as_csv: bool) -> bool:
    """Prints the `top` most likely classes of each image, as soon as its batch is done.

    path: a checkpoint or run folder. inputs: image files, and folders to search for image files. An
    image that cannot be read is reported on stderr, and does not affect the others.

    Returns whether all images could be read.

    Raises:
        UserError: there is no checkpoint, there are no images, or `top` exceeds the number of
            classes.
    """
    world = distributed.start_alone("predict")
    trained = load_trained(path, [], world)
    classes = trained.classes
    if top > len(classes):
        raise UserError(f"--top {top}: {path} has {len(classes)} classes; give at most that many")
    files = find_images(inputs)
    suffixes = [""] if top == 1 else [str(number) for number in range(1, top + 1)]
    header = ["path", *(f"{name}{n}" for n in suffixes for name in ("class", "probability"))]
    write = _csv_row if as_csv else _table_row(header, files, classes)
    write(header)
    # Pillow's warnings about headers do not say which file. Unreadable files are reported below.
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
    """Returns the inputs, with each folder replaced by the sorted image files below it."""
    found: list[str] = []
    for given in inputs:
        inner = sorted(images_below(given, "")) if os.path.isdir(given) else [""]
        found += [os.path.join(given, file) if file else given for file in inner]
    if not found:
        raise UserError(f"{', '.join(inputs)}: no image files found ({', '.join(IMAGE_SUFFIXES)})")
    return found


def classify(
    trained: Trained, files: Sequence[str], world: World
) -> Iterator[tuple[str, Tensor | str]]:
    """Yields each file, in order, with its probabilities or the reason why it cannot be read.

    The probabilities are float32 [num_classes] on the CPU.
    """
    config, count = trained.config, len(files)
    sizes = np.zeros((count, 2), np.int32)
    bad: dict[int, str] = {}
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        for number, size in enumerate(pool.map(_size, files)):
            if isinstance(size, str):
                bad[number] = size
            else:
                sizes[number] = size
    index = Index(
        classes=trained.classes,
        labels=np.zeros(count, np.int64),  # unknown, and not used
        sizes=sizes,
        paths=tuple(os.path.abspath(file) for file in files),
        pixels=None,
        fingerprint="",
        bad=bad,
    )
    config = replace(config, data=replace(config.data, max_bad_samples=count))
    loader = make_loader(index, config, world, trained.mean_image, trained.decoding(world))
    batch_size = config.train.max_local_batch_size
    slices = [np.arange(count)[start : start + batch_size] for start in range(0, count, batch_size)]
    requests = (Request(samples, eval_windows(config.data, sizes[samples])) for samples in slices)
    for samples, batch in zip(slices, loader.batches(requests), strict=True):
        with torch.inference_mode(), autocast(world.device, config.train.precision):
            logits = trained.network(batch.images)
        probabilities = logits.float().softmax(dim=1).cpu()  # CPU-GPU sync point
        for number, answer in zip(samples.tolist(), probabilities, strict=True):
            why = loader.bad.get(number)
            yield files[number], answer if why is None else f"{why}; remove or replace it"


def _size(file: str) -> tuple[int, int] | str:
    """Returns the height and width of an image, or the reason why it cannot be read."""
    try:
        with open_image_file(file) as image:
            return displayed_size(image)
    except OSError as error:
        return f"cannot be read ({error.strerror})"
    except UnreadableImage as error:
        return str(error)


def _csv_row(cells: Sequence[str]) -> None:
    csv.writer(sys.stdout, lineterminator="\n").writerow(cells)
    sys.stdout.flush()


def _table_row(
    header: Sequence[str], files: Sequence[str], classes: Sequence[str]
) -> Callable[[Sequence[str]], None]:
    """Returns a function that prints a row in columns wide enough for any row that may follow."""
    longest = {"path": max(map(len, files)), "class": max(map(len, classes)), "probability": 0}
    widths = [max(len(name), longest[name.rstrip("0123456789")]) for name in header]

    def write(cells: Sequence[str]) -> None:
        padded = (cell.ljust(width) for cell, width in zip(cells, widths, strict=True))
        print("  ".join(padded).rstrip(), flush=True)

    return write
