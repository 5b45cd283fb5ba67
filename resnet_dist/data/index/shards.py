"""The index of WebDataset shards: tar files, read in place and never unpacked.

Consecutive members with the same name up to the first dot form a sample: an image, and its label as
`.cls` (decimal text) or in `.json` (https://github.com/webdataset/webdataset). Our own shards come
with an index. Other tools' shards, such as the Hugging Face hub's, are scanned once.
"""

import io
import json
import os
import re
import sys
import tarfile
from collections.abc import Iterator
from concurrent.futures import ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from resnet_dist.data.index.class_list import class_list
from resnet_dist.data.index.image_file import UnreadableImage, check_bytes
from resnet_dist.data.index.index import Index, Shards, fingerprint_of, name_of
from resnet_dist.data.index.index_file import check_shards, load_index_file, read_extra, save_index
from resnet_dist.data.index.listing import IMAGE_SUFFIXES
from resnet_dist.data.index.pillow import END_BYTES, PNG_SIGNATURE, displayed_size
from resnet_dist.data.index.shard_files import own_index_file, shard_files
from resnet_dist.data.index.tar_members import RefusedTar, TarHeaders, plain_files
from resnet_dist.data.index.worker_pool import worker_pool
from resnet_dist.errors import UserError

SAMPLE = re.compile(r"((?:.*/)?[^./]+)\.([^/]*)")  # key and kind
LABEL_KEYS = ("label", "cls")  # keys of the label in a .json
MAX_CLASSES = 1_000_000
MAX_LABEL_BYTES = 1 << 20  # size of a .cls or .json
PREFIX_BYTES = 1 << 14  # contains the header of nearly every JPEG and PNG
RULES = 2  # of what is an image, and of how sizes are read; an index made by others is made again


@dataclass
class _Scan:
    """The content of a shard, with a list entry per image."""

    names: list[str] = field(default_factory=list)
    labels: list[int] = field(default_factory=list)
    sizes: list[tuple[int, int]] = field(default_factory=list)
    nbytes: list[int] = field(default_factory=list)
    offsets: list[int] = field(default_factory=list)
    bad: dict[int, str] = field(default_factory=dict)
    folders: dict[int, set[str]] = field(
        default_factory=dict
    )  # label -> folders of the filenames in .json


def shard_index(root: Path, split: str, kept: Path | None) -> Index:
    """Returns the index of root/SPLIT/*.tar, or else of the tars in `root` named after the split.

    kept: root/SPLIT/index.arrow, which is used as it is; or another index file, which is used while
    sizes and times of the shards are those recorded in it, and written otherwise. Class names come
    from root/classes.txt, else from the folders in the .json's filename, else they are numbers.
    Samples are in the order of the shards and of their members.

    Raises:
        UserError: there are no shards, or one is malicious, damaged, or not as indexed.
    """
    if kept == own_index_file(root, split):
        check_shards(kept, root)
        index = load_index_file(kept, root)
        if index.shards is None:
            raise UserError(f"{kept}: not an index of shards; make it again")
        return index
    files = shard_files(root, split)
    names = class_list(root / "classes.txt")
    facts = []
    for file in files:
        try:
            found = file.stat()
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; copy this shard again") from None
        facts.append([os.path.relpath(file, root), found.st_size, found.st_mtime_ns])
    extra = {"rules": RULES, "shards": facts, "classes": names}
    if kept is not None and read_extra(kept) == extra:
        try:
            return load_index_file(kept, root)
        except UserError:
            pass
    index = _merged(files, list(_scan_all(files)), root, names)
    if kept is None:
        return index
    try:
        save_index(index, kept, root, extra)
    except OSError:  # if the folder cannot be written, that only costs time later
        return index
    return load_index_file(kept, root)


