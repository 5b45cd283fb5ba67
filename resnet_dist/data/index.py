"""WHAT there is: the samples of a split, their classes, labels and sizes.

EXIF has one policy in the whole project: the orientation is honoured. `sizes` holds what a viewer
shows, crop windows are drawn in that frame, and DALI and Pillow are both told to turn the image.
"""

import hashlib
import os
import tempfile
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path

import numpy as np

from resnet_dist.data.headers import displayed_size
from resnet_dist.data.listing import (
    CIFAR10_RECORD_BYTES,
    cifar10_files,
    list_folder,
)
from resnet_dist.errors import UserError

CIFAR10_CLASSES = (
    "airplane",
    "automobile",
    "bird",
    "cat",
    "deer",
    "dog",
    "frog",
    "horse",
    "ship",
    "truck",
)
HEADER_THREADS = 16


@dataclass(frozen=True)
class Shards:
    """Where the images stand in tar files: image i is nbytes[i] bytes of files[shard[i]]."""

    files: tuple[str, ...]  # absolute
    shard: np.ndarray  # int32 [N]
    offset: np.ndarray  # int64 [N]: of the image's first byte


@dataclass(frozen=True)
class Index:
    """The samples of one split, numbered 0..N-1 in an order that every machine agrees on."""

    classes: tuple[str, ...]
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int32 [N, 2]: height, width, after the EXIF rotation; 0, 0 in `bad`
    # Image files, absolute, or SHARD.tar/MEMBER; empty where the pixels are in memory.
    paths: Sequence[str]
    pixels: np.ndarray | None  # uint8 [N, H, W, 3] raw pixels (CIFAR), or None
    fingerprint: str  # changes when a name, a label or a size does
    nbytes: np.ndarray | None = None  # int64 [N]: of each encoded image; None: not known here
    shards: Shards | None = None  # None: each image is a file
    # Samples known beforehand to be unreadable, and why. They keep their number and are replaced.
    bad: Mapping[int, str] = field(default_factory=dict)

    def __len__(self) -> int:
        return len(self.labels)

    def take(self, samples: np.ndarray) -> "Index":
        """The index of these samples alone, renumbered in their order. samples: int64 [M]."""
        digest = hashlib.sha256(self.fingerprint.encode() + samples.astype(np.int64).tobytes())
        number = {int(old): new for new, old in enumerate(samples)} if self.bad else {}
        shards = self.shards
        if shards is not None:
            shards = Shards(shards.files, shards.shard[samples], shards.offset[samples])
        return replace(
            self,
            labels=self.labels[samples],
            sizes=self.sizes[samples],
            paths=tuple(self.paths[i] for i in samples) if len(self.paths) else (),
            pixels=None if self.pixels is None else self.pixels[samples],
            fingerprint=digest.hexdigest(),
            nbytes=None if self.nbytes is None else self.nbytes[samples],
            shards=shards,
            bad={number[old]: why for old, why in self.bad.items() if old in number},
        )


def build_index(data_format: str, root: Path, split: str, cache_dir: Path | None) -> Index:
    """Reads what is in `root` for `split` ("train" or "val").

    `cache_dir` keeps the image sizes of folders: reading 1.28 M headers takes minutes, once.

    Raises:
        UserError: missing folders or files, or an image whose header cannot be read.
    """
    if data_format == "cifar10":
        return _cifar10(root, split)
    return _folder(root, split, cache_dir)


def _cifar10(root: Path, split: str) -> Index:
    parts = [np.fromfile(file, np.uint8) for file in cifar10_files(root, split)]
    records = np.concatenate(parts).reshape(-1, CIFAR10_RECORD_BYTES)
    labels = records[:, 0].astype(np.int64)
    if labels.max() >= len(CIFAR10_CLASSES):
        bad = int(labels.argmax())
        raise UserError(f"{root}: record {bad} of {split} has label {labels[bad]}; copy it again")
    planes = records[:, 1:].reshape(-1, 3, 32, 32)  # [N, C, H, W]
    return Index(
        classes=CIFAR10_CLASSES,
        labels=labels,
        sizes=np.full((len(labels), 2), 32, np.int32),
        paths=(),
        pixels=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        fingerprint=hashlib.sha256(records.data).hexdigest(),
    )


def _folder(root: Path, split: str, cache_dir: Path | None) -> Index:
    listing = list_folder(root, split)
    top = (root / split).absolute()
    paths = tuple(os.path.join(top, path) for path in listing.paths)
    names = os.fsencode("\0".join((*listing.classes, "", *listing.paths)))
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        cached = None
        if cache_dir is not None:
            files = np.array(list(pool.map(_file_facts, paths)), np.int64)
            key = hashlib.sha256(os.fsencode(top) + names + files.tobytes()).hexdigest()
            cached = cache_dir / f"sizes-{key[:16]}.npy"
        sizes = _load_sizes(cached, len(paths))
        if sizes is None:
            sizes = np.array(list(pool.map(displayed_size, paths)), np.int32)
            if cached is not None:
                _save_atomically(cached, sizes)
    labels = np.array(listing.labels, np.int64)
    digest = hashlib.sha256(names)
    digest.update(labels.tobytes())
    digest.update(sizes.tobytes())
    return Index(listing.classes, labels, sizes, paths, None, digest.hexdigest())


def _file_facts(path: str) -> tuple[int, int]:
    """What changes when a file is replaced. Far cheaper than its header."""
    facts = os.stat(path)
    return facts.st_size, facts.st_mtime_ns


def _load_sizes(path: Path | None, count: int) -> np.ndarray | None:
    """The cached sizes, int32 [count, 2]; None where there are none to rely on."""
    try:
        sizes = np.load(path) if path is not None else None
    except (OSError, ValueError, EOFError):
        return None
    return sizes if sizes is not None and sizes.shape == (count, 2) else None


def _save_atomically(path: Path, array: np.ndarray) -> None:
    """The cache is a help, not a need: a folder that cannot be written costs only time."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            np.save(file, array)
        os.chmod(file.name, 0o644)  # run folders are shared
        os.replace(file.name, path)
    except OSError:
        return
