"""Resizing on the CPU is Pillow's, to the grey level; normalisation is its formula."""

from dataclasses import replace

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.data.augment import unchanged
from resnet_dist.data.resample import IMAGES_PER_TASK, Resampler, normalized

COUNT = 2 * IMAGES_PER_TASK + 3


def pictures(seed: int) -> list[np.ndarray]:
    rng = np.random.default_rng(seed)
    sizes = rng.integers(1, 400, (COUNT, 2)).tolist()
    return [rng.integers(0, 256, (h, w, 3), np.uint8) for h, w in [[1, 1], [1, 300], *sizes[2:]]]


@pytest.mark.parametrize("size_px", [(64, 64), (48, 80)])
def test_the_same_as_pillow(size_px: tuple[int, int]) -> None:
    images = pictures(0)
    flip = np.arange(COUNT) % 3 == 1
    windows = replace(unchanged(np.zeros((COUNT, 4)), size_px), flip=flip)
    got = Resampler(threads=3).start([torch.from_numpy(image) for image in images], windows)()
    assert got.dtype == torch.uint8
    assert got.shape == (COUNT, *size_px, 3)
    for image, mirrored, pixels in zip(images, flip, got.numpy(), strict=True):
        out = Image.fromarray(image).resize(size_px[::-1], Image.Resampling.BILINEAR)
        expected = np.asarray(out)[:, ::-1] if mirrored else np.asarray(out)
        assert np.abs(expected.astype(int) - pixels).max() <= 1


def test_parts_of_larger_images_need_no_copy() -> None:
    image = torch.from_numpy(pictures(1)[5])
    part = image[3:20, 2:9]
    windows = unchanged(np.zeros((2, 4)), (32, 32))
    got = Resampler(threads=1).start([part, part.clone()], windows)()
    assert torch.equal(got[0], got[1])


@pytest.mark.parametrize("mean", [np.array([120.0, 110.0, 100.0]), "image"])
def test_normalisation(mean: np.ndarray | str) -> None:
    rng = np.random.default_rng(2)
    pixels = rng.integers(0, 256, (4, 16, 24, 3), np.uint8)
    mean = rng.uniform(0, 255, (16, 24, 3)) if isinstance(mean, str) else mean
    shift, std = rng.normal(0, 9, (4, 3)), [50.0, 60.0, 70.0]
    got = normalized(torch.from_numpy(pixels), mean.astype(np.float32), std, shift)
    expected = (pixels - mean.astype(np.float32) + shift[:, None, None]) / np.array(std)
    assert got.is_contiguous(memory_format=torch.channels_last)
    assert got.dtype == torch.float32
    assert np.abs(got.permute(0, 2, 3, 1).numpy() - expected).max() < 1e-5
