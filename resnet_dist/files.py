"""Writes files and folders completely or not at all, even across a kill or a power failure.

New content is written under a temporary name, flushed to the disk, and renamed. Then the parent
folder is flushed too, since a file's own fsync does not make its name durable.
"""

import errno
import os
import shutil
import stat
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".partial-"  # prefix of temporary names; one that stays was left by a killed writer


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """Opens a file for writing that replaces `path` when the block ends without an error.

    Creates missing folders. The file's permissions follow the umask.

    Raises:
        OSError: the file cannot be written. Then `path` is unchanged.
    """
    _make_folder(path.parent)
    fresh = temporary_name(path)
    try:
        with open(fresh, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)  # on a full disk its space is needed
        raise
    flush_folder(path.parent)


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes `content` to `path`, text as UTF-8. Raises what `replacing` raises."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """Gives a folder to fill, which is renamed to `path` when the block ends without an error.

    `path` must not exist yet. The caller flushes the files in it (`flush_file`).

    Raises:
        OSError: the folder cannot be written. Then nothing of it remains.
    """
    _make_folder(path.parent)
    fresh = temporary_name(path)
    try:
        fresh.mkdir()
        yield fresh
        flush_folder(fresh)
        os.rename(fresh, path)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise
    flush_folder(path.parent)


def replace_link(link: Path, target: str) -> None:
    """Makes `link` a symbolic link to `target`, replacing a file or link of that name.

    Raises:
        OSError: it cannot be replaced. Then the old one is unchanged.
    """
    fresh = temporary_name(link)
    try:
        fresh.symlink_to(target)
        os.replace(fresh, link)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    flush_folder(link.parent)


def regular(path: str, flags: int) -> int:
    """Opens a regular file: an `opener` for `open`. A pipe would wait, and a device may never end.

    Raises:
        OSError: it cannot be opened, or is of another kind.
    """
    try:
        descriptor = os.open(path, flags | os.O_NONBLOCK)
    except BlockingIOError:  # a file server has leased it, or it is on tape
        descriptor = os.open(path, flags)
    if not stat.S_ISREG(os.fstat(descriptor).st_mode):
        os.close(descriptor)
        raise OSError(errno.EINVAL, "not a regular file", path)
    os.set_blocking(descriptor, True)
    return descriptor


def temporary_name(path: Path) -> Path:
    """Returns an unused name in the same folder, for what will be renamed to `path`."""
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")


def flush_file(path: Path) -> None:
    """Makes the content of a file durable, whoever has written it."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Makes the names in a folder durable, which a file's own fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
