"""The table of data formats. A new format is a file in index/ and a row here.

Imports only the standard library, so that a login node can make a plan.
"""

import hashlib
import os
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.cifar_format import Cifar
from resnet_dist.data.index.folder import Folder
from resnet_dist.data.index.format import Format
from resnet_dist.data.index.list_file import ListFile
from resnet_dist.data.index.shard_format import ShardFiles

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index

# data.format -> format, in the order in which data are recognized and formats are listed.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (ShardFiles(), Cifar("cifar10"), Cifar("cifar100"), ListFile(), Folder())
}


def recognized(root: Path) -> str:
    """Returns the format that the data in `root` seem to have; "folder" if it is no other."""
    return next(name for name, known in FORMATS.items() if known.is_in(root))


def count_images(data_format: str, root: Path, split: str) -> int:
    """Returns the number of images in a split, without opening any. Raises like Format.count."""
    return FORMATS[data_format].count(root, split)


def build_index(data_format: str, root: Path, split: str, cache_dir: Path | None) -> "Index":
    """Returns the index of `split` ("train" or "val") of the data in `root`.

    Images that cannot be read are in the index's `bad`. cache_dir: keeps the index, so that the
    next start need not look at 1.28 M files again.

    Raises:
        UserError: folders, shards or files are missing or damaged.
    """
    kept = index_file(data_format, root, split, cache_dir)
    return FORMATS[data_format].index(root, split, kept)


def index_file(data_format: str, root: Path, split: str, cache_dir: Path | None) -> Path | None:
    """Returns where the index of a split is kept, with the data or in cache_dir; None: nowhere."""
    known = FORMATS[data_format]
    own = known.own_index(root, split)
    if own is not None and own.is_file():
        return own
    if known.is_pixels or cache_dir is None:
        return None
    # The folder is shared by many data sets.
    key = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    return cache_dir / f"{data_format}-{split}-{key}.arrow"
