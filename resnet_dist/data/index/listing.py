"""WHERE the images are: walks train/<class>/*, finds and counts CIFAR's files.

Only the standard library is imported here, so that a plan can be made on a login node.
"""

import json
import os
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.data.index.cifar_pickle import read_pickle
from resnet_dist.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class CifarForm:
    """How CIFAR's authors packed it: the archive's folder, the files in it."""

    folder: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    names: str  # the file of class names


CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_FORMS = {  # binary, Python
    "cifar10": (
        CifarForm(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in CIFAR10_BATCHES),
            ("test_batch.bin",),
            "batches.meta.txt",
        ),
        CifarForm("cifar-10-batches-py", CIFAR10_BATCHES, ("test_batch",), "batches.meta"),
    ),
    "cifar100": (
        CifarForm("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt"),
        CifarForm("cifar-100-python", ("train",), ("test",), "meta"),
    ),
}
# A record: the labels, a byte each, then the red, green and blue planes. The last label counts.
CIFAR_LABELS = {"cifar10": ("labels",), "cifar100": ("coarse_labels", "fine_labels")}
CIFAR_PIXEL_BYTES = 3 * 32 * 32


@dataclass(frozen=True)
class Listing:
    """Image files of one split in their canonical order: by class, then by path."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]  # relative to root/split
    labels: tuple[int, ...]
    # The folders read, relative to root/split, and their st_mtime_ns from before they were read:
    # a folder still of that time holds the same names.
    folders: dict[str, int]


def list_folder(root: Path, split: str) -> Listing:
    """Lists `root/split/<class>/**`; a class's number is its place in sorted order.

    Raises:
        UserError: no such folder, no classes, a class without images, or one that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; it must hold train/ and val/")
    top = root / split
    if not top.is_dir():
        raise UserError(
            f"data.root={root}: no folder {split}/ in it; expected {split}/<class>/<image files>"
        )
    try:
        folders = {"": os.stat(top).st_mtime_ns}
        classes = class_folders(top)
    except OSError as error:
        raise UserError(f"{top}: {error.strerror}; make the folder readable") from None
    if not classes:
        raise UserError(
            f"data.root={root}: {split}/ holds no class folders; expected one per class"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(images_below(top / name, name, folders))
        if not found:
            raise UserError(
                f"{top / name}: a class without images ({', '.join(IMAGE_SUFFIXES)}); "
                "add some or remove the folder"
            )
        paths.extend(found)
        labels.extend([label] * len(found))
    return Listing(classes, tuple(paths), tuple(labels), folders)


def class_folders(top: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in os.scandir(top) if e.is_dir() and e.name[0] != "."))


def images_below(folder: str | Path, name: str, folders: dict[str, int] | None = None) -> list[str]:
    """Paths of the image files in `folder` and its sub-folders, `name` standing for the folder.

    Where links lead to a folder twice, its files count once, under the path that sorts first.
    folders: takes in the st_mtime_ns of every folder read, under its path.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[str] = []
    seen = set()
    todo = [""]
    try:
        while todo:
            inner = todo.pop()
            facts = os.stat(os.path.join(folder, inner))
            if (facts.st_dev, facts.st_ino) in seen:  # a link to a folder above, or beside
                continue
            seen.add((facts.st_dev, facts.st_ino))
            prefix = os.path.join(name, inner) if inner else name
            if folders is not None:
                folders[prefix] = facts.st_mtime_ns
            below = []
            for entry in os.scandir(os.path.join(folder, inner)):
                if entry.is_dir():
                    below.append(os.path.join(inner, entry.name))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != ".":
                    found.append(os.path.join(prefix, entry.name))
            todo += sorted(below, reverse=True)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; make the folder readable or remove it"
        ) from None
    return found


def cifar_files(data_format: str, root: Path, split: str) -> tuple[list[Path], CifarForm]:
    """CIFAR's files of a split, binary or else Python's, in `root` or in their usual sub-folder.

    Raises:
        UserError: a file is missing, or is binary and not made of whole records.
    """
    places = [
        ([folder / name for name in getattr(form, split)], form)
        for form in CIFAR_FORMS[data_format]
        for folder in (root / form.folder, root)
        if folder.is_dir()
    ]
    if not places:
        raise UserError(f"data.root={root}: no such folder; it must hold {data_format}'s files")
    files, form = next((place for place in places if any(map(Path.is_file, place[0]))), places[0])
    record_bytes = len(CIFAR_LABELS[data_format]) + CIFAR_PIXEL_BYTES
    for file in files:
        if not file.is_file():
            raise UserError(
                f"data.root={root}: no {file.name} in it; expected the files of {form.folder}"
            )
        size = file.stat().st_size
        if file.suffix == ".bin" and (size % record_bytes or not size):
            raise UserError(f"{file}: not made of {record_bytes}-byte records; copy it again")
    return files, form


def count_images(data_format: str, root: Path, split: str) -> int:
    """Images in a split, without opening one of them.

    Raises:
        UserError: they are not there, or are shards without an index of ours.
    """
    if data_format == "shards":
        return _count_in_shards(root / split / "index.json")
    if data_format == "folder":
        return len(list_folder(root, split).paths)
    names = CIFAR_LABELS[data_format]
    return sum(
        file.stat().st_size // (len(names) + CIFAR_PIXEL_BYTES)
        if file.suffix == ".bin"
        else len(read_pickle(file).get(names[-1], ()))
        for file in cifar_files(data_format, root, split)[0]
    )


def _count_in_shards(note: Path) -> int:
    try:
        return int(json.loads(note.read_bytes())["images"])
    except FileNotFoundError:
        raise UserError(
            f"{note}: no such file; shards without an index cannot be counted at once"
        ) from None
    except (OSError, ValueError, KeyError, TypeError):
        raise UserError(f"{note}: not an index; make it again with `resnet-dist prepare`") from None
