"""Caches of encoded or decoded images, in memory that the ranks of a node share.

The memory is a file in /dev/shm that is unlinked once all ranks have mapped it. So it is freed when
the last of them ends, in whatever way.
"""

import mmap
import os
import uuid
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.index import Index
from resnet_dist.distributed import World
from resnet_dist.errors import UserError

SHARED_MEMORY = Path("/dev/shm")
BLANK_PX, BLANK_GREY = 8, 128  # the image that replaces an unreadable one in an evaluation
PLAIN, NOT_PLAIN = 1, 2  # marks of images in the cache of encoded images
SPARE_BYTES = 2**30  # left free in /dev/shm for NCCL and others


@dataclass(frozen=True)
class Image:
    """An image on its way to the decoder, or the box of it that a window needs."""

    data: np.ndarray  # encoded: uint8 [bytes]; decoded: uint8 [h, w, 3]
    size: tuple[int, int]  # height and width of what is in `data`
    corner: tuple[int, int] = (0, 0)  # the row and column of the whole image at which it begins


Result = Image | UnreadableImage


def shared_bytes(world: World, nbytes: int, what: str) -> np.ndarray:
    """Allocates memory that all ranks of a node share: uint8 [nbytes], zeros. A collective.

    what: what it is for, in the error message.

    Raises:
        UserError: it does not fit.
    """
    token = world.on_main(lambda: uuid.uuid4().hex)
    path = SHARED_MEMORY / f"resnet-dist-{token}"

    def make() -> None:
        if world.local_rank != 0:
            return
        try:
            reserve()
        except OSError as error:
            raise UserError(f"{what}: {path}: {error.strerror}; use data.cache=none") from None

    def reserve() -> None:
        free = os.statvfs(SHARED_MEMORY)
        spare = free.f_bavail * free.f_frsize - SPARE_BYTES
        if nbytes > spare:
            raise UserError(
                f"{what}: needs {nbytes / 2**30:,.1f} GiB of {SHARED_MEMORY}, which has "
                f"{max(0, spare) / 2**30:,.1f} GiB to spare; use data.cache=none"
            )
        with open(path, "wb") as file:
            os.posix_fallocate(
                file.fileno(), 0, max(1, nbytes)
            )  # a sparse file could run out of memory later

    def open_() -> np.ndarray:
        with open(path, "r+b") as file:
            return np.frombuffer(mmap.mmap(file.fileno(), 0), np.uint8)[:nbytes]

    try:
        world.on_all(make)
        return world.on_all(open_)
    finally:
        if world.local_rank == 0:
            path.unlink(missing_ok=True)


class EncodedCache:
    """The encoded bytes of the images that any rank of the node has read so far."""

    def __init__(self, nbytes: np.ndarray, world: World) -> None:
        """A collective. nbytes: the size of each image, int64 [N]."""
        self._ends = np.cumsum(nbytes)
        self._nbytes = nbytes
        total = int(nbytes.sum())
        memory = shared_bytes(world, total + len(nbytes), "data.cache=encoded")
        self._bytes, self._filled = memory[:total], memory[total:]

    def get(self, sample: int) -> tuple[np.ndarray, bool] | None:
        """Returns an image, uint8 [bytes], and whether it is plain (see index/plain.py), or None if
        it has not been read yet."""
        if not self._filled[sample]:
            return None
        end = self._ends[sample]
        return self._bytes[end - self._nbytes[sample] : end], self._filled[sample] == PLAIN

    def put(self, sample: int, data: np.ndarray, is_plain: bool) -> None:
        """Stores an image, unless its file has changed its size since it was indexed.

        Ranks that store the same image at the same time write the same bytes.
        """
        if len(data) == self._nbytes[sample]:
            end = self._ends[sample]
            self._bytes[end - len(data) : end] = data
            self._filled[sample] = PLAIN if is_plain else NOT_PLAIN


class DecodedCache:
    """The pixels of all images that can be decoded."""

    blank = Image(np.full((BLANK_PX, BLANK_PX, 3), BLANK_GREY, np.uint8), (BLANK_PX, BLANK_PX))

    def __init__(self, index: Index, world: World) -> None:
        """Allocates the memory; the images are added with `put`. A collective."""
        self._index = index
        self._nbytes = 3 * index.sizes.astype(np.int64).prod(axis=1)
        self._ends = np.cumsum(self._nbytes)
        total = int(self._nbytes.sum())
        memory = shared_bytes(world, total + len(index), "data.cache=decoded")
        self._pixels, self._filled = memory[:total], memory[total:]

    def put(self, sample: int, pixels: np.ndarray) -> None:
        """Stores an image. pixels: uint8 [H, W, 3]."""
        end = self._ends[sample]
        self._pixels[end - self._nbytes[sample] : end] = pixels.reshape(-1)
        self._filled[sample] = 1

    def read(self, sample: int, box: Sequence[int] = (), decoded: bool = True) -> Image:
        """Returns a whole image. The parameters are those of Reader.read.

        Raises:
            UnreadableImage: it could not be decoded.
        """
        if not self._filled[sample]:
            raise UnreadableImage(self._index.bad.get(sample, "could not be decoded"))
        height, width = self._index.sizes[sample].tolist()
        end = self._ends[sample]
        pixels = self._pixels[end - self._nbytes[sample] : end]
        return Image(pixels.reshape(height, width, 3), (height, width))

    def read_ahead(self, samples: np.ndarray, boxes: np.ndarray) -> Callable[[], list[Result]]:
        """Like Reader.read_ahead, but there is nothing to wait for."""
        return lambda: [self._result(sample) for sample in samples.tolist()]

    def _result(self, sample: int) -> Result:
        try:
            return self.read(sample)
        except UnreadableImage as error:
            return error
