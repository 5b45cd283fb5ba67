"""Shrunk images are the pictures that the loader sees."""

import io

import numpy as np
import pytest
from PIL import Image

from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.prepare.reencode import Limit, reencode
from tests.support.images import all_kinds
from tests.support.sources import photo


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: red grows to the right, green downwards."""
    red = np.linspace(0, 250, width)[None].repeat(height, 0)
    green = np.linspace(0, 250, height)[:, None].repeat(width, 1)
    return np.stack([red, green, np.full_like(red, 60)], axis=2).round().astype(np.uint8)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert "exif" not in image.info
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (Limit("longest", 100, 95), (50, 100)),
        (Limit("shortest", 100, 95), (100, 200)),
        (Limit("shortest", 101, 95), (101, 202)),
    ],
)
def test_the_side_is_the_limit_and_the_picture_the_same(
    limit: Limit, size: tuple[int, int]
) -> None:
    data = encoded(Image.fromarray(gradient(400, 800)), "JPEG", quality=95)
    found = decoded(reencode(data, limit))
    assert found.shape == (*size, 3)
    assert np.abs(found - gradient(*size)).mean() < 2


def test_an_image_within_the_limit_keeps_its_bytes() -> None:
    data = encoded(Image.fromarray(gradient(100, 200)), "PNG")
    assert reencode(data, Limit("longest", 200, 90)) is data
    assert reencode(data, Limit("shortest", 100, 90)) is data
    assert reencode(data, Limit("shortest", 99, 90)) != data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_exif_turns_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(gradient(320, 160))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it so
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright  # type: ignore[arg-type]
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    found = decoded(reencode(data, Limit("longest", 80, 95)))
    assert found.shape == (80, 40, 3)
    assert np.abs(found - gradient(80, 40)).mean() < 3


def test_other_kinds_of_pixels_become_8_bit_rgb() -> None:
    limit, small = Limit("longest", 40, 95), gradient(20, 40)
    rgb = Image.fromarray(gradient(80, 160))
    for data in (
        encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        encoded(rgb.quantize(256), "PNG"),
        encoded(rgb.convert("RGBA"), "PNG"),
        encoded(rgb, "JPEG", quality=95, progressive=True),
    ):
        assert np.abs(decoded(reencode(data, limit)) - small).mean() < 4
    grey = gradient(80, 160)[..., 0]
    for data in (
        encoded(Image.fromarray(grey), "PNG"),
        encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        encoded(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
    ):
        found = decoded(reencode(data, limit))
        assert np.abs(found - small[..., :1]).mean() < 3


def test_lower_quality_takes_fewer_bytes() -> None:
    data = photo(1, quality=95)
    assert len(reencode(data, Limit("longest", 40, 60))) < len(
        reencode(data, Limit("longest", 40, 95))
    )


def test_why_an_image_is_bad_is_said_in_the_same_words_each_time() -> None:
    torn = encoded(Image.fromarray(gradient(80, 160)), "TIFF")[:-9000]
    said = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage) as bad:
            reencode(torn, Limit("longest", 20, 90))
        said.add(str(bad.value))
    assert len(said) == 1
    assert "0x" not in said.pop()


def test_what_is_shrunk_is_what_the_loader_sees() -> None:
    """Gray values of more than 8 bits, CMYK without Adobe's mark, and transparency."""
    for name, data, shown in all_kinds():
        if name.startswith(("L12", "float", "LA", "RGBA", "CMYK", "cmyk", "1023", "exif", "late")):
            small = decoded(reencode(data, Limit("shortest", 20, 95)))
            size = small.shape[1], small.shape[0]
            expected = np.asarray(Image.fromarray(shown).resize(size, Image.Resampling.LANCZOS))
            assert np.abs(small.astype(int) - expected).mean() < 6, name
