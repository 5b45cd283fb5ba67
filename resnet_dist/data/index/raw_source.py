"""Recognizes what is no data set yet: archives, and what `resnet-dist prepare` converts.

Imports only the standard library, so that a login node can make a plan.
"""

import re
from collections.abc import Iterator
from pathlib import Path

from resnet_dist.data.index.folder import class_folders
from resnet_dist.data.index.listing import IMAGE_SUFFIXES

ILSVRC_TARS = "ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"
HUB_FILE = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")
KAGGLE_FOLDER = "ILSVRC/Data/CLS-LOC"
KAGGLE_LABELS = "LOC_val_solution.csv"
ARCHIVES = (".tar.gz", ".tgz", ".tar.bz2", ".tar.xz", ".zip")
GZIP, ZIP = b"\x1f\x8b", b"PK\x03\x04"
PREPARE = "run `resnet-dist prepare shards {} DEST` and train on DEST"


def hub_folder(root: Path) -> Path | None:
    """Returns the folder with the hub's parquet files, `root` or `root`/data; None if there are
    none."""
    for folder in (root, root / "data"):
        if any(HUB_FILE.fullmatch(path.name) for path in folder.glob("*.parquet")):
            return folder
    return None


def kaggle_folder(root: Path) -> Path | None:
    """Returns the folder with train/CLASS/ and a flat val/, as on Kaggle; None if there is none."""
    for folder in (root, root / "Data/CLS-LOC", root / KAGGLE_FOLDER):
        if (folder / "train").is_dir() and _is_flat(folder / "val"):
            return folder
    return None


def _is_flat(folder: Path) -> bool:
    try:
        return not class_folders(folder) and any(
            path.suffix.lower() in IMAGE_SUFFIXES for path in folder.iterdir()
        )
    except OSError:
        return False


def why_raw(root: Path) -> str | None:
    """Returns what the data in `root` are that cannot be trained on as they are, and what to do.

    None if they look like nothing of the kind.
    """
    if root.is_file():
        return f"{root}: is a file; unpack it, and give the folder"
    if any((root / name).is_file() for name in ILSVRC_TARS):
        return f"{root}: these are ILSVRC2012's tars: {PREPARE.format(root)}"
    if hub_folder(root) is not None:
        return f"{root}: these are parquet files from the hub: {PREPARE.format(root)}"
    if kaggle_folder(root) is not None:
        return f"{root}: this is ImageNet as on Kaggle, with a flat val/: {PREPARE.format(root)}"
    has_other = (root / "train").is_dir() or any(root.glob("*.tar"))
    for path in _files(root):
        is_archive = path.name.lower().endswith(ARCHIVES) and not has_other
        if is_archive or _start(path) in (GZIP, ZIP):
            return f"{path}: is compressed; unpack it, and give the folder"
        if re.fullmatch(r"n\d{8}\.tar", path.name):
            return f"{path}: is the tar of a class; unpack each of these to a folder of its name"
    return None


def _files(root: Path) -> Iterator[Path]:
    for folder in (root, root / "train", root / "val"):
        if folder.is_dir():
            yield from (path for path in sorted(folder.iterdir()) if path.is_file())


def _start(path: Path) -> bytes:
    """Returns the first bytes of a tar that may be compressed; nothing of another file."""
    if path.suffix != ".tar":
        return b""
    with path.open("rb") as file:
        start = file.read(len(ZIP))
    return start[: len(GZIP)] if start.startswith(GZIP) else start
