"""What the decoder is given: images that were read ahead, and stand-ins for those that are bad.

A stand-in is a function of (seed, epoch, sample) alone. Whether one is needed depends on the bytes
that the window takes, or on all bytes of an image that is not trusted or that stands in itself: who
finds a bad image, and when, changes no batch. Only a quarantine, made by hand or by `verify`, also
sets aside what could be decoded in part.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, field

import numpy as np

from resnet_dist.data.index.headers import UnreadableImage
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.batch import BLANK_LABEL
from resnet_dist.data.load.cache import BLANK_PX, DecodedCache, Image, Result
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.view.augment import Request, Windows, unchanged
from resnet_dist.errors import UserError

MAX_STAND_INS = 100  # tried for one image: where all are bad, it is not the images


@dataclass
class Work:
    """A request on its way to the decoder."""

    request: Request
    shown: np.ndarray  # int64 [B]: the request's samples, or what stands in for them
    windows: Windows
    images: list[np.ndarray]  # [B], as the reader gives them; none where pixels are in memory
    # (row, sample) of what was shown and failed: not to be put there again.
    failed: set[tuple[int, int]] = field(default_factory=set)

    def at(self, row: int) -> "Work":
        """The image at `row` alone."""
        one = slice(row, row + 1)
        return Work(self.request, self.shown[one], self.windows.at(row), self.images[one])

    def put(self, row: int, sample: int, window: Windows, image: np.ndarray) -> None:
        self.shown = self.shown.copy()
        self.shown[row] = sample
        self.windows = self.windows.put(row, window)
        self.images[row] = image


class Feed:
    def __init__(
        self,
        index: Index,
        reader: Reader | DecodedCache,
        max_bad_samples: int,
        check: Callable[[np.ndarray], str | None],
    ) -> None:
        """check: decodes an encoded image, and says what is wrong with it."""
        self._index = index
        self._reader = reader
        self._max_bad_samples = max_bad_samples
        self._check = check
        self._checked: dict[int, str | None] = {}  # what `check` said of samples
        self.blank = reader.blank
        self.bad: dict[int, str] = {}  # samples that were asked for in vain so far, and why

    def work(self, requests: Iterable[Request], ahead: int) -> Iterator[Work]:
        """In order; `ahead` requests are being read while one is worked on.

        Raises:
            UserError: too many bad images, or no stand-in.
        """
        reading: deque[tuple[Request, Callable[[], list[Result]]]] = deque()
        for request in requests:
            reading.append((request, self._reader.read_ahead(request.samples)))
            if len(reading) > ahead:
                yield self._collect(*reading.popleft())
        while reading:
            yield self._collect(*reading.popleft())

    def _collect(self, request: Request, wait: Callable[[], list[Result]]) -> Work:
        results = wait()

        images = [self.blank if isinstance(one, UnreadableImage) else one.data for one in results]
        work = Work(request, request.samples, request.windows, images)
        for row, result in enumerate(results):
            if isinstance(result, UnreadableImage):
                self.mend(work, row, str(result))
            elif not result.trusted:
                why = self._why_undecodable(int(request.samples[row]), result)
                if why is not None:
                    self.mend(work, row, why)
        return work

    def _why_undecodable(self, sample: int, image: Image) -> str | None:
        """Of its bytes; each sample is decoded once for it."""
        if image.data.ndim == 3:  # pixels
            return None
        if sample not in self._checked:
            self._checked[sample] = self._check(image.data)
        return self._checked[sample]

    def mend(self, work: Work, row: int, why: str) -> None:
        """Puts something else in the place of a bad image."""
        sample = int(work.request.samples[row])
        work.failed.add((row, int(work.shown[row])))
        self.bad.setdefault(sample, why)
        if len(self.bad) > self._max_bad_samples:
            raise UserError(too_many_bad(self.bad, self._index, self._max_bad_samples))
        if work.request.stand_in is None:
            whole = np.array([[0, 0, BLANK_PX, BLANK_PX]], np.float64)
            work.put(row, BLANK_LABEL, unchanged(whole, work.windows.size_px), self.blank)
            return
        for attempt in range(MAX_STAND_INS):
            other, window = work.request.stand_in(sample, attempt)
            if (row, other) in work.failed:
                continue
            try:
                image = self._reader.read(other)
            except UnreadableImage:
                continue
            if self._why_undecodable(other, image) is None:
                work.put(row, other, window, image.data)
                return
        raise UserError(
            f"{self._index.paths[sample]}: {why}; nor could any of {MAX_STAND_INS} other images "
            "be read in its place: is the data still there?"
        )


def too_many_bad(bad: dict[int, str], index: Index, most: int) -> str:
    """The line to stop with."""
    sample, why = next(iter(bad.items()))
    return (
        f"more than data.max_bad_samples={most} images cannot be read, such as "
        f"{index.paths[sample]} ({why}); look at them with `resnet-dist verify`, or raise the limit"
    )
