"""From data on disk to their index, whatever their format."""

import os
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from resnet_dist.data.index.cifar import cifar_index
from resnet_dist.data.index.folder import folder_index, kept_name
from resnet_dist.data.index.index import Index
from resnet_dist.data.index.shards import own_index_file, shard_index


def index_file(data_format: str, root: Path, split: str, cache_dir: Path | None) -> Path | None:
    """Where the index of a split is on disk, if it can be: with our own shards, or in cache_dir."""
    own = own_index_file(root, split)
    if data_format == "shards" and own.is_file():
        return own
    if data_format in ("folder", "shards") and cache_dir is not None:
        return cache_dir / kept_name(data_format, root, split)
    return None


def build_index(data_format: str, root: Path, split: str, cache_dir: Path | None) -> Index:
    """Reads what is in `root` for `split` ("train" or "val").

    An image that cannot be read does not fail: it is in the index's `bad`. `cache_dir` keeps what
    was found, so that the next start need not look at 1.28 M files again.

    Raises:
        UserError: missing or damaged folders, shards or files.
    """
    kept = index_file(data_format, root, split, cache_dir)
    if data_format == "folder":
        return folder_index(root, split, kept)
    if data_format == "shards":
        return shard_index(root, split, kept)
    return cifar_index(data_format, root, split)


def set_aside(index: Index, root: Path, quarantine: Mapping[str, str]) -> dict[int, str]:
    """The samples that `quarantine` (name relative to root -> reason) names, and why."""
    if not quarantine:
        return {}
    wanted = {os.path.join(root.absolute(), name): why for name, why in quarantine.items()}
    return {i: wanted[path] for i, path in enumerate(index.paths) if path in wanted}


def without(index: Index, bad: Mapping[int, str]) -> Index:
    """The index with these samples in `bad`, too. The fingerprint stays, and so a run goes on."""
    if not bad:
        return index
    sizes = index.sizes.copy()
    sizes[list(bad)] = 0
    return replace(index, sizes=sizes, bad={**index.bad, **bad})
