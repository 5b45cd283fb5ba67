"""Files and folders that are written whole or not at all, whatever is killed or loses its power.

What is new stands under another name, is flushed to the disk, and is then renamed; then the folder
that holds the name is flushed, too, as a file's own fsync does not write its name down.
"""

import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

PARTIAL = ".partial-"  # how a name begins that is not whole; of a writer that was killed


@contextmanager
def replacing(path: Path) -> Iterator[IO[bytes]]:
    """A file to write to, which takes the place of `path` when the block ends without an error.

    A folder that is missing is made. Who may read the file is up to the umask.

    Raises:
        OSError: it cannot be written. What stood at `path` stands there still.
    """
    _make_folder(path.parent)
    fresh = beside(path)
    try:
        with open(fresh, "xb") as file:
            yield file
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, path)
    except BaseException:
        fresh.unlink(missing_ok=True)  # its bytes may be what the disk lacks
        raise
    flush_folder(path.parent)


def replace_file(path: Path, content: bytes | str) -> None:
    """Writes `content` to `path`, text as UTF-8. Raises what `replacing` raises."""
    with replacing(path) as file:
        file.write(content if isinstance(content, bytes) else content.encode())


@contextmanager
def new_folder(path: Path) -> Iterator[Path]:
    """A folder to fill, which is at `path`, where nothing stands yet, when the block ends without
    an error. Its files are to be flushed by whoever writes them (`flush_file`).

    Raises:
        OSError: it cannot be written, and nothing of it stays.
    """
    _make_folder(path.parent)
    fresh = beside(path)
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
    """Makes `link` a symbolic link to `target`, in place of a file or link that stands there.

    Raises:
        OSError: that cannot be done; the old one stands.
    """
    fresh = beside(link)
    try:
        fresh.symlink_to(target)
        os.replace(fresh, link)
    except OSError:
        fresh.unlink(missing_ok=True)
        raise
    flush_folder(link.parent)


def beside(path: Path) -> Path:
    """A name that was never used, for what will be renamed to `path`."""
    return path.with_name(f"{PARTIAL}{path.name}-{uuid.uuid4().hex[:8]}")


def flush_file(path: Path) -> None:
    """Puts what others have written to it on the disk."""
    with open(path, "rb") as file:
        os.fsync(file.fileno())


def flush_folder(folder: Path) -> None:
    """Puts the names in it on the disk; a file's fsync does not."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _make_folder(folder: Path) -> None:
    if not folder.exists():
        folder.mkdir(parents=True, exist_ok=True)
        flush_folder(folder.parent)
