"""An index on disk: one Arrow file that all processes of a node map, and a summary for people.

The columns are used directly from the memory map, so 1.28 M samples cost a process neither time nor
memory of its own. It is an uncompressed Arrow IPC file with a single record batch:
https://arrow.apache.org/docs/format/Columnar.html#ipc-file-format
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from resnet_dist.data.index.index import Index, Shards, name_of
from resnet_dist.errors import UserError
from resnet_dist.files import replace_file, replacing

VERSION = 1
METADATA = b"resnet_dist"
TYPES = {
    "label": pa.int64(),
    "size": pa.list_(pa.int32(), 2),  # height, width, contiguous as in Index.sizes
    "nbytes": pa.int64(),
    "name": pa.large_binary(),  # index.name_of, in the file system's bytes
    "shard": pa.int32(),
    "offset": pa.int64(),
}

# What reading a damaged or unrelated file may raise.
_DAMAGE = (OSError, pa.ArrowException, ValueError, KeyError, TypeError, IndexError)


class StoredPaths(Sequence[str]):
    """The samples' absolute paths, built on demand."""

    def __init__(self, names: pa.LargeBinaryArray, top: str) -> None:
        self.names, self._top = names, top

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, i: Any) -> Any:
        if isinstance(i, slice):
            return [self[j] for j in range(*i.indices(len(self)))]
        return os.path.join(self._top, os.fsdecode(self.names[int(i)].as_py()))

    def __iter__(self) -> Iterator[str]:
        for start in range(0, len(self), 4096):  # in chunks, which is far faster
            for name in self.names.slice(start, 4096).to_pylist():
                yield os.path.join(self._top, os.fsdecode(name))


def save_index(index: Index, path: Path, top: Path, extra: Any = None) -> None:
    """Writes an index of files or shards to `path`, and a summary for people next to it (.json).

    path: must end in .arrow. It is replaced atomically. top: the data's root; names below it are
    stored relative to it, so that the data can be moved. extra: JSON that `read_extra` returns.
    Shards must be in place, since their sizes are recorded.

    Raises:
        OSError: it cannot be written.
    """
    columns: dict[str, Any] = {
        "label": index.labels,
        "size": pa.FixedSizeListArray.from_arrays(
            pa.array(index.sizes.astype(np.int32).reshape(-1)), 2
        ),
        "name": [os.fsencode(name_of(path, top)) for path in index.paths],
    }
    if index.nbytes is not None:
        columns["nbytes"] = index.nbytes
    summary: dict[str, Any] = {
        "version": VERSION,
        "images": len(index),
        "classes": len(index.classes),
        "fingerprint": index.fingerprint,
        "bad": len(index.bad),
    }
    shards: list[list[Any]] = []
    if index.shards is not None:
        columns |= {"shard": index.shards.shard, "offset": index.shards.offset}
        shards = [[name_of(file, top), os.path.getsize(file)] for file in index.shards.files]
        summary["shards"] = [{"file": name, "bytes": size} for name, size in shards]
    metadata = {
        **summary,
        "classes": index.classes,
        "bad": sorted(index.bad.items()),
        "shards": shards,
        "extra": extra,
    }
    schema = pa.schema(
        [(name, TYPES[name]) for name in columns], {METADATA: json.dumps(metadata).encode()}
    )
    arrays = [pa.array(column, TYPES[name]) for name, column in columns.items()]
    batch = pa.record_batch(arrays, schema=schema)
    with replacing(path) as file, pa.ipc.new_file(file, schema) as writer:
        writer.write_batch(batch)
    replace_file(path.with_suffix(".json"), json.dumps(summary, indent=1) + "\n")


