"""Feeds the decoder: reads images ahead, and replaces unreadable ones by stand-ins.

A stand-in is a function of (seed, epoch, sample). Whether one is needed depends on the bytes that
decoding the window takes, or on all bytes if the image is not trusted or is itself a stand-in. So
it makes no difference to any batch which rank finds a bad image, or when. Only a quarantine (made
by hand or by `verify`) also excludes images that could be decoded in part.
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

MAX_STAND_INS = 100  # attempts per image; if all fail, the fault is not in the images


@dataclass
class Work:
    """A request on its way to the decoder."""

    request: Request
    shown: np.ndarray  # int64 [B]: the requested samples, or their stand-ins
    windows: Windows
    images: list[np.ndarray]  # [B], from the reader; empty if all pixels are in memory anyway
    # (row, sample) pairs that could not be decoded and must not be tried again.
    failed: set[tuple[int, int]] = field(default_factory=set)

    def at(self, row: int) -> "Work":
        """Returns the work for the single image in `row`."""
        one = slice(row, row + 1)
        return Work(self.request, self.shown[one], self.windows.at(row), self.images[one])

    def put(self, row: int, sample: int, window: Windows, image: np.ndarray) -> None:
        """Replaces the image in `row`."""
        self.shown = self.shown.copy()
        self.shown[row] = sample
        self.windows = self.windows.put(row, window)
        self.images[row] = image


class Feed:
    """Turns requests into work for the decoder, and keeps the list of bad images."""

    def __init__(
        self,
        index: Index,
        reader: Reader | DecodedCache,
        max_bad_samples: int,
        check: Callable[[np.ndarray], str | None],
    ) -> None:
        """check: decodes an encoded image; returns what is wrong with it, or None."""
        self._index = index
        self._reader = reader
        self._max_bad_samples = max_bad_samples
        self._check = check
        self._checked: dict[int, str | None] = {}  # sample -> result of `check`
        self.blank = reader.blank
        self.bad: dict[int, str] = {}  # unreadable samples so far, and why

    def work(self, requests: Iterable[Request], ahead: int) -> Iterator[Work]:
        """Yields the work for each request, in order, while reading `ahead` requests in advance.

        Raises:
            UserError: there are too many bad images, or no stand-in can be read.
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
        """Returns why an image cannot be decoded, or None. Each sample is tried only once."""
        if image.data.ndim == 3:  # pixels
            return None
        if sample not in self._checked:
            self._checked[sample] = self._check(image.data)
        return self._checked[sample]

    def mend(self, work: Work, row: int, why: str) -> None:
        """Replaces the bad image in `row`: by a stand-in, or in an evaluation by a blank image."""
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
            f"{self._index.paths[sample]}: {why}, and none of {MAX_STAND_INS} other images could "
            "be read instead; check that the data are still there"
        )


def too_many_bad(bad: dict[int, str], index: Index, most: int) -> str:
    """Returns the message for a run that stops because of bad images."""
    sample, why = next(iter(bad.items()))
    return (
        f"more than data.max_bad_samples={most} images cannot be read, such as "
        f"{index.paths[sample]} ({why}); find them with `resnet-dist verify`, or raise the limit"
    )
