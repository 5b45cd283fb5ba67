"""The loaders that `bench loader` compares. Each is a stream of batches from the same photos.

Ours and the peers called "same windows" take their requests from data/view/requests.py: the same
samples in the same order, cropped to the same windows. They differ in the code that reads, decodes
and resizes.
"""

import ctypes
import shutil
import subprocess
import tempfile
from collections import deque
from collections.abc import Callable, Generator, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from torch import Tensor

from resnet_dist.config import Config, DataConfig, TrackingConfig, TrainConfig
from resnet_dist.data.formats import build_index
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.boxes import boxes_of
from resnet_dist.data.load.build import make_loader
from resnet_dist.data.load.resample import Buffers
from resnet_dist.data.view.augment import Request
from resnet_dist.data.view.requests import train_requests
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.plan import Plan

Stream = Generator[Tensor]  # the images of one batch at a time


@dataclass(frozen=True)
class Work:
    """What a stream has to deliver: `batches` full batches on `device`."""

    data: DataConfig
    images: int  # in an epoch; the photos are repeated to make up this number
    batch_size: int
    batches: int
    device: str  # "cpu" or "cuda"
    run_root: str  # reports of the probe of a GPU's decoders are kept in run_root/.index

    @property
    def threads(self) -> int:
        assert self.data.decode_threads is not None
        return self.data.decode_threads

    @property
    def config(self) -> Config:
        train = TrainConfig(
            epochs=None,
            iterations=self.batches,
            global_batch_size=self.batch_size,
            max_local_batch_size=self.batch_size,
            precision="fp16" if self.device == "cuda" else "fp32",
        )
        return Config(data=self.data, train=train, tracking=TrackingConfig(run_root=self.run_root))

    @property
    def world(self) -> World:
        return World(0, 0, 1, 1, torch.device(self.device))


@lru_cache(maxsize=1)
def index_of(work: Work) -> Index:
    """Returns the index of the photos, repeated up to `work.images` entries."""
    index = build_index(work.data.format, Path(work.data.root), "train", None)
    return index.take(np.arange(work.images) % len(index))


def requests_of(work: Work) -> Iterator[Request]:
    plan = Plan.of(work.config, 1, work.images, None)
    return train_requests(work.config, plan, index_of(work), rank=0, first_step=0)


def ours(work: Work) -> Stream:
    loader = make_loader(index_of(work), work.config, work.world)
    return (batch.images for batch in loader.batches(requests_of(work)))


def torchvision_same_windows(work: Work) -> Stream:
    """torchvision's ImageFolder and torch's DataLoader, with our windows instead of random crops.

    Everything else is as in torchvision's reference training: Pillow, bilinear, ToTensor,
    Normalize. The window is passed as Pillow's `box`, which resamples no more pixels than a crop
    followed by a resize.
    """
    from torchvision.datasets import ImageFolder
    from torchvision.transforms import v2

    index, transform = index_of(work), _to_normalized(work.data)

    class SameWindows(ImageFolder):
        def __getitem__(self, seen: tuple[Any, ...]) -> tuple[Tensor, int]:
            sample, (top, left, bottom, right), flip, (height, width) = seen
            image = self.loader(index.paths[sample])
            if image.size[::-1] != tuple(index.sizes[sample]):
                ImageOps.exif_transpose(image, in_place=True)
            box = (left, top, right, bottom)
            image = image.resize((width, height), Image.Resampling.BILINEAR, box=box)
            image = v2.functional.horizontal_flip(image) if flip else image
            return transform(image), int(index.labels[sample])

    seen = [
        [
            (sample, roi, flip, windows.size_px)
            for sample, roi, flip in zip(
                samples.tolist(), windows.roi.tolist(), windows.flip.tolist(), strict=True
            )
        ]
        for samples, windows, *_ in requests_of(work)
    ]
    loaded = _loaded(work, SameWindows(train_folder(work)), batch_sampler=seen)
    return (images for images, _ in loaded)


def torchvision_own_windows(work: Work) -> Stream:
    """The loader of torchvision's reference training, with its own shuffle and random crops."""
    return (images for images, _ in torchvision_batches(work))


def torchvision_batches(work: Work) -> Iterator[tuple[Tensor, Tensor]]:
    """The same, with labels."""
    from torchvision import transforms
    from torchvision.datasets import ImageFolder

    data = work.data
    dataset = ImageFolder(
        train_folder(work),
        transforms.Compose(
            [
                transforms.RandomResizedCrop(data.crop_px, data.area, data.aspect),
                transforms.RandomHorizontalFlip(),
                _to_normalized(data),
            ]
        ),
    )
    sampler = torch.utils.data.RandomSampler(dataset, num_samples=work.batches * work.batch_size)
    return _loaded(work, dataset, batch_size=work.batch_size, sampler=sampler)


def _to_normalized(data: DataConfig) -> Callable[[Any], Tensor]:
    from torchvision import transforms

    return transforms.Compose(
        [transforms.ToTensor(), transforms.Normalize(data.mean, data.std, inplace=True)]
    )


