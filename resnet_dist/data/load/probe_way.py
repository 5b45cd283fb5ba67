"""Tries one way of decoding in this process, which may crash. Started by probe.py.

    python -m resnet_dist.data.load.probe_way NUMBER --device cuda:0 [--images 64] [--seconds 0.5]

NUMBER: index of the way in decoding.WAYS. Prints READY once everything but the way itself is known
to work, and then the Trial as one line of JSON.
"""

import argparse
import io
import json
import math
import os
import resource
import signal
import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import asdict, replace
from functools import partial
from itertools import cycle

import numpy as np
import torch
from PIL import Image as Pillow
from torch import Tensor

from resnet_dist.config import DataConfig
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.cache import Image
from resnet_dist.data.load.dali import Batch, Loader
from resnet_dist.data.load.decoding import WAYS, Decoding, Trial
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.view.augment import Request, train_windows
from resnet_dist.process import set_up_process

READY = "ready"
HEIGHT_PX, WIDTH_PX = 375, 500  # the mean size in ImageNet
QUALITY = 90
EXIF_ORIENTATION = 0x0112
MAX_DECODE_THREADS = 16
BATCHES = 4  # different batches, each decoded ROUNDS times
ROUNDS = 8
# Differences to the CPU's pixels in grey levels, after resizing. Repeated instead of interpolated
# chroma differs by 2.2 in an image's mean and at most 26 anywhere on these images; a different IDCT
# (libjpeg-turbo's variants) by 1.0 and 5. A wrong block or image differs by much more.
MEAN_TOLERANCE, MAX_TOLERANCE = 4.0, 40.0
BORDER_PX = 4  # not compared: DALI repeats the edge pixel there, the CPU's resize does not
LAG_SIZE = 8192  # size of the matrix products that keep the GPU busy, as training does
LAG_SECONDS = 5.0  # total time of these products


class KnownJpegs:
    """Photo-like JPEGs in memory, the same in every process; used instead of a Reader."""

    blank = Reader.blank

    def __init__(self, count: int) -> None:
        self._images = [_jpeg(number) for number in range(count)]
        turned = [number % 8 >= 4 for number in range(count)]  # orientations 5 to 8
        sizes = [(WIDTH_PX, HEIGHT_PX) if turn else (HEIGHT_PX, WIDTH_PX) for turn in turned]
        self.index = Index(
            classes=("known",),
            labels=np.zeros(count, np.int64),
            sizes=np.array(sizes, np.int32),
            paths=tuple(f"known/{number}.jpg" for number in range(count)),
            pixels=None,
            fingerprint="known",
        )

    def read_ahead(self, samples: np.ndarray, boxes: np.ndarray) -> Callable[[], list[Image]]:
        sizes = self.index.sizes[samples].tolist()
        whole = zip(samples.tolist(), sizes, strict=True)
        return lambda: [Image(self._images[i], (height, width)) for i, (height, width) in whole]


def _jpeg(number: int) -> np.ndarray:
    """Makes a JPEG. They vary in EXIF orientation, subsampling, restart markers, and so on."""
    rng = np.random.default_rng(number)
    coarse = Pillow.fromarray(rng.integers(0, 256, (47, 63, 3), np.uint8))
    smooth = np.asarray(coarse.resize((WIDTH_PX, HEIGHT_PX), Pillow.Resampling.BICUBIC), np.int16)
    pixels = np.clip(smooth + rng.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)
    photo = Pillow.fromarray(pixels)
    if number % 16 == 9:
        photo = photo.convert("L")
    exif = Pillow.Exif()
    exif[EXIF_ORIENTATION] = 1 + number % 8
    file = io.BytesIO()
    photo.save(
        file,
        "JPEG",
        quality=QUALITY,
        exif=exif.tobytes(),
        progressive=number % 16 == 5,
        subsampling=0 if number % 4 == 3 else 2,  # 4:4:4, else 4:2:0
        restart_marker_rows=number % 3,
    )
    return np.frombuffer(file.getvalue(), np.uint8)


