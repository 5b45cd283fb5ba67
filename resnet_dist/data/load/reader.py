"""Reads the encoded bytes of images, from files or from inside shards, ahead of time in threads."""

import errno
import io
import os
import time
import weakref
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor

import numpy as np
from PIL import Image as Pillow

from resnet_dist.data.index.image_file import GONE, UnreadableImage, check_bytes, read_image_file
from resnet_dist.data.index.index import Index
from resnet_dist.data.index.plain import why_not_plain
from resnet_dist.data.load.boxes import decoded_box
from resnet_dist.data.load.cache import BLANK_GREY, BLANK_PX, EncodedCache, Image, Result
from resnet_dist.data.view.order import BLOCK_IMAGES
from resnet_dist.errors import UserError

IMAGES_PER_TASK = 16  # enough to amortize the cost of submitting a task to a thread
RETRY_AFTER_SECONDS = (0.1, 1.0)  # errors of a network file system may be temporary
# Errors that are not the image's fault but the process's.
OURS = (errno.EMFILE, errno.ENFILE, errno.ENOMEM)
BLOCKS_REMEMBERED = 4096  # blocks of shards that the kernel has been asked to read ahead


def _blank_png() -> Image:
    file = io.BytesIO()
    Pillow.new("RGB", (BLANK_PX, BLANK_PX), (BLANK_GREY,) * 3).save(file, "PNG")
    return Image(np.frombuffer(file.getvalue(), np.uint8), (BLANK_PX, BLANK_PX))


class Reader:
    """Reads the images of an index: plain ones (see index/plain.py) as they are encoded.

    Of the others it returns the pixels that are needed, which Pillow decodes in the same threads.
    """

    blank = _blank_png()

    def __init__(self, index: Index, threads: int, cache: EncodedCache | None = None) -> None:
        """threads: used by `read_ahead`. cache: the node's shared cache of encoded images."""
        self._index = index
        self._cache = cache
        self._threads = ThreadPoolExecutor(threads, thread_name_prefix="reader")
        self._shard_files: dict[int, int] = {}  # open file descriptors
        self._asked_for: set[int] = set()  # blocks whose read-ahead was requested
        weakref.finalize(self, _close_all, self._shard_files)

    def read(self, sample: int, box: Sequence[int], decoded: bool = False) -> Image:
        """Reads one image.

        box: top, left, bottom and right of the pixels that are needed. decoded: Pillow decodes it
        even if it is plain.

        Raises:
            UnreadableImage: it is known to be bad, missing, not an image of the indexed size, or
                cannot be decoded by Pillow.
        """
        why = self._index.bad.get(sample)
        if why is not None:
            raise UnreadableImage(why)
        height, width = self._index.sizes[sample].tolist()
        cached = None if self._cache is None else self._cache.get(sample)
        if cached is not None:
            data, is_plain = cached
        else:
            read = self._read_patiently(sample)
            data, is_plain = np.frombuffer(read, np.uint8), self.is_plain(sample, read)
            if self._cache is not None:
                self._cache.put(sample, data, is_plain)
        if is_plain and not decoded:
            return Image(data, (height, width))
        return decoded_box(data.tobytes(), (height, width), box)

    def is_plain(self, sample: int, data: bytes) -> bool:
        """Whether DALI decodes an image that was just read, in its encoded form `data`."""
        height, width = self._index.sizes[sample].tolist()
        return why_not_plain(data, (height, width)) is None

    def read_ahead(self, samples: np.ndarray, boxes: np.ndarray) -> Callable[[], list[Result]]:
        """Starts reading. Returns a function that waits for the images, in order.

        samples: int64 [B]. boxes: of each, as in `read`, int32 [B, 4].
        """
        wanted = list(zip(samples.tolist(), boxes.tolist(), strict=True))
        tasks = [
            self._threads.submit(self._read_some, wanted[start : start + IMAGES_PER_TASK])
            for start in range(0, len(wanted), IMAGES_PER_TASK)
        ]
        return lambda: [result for task in tasks for result in task.result()]

    def _read_some(self, wanted: Sequence[tuple[int, Sequence[int]]]) -> list[Result]:
        results: list[Result] = []
        for sample, box in wanted:
            try:
                results.append(self.read(sample, box))
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
                        f"{self._index.paths[sample]}: {error.strerror}, which is not the image's "
                        "fault; raise `ulimit -n`, or provide more memory"
                    ) from None
                if error.errno in GONE:
                    break
                time.sleep(pause_seconds)
        raise UnreadableImage(f"cannot be read ({failure.strerror})")

    def _read_file(self, sample: int) -> bytes:
        return read_image_file(self._index.paths[sample])

    def _read_from_shard(self, sample: int) -> bytes:
        shards, nbytes = self._index.shards, self._index.nbytes
        assert shards is not None
        assert nbytes is not None
        shard = int(shards.shard[sample])
        file = self._shard_files.get(shard)
        if file is None:
            # If two threads get here at once, the second uses the file that the first has opened.
            opened = os.open(shards.files[shard], os.O_RDONLY)
            file = self._shard_files.setdefault(shard, opened)
            if file != opened:
                os.close(opened)
        check_bytes(int(nbytes[sample]))
        self._ask_for_block(file, sample)
        data = os.pread(file, int(nbytes[sample]), int(shards.offset[sample]))
        if len(data) < nbytes[sample]:
            raise UnreadableImage("cannot be read (its shard is too short)")
        return data

    def _ask_for_block(self, file: int, sample: int) -> None:
        """Asks the kernel to read the image's whole block, since this rank needs it all soon."""
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
            return  # the block spans two shards, or samples are not in the order of the shards
        os.posix_fadvise(file, int(start), int(end - start), os.POSIX_FADV_WILLNEED)


def _close_all(files: dict[int, int]) -> None:
    for file in files.values():
        os.close(file)
