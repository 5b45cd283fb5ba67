"""Tries one way of decoding in this process, which may not survive it. probe.py starts it.

    python -m resnet_dist.data.load.probe_way NUMBER --device cuda:0 [--images 64] [--seconds 0.5]

NUMBER: of the way in decoding.WAYS. Prints READY once all but the way itself works, and
then what it saw: a Trial as one line of JSON.
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
HEIGHT_PX, WIDTH_PX = 375, 500  # ImageNet's mean size
QUALITY = 90
EXIF_ORIENTATION = 0x0112
MAX_DECODE_THREADS = 16
BATCHES = 4  # different ones, each repeated ROUNDS times
ROUNDS = 8
# In grey levels after the resize. Repeating chroma where the CPU interpolates it leaves 2.2 on the
# mean and 26 at most on these images, another IDCT 1.0 and 5 (libjpeg-turbo's own variants). A
# block or an image that is wrong leaves much more.
MEAN_TOLERANCE, MAX_TOLERANCE = 4.0, 40.0
BORDER_PX = 4  # taps beyond the border: DALI repeats the edge, and the CPU's resize leaves them out
LAG_SIZE = 8192  # of the matrices that keep a GPU busy behind the decoder, as training does
LAG_SECONDS = 5.0  # in all


class KnownJpegs:
    """Photo-like JPEGs in memory, the same in every process, in place of a data set's reader."""

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

    def read(self, sample: int) -> Image:
        return Image(self._images[sample], trusted=True)

    def read_ahead(self, samples: np.ndarray) -> Callable[[], list[Image]]:
        return lambda: [self.read(sample) for sample in samples.tolist()]


def _jpeg(number: int) -> np.ndarray:
    """Every kind in turn: EXIF orientations, chroma subsampling, progressive, restarts, grey."""
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
    """Decodes the same batches again and again, behind a consumer that lags, and then for speed.

    images: in a batch. ready: called once the CPU has decoded and the GPU has computed: what fails
    from then on is the way. Crashes where the way does.

    Raises:
        RuntimeError: DALI refuses.
        UserError: an image cannot be decoded. DALI's error is its context.
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
        return loader.batches(requests)

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
    for _ in range(BATCHES):  # what is decoded ahead, and the start
        next(endless)
    began, count = _clock(device), 0
    while time.perf_counter() - began < seconds:
        next(endless)
        count += images
    return replace(trial, images_per_sec=round(count / (_clock(device) - began), 1))


def _clock(device: torch.device) -> float:
    """Seconds, once the GPU has done all that it was given."""
    if device.type == "cuda":
        torch.cuda.synchronize(device)  # CPU-GPU sync point
    return time.perf_counter()


class Lag:
    """Work for the GPU's current stream, more and more until the decoder is ahead of it."""

    def __init__(self, device: torch.device) -> None:
        self._busy = torch.randn(LAG_SIZE, LAG_SIZE, device=device)
        self._multiply(1)  # the first one takes longer
        began = _clock(device)
        self._multiply(1)
        self._left = int(LAG_SECONDS / (_clock(device) - began))
        self._products = 1  # for a batch
        self._done: torch.cuda.Event | None = None

    def queue(self) -> None:
        """A batch's share of it."""
        if self._done is not None and self._done.query():  # the GPU had nothing to do
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
    """The first BATCHES of images, and how many of their repetitions are other pixels.

    On a GPU a consumer lags behind the decoder, as training does: a decoder that frees or fills
    memory too early shows only so.
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
    """Whether normalized images are the CPU's, but for rounding.

    ours, cpu: float32 [B, 3, H, W] each, in host memory.
    """
    grey_levels = 255 * torch.tensor(std)[:, None, None]
    inner = slice(BORDER_PX, -BORDER_PX)
    off = torch.cat(
        [(a - b).abs()[:, :, inner, inner] * grey_levels for a, b in zip(ours, cpu, strict=True)]
    )
    mean, most = off.flatten(1).mean(dim=1).max().item(), off.max().item()
    is_near = mean <= MEAN_TOLERANCE and most <= MAX_TOLERANCE  # False where one is NaN
    said = f"at most {most:.1f} grey levels from the CPU's pixels, {mean:.2f} on an image's mean"
    return Trial("ok" if is_near else "differs", said=said)


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("way", type=int)
    parser.add_argument("--device", type=torch.device, required=True)
    parser.add_argument("--images", type=int, default=64)
    parser.add_argument("--seconds", type=float, default=0.5)
    parser.add_argument("--limit", type=float, default=60.0, help="seconds until it ends itself")
    given = parser.parse_args()
    signal.alarm(math.ceil(given.limit) + 1)  # should probe.py, which ends it, be gone
    hard = resource.getrlimit(resource.RLIMIT_CORE)[1]
    resource.setrlimit(resource.RLIMIT_CORE, (0, hard))  # of a process with a GPU: many GB
    if given.device.type == "cuda":
        # Whether this process may use the GPU at all: not the decoder's fault if not.
        torch.cuda.set_device(given.device)
        torch.zeros(2**28, dtype=torch.uint8, device=given.device)
        torch.cuda.synchronize(given.device)
        torch.cuda.empty_cache()
    way = WAYS[given.way]
    if given.device.type == "cpu":  # shows that the probe works, and nothing else
        way = Decoding(way.extent)
    ready = partial(print, READY, flush=True)
    trial = try_way(way, given.device, given.images, given.seconds, ready)
    print(json.dumps(asdict(trial)), flush=True)
    os._exit(0)  # what fails when libraries unload is not the decoder's fault


if __name__ == "__main__":
    main()
