"""The encoded bytes of images, from files or from the middle of shards, read ahead by threads."""

import errno
import io
import os
import stat
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image as Pillow

from resnet_dist.data.index.headers import UnreadableImage, screen
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.cache import BLANK_GREY, BLANK_PX, EncodedCache, Image, Result
from resnet_dist.data.view.order import BLOCK_IMAGES
from resnet_dist.errors import UserError

IMAGES_PER_TASK = 16  # a thread's errand: long against what it costs to send the thread
RETRY_AFTER_SECONDS = (0.1, 1.0)  # a network file system may stumble
GONE = (errno.ENOENT, errno.ENOTDIR, errno.EISDIR, errno.EACCES, errno.EPERM, errno.ELOOP)
OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BLOCKS_REMEMBERED = 4096


def _blank_png() -> np.ndarray:
    file = io.BytesIO()
    Pillow.new("RGB", (BLANK_PX, BLANK_PX), (BLANK_GREY,) * 3).save(file, "PNG")
    return np.frombuffer(file.getvalue(), np.uint8)


class Reader:
    blank = _blank_png()

    def __init__(self, index: Index, threads: int, cache: EncodedCache | None = None) -> None:
        """threads: of `read_ahead`. cache: of this index, shared with the ranks of the node."""
        self._index = index
        self._cache = cache
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._shard_files: dict[int, int] = {}  # open file descriptors
        self._asked_for: set[int] = set()  # blocks
        weakref.finalize(self, _close_all, self._shard_files)

    def read(self, sample: int) -> Image:
        """
        Raises:
            UnreadableImage: known to be bad, gone, or not an image of the index's size.
        """
        why = self._index.bad.get(sample)
        if why is not None:
            raise UnreadableImage(why)
        cached = None if self._cache is None else self._cache.get(sample)
        if cached is not None:
            return Image(cached, trusted=True)
        data = self._read_patiently(sample)
        height, width = self._index.sizes[sample].tolist()
        image = Image(np.frombuffer(data, np.uint8), screen(data, (height, width)))
        if self._cache is not None and image.trusted:
            self._cache.put(sample, image.data)
        return image

    def read_ahead(self, samples: np.ndarray) -> Callable[[], list[Result]]:
        """Starts to read; what is returned waits for the images, in order."""
        numbers = samples.tolist()
        tasks = [
            self._threads.submit(self._read_some, numbers[start : start + IMAGES_PER_TASK])
            for start in range(0, len(numbers), IMAGES_PER_TASK)
        ]
        return lambda: [result for task in tasks for result in task.result()]

    def _read_some(self, samples: Sequence[int]) -> list[Result]:
        results: list[Result] = []
        for sample in samples:
            try:
                results.append(self.read(sample))
            except UnreadableImage as error:
                results.append(error)
        return results

    def _read_patiently(self, sample: int) -> bytes:
        read = self._read_file if self._index.shards is None else self._read_from_shard
        for pause_seconds in (*RETRY_AFTER_SECONDS, 0):
            try:
                return read(sample)
            except OSError as error:
                failure = error
                if error.errno in OURS:
                    raise UserError(
                        f"{self._index.paths[sample]}: {error.strerror}: the fault of this process "
                        "or machine, not of the image; raise `ulimit -n`, or give it more memory"
                    ) from None
                if error.errno in GONE:
                    break
                time.sleep(pause_seconds)
        raise UnreadableImage(f"cannot be read ({failure.strerror})")

    def _read_file(self, sample: int) -> bytes:
        with open(self._index.paths[sample], "rb", buffering=0) as file:
            if not stat.S_ISREG(os.fstat(file.fileno()).st_mode):
                raise UnreadableImage("not a plain file")
            return file.read()

    def _read_from_shard(self, sample: int) -> bytes:
        shards, nbytes = self._index.shards, self._index.nbytes
        assert shards is not None
        assert nbytes is not None
        shard = int(shards.shard[sample])
        file = self._shard_files.get(shard)
        if file is None:
            # Two threads may come here at once: the second finds the first one's file.
            opened = os.open(shards.files[shard], os.O_RDONLY)
            file = self._shard_files.setdefault(shard, opened)
            if file != opened:
                os.close(opened)
        self._ask_for_block(file, sample)
        data = os.pread(file, int(nbytes[sample]), int(shards.offset[sample]))
        if len(data) < nbytes[sample]:
            raise UnreadableImage("cannot be read (its shard ends before it does)")
        return data

    def _ask_for_block(self, file: int, sample: int) -> None:
        """Has the kernel read the neighbours too, in one go: this rank comes to them soon."""
        shards, nbytes = self._index.shards, self._index.nbytes
        assert shards is not None
        assert nbytes is not None
        block = sample // BLOCK_IMAGES
        if block in self._asked_for:
            return
        if len(self._asked_for) >= BLOCKS_REMEMBERED:
            self._asked_for.clear()
        self._asked_for.add(block)
        first = block * BLOCK_IMAGES
        last = min(first + BLOCK_IMAGES, len(self._index)) - 1
        start, end = shards.offset[first], shards.offset[last] + nbytes[last]
        if shards.shard[first] != shards.shard[last] or end < start:
            return  # a block on two shards, or an index that was reordered: image by image
        os.posix_fadvise(file, int(start), int(end - start), os.POSIX_FADV_WILLNEED)


def _close_all(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)