def _scan_all(files: list[Path]) -> Iterator[_Scan]:
    """Scans all shards and yields the results in order. Python code, so a process per core."""
    workers = min(len(files), len(os.sched_getaffinity(0)))
    if workers == 1:
        yield from map(_scan, files)
        return
    try:
        yield from _scan_by(worker_pool(workers), files)
    except BrokenProcessPool:
        raise UserError(f"{files[0].parent}: a process that read shards was killed") from None


def _scan_by(workers: ProcessPoolExecutor, files: list[Path]) -> Iterator[_Scan]:
    with workers as pool:
        for number, scan in enumerate(pool.map(_scan, files), start=1):
            if sys.stderr.isatty():
                end = "\n" if number == len(files) else ""
                print(f"\rscanned {number} of {len(files)} shards", end=end, file=sys.stderr)
            yield scan


def _merged(files: list[Path], scans: list[_Scan], root: Path, names: list[str] | None) -> Index:
    counts = [len(scan.names) for scan in scans]
    starts = np.cumsum([0, *counts])
    if not starts[-1]:
        raise UserError(f"{files[0]}: no images in this shard or any other; copy them again")
    labels = np.array([label for scan in scans for label in scan.labels], np.int64)
    if names is not None and labels.max() >= len(names):
        shard = int(np.searchsorted(starts, labels.argmax(), "right")) - 1
        raise UserError(
            f"{files[shard]}: has a label {labels.max()}, but there are {len(names)} classes in "
            f"{root / 'classes.txt'}; correct one of them"
        )
    classes = tuple(names or _classes(scans, int(labels.max()) + 1))
    sizes = np.array([size for scan in scans for size in scan.sizes], np.int32)
    paths = tuple(
        os.path.join(file, name)
        for file, scan in zip(files, scans, strict=True)
        for name in scan.names
    )
    return Index(
        classes=classes,
        labels=labels,
        sizes=sizes,
        paths=paths,
        pixels=None,
        fingerprint=fingerprint_of(classes, (name_of(path, root) for path in paths), labels, sizes),
        nbytes=np.array([nbytes for scan in scans for nbytes in scan.nbytes], np.int64),
        shards=Shards(
            files=tuple(map(str, files)),
            shard=np.repeat(np.arange(len(files), dtype=np.int32), counts),
            offset=np.array([offset for scan in scans for offset in scan.offsets], np.int64),
        ),
        bad={
            int(begin) + i: why
            for begin, scan in zip(starts[:-1], scans, strict=True)
            for i, why in scan.bad.items()
        },
    )


def _classes(scans: list[_Scan], count: int) -> list[str]:
    """Returns the folders in the .json's filename, if each label has its own; else numbers."""
    found: list[set[str]] = [set() for _ in range(count)]
    for scan in scans:
        for label, folders in scan.folders.items():
            found[label] |= folders
    names = [next(iter(folders)) for folders in found if len(folders) == 1]
    if len(names) == count == len(set(names)):
        return names
    return [f"{label:04}" for label in range(count)]


def _scan(file: Path) -> _Scan:
    """Reads the headers of a tar and of its images.

    Raises:
        UserError: the shard cannot be used; names the shard, and the member if there is one.
    """
    scan = _Scan()
    try:
        with TarHeaders(file) as stream:
            for key, members in _samples(stream):
                _add(scan, stream, key, members)
    except RefusedTar as why:
        raise UserError(f"{file}: {why}; make or copy this shard again") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror or error}; copy this shard again") from None
    return scan


def _samples(stream: TarHeaders) -> Iterator[tuple[str, dict[str, tarfile.TarInfo]]]:
    """Yields the key of each sample, and its members by kind, such as "jpg"."""
    seen: set[str] = set()
    members: dict[str, tarfile.TarInfo] = {}
    key = ""
    for member in plain_files(stream):
        name = member.name.removeprefix("./")
        parts = SAMPLE.fullmatch(name)
        if parts is None:
            continue
        kind = parts[2].lower()
        if parts[1] != key:
            if members:
                yield key, members
            key, members = parts[1], {}
            if key in seen:
                raise RefusedTar(f"{name}: members with this key are not consecutive")
            seen.add(key)
        if kind in members:
            raise RefusedTar(f"{name}: is there twice")
        members[kind] = member
    if members:
        yield key, members


