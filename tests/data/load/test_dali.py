"""What DALI delivers is what Pillow would have: the same pixels of the same windows.

The reference is Pillow's `Image.resize(BILINEAR, box=window)`: a triangle filter, antialiased when
it scales down. All differences are in grey levels (0..255), before normalisation. Measured on the
pictures below and on 500 ImageNet photos: max 1.00, mean 0.30, all of it Pillow's own rounding to
whole levels after each of its two passes. Only at the border of the image do the two filters
differ: DALI repeats the edge pixel, Pillow leaves taps outside the image out. There the reference
is Pillow on an image whose edge was repeated; against plain Pillow the border differs by up to 17
(photos), which moves the mean over the picture by 0.02.
"""

import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import backend
from PIL import Image, ImageOps

from resnet_dist.config import DataConfig
from resnet_dist.data.index.index import Index
from resnet_dist.data.load import dali
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.load.boxes import boxes_of
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.decoding import HOST, Decoding
from resnet_dist.data.view.augment import Request, Windows, unchanged
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS

MEAN = np.array([0.485, 0.456, 0.406])
STD = np.array([0.229, 0.224, 0.225])
MAX_DIFF, MEAN_DIFF = 1.01, 0.35  # grey levels, measured: 1.00 and 0.33
GPU_MAX_DIFF, GPU_MEAN_DIFF = 2.0, 0.5  # the GPU resizes, and adds in another order
# nvJPEG has an IDCT of its own. Not measured on a GPU yet: the bounds lie between two variants of
# libjpeg-turbo, measured on the CPU on the eight photos of test_exif_orientation. Its fast IDCT, a
# coarse one, leaves 1.1 at most on the mean of a window, and 4 at most: that may pass. Chroma that
# is repeated instead of interpolated leaves 2.2 to 2.4 on the mean of the third window and 3.1 to
# 4.2 on that of the fourth, and 21 to 30 at most: that must not.
NVJPEG_MAX_DIFF, NVJPEG_MEAN_DIFF = 8.0, 1.5
EXIF_ORIENTATION = 0x0112

# top, left, bottom, right in a picture of 300 x 400: whole pixels, fractional, squeezed, enlarged.
INNER_WINDOWS = [
    (20, 30, 250, 340),
    (20.3, 30.8, 251.6, 339.1),
    (100.5, 20.25, 130.5, 380.75),
    (140.2, 200.7, 163.9, 231.4),
]
BORDER_WINDOWS = [(0, 0, 300, 400), (0, 0, 150, 150), (170.5, 211.3, 300, 400), (0, 90.5, 20, 130)]


def picture(height: int, width: int, seed: int = 0, noise: float = 12) -> np.ndarray:
    """uint8 [height, width, 3]: slopes, waves and noise; no symmetry that would hide a flip."""
    y, x = np.mgrid[:height, :width]
    smooth = [x * 255 / width, y * 255 / height, 128 + 90 * np.sin(x / 7 + y / 11)]
    random = np.random.default_rng(seed).normal(0, noise, (height, width, 3))
    return np.clip(np.stack(smooth, -1) + random, 0, 255).astype(np.uint8)


