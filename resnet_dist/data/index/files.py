"""The index of images that are files. It is kept, as reading 1.28 M headers takes minutes."""

import os
import stat
import time
from collections.abc import Callable, Iterable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from itertools import chain
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.index.image_file import UnreadableImage, check_bytes
from resnet_dist.data.index.index import HEADER_THREADS, Index, fingerprint_of
from resnet_dist.data.index.index_file import load_index_file, read_extra, save_index
from resnet_dist.data.index.listing import Listing
from resnet_dist.data.index.pillow import displayed_size
from resnet_dist.errors import UserError

CHECKED_FILES = 10_000
RULES = 2  # of what is listed, and of how sizes are read; an index made by others is made again
CHUNK = 256  # files per task of a thread
# A folder that changed less than this before it was read may have changed again afterwards, within
# the same tick of the file system's clock, without a new modification time. The coarsest clock in
# use is FAT's, with 2 s.
CLOCK_TICK_NS = 2_000_000_000


def index_of_files(
    list_files: Callable[[], Listing], top: Path, root: Path, kept: Path | None
) -> Index:
    """Returns the index of the files that `list_files` lists.

    Uses the index file `kept` while it is valid: that is, while everything that was read for the
    listing has its modification time, up to 10,000 evenly spaced images (all in a small data set)
    have their size and modification time, and those in `bad` have not changed, nor have their
    permissions. If it cannot be written, the index is made again each time. Images that cannot be
    read are in the index's `bad`.

    top: the folder to which paths in the listing are relative. root: the root of the data.

    Raises:
        UserError: what `list_files` raises.
    """
    if kept is not None and (index := _still_valid(kept, list_files, top, root)) is not None:
        return index
    started = time.time_ns()
    listing = list_files()
    checked = evenly_spaced(len(listing.paths))
    facts = _facts(top, (listing.paths[i] for i in checked))
    headers = list(_threaded(_header, [os.path.join(top, path) for path in listing.paths]))
    bad = {i: why for i, (_, _, _, why) in enumerate(headers) if why}
    labels = np.array(listing.labels, np.int64)
    sizes = np.array([header[:2] for header in headers], np.int32)
    index = Index(
        classes=listing.classes,
        labels=labels,
        sizes=sizes,
        paths=_absolute(listing, top),
        pixels=None,
        fingerprint=fingerprint_of(listing.classes, listing.paths, labels, sizes),
        nbytes=np.array([header[2] for header in headers], np.int64),
        bad=bad,
        notes=listing.notes,
    )
    if kept is None:
        return index
    changed = _changes(top, (listing.paths[i] for i in bad))
    return _keep(index, kept, root, _extra(listing, facts, changed, started))


def evenly_spaced(count: int) -> list[int]:
    """Returns up to 10,000 evenly spaced samples out of `count`."""
    return np.unique(np.linspace(0, count - 1, min(count, CHECKED_FILES), dtype=np.int64)).tolist()


def _still_valid(
    kept: Path, list_files: Callable[[], Listing], top: Path, root: Path
) -> Index | None:
    extra, started = read_extra(kept), time.time_ns()
    if extra is None or extra.get("rules") != RULES:
        return None
    read = facts_of([os.path.join(top, name) for name in extra["folders"]])
    if [facts and facts[1] for facts in read] != list(extra["folders"].values()):
        return None
    if _facts(top, extra["files"]) != extra["files"]:
        return None
    changed = extra.get("bad", {})  # missing in older files, whose "files" has these as well
    if _changes(top, changed) != changed:
        return None
    try:
        index = load_index_file(kept, root)
    except UserError:
        return None
    if extra["settled"]:
        return index
    listing = list_files()  # times cannot be trusted (see CLOCK_TICK_NS), names and labels can
    if listing.classes != index.classes or _absolute(listing, top) != tuple(index.paths):
        return None
    if not np.array_equal(listing.labels, index.labels):
        return None
    return _keep(index, kept, root, _extra(listing, extra["files"], changed, started))


def _absolute(listing: Listing, top: Path) -> tuple[str, ...]:
    return tuple(os.path.join(top.absolute(), path) for path in listing.paths)


def _extra(
    listing: Listing, facts: dict[str, Any], changed: dict[str, Any], started: int
) -> dict[str, Any]:
    latest = max((time_ns for time_ns in listing.read.values() if time_ns is not None), default=0)
    # The key "folders" is older than formats with lists; it keeps older index files valid.
    settled = latest < started - CLOCK_TICK_NS
    return {
        "rules": RULES,
        "folders": listing.read,
        "files": facts,
        "bad": changed,
        "settled": settled,
    }


def _keep(index: Index, kept: Path, root: Path, extra: Any) -> Index:
    """Writes the index and maps it. If the folder cannot be written, that only costs time later."""
    try:
        save_index(index, kept, root, extra)
    except OSError:
        return index
    return replace(load_index_file(kept, root), notes=index.notes)


def facts_of(paths: Sequence[str]) -> list[list[int] | None]:
    """Returns [st_size, st_mtime_ns] of each file; None for a missing one."""
    return list(_threaded(_size_and_time, paths))


def _facts(top: str | Path, names: Iterable[str]) -> dict[str, Any]:
    names = list(names)
    return dict(zip(names, facts_of([os.path.join(top, name) for name in names]), strict=True))


def _changes(top: Path, names: Iterable[str]) -> dict[str, int | None]:
    """Returns when each file or its permissions last changed, in ns; None for a missing one."""
    names = list(names)
    times = _threaded(_time_of_change, [os.path.join(top, name) for name in names])
    return dict(zip(names, times, strict=True))


def _threaded(function: Any, paths: Sequence[str]) -> Iterable[Any]:
    """Calls function(path) for each path in threads; yields the results in order."""
    chunks = [paths[i : i + CHUNK] for i in range(0, len(paths), CHUNK)]
    with ThreadPoolExecutor(HEADER_THREADS) as pool:
        return chain.from_iterable(pool.map(lambda chunk: [*map(function, chunk)], chunks))


def _header(path: str) -> tuple[int, int, int, str]:
    """Returns height, width, size in bytes, and why the image cannot be read, or ""."""
    nbytes = 0
    try:
        facts = os.stat(path)
        nbytes = facts.st_size
        if not stat.S_ISREG(facts.st_mode):  # opening a pipe would block
            return 0, 0, 0, "not a regular file"
        check_bytes(nbytes)
        with open(path, "rb") as file:
            return *displayed_size(file), nbytes, ""
    except OSError as error:
        return 0, 0, nbytes, error.strerror or type(error).__name__
    except UnreadableImage as error:
        return 0, 0, nbytes, str(error)


def _time_of_change(path: str) -> int | None:
    try:
        return os.stat(path).st_ctime_ns
    except OSError:
        return None


def _size_and_time(path: str) -> list[int] | None:
    try:
        facts = os.stat(path)
    except OSError:
        return None
    return [facts.st_size, facts.st_mtime_ns]