def try_way(
    way: Decoding,
    device: torch.device,
    images: int,
    seconds: float,
    ready: Callable[[], None],
) -> Trial:
    """Decodes the same batches repeatedly with a slow consumer, then measures the speed.

    images: per batch. ready: called once the CPU has decoded and the GPU has computed something;
    what fails after that is the way's fault. The process crashes if the way does.

    Raises:
        RuntimeError: DALI fails.
        UserError: an image cannot be decoded; DALI's error is its context.
    """
    known = KnownJpegs(images)
    threads = min(MAX_DECODE_THREADS, len(os.sched_getaffinity(0)))
    data = DataConfig(train_crop="random_resized", decode_threads=threads, max_bad_samples=0)
    samples = np.arange(images)
    requests = [
        Request(samples, train_windows(data, 0, epoch, samples, known.index.sizes))
        for epoch in range(BATCHES)
    ]

    def decoded(where: torch.device, how: Decoding, requests: Iterable[Request]) -> Iterator[Batch]:
        loader = Loader(
            known.index,
            data,
            device=where,
            dtype=torch.float32,
            max_batch_size=images,
            reader=known,  # type: ignore[arg-type]
            decoding=how,
        )
        for batch in loader.batches(requests):
            if loader.refused:  # otherwise Pillow decodes in place of the way
                raise RuntimeError(next(iter(loader.refused.values())))
            yield batch

    cpu = [batch.images for batch in decoded(torch.device("cpu"), Decoding(), requests)]
    lag = Lag(device) if device.type == "cuda" else None
    ready()
    repeated = decoded(device, way, requests * ROUNDS)
    first, changed = repeat((batch.images for batch in repeated), device, lag)
    if changed:
        return Trial("changed", said=f"{changed} of {BATCHES * (ROUNDS - 1)} batches, repeated")
    trial = compare([images.cpu() for images in first], cpu, data.std)
    if trial.verdict != "ok":
        return trial
    endless = decoded(device, way, cycle(requests))
    for _ in range(BATCHES):  # start-up, and batches decoded in advance
        next(endless)
    began, count = _clock(device), 0
    while time.perf_counter() - began < seconds:
        next(endless)
        count += images
    return replace(trial, images_per_sec=round(count / (_clock(device) - began), 1))


def _clock(device: torch.device) -> float:
    """Returns the time in seconds, after the GPU has finished all its work."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # CPU-GPU sync point
    return time.perf_counter()


class Lag:
    """Work for the current CUDA stream, increased until the GPU is slower than the decoder."""

    def __init__(self, device: torch.device) -> None:
        self._busy = torch.randn(LAG_SIZE, LAG_SIZE, device=device)
        self._multiply(1)  # the first product takes longer
        began = _clock(device)
        self._multiply(1)
        self._left = int(LAG_SECONDS / (_clock(device) - began))
        self._products = 1  # per batch
        self._done: torch.cuda.Event | None = None

    def queue(self) -> None:
        """Queues the work that goes with one batch."""
        if self._done is not None and self._done.query():  # the GPU was idle
            self._products *= 2
        count = min(self._products, self._left)
        self._left -= count
        self._multiply(count)
        self._done = torch.cuda.Event()
        self._done.record()

    def _multiply(self, count: int) -> None:
        for _ in range(count):
            self._busy = (self._busy @ self._busy).clamp_(-1, 1)


def repeat(
    batches: Iterable[Tensor], device: torch.device, lag: Lag | None = None
) -> tuple[list[Tensor], int]:
    """Returns the first BATCHES of images, and how many repetitions have different pixels.

    On a GPU the consumer lags behind the decoder, as training does. Only then does it show if the
    decoder frees or overwrites memory too early.
    """
    first: list[Tensor] = []
    changed = torch.zeros((), dtype=torch.int64, device=device)
    for number, images in enumerate(batches):
        if lag is not None:
            lag.queue()
        if number < BATCHES:
            first.append(images.clone())
        else:
            changed += (images != first[number % BATCHES]).any()
    return first, int(changed)  # CPU-GPU sync point


def compare(ours: list[Tensor], cpu: list[Tensor], std: Sequence[float]) -> Trial:
    """Compares normalized images with the CPU's: "ok" if they are within the tolerances.

    ours, cpu: float32 [B, 3, H, W] each, in host memory.
    """
    grey_levels = 255 * torch.tensor(std)[:, None, None]
    inner = slice(BORDER_PX, -BORDER_PX)
    off = torch.cat(
        [(a - b).abs()[:, :, inner, inner] * grey_levels for a, b in zip(ours, cpu, strict=True)]
    )
    mean, most = off.flatten(1).mean(dim=1).max().item(), off.max().item()
    is_near = mean <= MEAN_TOLERANCE and most <= MAX_TOLERANCE  # False if a pixel is NaN
    said = f"at most {most:.1f} grey levels from the CPU's pixels, {mean:.2f} on an image's mean"
    return Trial("ok" if is_near else "differs", said=said)


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(
        description=(__doc__ or "").splitlines()[0], allow_abbrev=False
    )
    parser.add_argument("way", type=int)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument(
        "--limit", type=float, default=60.0, help="seconds until the process ends itself"
    )
    given = parser.parse_args()
    signal.alarm(
        math.ceil(given.limit) + 1
    )  # in case probe.py, which would kill this process, has died
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # core dumps of GPU processes are huge
    if given.device.type == "cuda":
        # If this process cannot use the GPU at all, that is not the decoder's fault.
        torch.cuda.set_device(given.device)
        torch.zeros(2**28, dtype=torch.uint8, device=given.device)
        torch.cuda.synchronize(given.device)  # CPU-GPU sync point
        torch.cuda.empty_cache()
    way = WAYS[given.way]
    if given.device.type == "cpu":  # only to test the probe itself
        way = Decoding(way.extent)
    ready = partial(print, READY, flush=True)
    trial = try_way(way, given.device, given.images, given.seconds, ready)
    print(json.dumps(asdict(trial)), flush=True)
    os._exit(0)  # failures while unloading libraries do not count


if __name__ == "__main__":
    main()