def photo(height: int, width: int, seed: int = 0) -> np.ndarray:
    """uint8 [height, width, 3]: colours that change within a few pixels, as in photos."""
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (height // 8, width // 8, 3), np.uint8))
    smooth = np.asarray(coarse.resize((width, height), Image.Resampling.BICUBIC), np.int16)
    return np.clip(smooth + rng.integers(-4, 5, smooth.shape), 0, 255).astype(np.uint8)


def save(path: Path, pixels: np.ndarray, orientation: int = 1, mode: str = "RGB", **kw: Any) -> str:
    exif = Image.Exif()
    exif[EXIF_ORIENTATION] = orientation
    Image.fromarray(pixels).convert(mode).save(path, exif=exif, **kw)
    return str(path)


def decode(path: str) -> Image.Image:
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def index_of(paths: Sequence[str]) -> Index:
    sizes = np.array([decode(path).size[::-1] for path in paths], np.int32)
    return Index(("a",), np.arange(len(paths)) + 100, sizes, tuple(paths), None, "")


def raw_index(pixels: np.ndarray) -> Index:
    count = len(pixels)
    sizes = np.full((count, 2), pixels.shape[1], np.int32)
    return Index(("a",), np.arange(count) + 100, sizes, (), pixels, "")


def windows(roi: Any, flip: Any = False) -> Windows:
    roi = np.array(roi, np.float64).reshape(-1, 4)
    return replace(unchanged(roi, (96, 96)), flip=np.broadcast_to(flip, len(roi)))


def loader(index: Index, device: str = "cpu", **kwargs: Any) -> Loader:
    """kwargs: of DataConfig, or Loader's dtype, mean_image and decoding."""
    data = DataConfig(mean=tuple(MEAN), std=tuple(STD), decode_threads=2)
    own = {key: kwargs.pop(key) for key in ("mean_image", "reader", "decoding") if key in kwargs}
    own.setdefault("decoding", Decoding("window", "mixed" if device == "cuda" else "cpu"))
    return Loader(
        index,
        replace(data, **{k: v for k, v in kwargs.items() if k != "dtype"}),
        device=torch.device(device),
        dtype=kwargs.get("dtype", torch.float32),
        max_batch_size=16,
        **own,
    )


def one_batch(
    index: Index, samples: Sequence[int], seen: Windows, px: int = 96, **kwargs: Any
) -> Batch:
    seen = replace(seen, size_px=(px, px))
    (batch,) = loader(index, **kwargs).batches([Request(np.array(samples), seen)])
    return batch


def grey_levels(batch: Batch) -> np.ndarray:
    """float64 [B, H, W, 3] before normalisation."""
    return (batch.images.permute(0, 2, 3, 1).double().cpu().numpy() * STD + MEAN) * 255


def pillow(path: str, seen: Windows, i: int, px: int = 96, repeat_edge: bool = False) -> np.ndarray:
    """float64 [px, px, 3]. repeat_edge: as DALI does, see the module's docstring."""
    image, pad = decode(path), 0
    if repeat_edge:
        pad = 64  # more than any filter here reaches
        image = Image.fromarray(
            np.pad(np.asarray(image), ((pad, pad), (pad, pad), (0, 0)), mode="edge")
        )
    top, left, bottom, right = seen.roi[i] + pad
    box = (left, top, right, bottom)
    out = np.asarray(image.resize((px, px), Image.Resampling.BILINEAR, box=box), np.float64)
    return out[:, ::-1] if seen.flip[i] else out


def assert_parity(
    path: str, seen: Windows, max_diff: float = MAX_DIFF, px: int = 96, repeat_edge: bool = False
) -> None:
    """Every window of the image against Pillow."""
    batch = one_batch(index_of([path]), [0] * len(seen.roi), seen, px=px)
    assert_as_pillow(batch, path, seen, max_diff, MEAN_DIFF, px, repeat_edge)


def assert_as_pillow(
    batch: Batch,
    path: str,
    seen: Windows,
    max_diff: float,
    mean_diff: float,
    px: int = 96,
    repeat_edge: bool = False,
) -> None:
    for i, got in enumerate(grey_levels(batch)):
        diff = np.abs(got - pillow(path, seen, i, px, repeat_edge))
        assert diff.max() <= max_diff, (path, seen.roi[i], diff.max())
        assert diff.mean() <= mean_diff, (path, seen.roi[i], diff.mean())


@pytest.mark.parametrize("flip", [False, True])
def test_png_windows_inside_the_image(tmp_path: Path, flip: bool) -> None:
    path = save(tmp_path / "a.png", picture(300, 400))
    assert_parity(path, windows(INNER_WINDOWS, flip))


def test_png_windows_at_the_border(tmp_path: Path) -> None:
    path = save(tmp_path / "a.png", picture(300, 400))
    assert_parity(path, windows(BORDER_WINDOWS), repeat_edge=True)
    # Plain Pillow: only the outermost pixels of the output may differ (measured: max 4.4).
    assert_parity(path, windows(BORDER_WINDOWS), max_diff=6)
    got = grey_levels(one_batch(index_of([path]), [0], windows(BORDER_WINDOWS[0])))[0]
    diff = np.abs(got - pillow(path, windows(BORDER_WINDOWS[0]), 0))
    assert diff[1:-1, 1:-1].max() <= MAX_DIFF


@pytest.mark.parametrize("size", [(37, 611), (611, 37), (3, 5), (1, 1), (97, 95)])
def test_png_of_odd_sizes(tmp_path: Path, size: tuple[int, int]) -> None:
    height, width = size
    path = save(tmp_path / "a.png", picture(*size))
    whole = (0, 0, height, width)
    part = (0.1 * height, 0.2 * width, 0.85 * height, 0.9 * width)
    assert_parity(path, windows([whole, part], [False, True]), repeat_edge=True)


@pytest.mark.parametrize(
    "kind",
    [
        {"mode": "RGB", "subsampling": "4:4:4"},
        {"mode": "RGB", "subsampling": "4:2:0"},
        {"mode": "RGB", "subsampling": "4:2:0", "progressive": True},
        {"mode": "L"},
        {"mode": "CMYK"},
    ],
    ids=lambda kind: "-".join(map(str, kind.values())),
)
def test_jpeg_kinds(tmp_path: Path, kind: dict[str, Any]) -> None:
    """Both decode with libjpeg-turbo, which gave equal pixels: the tolerance is that of PNG."""
    path = save(tmp_path / "a.jpg", picture(300, 400), quality=90, **kind)
    assert_parity(path, windows(INNER_WINDOWS))


@pytest.mark.parametrize("mode", ["L", "LA", "P", "1", "RGBA"])
def test_png_kinds(tmp_path: Path, mode: str) -> None:
    path = save(tmp_path / "a.png", picture(300, 400), mode=mode)
    assert_parity(path, windows(INNER_WINDOWS))


def test_a_png_of_16_bits(tmp_path: Path) -> None:
    grey = np.linspace(0, 65535, 300 * 400).reshape(300, 400)
    Image.fromarray(grey.astype(np.uint16)).save(tmp_path / "a.png")
    seen = windows([[0, 0, 96, 96]])
    index = replace(index_of([str(tmp_path / "a.png")]), sizes=np.array([[300, 400]]))
    expected = np.repeat(np.rint(grey[:96, :96, None] / 257), 3, axis=2)
    assert np.abs(grey_levels(one_batch(index, [0], seen))[0] - expected).max() <= 1.01


@pytest.mark.parametrize("kind", ["4:2:0", "progressive", "L", "CMYK", "EXIF", "P", "16-bit"])
def test_windows_that_are_cut_first(tmp_path: Path, kind: str) -> None:
    """As in training, and as torchvision's resized_crop."""
    pixels, path = picture(300, 400), str(tmp_path / "a.jpg")
    if kind == "16-bit":
        Image.fromarray(pixels[..., 0].astype(np.uint16) * 257).save(tmp_path / "a.png")
        path = save(tmp_path / "b.png", pixels[..., :1].repeat(3, axis=2))
    elif kind == "P":
        path = save(tmp_path / "a.png", pixels, mode="P")
    elif kind == "EXIF":
        save(tmp_path / "a.jpg", picture(400, 300), orientation=6)
    else:
        how = {"4:2:0": {"subsampling": "4:2:0"}, "progressive": {"progressive": True}}
        save(tmp_path / "a.jpg", pixels, **how.get(kind, {"mode": kind}))
    seen = replace(windows(np.rint(INNER_WINDOWS), [False, True, True, False]), cut_first=True)
    index = index_of([path])
    if kind == "16-bit":
        index = replace(index, paths=(str(tmp_path / "a.png"),))
    for way in (Decoding("window"), Decoding("image")):
        got = grey_levels(one_batch(index, [0] * 4, seen, decoding=way))
        for (top, left, bottom, right), mirrored, out in zip(seen.roi, seen.flip, got, strict=True):
            cut = decode(path).crop((left, top, right, bottom))
            expected = np.asarray(cut.resize((96, 96), Image.Resampling.BILINEAR), np.float64)
            expected = expected[:, ::-1] if mirrored else expected
            assert np.abs(out - expected).max() <= 1.01


WAYS_OF_DECODING = [
    Decoding("window"),
    Decoding("image"),
    *(
        pytest.param(way, marks=pytest.mark.gpu)
        for way in (Decoding("window", "mixed"), Decoding("image", "mixed"), HOST)
    ),
]


@pytest.mark.parametrize("suffix", ["jpg", "png"])
@pytest.mark.parametrize("way", WAYS_OF_DECODING, ids=str)
def test_exif_orientation(tmp_path: Path, suffix: str, way: Decoding) -> None:
    """Of all eight, and so also that a GPU's pixels are Pillow's."""
    paths = [
        save(
            tmp_path / f"{orientation}.{suffix}",
            photo(300, 400, orientation) if orientation < 5 else photo(400, 300, orientation),
            orientation,
            quality=90,
        )
        for orientation in range(1, 9)
    ]
    assert {decode(path).size for path in paths} == {(400, 300)}
    device = "cpu" if way.device == "cpu" else "cuda"
    tolerance = (MAX_DIFF, MEAN_DIFF) if device == "cpu" else (GPU_MAX_DIFF, GPU_MEAN_DIFF)
    if way.device == "mixed" and suffix == "jpg":
        tolerance = NVJPEG_MAX_DIFF, NVJPEG_MEAN_DIFF
    seen = windows(INNER_WINDOWS, [False, True, True, False])
    requests = [Request(np.full(len(seen.roi), number), seen) for number in range(8)]
    batches = loader(index_of(paths), device, decoding=way).batches(requests)
    for path, batch in zip(paths, batches, strict=True):
        assert batch.images.device.type == batch.labels.device.type == device
        assert batch.images.is_contiguous(memory_format=torch.channels_last)
        assert_as_pillow(batch, path, seen, *tolerance)


def test_same_geometry_as_resize_then_crop(tmp_path: Path) -> None:
    """Pillow's classic route: shorter side to 128, then the central 96 x 96."""
    path = save(tmp_path / "a.png", picture(300, 450))
    top, left, scale = (128 - 96) // 2, (192 - 96) // 2, 300 / 128
    resized = decode(path).resize((192, 128), Image.Resampling.BILINEAR)
    expected = np.asarray(resized.crop((left, top, left + 96, top + 96)), np.float64)
    roi = np.array([top, left, top + 96, left + 96]) * scale
    diff = np.abs(grey_levels(one_batch(index_of([path]), [0], windows(roi)))[0] - expected)
    assert diff.max() <= MAX_DIFF
    assert diff.mean() <= MEAN_DIFF


@pytest.mark.parametrize("px", [16, 96])
def test_decoding_only_the_window_changes_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, px: int
) -> None:
    path = save(tmp_path / "a.jpg", picture(300, 400, noise=40), subsampling="4:2:0")
    index, seen = index_of([path]), windows(INNER_WINDOWS + BORDER_WINDOWS)
    samples = [0] * len(seen.roi)
    boxes = boxes_of(replace(seen, size_px=(px, px)), index.sizes[samples])
    assert (boxes[:, 2:] - boxes[:, :2]).prod(axis=1).mean() < 0.5 * 300 * 400  # it saves decoding

    part = grey_levels(one_batch(index, samples, seen, px=px))
    monkeypatch.setattr(
        dali, "boxes_of", lambda _, sizes: np.hstack([np.zeros_like(sizes), sizes]).astype(np.int32)
    )
    whole = grey_levels(one_batch(index, samples, seen, px=px))
    # Measured: 0.0015. The windows' float32 coordinates are relative to different corners.
    assert np.abs(part - whole).max() <= 0.01