def load_index_file(path: Path, top: Path) -> Index:
    """Maps an index that `save_index` wrote. Its arrays are read-only views, `paths` is lazy.

    Raises:
        UserError: it is missing, damaged or of a different version. Shards are not checked.
    """
    try:
        batch, metadata = _open(path)
        batch.validate(full=True)
        columns = {name: batch.column(name) for name in batch.schema.names}
        if any(column.null_count for column in columns.values()) or not len(batch):
            raise ValueError("missing values")
        labels = _view(columns["label"], np.int64)
        sizes = _view(columns["size"].values, np.int32).reshape(-1, 2)
        nbytes = _view(columns["nbytes"], np.int64) if "nbytes" in columns else None
        classes = tuple(metadata["classes"])
        if labels.min() < 0 or labels.max() >= len(classes):
            raise ValueError("a label without a class")
        shards = None
        if metadata["shards"]:
            files = tuple(os.path.join(top.absolute(), name) for name, _ in metadata["shards"])
            numbers, offsets = columns["shard"], columns["offset"]
            shards = Shards(files, _view(numbers, np.int32), _view(offsets, np.int64))
            _check_ranges(shards, nbytes, metadata["shards"])
        bad = {range(len(batch))[sample]: str(why) for sample, why in metadata["bad"]}
        fingerprint = str(metadata["fingerprint"])
        paths = StoredPaths(columns["name"], str(top.absolute()))
    except _DAMAGE as error:
        raise _unusable(path, error) from None
    return Index(classes, labels, sizes, paths, None, fingerprint, nbytes, shards, bad)


def read_extra(path: Path) -> Any:
    """Returns the `extra` of `save_index`; None if there is no valid file of this version."""
    try:
        return _open(path)[1]["extra"]
    except _DAMAGE:
        return None


def check_shards(path: Path, top: Path) -> None:
    """Raises UserError if a shard is missing or differs in size, or if there is no valid index."""
    try:
        shards = [(str(name), int(size)) for name, size in _open(path)[1]["shards"]]
    except _DAMAGE as error:
        raise _unusable(path, error) from None
    for name, expected in shards:
        file = top / name
        try:
            found = file.stat().st_size
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; copy the shards again") from None
        if found != expected:
            raise UserError(
                f"{file}: {found} bytes, but {expected} in {path.name}; copy the shards again"
            )


def _unusable(path: Path, error: Exception) -> UserError:
    reason = getattr(error, "strerror", None) or str(error).split("\n")[0]
    return UserError(f"{path}: not a usable index ({reason}); make it again")


def _open(path: Path) -> tuple[pa.RecordBatch, Mapping[str, Any]]:
    reader = pa.ipc.open_file(pa.memory_map(str(path)))
    metadata = json.loads((reader.schema.metadata or {})[METADATA])
    if metadata["version"] != VERSION:
        raise ValueError(f"version {metadata['version']}, not {VERSION}")
    if any(TYPES[name] != reader.schema.field(name).type for name in reader.schema.names):
        raise ValueError("columns of unexpected types")
    if reader.num_record_batches != 1:
        raise ValueError("more or less than one record batch")
    return reader.get_batch(0), metadata


def _view(column: pa.Array, dtype: type) -> np.ndarray:
    # Not column.to_numpy(), which imports pandas and costs each process 40 MB.
    return np.frombuffer(column.buffers()[-1], dtype, len(column))


def _check_ranges(
    shards: Shards, nbytes: np.ndarray | None, files: Sequence[Sequence[Any]]
) -> None:
    """Raises ValueError if the index would make us read outside of its shards."""
    if any(os.path.isabs(name) or ".." in name.split("/") for name, _ in files):
        raise ValueError("a shard outside the data")
    if shards.shard.min() < 0 or shards.shard.max() >= len(files):
        raise ValueError("an image in a shard that is not listed")
    if nbytes is None:
        raise ValueError("no sizes of the images in the shards")
    ends = np.array([size for _, size in files], np.int64)[shards.shard]
    if shards.offset.min() < 0 or nbytes.min() < 0 or (shards.offset > ends - nbytes).any():
        raise ValueError("an image past the end of its shard")