def _add(scan: _Scan, stream: TarHeaders, key: str, members: dict[str, tarfile.TarInfo]) -> None:
    images = [kind for kind in members if f".{kind}" in IMAGE_SUFFIXES]
    if len(images) > 1:
        raise RefusedTar(f"{key}: two images ({', '.join(images)}) with one key")
    if not images:
        dotted = next((kind for kind in members if kind.endswith(IMAGE_SUFFIXES)), None)
        if dotted is not None:
            raise RefusedTar(
                f"{key}.{dotted}: only what comes before the first dot tells samples apart; rename "
                f"the members, such as {key}-{dotted.replace('.', '-', dotted.count('.') - 1)}"
            )
        if "cls" in members:
            raise RefusedTar(f"{key}.cls: a label without an image such as {key}.jpg")
        return
    image = members[images[0]]
    name = image.name.removeprefix("./")
    about = _json(stream, members["json"]) if "json" in members else {}
    if "cls" in members:
        label: Any = _content(stream, members["cls"]).strip()
    else:
        label = next((about[word] for word in LABEL_KEYS if word in about), None)
        if label is None:
            raise RefusedTar(f"{name}: an image without a label (.cls, or label in .json)")
    scan.labels.append(_label(label, f"{key}.cls" if "cls" in members else f"{key}.json"))
    folder = os.path.basename(os.path.dirname(str(about.get("filename", ""))))
    if folder:
        scan.folders.setdefault(scan.labels[-1], set()).add(folder)
    try:
        scan.sizes.append(_size(stream, image))
    except UnreadableImage as error:
        scan.bad[len(scan.names)] = str(error)
        scan.sizes.append((0, 0))
    scan.names.append(name)
    scan.nbytes.append(image.size)
    scan.offsets.append(image.offset_data)


def _size(stream: TarHeaders, image: tarfile.TarInfo) -> tuple[int, int]:
    """Returns height and width, reading no more of the image than necessary."""
    check_bytes(image.size)
    start = os.pread(stream.fileno(), min(image.size, PREFIX_BYTES), image.offset_data)
    # A PNG may have its EXIF block at the end, other formats anywhere.
    if start.startswith(PNG_SIGNATURE) and image.size > PREFIX_BYTES + END_BYTES:
        start += os.pread(stream.fileno(), END_BYTES, image.offset_data + image.size - END_BYTES)
    if image.size > len(start) and start.startswith((b"\xff\xd8", PNG_SIGNATURE)):
        try:
            return displayed_size(io.BytesIO(start))
        except UnreadableImage:
            pass
    whole = os.pread(stream.fileno(), image.size, image.offset_data)
    return displayed_size(io.BytesIO(whole))


def _content(stream: TarHeaders, member: tarfile.TarInfo) -> bytes:
    if member.size > MAX_LABEL_BYTES:
        raise RefusedTar(f"{member.name}: {member.size} bytes for a label")
    return os.pread(stream.fileno(), member.size, member.offset_data)


def _json(stream: TarHeaders, member: tarfile.TarInfo) -> dict[str, Any]:
    """Returns the object in a .json; empty if there is none, as any file may be called .json."""
    try:
        about = json.loads(_content(stream, member))
    except (ValueError, RecursionError):
        return {}
    return about if isinstance(about, dict) else {}


def _label(text: bytes | Any, member: str) -> int:
    plain = text.decode("latin1") if isinstance(text, bytes) else str(text)
    if not re.fullmatch("[0-9]{1,7}", plain) or int(plain) >= MAX_CLASSES:
        raise RefusedTar(f"{member}: {plain[:40]!r} is not a label; expected a number, 0 or more")
    return int(plain)