def test_raw_pixels_with_zero_padding() -> None:
    random = np.random.default_rng(0)
    pixels = random.integers(0, 256, (16, 32, 32, 3), dtype=np.uint8)
    corner = random.integers(-4, 5, (16, 2))
    corner[:2] = [[-4, -4], [4, 4]]
    seen = windows(np.hstack([corner, corner + 32]), np.arange(16) % 3 == 0)
    batch = one_batch(raw_index(pixels), range(16), seen, px=32)
    got = batch.images.permute(0, 2, 3, 1).numpy()
    for i, (top, left) in enumerate(corner + 4):
        normalised = (pixels[i] / 255 - MEAN) / STD
        padded = np.pad(normalised, ((4, 4), (4, 4), (0, 0)))[top : top + 32, left : left + 32]
        expected = padded[:, ::-1] if seen.flip[i] else padded
        np.testing.assert_allclose(got[i], expected, rtol=0, atol=1e-6)
        assert (got[i][expected == 0] == 0).all()
    assert batch.labels.tolist() == list(range(100, 116))


@pytest.mark.parametrize("roi", [(0, 0, 16, 16), (0.5, 0, 32.5, 32)])
def test_raw_pixels_are_never_resampled(roi: tuple[float, ...]) -> None:
    index = raw_index(np.zeros((1, 32, 32, 3), np.uint8))
    with pytest.raises(ValueError, match=r"\(32, 32\) pixels high and wide"):
        one_batch(index, [0], windows(roi), px=32)


