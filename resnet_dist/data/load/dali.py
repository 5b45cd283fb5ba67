"""Turns requests (sample numbers and windows) into batches with NVIDIA DALI.

Nothing random happens here; data/view decides what a batch shows. dali_graphs.py has the pipelines.
Resampling is antialiased bilinear as in Pillow and torchvision (a triangle filter as wide as the
scale), except at the border of an image: filter taps beyond it repeat the edge pixel, while Pillow
leaves them out.
"""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from typing import Any

import numpy as np
import torch
from nvidia.dali import Pipeline, __version__, backend, types

from resnet_dist.config import DataConfig
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.batch import BLANK_LABEL, Batch
from resnet_dist.data.load.boxes import boxes_of
from resnet_dist.data.load.cache import DecodedCache
from resnet_dist.data.load.dali_graphs import decode_graph, image_graph, raw_graph
from resnet_dist.data.load.decoding import Decoding
from resnet_dist.data.load.feed import BLANK_PX, Feed, Work
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.load.resample import Resampler
from resnet_dist.data.view.augment import Request, Windows, whole_images
from resnet_dist.process import give_back

DALI_VERSION: str = __version__


@dataclass(frozen=True)
class _Graph:
    """A DALI pipeline that is not built yet, and how to make its inputs."""

    define: Callable[..., Pipeline]
    options: dict[str, Any]
    inputs: Callable[[Work], tuple[Any, ...]]  # work -> the arrays that the pipeline polls


class _Source:
    """What a pipeline polls for its inputs, until it is closed.

    The graph of a DALI pipeline refers to its source and, in a circle, to itself. So both live on
    until the next full garbage collection, which may be a long time coming. A closed source keeps
    no images alive until then.
    """

    def __init__(self, poll: Callable[[], tuple[Any, ...]]) -> None:
        """poll: returns the inputs of a batch; StopIteration if there are no more."""
        self._poll: Callable[[], tuple[Any, ...]] | None = poll

    def __call__(self) -> tuple[Any, ...]:
        assert self._poll is not None
        return self._poll()

    def close(self) -> None:
        """Forgets where the inputs come from."""
        self._poll = None


