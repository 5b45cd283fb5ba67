"""Where the encoded images of a source are: in files, tars, parquet files, or as pixels in memory.

An Images object describes a contiguous range of a split. It is small enough to be sent to a worker,
can be cut, and yields the bytes of one image after the other.
"""

import hashlib
import io
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np
from PIL import Image

from resnet_dist.data.index.image_file import GONE, UnreadableImage, check_bytes, read_image_file
from resnet_dist.errors import UserError

PARQUET_BATCH_ROWS = 16
PARQUET_BUFFER_BYTES = 1 << 20


class Images(Protocol):
    """N encoded images, in the order of their split."""

    def cut(self, start: int, stop: int) -> "Images":
        """Returns images start..stop-1."""

    def identity(self) -> bytes:
        """Returns what identifies the images, as far as is known without reading them."""

    def __iter__(self) -> Iterator[bytes | UserError]:
        """Yields each image, or why it cannot be read: UnreadableImage if no retry would help.

        Raises UserError if the remaining images cannot be read either.
        """


@dataclass(frozen=True)
class Files:
    """Images in files of their own."""

    paths: Sequence[str]
    nbytes: np.ndarray  # int64 [N]

    def cut(self, start: int, stop: int) -> "Files":
        return Files(self.paths[start:stop], self.nbytes[start:stop])

    def identity(self) -> bytes:
        return self.nbytes.astype(np.int64).tobytes()

    def __iter__(self) -> Iterator[bytes | UserError]:
        for path in self.paths:
            try:
                yield read_image_file(path)
            except UnreadableImage as why:
                yield why
            except OSError as error:
                gone = error.errno in GONE
                yield UnreadableImage(error.strerror) if gone else unreadable(path, error)


@dataclass(frozen=True)
class TarMembers:
    """Images inside tars: image i is nbytes[i] bytes of files[tar[i]], starting at offset[i]."""

    files: Sequence[str]
    tar: np.ndarray  # int32 [N]
    offset: np.ndarray  # int64 [N]
    nbytes: np.ndarray  # int64 [N]

    def cut(self, start: int, stop: int) -> "TarMembers":
        cut = slice(start, stop)
        return replace(self, tar=self.tar[cut], offset=self.offset[cut], nbytes=self.nbytes[cut])

    def identity(self) -> bytes:
        return self.nbytes.astype(np.int64).tobytes()  # the same as for Files

    def __iter__(self) -> Iterator[bytes | UnreadableImage]:
        opened, descriptor = -1, -1
        try:
            for tar, offset, nbytes in zip(self.tar, self.offset, self.nbytes, strict=True):
                path = self.files[tar]
                try:
                    check_bytes(int(nbytes))
                    if tar != opened:
                        if descriptor >= 0:
                            os.close(descriptor)
                        descriptor = os.open(path, os.O_RDONLY)
                        opened = tar
                    data = os.pread(descriptor, int(nbytes), int(offset))
                except UnreadableImage as why:
                    yield why
                    continue
                except OSError as error:
                    raise unreadable(path, error) from None
                if len(data) < nbytes:
                    raise UserError(f"{path}: has become shorter; copy it again")
                yield data
        finally:
            if descriptor >= 0:
                os.close(descriptor)


@dataclass(frozen=True)
class ParquetRows:
    """The column image.bytes of rows start..stop-1 of several files, seen as one table."""

    files: Sequence[str]
    rows: Sequence[int]  # number of rows of each file
    start: int
    stop: int

    def cut(self, start: int, stop: int) -> "ParquetRows":
        return replace(self, start=self.start + start, stop=self.start + stop)

    def identity(self) -> bytes:
        return repr([(rows, os.path.getsize(path)) for path, rows in self._files()]).encode()

    def __iter__(self) -> Iterator[bytes]:
        first = 0
        for path, rows in self._files():
            if first < self.stop and first + rows > self.start:
                yield from _parquet_rows(path, self.start - first, self.stop - first)
            first += rows

    def _files(self) -> Iterator[tuple[str, int]]:
        return zip(self.files, self.rows, strict=True)


def _parquet_rows(path: str, start: int, stop: int) -> Iterator[bytes]:
    import pyarrow as pa  # only this source needs it
    import pyarrow.parquet as pq

    try:
        # A row group may be as large as the file, so it is read in batches.
        with pq.ParquetFile(path, buffer_size=PARQUET_BUFFER_BYTES, pre_buffer=False) as file:
            row = 0
            for group in range(file.num_row_groups):
                rows = file.metadata.row_group(group).num_rows
                if row >= stop or row + rows <= start:
                    row += rows
                    continue
                for batch in file.iter_batches(
                    PARQUET_BATCH_ROWS, [group], ["image.bytes"], use_threads=False
                ):
                    for data in batch.column(0).field("bytes"):
                        if start <= row < stop:
                            yield data.as_py() or b""
                        row += 1
    except OSError as error:  # Arrow's message names no file
        raise unreadable(path, error) from None
    except pa.ArrowException as error:
        raise UserError(f"{path}: damaged ({str(error).splitlines()[0]}); copy it again") from None


@dataclass(frozen=True)
class Pixels:
    """Raw pixels, uint8 [N, H, W, 3], which become PNG files without loss."""

    pixels: np.ndarray

    def cut(self, start: int, stop: int) -> "Pixels":
        return Pixels(self.pixels[start:stop])

    def identity(self) -> bytes:
        return hashlib.sha256(self.pixels.data).digest()

    def __iter__(self) -> Iterator[bytes]:
        for pixels in self.pixels:
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "PNG")
            yield file.getvalue()


def unreadable(path: object, error: OSError) -> UserError:
    """Returns the error for a file that cannot be read."""
    reason = error.strerror or str(error).splitlines()[0]
    return UserError(f"{path}: cannot be read: {reason}")