@pytest.fixture
def folder(tmp_path: Path) -> Index:
    """Eight pictures of different sizes, JPEG and PNG."""
    return index_of(
        [
            save(
                tmp_path / f"{i}.{'jpg' if i % 2 else 'png'}", picture(120 + 9 * i, 200 - 8 * i, i)
            )
            for i in range(8)
        ]
    )


def request(index: Index, samples: Sequence[int]) -> Request:
    """A window and flip for each sample that depend on the sample alone."""
    numbers = np.array(samples, np.int64)
    corner = np.stack([numbers * 1.5, numbers * 2.25], 1)
    seen = windows(np.hstack([corner, corner + 70 + corner]), numbers % 2 == 1)
    return Request(numbers, seen)


def raw_or_encoded(kind: str, folder: Index) -> Index:
    return (
        folder if kind == "encoded" else raw_index(np.stack([picture(96, 96, i) for i in range(8)]))
    )


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16])
@pytest.mark.parametrize("kind", ["encoded", "raw"])
def test_what_a_batch_is(folder: Index, kind: str, dtype: torch.dtype) -> None:
    index = raw_or_encoded(kind, folder)
    seen = windows([[0, 0, 96, 96]] * 3, [True, False, True])
    batch = one_batch(index, [5, 0, 5], seen, dtype=dtype)
    assert batch.images.shape == (3, 3, 96, 96)
    assert batch.images.dtype == dtype
    assert batch.images.is_contiguous(memory_format=torch.channels_last)
    assert batch.labels.dtype == torch.int64
    assert batch.labels.tolist() == [105, 100, 105]
    exact = one_batch(index, [5, 0, 5], seen).images
    torch.testing.assert_close(batch.images, exact.to(dtype), rtol=2**-7, atol=1e-3)


