"""The table of data formats. A new format is a file in index/ and a row here.

Imports only the standard library, so that a login node can make a plan.
"""

import hashlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.cifar_format import Cifar
from resnet_dist.data.index.folder import Folder
from resnet_dist.data.index.format import Format
from resnet_dist.data.index.list_file import ListFile
from resnet_dist.data.index.raw_source import why_raw
from resnet_dist.data.index.shard_format import ShardFiles
from resnet_dist.data.index.survey import Survey
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index

# data.format -> format, in the order in which data are recognized and formats are listed.
FORMATS: dict[str, Format] = {
    known.name: known
    for known in (ShardFiles(), Cifar("cifar10"), Cifar("cifar100"), ListFile(), Folder())
}
SOURCES = ("ilsvrc", "parquet", "kaggle")  # what only `prepare` reads


def recognized(root: Path) -> str:
    """Returns the format that the data in `root` seem to have; "folder" if it is no other."""
    return next(name for name, known in FORMATS.items() if known.is_in(root))


def survey(data_format: str, root: Path, split: str) -> Survey:
    """Counts the images and classes of a split, without opening images.

    Raises like Format.survey.
    """
    with _leading_out(root):
        return FORMATS[data_format].survey(root, split)


def build_index(data_format: str, root: Path, split: str, cache_dir: Path | None) -> "Index":
    """Returns the index of `split` ("train" or "val") of the data in `root`.

    Images that cannot be read are in the index's `bad`. cache_dir: keeps the index, so that the
    next start need not look at 1.28 M files again.

    Raises:
        UserError: folders, shards or files are missing or damaged.
    """
    kept = index_file(data_format, root, split, cache_dir)
    with _leading_out(root):
        return FORMATS[data_format].index(root, split, kept)


@contextmanager
def _leading_out(root: Path) -> Iterator[None]:
    """If the data cannot be used because they are something else, raises an error that says so."""
    try:
        yield
    except UserError as error:
        why = why_raw(root)
        if why is None and not root.is_absolute() and not root.exists():
            why = f"{error} (looked for in {Path.cwd()}; an absolute path works from anywhere)"
        raise error if why is None else UserError(why) from None


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
