"""The one table of data formats: a new one is a row here, and a file in index/.

Only the standard library is imported here, so that a plan can be made on a login node.
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

# By data.format. In the order in which data are recognized; messages and help have it, too.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (ShardFiles(), Cifar("cifar10"), Cifar("cifar100"), ListFile(), Folder())
}


def recognized(root: Path) -> str:
    """The format that the data in `root` look like; "folder" for all that is nothing else."""
    return next(name for name, known in FORMATS.items() if known.is_in(root))


def count_images(data_format: str, root: Path, split: str) -> int:
    """Images in a split, without opening one of them. Raises what Format.count raises."""
    return FORMATS[data_format].count(root, split)


def build_index(data_format: str, root: Path, split: str, cache_dir: Path | None) -> "Index":
    """Reads what is in `root` for `split` ("train" or "val").

    An image that cannot be read does not fail: it is in the index's `bad`. `cache_dir` keeps what
    was found, so that the next start need not look at 1.28 M files again.

    Raises:
        UserError: missing or damaged folders, shards or files.
    """
    kept = index_file(data_format, root, split, cache_dir)
    return FORMATS[data_format].index(root, split, kept)


def index_file(data_format: str, root: Path, split: str, cache_dir: Path | None) -> Path | None:
    """Where the index of a split is on disk, if it can be: with the data, or in cache_dir."""
    known = FORMATS[data_format]
    own = known.own_index(root, split)
    if own is not None and own.is_file():
        return own
    if known.is_pixels or cache_dir is None:
        return None
    # Many data sets share the folder.
    key = hashlib.sha256(os.fsencode(root.absolute())).hexdigest()[:16]
    return cache_dir / f"{data_format}-{split}-{key}.arrow"