def equal(a: Batch, b: Batch) -> bool:
    return torch.equal(a.images, b.images) and torch.equal(a.labels, b.labels)


def test_a_sample_does_not_depend_on_its_company(folder: Index) -> None:
    """Bit for bit: batch sizes vary within a stream, and so do composition and thread count."""
    together = next(loader(folder, decode_threads=1).batches([request(folder, range(8))]))
    requests = [request(folder, s) for s in ([3], [0, 3, 7, 2], [5, 5], [1, 4, 6, 0, 2])]
    for threads in (1, 3):
        batches = list(loader(folder, decode_threads=threads).batches(requests))
        assert [len(b.labels) for b in batches] == [1, 4, 2, 5]
        for (samples, *_), batch in zip(requests, batches, strict=True):
            assert torch.equal(batch.images, together.images[samples])
            assert torch.equal(batch.labels, together.labels[samples])


@pytest.mark.parametrize("kind", ["encoded", "raw"])
def test_streams_are_independent(folder: Index, kind: str) -> None:
    index = raw_or_encoded(kind, folder)

    def ask(samples: Sequence[int]) -> Request:
        return Request(np.array(samples), windows([[0, 0, 96, 96]] * len(samples)))

    forth = [ask([i, i + 1]) for i in range(7)]
    expected = [one_batch(index, list(samples), seen) for samples, seen, *_ in forth]
    same = loader(index)

    def check(batches: Iterator[Batch], reference: list[Batch]) -> None:
        assert all(equal(a, b) for a, b in zip(batches, reference, strict=True))

    check(same.batches(forth), expected)
    check(same.batches(forth[::-1]), expected[::-1])  # run to its end, then again
    assert list(same.batches([])) == []
    check(same.batches(forth[4:5]), expected[4:5])  # shorter than the prefetch
    abandoned = same.batches(forth)
    kept = [next(abandoned), next(abandoned)]
    check(same.batches(forth[::-1]), expected[::-1])
    check(abandoned, expected[2:])  # and a stream taken up again continues where it was
    check(iter(kept), expected[:2])  # batches outlive their stream


