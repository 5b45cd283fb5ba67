"""The sources of `prepare`: image folders, lists, shards, ILSVRC2012's tars, parquet, CIFAR.

Which one a folder is, is recognized by its files.
"""

import csv
import hashlib
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.formats import FORMATS, build_index, recognized
from resnet_dist.data.index import raw_source
from resnet_dist.data.index.files import facts_of
from resnet_dist.data.index.format import Format, ImageFiles
from resnet_dist.data.index.index import Index, name_of, set_aside
from resnet_dist.data.index.listing import Listing
from resnet_dist.data.index.quarantine import read_quarantine
from resnet_dist.data.prepare import hub_parquet, ilsvrc
from resnet_dist.data.prepare.images import Files, Images, Pixels, TarMembers
from resnet_dist.errors import UserError

SPLITS = ("train", "val")
# Kinds of sources -> what they are called. Most can also be trained on as they are.
KINDS = {
    "folder": "an image folder",
    "list": "a list of images",
    "shards": "shards",
    "cifar10": "CIFAR-10",
    "cifar100": "CIFAR-100",
    "ilsvrc": "ILSVRC2012's tars",
    "parquet": "parquet files from the hub",
    "kaggle": "ImageNet as on Kaggle",
}


@dataclass(frozen=True)
class Split:
    """N images, in the order in which they are written."""

    labels: np.ndarray  # int64 [N]
    names: Sequence[str]  # [N]: names of the original files, CLASS/FILE
    images: Images
    bad: Mapping[int, str] = field(default_factory=dict)  # known to be bad: sample -> reason


@dataclass(frozen=True)
class Source:
    """The images that become shards."""

    classes: tuple[str, ...]  # sorted; a label is an index into them
    splits: Mapping[str, Split]

    def fingerprint(self) -> str:
        """Returns a hash of what is known without reading images: names, labels and sizes."""
        digest = hashlib.sha256("\n".join(self.classes).encode(errors="surrogateescape"))
        for name, split in self.splits.items():
            text = "\0".join((name, *split.names))
            digest.update(text.encode(errors="surrogateescape"))
            digest.update(split.labels.tobytes())
            digest.update(split.images.identity())
        return digest.hexdigest()


def open_source(
    root: Path, map_: Callable[..., Iterable[Any]], kind: str | None = None
) -> tuple[str, Source]:
    """Opens the source in `root`. Returns what kind it is, and the source.

    map_: like the built-in `map`; may run in processes. kind: one of KINDS; None: recognized by the
    files in `root`.

    Raises:
        UserError: there is no known source, or it is incomplete or damaged.
    """
    if not root.is_dir():
        raise UserError(f"{root}: no such folder")
    kind = kind or _recognized(root)
    if kind == "ilsvrc":
        source = _ilsvrc(root, map_)
    elif kind == "parquet":
        source = _parquet(raw_source.hub_folder(root) or root)
    elif kind == "kaggle":
        source = _kaggle(root)
    elif isinstance(known := FORMATS[kind], ImageFiles):
        listings = {split: known.listing(root, split) for split in _splits(known, root)}
        source = _listed(root, listings, {name: known.top(root, name) for name in listings})
    else:
        source = _indexed(known, root)
    odd = [name for name in source.classes if not name.strip() or "\n" in name or "\r" in name]
    if odd:
        raise UserError(f"{root}: class {odd[0]!r}: is empty or has a line end; rename it")
    empty = [name for name, split in source.splits.items() if not len(split.labels)]
    if empty:
        raise UserError(f"{root}: has no {empty[0]} images; copy it again")
    return KINDS[kind], source


def _recognized(root: Path) -> str:
    """Returns the kind of the source in `root`.

    Raises:
        UserError: it is of no known kind.
    """
    if (root / ilsvrc.TRAIN_TAR).exists():
        return "ilsvrc"
    if raw_source.hub_folder(root) is not None:
        return "parquet"
    if raw_source.kaggle_folder(root) is not None:
        return "kaggle"
    kind = recognized(root)
    if FORMATS[kind].has_split(root, "train"):
        return kind
    raise UserError(
        raw_source.why_raw(root)
        or f"{root}: nothing to prepare; expected train/CLASS/IMAGES and val/, train.csv and "
        f"val.csv, shards, {ilsvrc.TRAIN_TAR}, train-00000-of-NNNNN.parquet, or CIFAR's batches"
    )


def _splits(known: Format, root: Path) -> list[str]:
    """Returns the splits that exist. Without val/, training needs data.holdout_images."""
    return [split for split in SPLITS if split == "train" or known.has_split(root, split)]


def _listed(root: Path, listings: Mapping[str, Listing], tops: Mapping[str, Path]) -> Source:
    """Returns a source of image files; their headers are read later, when shards are written.

    tops: of each split, the folder to which paths in its listing are relative.
    """
    classes = _same_classes(root, {name: one.classes for name, one in listings.items()})
    quarantined = read_quarantine(root)
    splits = {}
    for name, listing in listings.items():
        top = tops[name].absolute()
        paths = [os.path.join(top, path) for path in listing.paths]
        nbytes = np.array([facts[0] if facts else 0 for facts in facts_of(paths)], np.int64)
        labels = np.array(listing.labels, np.int64)
        bad = _known_bad(quarantined, (name_of(path, root) for path in paths))
        names = [
            _in_class(path, classes[label])
            for path, label in zip(listing.paths, listing.labels, strict=True)
        ]
        splits[name] = Split(labels, names, Files(paths, nbytes), bad)
    return _in_sorted_classes(classes, splits)