def train_folder(work: Work) -> str:
    return str(Path(work.data.root) / "train")


def _loaded(work: Work, dataset: Any, **sampling: Any) -> Iterator[tuple[Tensor, Tensor]]:
    loader = torch.utils.data.DataLoader(
        dataset,
        num_workers=work.threads,
        pin_memory=work.device == "cuda",
        multiprocessing_context="fork",
        **sampling,
    )
    return (
        (images.to(work.device, non_blocking=True), labels.to(work.device, non_blocking=True))
        for images, labels in loader
    )


def dali_own_windows(work: Work) -> Stream:
    from resnet_dist.bench.peers.dali_reader import dali_batches

    batches = dali_batches(index_of(work), work.data, work.batch_size, work.device)
    return (images for images, _ in batches)


def bare_libjpeg(work: Work) -> Stream:
    """An upper bound: libjpeg-turbo decodes the same windows from memory and does nothing else.

    Each thread decodes a whole batch by itself. It decodes the same region of each image as `ours`.
    The batches that are returned hold no pixels.
    """
    decode = plain_c().decode_window

    def one(data: bytes, box: np.ndarray, flip: bool, scratch: Any, out: Tensor) -> int:
        size = scratch  # which nobody reads
        return decode(data, len(data), box.ctypes.data, scratch, size)

    return _in_plain_c(work, one, height=0)


def plain_c_loader(work: Work) -> Stream:
    """The floor: plain C decodes, resizes, flips and normalizes the same windows from memory.

    Its pixels are those of `ours`, except for rounding. Reading the files is not included.
    """
    load, px = plain_c().load_window, work.data.crop_px
    mean, std = (255 * np.array(levels) for levels in (work.data.mean, work.data.std))
    levels = np.concatenate([1 / std, -mean / std]).astype(np.float32)

    def one(data: bytes, box: np.ndarray, flip: bool, scratch: Any, out: Tensor) -> int:
        to = out.data_ptr()
        where = box.ctypes.data, flip, px, px, levels.ctypes.data
        return load(data, len(data), *where, scratch, to)

    return _in_plain_c(work, one, height=px)


def _in_plain_c(
    work: Work, one: Callable[[bytes, np.ndarray, bool, Any, Tensor], int], height: int
) -> Stream:
    """Calls `one` for each image, a batch in each thread. height: of the images in a batch."""
    index, kept = index_of(work), Buffers()
    encoded = [Path(path).read_bytes() for path in dict.fromkeys(index.paths)]
    # What load_window asks for; decode_window needs less.
    most = int((4 * index.sizes.prod(axis=1) + 3 * height * index.sizes[:, 0]).max())
    scratches = [ctypes.create_string_buffer(most) for _ in range(work.threads + 1)]

    def batch_of(request: Request) -> Tensor:
        samples, windows = request.samples, request.windows
        boxes = boxes_of(windows, index.sizes[samples])
        shape = len(samples), height, height, 3
        out = kept.take(shape, torch.float32) if height else torch.empty(shape)
        scratch = scratches.pop()
        rows = zip(samples.tolist(), boxes, windows.flip.tolist(), out, strict=True)
        for sample, box, flip, to in rows:
            if one(encoded[sample % len(encoded)], box, flip, scratch, to):
                raise UserError(f"{index.paths[sample]}: plain C cannot load it")
        scratches.append(scratch)
        return out.permute(0, 3, 1, 2)

    with ThreadPoolExecutor(work.threads) as pool:
        loading: deque[Future[Tensor]] = deque()
        for request in requests_of(work):
            loading.append(pool.submit(batch_of, request))
            if len(loading) > work.threads:
                yield loading.popleft().result()
        while loading:
            yield loading.popleft().result()


@lru_cache(maxsize=1)
def plain_c() -> ctypes.CDLL:
    """Compiles plain_loader.c, and returns its functions.

    Raises:
        UserError: there is no C compiler, or libjpeg-turbo's header or library is missing.
    """
    source = Path(__file__).with_name("plain_loader.c")
    with tempfile.TemporaryDirectory() as folder:
        library = Path(folder) / "plain_loader.so"
        options = ["-O3", "-march=native", "-shared", "-fPIC"]
        command = ["cc", *options, str(source), "-o", str(library), "-ljpeg", "-lm"]
        if shutil.which("cc") is None or subprocess.run(command, capture_output=True).returncode:
            raise UserError(
                "bare libjpeg-turbo: needs a C compiler (cc) and jpeglib.h; on Debian or Ubuntu "
                "install gcc and libjpeg62-turbo-dev or libjpeg-turbo8-dev"
            )
        functions = ctypes.CDLL(str(library))
    image: list[Any] = [ctypes.c_char_p, ctypes.c_ulong, ctypes.c_void_p]  # data, nbytes, window
    functions.decode_window.argtypes = [*image, ctypes.c_void_p, ctypes.c_void_p]
    shape: list[Any] = [ctypes.c_int] * 3  # flip, height, width
    functions.load_window.argtypes = [*image, *shape, *[ctypes.c_void_p] * 3]
    return functions
