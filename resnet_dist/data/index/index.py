"""The index: the images of a split, with their classes, labels and sizes.

The whole project treats EXIF orientation the same way: images are rotated. `sizes` has what a
viewer shows, crop windows are in those coordinates, and both DALI and Pillow are told to rotate.
"""

import hashlib
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.index.survey import empty_classes

HEADER_THREADS = 16  # reading headers is mostly waiting
IN_BYTES = " in bytes"  # suffix in Index.fingerprints, for the sizes of encoded images


@dataclass(frozen=True)
class Shards:
    """Where images are in tar files: image i is nbytes[i] bytes of files[shard[i]]."""

    files: tuple[str, ...]  # absolute
    shard: np.ndarray  # int32 [N]
    offset: np.ndarray  # int64 [N]: offset of the image's first byte


@dataclass(frozen=True)
class Index:
    """The samples of one split, numbered 0..N-1 in an order that every machine agrees on."""

    classes: tuple[str, ...]
    labels: np.ndarray  # int64 [N]
    sizes: np.ndarray  # int32 [N, 2]: height, width, after the EXIF rotation; 0, 0 in `bad`
    # Absolute paths of image files, or SHARD.tar/MEMBER; empty if the pixels are in memory.
    paths: Sequence[str]
    pixels: np.ndarray | None  # uint8 [N, H, W, 3] raw pixels (CIFAR), or None
    fingerprint: str  # changes if a name, a label or a size does
    nbytes: np.ndarray | None = None  # int64 [N]: size of each encoded image; None: unknown
    shards: Shards | None = None  # None: each image is a file
    # Samples that are known to be unreadable -> reason. They keep their number and are replaced.
    bad: Mapping[int, str] = field(default_factory=dict)
    # What a user should know about the data, a line each. Not kept in index files.
    notes: tuple[str, ...] = ()

    def __len__(self) -> int:
        return len(self.labels)

    def fingerprints(self, split: str) -> dict[str, str]:
        """Returns what a checkpoint records about the data. split: "training" or "validation".

        That is `fingerprint`, and a hash of the encoded images' sizes in bytes, which changes if
        images are re-encoded.
        """
        found = {f"{split} images": self.fingerprint}
        if self.nbytes is not None:
            nbytes = np.ascontiguousarray(self.nbytes, np.int64).data
            found[f"{split} images{IN_BYTES}"] = hashlib.sha256(nbytes).hexdigest()
        return found

    def take(self, samples: np.ndarray) -> "Index":
        """Returns an index of these samples only, renumbered in this order. samples: int64 [M]."""
        digest = hashlib.sha256(self.fingerprint.encode() + samples.astype(np.int64).tobytes())
        number = {int(old): new for new, old in enumerate(samples)} if self.bad else {}
        shards = self.shards
        if shards is not None:
            shards = Shards(shards.files, shards.shard[samples], shards.offset[samples])
        return replace(
            self,
            labels=self.labels[samples],
            sizes=self.sizes[samples],
            paths=_Selection(self.paths, samples) if len(self.paths) else (),
            pixels=None if self.pixels is None else self.pixels[samples],
            fingerprint=digest.hexdigest(),
            nbytes=None if self.nbytes is None else self.nbytes[samples],
            shards=shards,
            bad={number[old]: why for old, why in self.bad.items() if old in number},
        )


def notes_of(index: Index, where: object) -> list[str]:
    """Returns what a user should know about a split, a line each. where: the split, for them."""
    counts = np.bincount(index.labels, minlength=len(index.classes))
    return [*index.notes, *empty_classes(index.classes, (counts > 0).tolist(), where)]


class _Selection(Sequence[str]):
    """Some of the paths, in any order, without copying them."""

    def __init__(self, whole: Sequence[str], samples: np.ndarray) -> None:
        self._whole, self._samples = whole, samples

    def __len__(self) -> int:
        return len(self._samples)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self._whole[j] for j in self._samples[i]]
        return self._whole[self._samples[i]]


def fingerprint_of(
    classes: Sequence[str], names: Iterable[str], labels: np.ndarray, sizes: np.ndarray
) -> str:
    """Returns a hash of classes, names, labels (int64 [N]) and sizes (int32 [N, 2])."""
    digest = hashlib.sha256(os.fsencode("\0".join((*classes, "", *names))))
    digest.update(np.ascontiguousarray(labels, np.int64).data)
    digest.update(np.ascontiguousarray(sizes, np.int32).data)
    return digest.hexdigest()


def name_of(path: str, root: Path) -> str:
    """Returns the name of an image or shard in messages, quarantines and index files.

    It is the absolute `path`, made relative if it is below the root of the data.
    """
    return path.removeprefix(os.path.join(root.absolute(), ""))


def path_of(name: str, root: Path) -> str:
    """The inverse of `name_of`."""
    return os.path.join(root.absolute(), name)


def set_aside(index: Index, root: Path, quarantine: Mapping[str, str]) -> dict[int, str]:
    """Returns the samples in a quarantine (name relative to root -> reason), with the reasons."""
    if not quarantine:
        return {}
    wanted = {path_of(name, root): why for name, why in quarantine.items()}
    return {i: wanted[path] for i, path in enumerate(index.paths) if path in wanted}


def without(index: Index, bad: Mapping[int, str]) -> Index:
    """Returns the index with these samples added to `bad`.

    The fingerprint stays the same, so that a run can be resumed.
    """
    if not bad:
        return index
    sizes = index.sizes.copy()
    sizes[list(bad)] = 0
    return replace(index, sizes=sizes, bad={**index.bad, **bad})
