"""Feeds the decoder: reads images ahead, and replaces unreadable ones by stand-ins.

A stand-in is a function of (seed, epoch, sample). Whether one is needed depends on the image's
bytes, and with damage that only DALI notices on the window, too. So it makes no difference to any
batch which rank finds a bad image, or when.
"""

from collections import deque
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace

import numpy as np

from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.batch import BLANK_LABEL
from resnet_dist.data.load.boxes import boxes_of, decoded_box
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
    # Of each image, its window, and height and width of what is in `images`: int [B, 2].
    windows: Windows
    sizes: np.ndarray
    images: list[np.ndarray]  # [B], from the reader; empty if all pixels are in memory anyway

    def at(self, row: int) -> "Work":
        """Returns the work for the single image in `row`."""
        one = slice(row, row + 1)
        return Work(
            self.request,
            self.shown[one],
            self.windows.at(row),
            self.sizes[one],
            self.images[one],
        )

    def put(self, row: int, sample: int, window: Windows, image: Image) -> None:
        """Replaces the image in `row`. window: in pixels of the whole image."""
        self.shown, self.sizes = self.shown.copy(), self.sizes.copy()
        self.shown[row], self.sizes[row], self.images[row] = sample, image.size, image.data
        inside = window.roi - np.tile(image.corner, 2)
        self.windows = self.windows.put(row, replace(window, roi=inside))


class Feed:
    """Turns requests into work for the decoder, and keeps the list of bad images."""

    def __init__(self, index: Index, reader: Reader | DecodedCache, max_bad_samples: int) -> None:
        self._index = index
        self._reader = reader
        self._max_bad_samples = max_bad_samples
        self.blank = reader.blank
        self.bad: dict[int, str] = {}  # unreadable samples so far, and why
        self.refused: dict[int, str] = {}  # samples that only Pillow could decode; DALI's reason

    def work(self, requests: Iterable[Request], ahead: int) -> Iterator[Work]:
        """Yields the work for each request, in order, while reading `ahead` requests in advance.

        Raises:
            UserError: there are too many bad images, or no stand-in can be read.
        """
        reading: deque[tuple[Request, Callable[[], list[Result]]]] = deque()
        for request in requests:
            boxes = boxes_of(request.windows, self._index.sizes[request.samples])
            reading.append((request, self._reader.read_ahead(request.samples, boxes)))
            if len(reading) > ahead:
                yield self._collect(*reading.popleft())
        while reading:
            yield self._collect(*reading.popleft())

    def _collect(self, request: Request, wait: Callable[[], list[Result]]) -> Work:
        samples, windows = request.samples, request.windows
        results = wait()
        images = [one.data if isinstance(one, Image) else self.blank.data for one in results]
        work = Work(request, samples, windows, self._index.sizes[samples], images)
        for row, result in enumerate(results):
            if isinstance(result, UnreadableImage):
                self._replace(work, row, str(result))
            elif result.size != tuple(work.sizes[row]):  # Pillow has decoded a part
                work.put(row, int(samples[row]), windows.at(row), result)
        return work

    def mend(self, work: Work, row: int, said: str) -> None:
        """Lets Pillow decode the image in `row`, or replaces it. said: DALI's reason to refuse."""
        sample, window = int(work.shown[row]), work.windows.at(row)
        height, width = work.sizes[row].tolist()
        box = boxes_of(window, work.sizes[row : row + 1])[0].tolist()
        try:
            image = decoded_box(work.images[row].tobytes(), (height, width), box)
        except UnreadableImage as error:
            self._replace(work, row, str(error))
        else:
            self.refused.setdefault(sample, said)
            work.put(row, sample, window, image)

    def _replace(self, work: Work, row: int, why: str) -> None:
        """Replaces the bad image in `row`: by a stand-in, or in an evaluation by a blank image."""
        sample = int(work.request.samples[row])
        self.bad.setdefault(sample, why)
        if len(self.bad) > self._max_bad_samples:
            raise UserError(too_many_bad(self.bad, self._index, self._max_bad_samples))
        if work.request.stand_in is None:
            whole = np.array([[0, 0, BLANK_PX, BLANK_PX]], np.float64)
            work.put(row, BLANK_LABEL, unchanged(whole, work.windows.size_px), self.blank)
            return
        for attempt in range(MAX_STAND_INS):
            other, window = work.request.stand_in(sample, attempt)
            box = boxes_of(window, self._index.sizes[[other]])[0].tolist()
            try:
                work.put(row, other, window, self._reader.read(other, box, decoded=True))
                return
            except UnreadableImage:
                continue
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