def test_windows_of_any_shape(folder: Index) -> None:
    """Higher than wide, as whole images are in a multi-scale test; against Pillow."""
    seen = replace(windows([[10, 12, 110, 92]]), size_px=(75, 60))
    (batch,) = loader(folder).batches([Request(np.array([1]), seen)])
    assert batch.images.shape == (1, 3, 75, 60)
    image = Image.fromarray(np.asarray(decode(folder.paths[1])))
    resized = image.resize((60, 75), Image.Resampling.BILINEAR, box=(12, 10, 92, 110))
    assert np.abs(grey_levels(batch)[0] - np.asarray(resized)).max() <= MAX_DIFF


@pytest.mark.parametrize("kind", ["encoded", "raw"])
def test_the_mean_image_is_subtracted_before_padding_and_mirror(folder: Index, kind: str) -> None:
    index = raw_or_encoded(kind, folder)
    mean = np.random.default_rng(3).uniform(0, 1, (96, 96, 3)).astype(np.float32)
    seen = windows([[0, 0, 96, 96]] * 2, [False, True])
    if kind == "raw":
        seen = windows([[-4, 2, 92, 98]] * 2, [False, True])
    batch = one_batch(index, [3, 3], seen, mean_image=mean)
    got = batch.images.permute(0, 2, 3, 1).double().numpy()
    if kind == "raw":
        assert index.pixels is not None
        centred = np.pad((index.pixels[3] / 255 - mean) / STD, ((4, 4), (4, 4), (0, 0)))
        expected = centred[0:96, 6:102]
    else:
        unseen = one_batch(index, [3], windows([[0, 0, 96, 96]]), mean=(0.0, 0.0, 0.0))
        expected = (grey_levels(unseen)[0] / 255 - MEAN - mean) / STD
    assert np.abs(got[0] - expected).max() < 1e-5
    assert np.abs(got[1] - expected[:, ::-1]).max() < 1e-5


def test_a_mean_image_of_another_size_is_refused(folder: Index) -> None:
    with pytest.raises(ValueError, match=r"mean image is \(8, 8\), the windows \(96, 96\)"):
        one_batch(folder, [0], windows([[0, 0, 96, 96]]), mean_image=np.zeros((8, 8, 3)))


@pytest.mark.parametrize("mean", [None, np.full((96, 96, 3), 0.4)])
def test_a_colour_is_added_to_each_image(folder: Index, mean: Any) -> None:
    seen = windows([[0, 0, 96, 96]] * 2, [False, True])
    shift = np.array([[0.1, -0.05, 0.02], [0.0, 0.03, -0.2]])
    before = one_batch(folder, [3, 4], seen, mean_image=mean).images
    after = one_batch(folder, [3, 4], replace(seen, color_shift=shift), mean_image=mean).images
    added = ((after - before).double().permute(0, 2, 3, 1).numpy() * STD).reshape(2, -1, 3)
    assert np.abs(added - shift[:, None]).max() < 1e-5


