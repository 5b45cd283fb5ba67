"""Makes sure that every rank has the same index, and every node the same data."""

import os
from collections.abc import Mapping, Sequence
from pathlib import Path

from resnet_dist.data.formats import FORMATS, build_index, index_file
from resnet_dist.data.index.files import evenly_spaced, facts_of
from resnet_dist.data.index.format import Format
from resnet_dist.data.index.index import Index
from resnet_dist.data.index.index_file import load_index_file
from resnet_dist.distributed import World
from resnet_dist.errors import UserError


def agreed_index(data_format: str, root: Path, split: str, cache_dir: Path, world: World) -> Index:
    """Returns what `build_index` finds, the same on every rank. A collective.

    Rank 0 walks folders and scans shards. The others map the index file that it wrote, or are sent
    the index if one of them cannot see that file. CIFAR, and shards that have an index of their
    own, are read by each rank. Then one rank per node compares its data with rank 0's.

    Raises:
        UserError: what `build_index` raises, or the data of a node are missing or different.
    """
    made: list[Index] = []

    def make() -> tuple[str, Path | None, list[int], dict[str, str]]:
        made.append(build_index(data_format, root, split, cache_dir))
        shards = made[0].shards
        kept = index_file(data_format, root, split, cache_dir)
        shard_bytes = _bytes_of(shards.files) if shards else []
        outline = known.outline(root, split) if world.size > 1 else {}
        return made[0].fingerprint, kept, shard_bytes, outline

    known = FORMATS[data_format]
    fingerprint, kept, shard_bytes, outline = world.on_main(make)
    if world.size == 1:
        return made[0]
    index = made[0] if made else None
    if kept is not None and kept.parent == cache_dir:
        if index is None:
            index = _mapped(kept, root, fingerprint)
        if world.any(index is None):
            sent = world.on_main(lambda: made[0])
            index = sent if index is None else index

    def look() -> Index:
        try:
            mine = index if index is not None else _of_this_node(known, root, split)
        except UserError as error:
            raise UserError(f"{os.uname().nodename}: {error}") from None
        other = None if mine.fingerprint == fingerprint else "its index has a different fingerprint"
        if other is None and world.local_rank == 0 and not world.is_main:
            other = _why_outline_differs(known, root, split, outline)
            other = other or _why_bytes_differ(mine, shard_bytes)
        if other is not None:
            raise UserError(
                f"{os.uname().nodename}: data.root={root}: not the same {split} data as on rank 0: "
                f"{other}; copy the data to this node again, or leave the node out"
            )
        return mine

    return world.on_all(look)


def _mapped(kept: Path, root: Path, fingerprint: str) -> Index | None:
    """Maps the index in the file `kept`; None if it is not visible (or not yet, on a slow NFS)."""
    try:
        index = load_index_file(kept, root)
    except UserError:
        return None
    return index if index.fingerprint == fingerprint else None


def _of_this_node(known: Format, root: Path, split: str) -> Index:
    own = known.own_index(root, split)
    return known.index(root, split, None) if own is None else load_index_file(own, root)


def _why_outline_differs(
    known: Format, root: Path, split: str, expected: Mapping[str, str]
) -> str | None:
    """Returns what differs in this node's outline from rank 0's; None if nothing does."""
    try:
        found = known.outline(root, split)
    except OSError as error:
        return f"{error.filename}: {error.strerror}"
    except UserError as error:
        return str(error)
    differing = {name for name, _ in found.items() ^ expected.items()}
    return f"{len(differing)} {known.outline_noun}, such as {min(differing)}" if differing else None


def _why_bytes_differ(index: Index, shard_bytes: Sequence[int]) -> str | None:
    """Returns which of this node's files differs in size from rank 0's; None if none does.

    Compares the sizes of all shards, or of up to 10,000 evenly spaced files. CIFAR has no files to
    compare.
    """
    if index.shards is not None:
        files, expected = index.shards.files, list(shard_bytes)
    elif index.nbytes is not None:
        samples = evenly_spaced(len(index))
        files, expected = tuple(index.paths[i] for i in samples), index.nbytes[samples].tolist()
    else:
        return None
    for file, there, here in zip(files, expected, _bytes_of(files), strict=True):
        if here != there:
            return f"{file} has {here} bytes here and {there} on rank 0"
    return None


def _bytes_of(files: Sequence[str]) -> list[int]:
    """Returns the sizes of files in bytes; 0 for a missing file."""
    return [facts[0] if facts else 0 for facts in facts_of(files)]