def _kaggle(root: Path) -> Source:
    """Returns ImageNet as on Kaggle: train/CLASS/ and a flat val/, whose labels are in a CSV file.

    https://www.kaggle.com/c/imagenet-object-localization-challenge/data
    """
    folder = raw_source.kaggle_folder(root)
    if folder is None:
        raise UserError(f"{root}: expected train/CLASS/IMAGES and val/IMAGES")
    places = (folder, *list(folder.absolute().parents)[:3])
    file = next((f for up in places if (f := up / raw_source.KAGGLE_LABELS).is_file()), None)
    if file is None:
        raise UserError(
            f"{folder / 'val'}: no labels; put Kaggle's {raw_source.KAGGLE_LABELS} into {folder}"
        )
    train = FORMATS["folder"].listing(folder, "train")  # type: ignore[attr-defined]
    number = {name: label for label, name in enumerate(train.classes)}
    found: list[tuple[int, str]] = []
    with file.open(newline="") as text:
        for line, cells in enumerate(csv.reader(text), start=1):
            synset = cells[1].split()[:1] if len(cells) > 1 else []
            if line == 1:
                continue
            if not synset or synset[0] not in number:
                raise UserError(f"{file}:{line}: no class of train/; copy it again")
            found.append((number[synset[0]], f"{cells[0]}.JPEG"))
    found.sort()
    labels, paths = zip(*found, strict=True) if found else ((), ())
    val = Listing(train.classes, paths, labels, {})
    tops = {name: folder / name for name in SPLITS}
    return _listed(root, {"train": train, "val": val}, tops)


def _in_class(path: str, name: str) -> str:
    return path if path.startswith(f"{name}/") else f"{name}/{os.path.basename(path)}"


def _ilsvrc(root: Path, map_: Callable[..., Iterable[Any]]) -> Source:
    """Returns the same order and names as an image folder unpacked from these tars."""
    listings = {
        "val": (
            root / ilsvrc.VAL_TAR,
            ilsvrc.list_val(root),
        ),  # first, because it takes only a second
        "train": (root / ilsvrc.TRAIN_TAR, ilsvrc.list_train(root, map_)),
    }
    found = {name: tuple(sorted(listings[name][1])) for name in SPLITS}
    classes = _same_classes(root, found)
    splits = {}
    for name in SPLITS:
        path, images_of = listings[name]
        members = [member for synset in classes for member in images_of[synset]]
        counts = [len(images_of[synset]) for synset in classes]
        labels = np.repeat(np.arange(len(classes), dtype=np.int64), counts)
        names = [
            f"{classes[label]}/{member[0]}"
            for label, member in zip(labels.tolist(), members, strict=True)
        ]
        splits[name] = Split(labels, names, ilsvrc.as_tar_members(path, members))
    return Source(classes, splits)


def _parquet(folder: Path) -> Source:
    found = hub_parquet.splits_in(folder)
    hub = {name: hub_parquet.list_parquet(folder, name) for name in SPLITS if name in found}
    class_of = hub_parquet.class_of_labels(list(hub.values()))
    hub_labels = sorted(class_of, key=lambda label: (class_of[label], label))
    number = {label: new for new, label in enumerate(hub_labels)}
    splits = {}
    for name, one in hub.items():
        names = [
            f"{class_of[label]}/{file}" for label, file in zip(one.labels, one.names, strict=True)
        ]
        labels = np.array([number[label] for label in one.labels], np.int64)
        splits[name] = Split(labels, names, one.images)
    return Source(tuple(class_of[label] for label in hub_labels), splits)


def _indexed(known: Format, root: Path) -> Source:
    indexes = {name: build_index(known.name, root, name, None) for name in _splits(known, root)}
    given = _same_classes(root, {name: index.classes for name, index in indexes.items()})
    quarantined = read_quarantine(root)
    splits = {}
    for name, index in indexes.items():
        files = index.paths if len(index.paths) else [f"{i:05}.png" for i in range(len(index))]
        names = [
            f"{given[label]}/{os.path.basename(file)}"
            for label, file in zip(index.labels.tolist(), files, strict=True)
        ]
        bad = {**index.bad, **set_aside(index, root, quarantined)}
        splits[name] = Split(index.labels, names, _images(index), bad)
    return _in_sorted_classes(given, splits)


def _in_sorted_classes(given: Sequence[str], splits: Mapping[str, Split]) -> Source:
    """Returns a source with the classes sorted by name, and labels to match."""
    order = sorted(range(len(given)), key=lambda label: given[label])
    number = np.argsort(order)  # the new label of each old one
    renumbered = {
        name: replace(split, labels=number[split.labels]) for name, split in splits.items()
    }
    return Source(tuple(given[label] for label in order), renumbered)


def _images(index: Index) -> Images:
    if index.shards is None:
        assert index.pixels is not None
        return Pixels(index.pixels)
    assert index.nbytes is not None
    shards = index.shards
    return TarMembers(shards.files, shards.shard, shards.offset, index.nbytes)


def _known_bad(known: Mapping[str, str], names: Iterable[str]) -> dict[int, str]:
    return {i: known[name] for i, name in enumerate(names) if name in known} if known else {}


def _same_classes(root: Path, found: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    train = set(found["train"])
    val = set(found.get("val", train))
    if train != val or len(found["train"]) != len(train):
        odd = sorted(train ^ val) or sorted(found["train"])
        where = "train" if odd[0] in train else "val"
        raise UserError(
            f"{root}: class {odd[0]!r} is only in {where} ({len(train)} classes in train, "
            f"{len(val)} in val); both must have the same classes"
        )
    return tuple(found["train"])
