"""WHERE the images are: walks train/<class>/*, counts CIFAR records.

Only the standard library is imported here, so that a plan can be made on a login node.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")

CIFAR10_FILES = {
    "train": tuple(f"data_batch_{number}.bin" for number in range(1, 6)),
    "val": ("test_batch.bin",),
}
CIFAR10_RECORD_BYTES = 1 + 3 * 32 * 32  # label, then the red, green and blue planes


@dataclass(frozen=True)
class Listing:
    """Image files of one split in their canonical order: by class, then by path."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]  # relative to root/split
    labels: tuple[int, ...]


def list_folder(root: Path, split: str) -> Listing:
    """Lists `root/split/<class>/**`; a class's number is its place in sorted order.

    Raises:
        UserError: no such folder, no classes, or a class without images.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; it must hold train/ and val/")
    top = root / split
    if not top.is_dir():
        raise UserError(
            f"data.root={root}: no folder {split}/ in it; expected {split}/<class>/<image files>"
        )
    classes = tuple(sorted(e.name for e in os.scandir(top) if e.is_dir() and e.name[0] != "."))
    if not classes:
        raise UserError(
            f"data.root={root}: {split}/ holds no class folders; expected one per class"
        )
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(images_below(top / name, name))
        if not found:
            raise UserError(
                f"{top / name}: a class without images ({', '.join(IMAGE_SUFFIXES)}); "
                "add some or remove the folder"
            )
        paths.extend(found)
        labels.extend([label] * len(found))
    return Listing(classes, tuple(paths), tuple(labels))


def cifar10_files(root: Path, split: str) -> list[Path]:
    """CIFAR-10's binary batches of a split, looked for in `root` and in its usual sub-folder.

    Raises:
        UserError: a file is missing or is not made of whole records.
    """
    folder = root / "cifar-10-batches-bin" if (root / "cifar-10-batches-bin").is_dir() else root
    files = [folder / name for name in CIFAR10_FILES[split]]
    for file in files:
        if not file.is_file():
            raise UserError(
                f"data.root={root}: no {file.name} in it; expected the binary version of CIFAR-10"
            )
        if file.stat().st_size % CIFAR10_RECORD_BYTES or not file.stat().st_size:
            raise UserError(
                f"{file}: not made of {CIFAR10_RECORD_BYTES}-byte records; copy it again"
            )
    return files


def count_images(data_format: str, root: Path, split: str) -> int:
    """Images in a split, without opening one of them."""
    if data_format == "cifar10":
        files = cifar10_files(root, split)
        return sum(file.stat().st_size // CIFAR10_RECORD_BYTES for file in files)
    return len(list_folder(root, split).paths)


def images_below(folder: str | Path, name: str) -> list[str]:
    """Paths of the image files in `folder` and its sub-folders, `name` standing for the folder."""
    found = []
    seen = set()
    for parent, _, files in os.walk(folder, followlinks=True):
        real = os.path.realpath(parent)
        if real in seen:  # a link back to a folder above would go round and round
            continue
        seen.add(real)
        inner = os.path.join(name, os.path.relpath(parent, folder))
        found += [
            os.path.normpath(os.path.join(inner, file))
            for file in files
            if file.lower().endswith(IMAGE_SUFFIXES) and file[0] != "."
        ]
    return found