class Loader:
    """Turns requests into batches, reading and decoding ahead of the consumer.

    A bad image makes a DALI pipeline fail. Then the images of its batch are decoded one by one,
    those that fail are left to Pillow or replaced (see feed.py), and a new pipeline continues with
    that batch.
    """

    def __init__(
        self,
        index: Index,
        data: DataConfig,
        *,
        device: torch.device,
        dtype: torch.dtype,
        max_batch_size: int,
        mean_image: np.ndarray | None = None,
        reader: Reader | DecodedCache | None = None,
        decoding: Decoding = Decoding(),  # noqa: B008 (it is frozen)
    ) -> None:
        """dtype: of the images in a batch. mean_image: float32 [H, W, 3] on the 0..1 scale, which
        replaces data.mean; images must be seen at H x W. reader: None for a new Reader without a
        cache.

        Raises:
            ValueError: `decoding` needs a GPU, and `device` is not one.
        """
        if decoding.device == "mixed" and device.type != "cuda":
            raise ValueError(f"{decoding}: needs a GPU, and the images are for {device}")
        self._decoding = decoding
        self._index = index
        self._data = data
        self._device = device
        self._dtype = dtype
        self._mean = 255 * np.asarray(data.mean if mean_image is None else mean_image, np.float32)
        self._std = [255 * s for s in data.std]
        self._threads = data.decode_threads or 1
        self._executor = {
            "batch_size": max_batch_size,
            "num_threads": self._threads,
            "device_id": _device_id(device),
            "prefetch_queue_depth": data.prefetch_batches,
        }
        self._input_kind = "decoded" if isinstance(reader, DecodedCache) else decoding.extent
        self._feed: Feed | None = None
        if index.pixels is None:
            reader = reader or Reader(index, data.read_threads)
            self._feed = Feed(index, reader, data.max_bad_samples)

    @cached_property
    def _resampler(self) -> Resampler:
        return Resampler(self._mean, self._std, self._dtype, self._threads)

    @property
    def bad(self) -> dict[int, str]:
        """Unreadable samples so far, and why."""
        return {} if self._feed is None else self._feed.bad

    @property
    def refused(self) -> dict[int, str]:
        """Samples that DALI refused so far, though Pillow can decode them, and DALI's reason."""
        return {} if self._feed is None else self._feed.refused

    def batches(self, requests: Iterable[Request]) -> Generator[Batch]:
        """Yields one Batch per request, in order.

        The batch size may vary from request to request. Windows.cut_first must be the same in all.
        The memory is held until the generator ends or is closed.

        Raises:
            UserError: more than data.max_bad_samples images cannot be read.
            RuntimeError: DALI failed for a reason other than a bad image.
        """
        requests = iter(requests)
        first = next(requests, None)
        if first is None:
            return
        requests = chain([first], requests)
        seen_px = first.windows.size_px
        if self._mean.ndim == 3 and self._mean.shape[:2] != seen_px:
            raise ValueError(f"the mean image is {self._mean.shape[:2]}, the windows {seen_px}")
        work: Iterator[Work]
        if self._feed is None:
            work = (Work(one, one.samples, one.windows, np.empty(0), []) for one in requests)
        else:
            work = self._feed.work(requests, ahead=self._data.prefetch_batches)
        if not self._resizes_here(first.windows):
            yield from self._made_by_dali(work, self._graph_for(first.windows))
        elif self._input_kind == "decoded":
            yield from self._resized_here((w, self._cut_out(w)) for w in work)
        else:
            outputs = self._run(work, self._graph_for(first.windows))
            yield from self._resized_here(
                # The capsule, because torch takes ten times as long to ask for it.
                (w, [torch.from_dlpack(window.__dlpack__()) for window in windows])
                for w, (windows,) in outputs
            )

    def decoded(self, batches: Iterable[np.ndarray]) -> Iterator[tuple[int, np.ndarray]]:
        """Decodes whole images on the CPU: yields sample number and pixels, uint8 [H, W, 3].

        Leaves out images that cannot be decoded. batches: sample numbers to decode together, int64
        [B] each.
        """
        assert self._feed is not None
        requests = (
            Request(samples, whole_images(self._index.sizes[samples])) for samples in batches
        )
        work = self._feed.work(requests, ahead=self._data.prefetch_batches)
        graph = _Graph(
            decode_graph,
            {"input_kind": "image", "cut": False, "decoding": Decoding("image")},
            lambda one: (one.images,),
        )
        for one, (images,) in self._run(work, graph):
            for sample, pixels in zip(one.shown.tolist(), images, strict=True):
                if sample >= 0:
                    yield sample, np.array(pixels)

    def _resizes_here(self, windows: Windows) -> bool:
        """Whether resample.py does the resizing: on a CPU it is faster than DALI."""
        on_cpu = self._device.type == "cpu"
        return self._feed is not None and windows.cut_first and on_cpu

    def _graph_for(self, windows: Windows) -> _Graph:
        # DALI has no bfloat16. float16 has three more bits of mantissa, and normalized pixels are
        # far inside its range, so converting from it to bfloat16 loses nothing.
        dtype = types.FLOAT if self._dtype == torch.float32 else types.FLOAT16
        normalisation = {"mean": self._mean, "normalisation": {"std": self._std, "dtype": dtype}}
        if self._feed is None:
            return _Graph(raw_graph, normalisation, self._raw_inputs)
        decode = {
            "input_kind": self._input_kind,
            "cut": windows.cut_first,
            "decoding": self._decoding,
        }
        if self._resizes_here(windows):
            return _Graph(decode_graph, decode, self._image_inputs)
        return _Graph(image_graph, decode | normalisation, self._window_inputs)

    def _made_by_dali(self, work: Iterator[Work], graph: _Graph) -> Iterator[Batch]:
        # The tensors are views of DALI's memory. When torch releases one, a thread of DALI 2.4
        # synchronizes the whole device before it frees the memory, about once per batch. That does
        # not block this thread, but it may make the capture of a CUDA graph fail, or end the
        # process. Copies into torch's own memory would avoid it; benchmarks/gpu_batch_copy.py
        # measures what they would cost.
        for one, (images, labels) in self._run(work, graph):
            yield Batch(
                # [B, H, W, 3] seen as [B, 3, H, W]: channels_last without a copy.
                torch.from_dlpack(images.as_tensor()).permute(0, 3, 1, 2).to(self._dtype),
                torch.from_dlpack(labels.as_tensor()),
                one.request.step,
                one.request.positions,
            )

    def _resized_here(self, cut: Iterable[tuple[Work, list[torch.Tensor]]]) -> Iterator[Batch]:
        """Resizes a batch in threads while the consumer works on the previous one."""
        resizing: deque[tuple[Work, Callable[[], torch.Tensor]]] = deque()

        def batch() -> Batch:
            work, wait = resizing.popleft()
            labels = torch.from_numpy(self._labels(work))
            return Batch(wait(), labels, work.request.step, work.request.positions)

        try:
            for work, windows in cut:
                resizing.append((work, self._resampler.start(windows, work.windows)))
                if len(resizing) > 1:
                    yield batch()
            while resizing:
                yield batch()
        finally:
            self._resampler.forget()

    def _cut_out(self, work: Work) -> list[torch.Tensor]:
        """Returns the windows of decoded images, uint8 [h, w, 3] each."""
        return _cut_boxes([torch.from_numpy(image) for image in work.images], *self._box(work))

    def _run(self, work: Iterator[Work], graph: _Graph) -> Iterator[tuple[Work, Any]]:
        """Yields each Work with the outputs of the pipeline, which is rebuilt if it fails."""
        polled: deque[Work] = deque()  # given to DALI, but not delivered yet
        again: deque[Work] = deque()  # the same, to be given again after a pipeline failed
        # DALI reads the inputs in place (no_copy), so they must stay alive until it is done.
        alive: deque[tuple[Any, ...]] = deque(maxlen=2 * self._data.prefetch_batches + 1)

        def poll() -> tuple[Any, ...]:
            one = again.popleft() if again else next(work)  # StopIteration: no more input
            polled.append(one)
            alive.append(graph.inputs(one))
            return alive[-1]

        while True:
            source = _Source(poll)
            pipe = graph.define(source, **graph.options, **self._executor)
            try:
                while True:
                    # This waits for DALI's CPU threads, but not for the GPU: the current CUDA
                    # stream is made to wait for the batch instead.
                    outputs = pipe.run(_current_stream(self._device))
                    yield polled.popleft(), outputs
            except StopIteration:
                return
            except RuntimeError as error:
                self._mend_first_bad(polled, error)
            finally:
                del pipe
                source.close()
                give_back()
                if self._device.type == "cuda":
                    backend.ReleaseUnusedMemory()  # type: ignore[attr-defined]
            again.extend(polled)
            polled.clear()

    def _mend_first_bad(self, polled: Iterable[Work], error: RuntimeError) -> None:
        """Finds the first Work with images that DALI cannot decode, one by one, and mends them.

        Raises `error` if there are none, or if not even a good image can be decoded.
        """
        for work in polled:
            if self._feed is None:
                break
            is_bad = False
            for row, said in self._failures([work.at(row) for row in range(len(work.shown))]):
                if not is_bad and not self._decodes_at_all(work):
                    raise error
                is_bad = True
                self._feed.mend(work, row, said)
            if is_bad:
                return
        raise error

    def _decodes_at_all(self, work: Work) -> bool:
        """Whether a good image can be decoded. If not, the fault is not in the images."""
        good = work.at(0)
        assert self._feed is not None
        good.put(0, BLANK_LABEL, whole_images(np.full((1, 2), BLANK_PX)), self._feed.blank)
        return not any(self._failures([good]))

    def _failures(self, singles: list[Work]) -> Iterator[tuple[int, str]]:
        """Yields which of these, with one image each, cannot be decoded, and DALI's reason."""
        graph = self._graph_for(singles[0].windows)
        executor = self._executor | {"batch_size": 1, "num_threads": 1, "prefetch_queue_depth": 1}
        done = 0
        left: Iterator[Work]
        alive: deque[tuple[Any, ...]] = deque(maxlen=3)

        def poll() -> tuple[Any, ...]:
            alive.append(graph.inputs(next(left)))
            return alive[-1]

        while done < len(singles):
            left = iter(singles[done:])
            source = _Source(poll)
            pipe = graph.define(source, **graph.options, **executor)
            try:
                while True:
                    pipe.run()
                    done += 1
            except StopIteration:
                return
            except RuntimeError as error:
                said = str(error)
                del pipe
            finally:
                source.close()
            yield done, said
            done += 1

    def _image_inputs(self, work: Work) -> tuple[Any, ...]:
        """Encoded images and, unless the whole image is wanted, the box to decode."""
        if self._input_kind == "image" and not work.windows.cut_first:
            return (work.images,)
        start, end = self._box(work)
        if self._input_kind != "decoded":
            return work.images, start, end
        return ([np.ascontiguousarray(box) for box in _cut_boxes(work.images, start, end)],)

    def _box(self, work: Work) -> tuple[np.ndarray, np.ndarray]:
        """Returns the pixels that the windows depend on, as top left and bottom right corners.

        int32 [B, 2] each.
        """
        boxes = boxes_of(work.windows, work.sizes)
        return np.ascontiguousarray(boxes[:, :2]), np.ascontiguousarray(boxes[:, 2:])

    def _window_inputs(self, work: Work) -> tuple[Any, ...]:
        """Image inputs, and for each window: its place in the decoded box, its size after resizing,
        the mean to subtract from R, G and B, whether to flip it, and its label."""
        windows = work.windows
        whole = self._input_kind == "image" and not windows.cut_first
        corner = np.zeros(4) if whole else np.tile(self._box(work)[0], (1, 2))
        # DALI takes float32. Relative to the decoded box that is precise enough: 1/1000 pixel at
        # 16,000 pixels.
        roi = (windows.roi - corner).astype(np.float32)
        size = np.tile(np.array(windows.size_px, np.float32), (len(roi), 1))
        mean = self._mean if self._mean.ndim == 1 else np.zeros(3)
        # A colour shift is subtracted from the mean, which saves a pass over the pixels.
        mean = (mean - 255 * windows.color_shift).astype(np.float32)
        flip, labels = windows.flip.astype(np.int32), self._labels(work)
        return (
            *self._image_inputs(work),
            roi[:, :2].copy(),
            roi[:, 2:].copy(),
            size,
            mean,
            flip,
            labels,
        )

    def _raw_inputs(self, work: Work) -> tuple[Any, ...]:
        """Pixels in memory, and for each window: its top left corner, which may be outside the
        image (padding), its size, whether to flip it, and its label."""
        assert self._index.pixels is not None
        windows = work.windows
        corner, size = windows.roi[:, :2].astype(np.int32), np.array(windows.size_px, np.int32)
        if not np.array_equal(np.hstack([corner, corner + size]), windows.roi):
            raise ValueError(
                f"windows of raw pixels must be {windows.size_px} pixels high and wide and start "
                f"at whole pixels, since they are not resized: got {windows.roi[0].tolist()}, ..."
            )
        pixels, size = self._index.pixels[work.shown], np.tile(size, (len(work.shown), 1))
        return pixels, corner, size, windows.flip.astype(np.int32), self._labels(work)

    def _labels(self, work: Work) -> np.ndarray:
        return np.where(work.shown < 0, BLANK_LABEL, self._index.labels[work.shown])


def _cut_boxes(images: Sequence[Any], start: np.ndarray, end: np.ndarray) -> list[Any]:
    """Cuts a box out of each image. images: [h, w, 3] each; start, end: int32 [B, 2], y first."""
    corners = zip(images, start.tolist(), end.tolist(), strict=True)
    return [image[top:bottom, left:right] for image, (top, left), (bottom, right) in corners]


def _device_id(device: torch.device) -> int | None:
    if device.type != "cuda":
        return None
    return torch.cuda.current_device() if device.index is None else device.index


def _current_stream(device: torch.device) -> torch.cuda.Stream | None:
    return torch.cuda.current_stream(device) if device.type == "cuda" else None