def test_errors_of_the_requests_pass_through(folder: Index) -> None:
    def requests() -> Iterator[Request]:
        yield request(folder, [0])
        raise RuntimeError("from the sampler")

    with pytest.raises(RuntimeError, match="from the sampler"):
        list(loader(folder).batches(requests()))


WITHOUT_NPP = pytest.mark.skipif(
    backend.GetNppVersion() != -1, reason="NPP is installed: DALI has nothing to warn of"
)


@WITHOUT_NPP
def test_a_library_that_is_not_needed_is_not_warned_of() -> None:
    """What DALI checks when it builds the first pipeline for a GPU, in a process of its own."""
    check = "from nvidia.dali import backend; backend.check_cuda_runtime()"
    set_up = "from resnet_dist.process import set_up_process; set_up_process()"
    for code, stderr in ((check, "NPP is typically"), (f"{set_up}; {check}", "")):
        command = [sys.executable, "-W", "error", "-c", code]
        done = subprocess.run(
            command, capture_output=True, text=True, timeout=HANG_SECONDS, cwd=REPO
        )
        assert (done.returncode == 0) == (stderr == "")
        assert stderr in done.stderr
    assert done.stderr == ""


@WITHOUT_NPP
def test_nor_does_it_end_a_test(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(backend, "cuda_checked", False)
    backend.check_cuda_runtime()
    assert backend.cuda_checked


@pytest.mark.gpu
def test_gpu_raw_pixels() -> None:
    index = raw_index(np.stack([picture(32, 32, i) for i in range(4)]))
    seen = windows([[-4, 2, 28, 34]] * 4, [True, False, True, False])
    gpu, cpu = (one_batch(index, range(4), seen, px=32, device=d) for d in ("cuda", "cpu"))
    torch.testing.assert_close(gpu.images.cpu(), cpu.images, rtol=0, atol=1e-5)
    assert torch.equal(gpu.labels.cpu(), cpu.labels)


@pytest.mark.gpu
@pytest.mark.parametrize("kind", ["encoded", "raw"])
def test_gpu_mean_image_colour_and_shape(folder: Index, kind: str) -> None:
    """On decoded PNG files and raw pixels the GPU does what the CPU does."""
    index = raw_or_encoded(kind, folder)
    mean = np.random.default_rng(3).uniform(0, 1, (96, 96, 3)).astype(np.float32)
    seen = windows([[0, 0, 96, 96]] * 2, [False, True])
    if kind == "encoded":
        seen = replace(seen, color_shift=np.array([[0.1, -0.05, 0.02], [0.0, 0.03, -0.2]]))
    gpu, cpu = (one_batch(index, [0, 2], seen, mean_image=mean, device=d) for d in ("cuda", "cpu"))
    torch.testing.assert_close(gpu.images.cpu(), cpu.images, rtol=0, atol=2 / 255 / STD.min())
    tall = replace(windows([[0, 0, 75, 60]]), size_px=(75, 60))
    for device in ("cuda", "cpu"):
        (batch,) = loader(index, device).batches([Request(np.array([2]), tall)])
        assert batch.images.shape == (1, 3, 75, 60)


@pytest.mark.gpu
@pytest.mark.parametrize("part", ["window", "image"])
def test_gpu_windows_that_are_cut_first(folder: Index, part: Any) -> None:
    """On PNG files. At the border DALI repeats the edge pixel, and torch leaves taps out."""
    roi = [[3, 5, 80, 90], [0, 0, 60, 50], [10, 2, 96, 96]]
    seen = replace(windows(roi, [False, True, False]), cut_first=True)
    gpu, cpu = (
        grey_levels(one_batch(folder, [0, 2, 4], seen, device=device, decoding=way))
        for device, way in (("cuda", Decoding(part, "mixed")), ("cpu", Decoding(part)))
    )
    assert np.abs(gpu - cpu)[:, 4:-4, 4:-4].max() <= GPU_MAX_DIFF
