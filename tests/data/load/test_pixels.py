"""The pixels of every kind of image are those that Pillow shows, whoever decodes them."""

import io
import os
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image, ImageOps

from resnet_dist.config import DataConfig
from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.index import Index
from resnet_dist.data.index.pillow import displayed_size
from resnet_dist.data.index.plain import why_not_plain
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.decoding import HOST, UNPROBED, WAYS, Decoding
from resnet_dist.data.view.augment import Request, unchanged
from tests.support.images import HEIGHT, Case, all_kinds

KINDS = list(all_kinds())
PX = 32  # of a window that is inside every image, whichever way it is turned
CORNER = (4, 7)
# YCCK, and the rounding of 16 bits to 8.
MAX_DIFF = 1
AWKWARD = os.environ.get("AWKWARD_IMAGES")
gpu = [pytest.param(way, marks=pytest.mark.gpu) for way in (UNPROBED, WAYS[1], HOST)]


def pixels_of(
    folder: Path, cases: Sequence[Case], way: Decoding, cut_first: bool
) -> tuple[np.ndarray, dict[int, str]]:
    """Returns the loader's pixels in a window of each image, in grey levels: [N, PX, PX, 3]."""
    sizes = np.zeros((len(cases), 2), np.int32)
    bad = {}
    for number, (name, data, _) in enumerate(cases):
        (folder / name).write_bytes(data)
        try:
            sizes[number] = displayed_size(io.BytesIO(data))
        except UnreadableImage as error:
            bad[number] = str(error)
    paths = tuple(str(folder / name) for name, _, _ in cases)
    index = Index(("a",), np.arange(len(cases)), sizes, paths, None, "", bad=bad)
    data = DataConfig(mean=(0, 0, 0), std=(1, 1, 1), decode_threads=2, max_bad_samples=len(cases))
    loader = Loader(
        index,
        data,
        device=torch.device("cpu" if way.device == "cpu" else "cuda"),
        dtype=torch.float32,
        max_batch_size=len(cases),
        decoding=way,
    )
    roi = np.tile([*CORNER, CORNER[0] + PX, CORNER[1] + PX], (len(cases), 1)).astype(float)
    windows = replace(unchanged(roi, (PX, PX)), cut_first=cut_first)
    (batch,) = loader.batches([Request(np.arange(len(cases)), windows)])
    pixels = 255 * batch.images.permute(0, 2, 3, 1).double().cpu().numpy()
    return pixels, loader.bad


def window_of(shown: np.ndarray) -> np.ndarray:
    top, left = CORNER
    return shown[top : top + PX, left : left + PX].astype(float)


@pytest.mark.parametrize("cut_first", [True, False], ids=["training", "evaluation"])
@pytest.mark.parametrize("way", [Decoding("window"), Decoding("image"), *gpu], ids=str)
def test_every_kind_is_shown_as_by_pillow(tmp_path: Path, way: Decoding, cut_first: bool) -> None:
    got, bad = pixels_of(tmp_path, KINDS, way, cut_first)
    assert not bad
    expected = np.stack([window_of(shown) for _, _, shown in KINDS])
    worst = np.abs(got - expected).max(axis=(1, 2, 3))
    limit = MAX_DIFF if way.device == "cpu" else 8  # nvJPEG has an IDCT of its own
    off = {name: diff for (name, _, _), diff in zip(KINDS, worst, strict=True) if diff > limit}
    assert not off
    assert CORNER[1] + PX <= HEIGHT


def test_the_kinds_that_cameras_and_programs_write_are_left_to_dali() -> None:
    plain = {
        name
        for name, data, shown in KINDS
        if why_not_plain(data, (shown.shape[0], shown.shape[1])) is None
    }
    assert {"L-False-0.jpg", "RGB-True-2.jpg", "exif-6.jpg", "P8.png", "RGBA16.png"} < plain
    assert {"exif-6.png", "RGB-False.webp", "RGBA-True.webp"} < plain
    assert not {"CMYK-False-0.jpg", "two-6-1.jpg", "late-6.png", "L.tif", "L.gif"} & plain


def test_dali_decodes_plain_images_without_help(tmp_path: Path) -> None:
    plain = [
        case
        for case in KINDS
        if why_not_plain(case[1], (case[2].shape[0], case[2].shape[1])) is None
    ]
    _, bad = pixels_of(tmp_path, plain, Decoding(), cut_first=True)
    assert not bad


def reference(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        if image.mode.startswith("I"):
            grey = Image.fromarray((np.asarray(image) / 257).astype(np.uint8))
            return np.asarray(grey.convert("RGB"))
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


@pytest.mark.skipif(AWKWARD is None, reason="needs AWKWARD_IMAGES, a folder of damaged images")
def test_damaged_images_that_pillow_reads_are_shown_as_by_pillow(tmp_path: Path) -> None:
    assert AWKWARD is not None
    cases: list[Case] = []
    for path in sorted(Path(AWKWARD).rglob("*.*")):
        if path.stat().st_size > 2**22 or path.name == "max_size.jpg":
            continue
        try:
            shown = reference(path.read_bytes())
        except Exception:
            continue
        if min(shown.shape[:2]) >= CORNER[1] + PX:
            cases.append((f"{len(cases):04}{path.suffix}", path.read_bytes(), shown))
    assert len(cases) > 100
    for way in (Decoding("window"), Decoding("image")):
        got, bad = pixels_of(tmp_path, cases, way, cut_first=True)
        assert not bad
        expected = np.stack([window_of(shown) for _, _, shown in cases])
        assert np.abs(got - expected).max() <= MAX_DIFF


@pytest.mark.parametrize(
    ("start", "what"),
    [
        (b"", "an empty file"),
        (bytes(100), "only zeros"),
        (b" <!DOCTYPE html><html>", "a web page"),
        (b"<svg xmlns='x'/>", "an SVG or XML file"),
        (b"\0\0\0\x18ftypheic" + bytes(9), "a HEIC image"),
        (b"\xff\x0a" + bytes(9), "a JPEG XL image"),
        (b"%!PS-Adobe-3.0 EPSF-3.0", "a PDF or PostScript file"),
        (b"8BPS" + bytes(9), "a Photoshop file"),
        (b"version https://git-lfs.github.com/spec/v1", "a Git LFS pointer"),
        (b"Rar!", "of no known format"),
    ],
)
def test_what_is_no_image_is_said(start: bytes, what: str) -> None:
    with pytest.raises(UnreadableImage, match=rf"^not a readable image \({what}\)$"):
        displayed_size(io.BytesIO(start))
