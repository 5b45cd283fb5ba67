"""What the decoder is given: images that were read ahead, and stand-ins for those that are bad.

A stand-in is a function of (seed, epoch, sample) alone, and whether one is needed depends on the
bytes that the window takes: who finds a bad image, and when, changes no batch. Only a quarantine,
made by hand or by `verify`, also sets aside what could be decoded in part.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

import numpy as np

from resnet_dist.data.augment import Request, Windows, unchanged
from resnet_dist.data.cache import BLANK_PX, DecodedCache, Result
from resnet_dist.data.headers import UnreadableImage
from resnet_dist.data.index import Index
from resnet_dist.data.reader import Reader
from resnet_dist.errors import UserError

BLANK_LABEL = -1  # of an image that stands for a bad one in an evaluation: no answer is right
MAX_STAND_INS = 100  # tried in one place: where all are bad, it is not the images


@dataclass
class Work:
    """A request on its way to the decoder."""

    request: Request
    shown: np.ndarray  # int64 [B]: the request's samples, or what stands in for them
    windows: Windows
    images: list[np.ndarray]  # [B], as the reader gives them; none where pixels are in memory

    def at(self, place: int) -> "Work":
        """The image at `place` alone."""
        one = slice(place, place + 1)
        return Work(self.request, self.shown[one], self.windows.at(place), self.images[one])

    def put(self, place: int, sample: int, window: Windows, image: np.ndarray) -> None:
        self.shown = self.shown.copy()
        self.shown[place] = sample
        self.windows = self.windows.put(place, window)
        self.images[place] = image


class Feed:
    def __init__(
        self,
        index: Index,
        reader: Reader | DecodedCache,
        max_bad_samples: int,
        why_undecodable: Callable[[Work], str | None],
    ) -> None:
        """why_undecodable: decodes the one image of a Work, and says what is wrong with it."""
        self._index = index
        self._reader = reader
        self._max_bad_samples = max_bad_samples
        self._why_undecodable = why_undecodable
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
        for place, result in enumerate(results):
            if isinstance(result, UnreadableImage):
                self.mend(work, place, str(result))
            elif not result.trusted:
                why = self._why_undecodable(work.at(place))
                if why is not None:
                    self.mend(work, place, why)
        return work

    def mend(self, work: Work, place: int, why: str) -> None:
        """Puts something else in the place of a bad image."""
        sample = int(work.request.samples[place])
        self.bad.setdefault(sample, why)
        if len(self.bad) > self._max_bad_samples:
            raise UserError(too_many_bad(self.bad, self._index, self._max_bad_samples))
        if work.request.stand_in is None:
            whole = np.array([[0, 0, BLANK_PX, BLANK_PX]], np.float64)
            work.put(place, BLANK_LABEL, unchanged(whole, work.windows.size_px), self.blank)
            return
        for attempt in range(MAX_STAND_INS):
            other, window = work.request.stand_in(sample, attempt)
            try:
                image = self._reader.read(other)
            except UnreadableImage:
                continue
            work.put(place, other, window, image.data)
            if self._why_undecodable(work.at(place)) is None:
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
