"""Resizing on the CPU is Pillow's, to the grey level; normalisation is its formula."""

from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.data.load.resample import MIN_IMAGES_PER_TASK, Buffers, Resampler
from resnet_dist.data.view.augment import Windows, unchanged

COUNT = 7 * MIN_IMAGES_PER_TASK + 3  # more per task than the minimum


def pictures(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 400, (COUNT, 2)).tolist()
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [[1, 1], [1, 300], *sizes[2:]]]


GREY_LEVELS = (np.zeros(3, np.float32), [1.0, 1.0, 1.0])  # mean and std that change nothing


@pytest.mark.parametrize("size_px", [(64, 64), (48, 80), (1, 1)])
def test_the_same_as_pillow(size_px: tuple[int, int]) -> None:
    images = pictures(0)
    flip = np.arange(COUNT) % 3 == 1
    windows = replace(unchanged(np.zeros((COUNT, 4)), size_px), flip=flip)
    tensors = [torch.from_numpy(image) for image in images]
    got = Resampler(*GREY_LEVELS, torch.float32, threads=3).start(tensors, windows)()
    assert got.dtype == torch.float32
    assert got.shape == (COUNT, 3, *size_px)
    assert got.is_contiguous(memory_format=torch.channels_last)
    for image, mirrored, pixels in zip(images, flip, got.permute(0, 2, 3, 1).numpy(), strict=True):
        out = Image.fromarray(image).resize(size_px[::-1], Image.Resampling.BILINEAR)
        expected = np.asarray(out)[:, ::-1] if mirrored else np.asarray(out)
        assert np.abs(expected.astype(int) - pixels).max() <= 1


def test_parts_of_larger_images_need_no_copy() -> None:
    image = torch.from_numpy(pictures(1)[5])
    part = image[3:20, 2:9]
    windows = unchanged(np.zeros((2, 4)), (32, 32))
    got = Resampler(*GREY_LEVELS, torch.float32, threads=1).start([part, part.clone()], windows)()
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("mean", [np.array([120.0, 110.0, 100.0]), "image"])
def test_normalisation(mean: np.ndarray | str) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (4, 150, 224, 3), np.uint8)
    mean = rng.uniform(0, 255, (150, 224, 3)) if isinstance(mean, str) else mean
    shift, std = rng.normal(0, 0.1, (4, 3)), [50.0, 60.0, 70.0]
    flip = np.array([False, True, False, True])
    windows = Windows(np.zeros((4, 4)), flip, (150, 224), shift)
    resampler = Resampler(mean.astype(np.float32), std, torch.float32, threads=2)
    got = resampler.start([torch.from_numpy(image) for image in pixels], windows)()
    pixels[flip] = pixels[flip][:, :, ::-1]
    expected = (pixels - mean + 255 * shift[:, None, None]) / np.array(std)
    assert np.abs(got.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_is_the_rounded_result(dtype: torch.dtype) -> None:
    """Both are computed in float32, so there is one rounding."""
    images = [torch.from_numpy(image) for image in pictures(3)]
    windows = replace(unchanged(np.zeros((COUNT, 4)), (40, 56)), flip=np.arange(COUNT) % 2 == 0)
    mean, std = np.array([120.0, 110.0, 100.0], np.float32), [50.0, 60.0, 70.0]
    whole, half = (
        Resampler(mean, std, to, threads=2).start(images, windows)()
        for to in (torch.float32, dtype)
    )
    assert half.dtype == dtype
    assert half.is_contiguous(memory_format=torch.channels_last)
    assert torch.equal(half, whole.to(dtype))


def test_a_batch_may_enter_a_graph_and_be_written_to() -> None:
    images = [torch.from_numpy(image) for image in pictures(4)]
    windows = unchanged(np.zeros((COUNT, 4)), (8, 8))
    batch = Resampler(*GREY_LEVELS, torch.float32, threads=2).start(images, windows)()
    weight = torch.ones(2, 3, 1, 1, requires_grad=True)
    torch.nn.functional.conv2d(batch, weight).sum().backward()
    assert weight.grad is not None
    batch.zero_()


def test_a_buffer_is_used_again_when_nobody_has_it() -> None:
    buffers = Buffers()
    first = buffers.take((4, 5), torch.float32)
    place = first.data_ptr()
    view = first.view(20)[3:7]  # any view counts
    del first
    assert buffers.take((4, 5), torch.float32).data_ptr() != place
    view.fill_(7)
    places = set()
    for _ in range(50):
        taken = buffers.take((4, 5), torch.float32)
        places.add(taken.data_ptr())
        taken.fill_(0)
    assert view.eq(7).all()
    assert place not in places
    assert len(places) == 2  # `taken` still has one when the next is asked for
    del view
    assert buffers.take((4, 5), torch.float32).data_ptr() == place
    assert buffers.take((5, 4), torch.float32).shape == (5, 4)
    assert buffers.take((4, 5), torch.uint8).dtype == torch.uint8


class CountsThreads(list[torch.Tensor]):
    """Images that notice how many threads torch has where they are used."""

    def __init__(self, images: list[torch.Tensor], threads: list[int] | None = None) -> None:
        super().__init__(images)
        self.threads = [] if threads is None else threads

    def __getitem__(self, some: Any) -> Any:
        return CountsThreads(super().__getitem__(some), self.threads)

    def __iter__(self) -> Iterator[torch.Tensor]:
        self.threads.append(torch.get_num_threads())
        return super().__iter__()


def test_torchs_own_threads_are_left_alone() -> None:
    before = torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        resampler = Resampler(*GREY_LEVELS, torch.float32, threads=2)
        assert torch.get_num_threads() == 3
        with ThreadPoolExecutor(1) as new:
            assert new.submit(torch.get_num_threads).result() == 3
        images = CountsThreads([torch.zeros(8, 8, 3, dtype=torch.uint8)])
        resampler.start(images, unchanged(np.array([[0.0, 0, 8, 8]]), (4, 4)))()
        assert images.threads == [1]
    finally:
        torch.set_num_threads(before)
