"""Reads images with Pillow, which decides what is an image, how large it is, and which way is up.

DALI decodes the images on which both agree, see plain.py, and Pillow decodes the others.
"""

import errno
import io
import os
import re
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from typing import IO, BinaryIO

import numpy as np
from PIL import Image, ImageFile, UnidentifiedImageError

from resnet_dist.data.index.image_file import UnreadableImage

# Only formats for pictures of pixels. Pillow knows others, and calls Ghostscript for some of them.
FORMATS = ("JPEG", "PNG", "GIF", "BMP", "PPM", "TIFF", "WEBP", "AVIF", "JPEG2000")
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # with more, Pillow assumes an attack
EXIF_ORIENTATION = 0x0112
# EXIF 2.32, table "Orientation": how to make the stored image upright.
UPRIGHT = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
TURNED = (5, 6, 7, 8)  # orientations in which height and width change places
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"
PNG_END = b"\0\0\0\0IEND\xaeB`\x82"
# Where a PNG may have its EXIF block after the pixels, as written by ExifTool. Only so many bytes
# at the end are searched, as walking over all chunks would take as long as reading the file.
END_BYTES = 1 << 16
TIFF_BITS_PER_SAMPLE, TIFF_SAMPLE_FORMAT, TIFF_SIGNED = 258, 339, 2
SNIFFED_BYTES = 64
# What is often stored under the name of an image: its first bytes -> what it is.
NO_IMAGES = (
    (re.compile(rb"$"), "an empty file"),
    (re.compile(rb"\0+$"), "only zeros"),
    (re.compile(rb"\s*<(!doctype html|html)", re.IGNORECASE), "a web page"),
    (re.compile(rb"\s*<(\?xml|svg)"), "an SVG or XML file"),
    (re.compile(rb"....ftyp(hei|hev|mif1|msf1)", re.DOTALL), "a HEIC image"),
    (re.compile(rb"\xff\x0a|\0\0\0\x0cJXL "), "a JPEG XL image"),
    (re.compile(rb"%PDF|%!PS"), "a PDF or PostScript file"),
    (re.compile(rb"8BPS"), "a Photoshop file"),
    (re.compile(rb"version https://git-lfs"), "a Git LFS pointer"),
)


@contextmanager
def opened(file: BinaryIO) -> Iterator[ImageFile.ImageFile]:
    """Opens an image: its header is read, its pixels are not.

    Raises:
        UnreadableImage: the header cannot be read or gives an absurd size, or what the caller does
            with the image fails.
        OSError: the disk fails.
    """
    try:
        with Image.open(file, formats=FORMATS) as image:
            yield image
    except (MemoryError, UnreadableImage):
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        # Pillow's own errors have no number, and a damaged image may lead to a seek below zero.
        if isinstance(error, OSError) and error.errno not in (None, errno.EINVAL):
            raise
        raise UnreadableImage(f"not a readable image ({_reason(error, file)})") from None


def displayed_size(file: BinaryIO) -> tuple[int, int]:
    """Returns (height, width) as a viewer shows the image, after its EXIF orientation.

    Raises what `opened` raises.
    """
    with opened(file) as image:
        width, height = image.size
        return (width, height) if orientation_of(image) in TURNED else (height, width)


def orientation_of(image: ImageFile.ImageFile) -> object:
    """Returns the EXIF orientation of an opened image, 1 to 8, or whatever value is stored.

    Only an EXIF block counts. Pillow's getexif() would also read XMP, which viewers ignore, and a
    TIFF's own tags, which Pillow has already applied to `size`.
    """
    block = image.info.get("exif")
    if block is None and image.format == "PNG":
        block = None if image.fp is None else _last_exif(image.fp)
    if not block:
        return None
    exif = Image.Exif()
    try:
        exif.load(block)
        return exif.get(EXIF_ORIENTATION)
    except (OSError, ValueError, SyntaxError, struct.error):
        return None  # a damaged block does not make the image unreadable


def _last_exif(file: IO[bytes]) -> bytes | None:
    """Returns the EXIF block of a PNG that has it after the pixels; None if there is none."""
    before = file.tell()
    file.seek(max(0, file.seek(0, os.SEEK_END) - END_BYTES))
    end = file.read()
    file.seek(before)
    at = start = end.rfind(b"eXIf") - 4
    if start < 0:
        return None
    while at + 12 <= len(end) and end[at : at + 12] != PNG_END:  # only chunks follow it
        if end[at + 4 : at + 8] == b"IDAT":
            return None
        at += 12 + int.from_bytes(end[at : at + 4])
    if end[at : at + 12] != PNG_END:
        return None
    return end[start + 8 : start + 8 + int.from_bytes(end[start : start + 4])]


def upright(data: bytes, size: tuple[int, int]) -> np.ndarray:
    """Decodes an image: upright pixels, uint8 [height, width, 3] in RGB, of its first frame.

    Transparency is dropped, as DALI does. size: height and width in the index.

    Raises:
        UnreadableImage: it cannot be decoded, or has a different size.
    """
    with opened(io.BytesIO(data)) as image:
        orientation = orientation_of(image)
        pixels = np.asarray(as_rgb(image))
        if orientation in UPRIGHT:
            pixels = np.asarray(Image.fromarray(pixels).transpose(UPRIGHT[orientation]))
    check_size(pixels.shape[:2], size)
    return pixels


def check_size(found: tuple[int, ...], size: tuple[int, int]) -> None:
    """Raises UnreadableImage if an image, of height and width `found`, has a different `size`."""
    if found != size:
        raise UnreadableImage(
            f"is {found[1]} x {found[0]} pixels, but {size[1]} x {size[0]} in the index"
        )


def as_rgb(image: Image.Image) -> Image.Image:
    """Decodes the pixels of an opened image and converts them to 8-bit RGB without transparency.

    Gray values with more bits are scaled, see `_white`.
    """
    image.info.pop("xmp", None)  # Pillow would turn a TIFF by it
    image.load()
    if image.mode != "F" and not image.mode.startswith("I"):
        return image.convert("RGB")
    gray = np.asarray(image)
    scaled = np.nan_to_num(gray * (255 / _white(image, gray))).clip(0, 255)
    return Image.fromarray(np.rint(scaled).astype(np.uint8)).convert("RGB")


def _white(image: Image.Image, gray: np.ndarray) -> float:
    """Returns the value that is shown as white: the largest that can be stored in up to 16 bits.

    Of 32 bits few programs use all: float values go to 1, and both kinds often hold 8-bit or 16-bit
    values. So the range is the smallest of these that has all values.
    """
    tags = getattr(image, "tag_v2", {})  # of a TIFF; Pillow scales a PPM's values to 16 bits
    bits = int(tags.get(TIFF_BITS_PER_SAMPLE, (16,))[0])
    if bits <= 16:
        is_signed = tags.get(TIFF_SAMPLE_FORMAT, (1,))[0] == TIFF_SIGNED
        return float(2 ** (bits - is_signed) - 1)
    largest = float(np.nanmax(gray, initial=0))
    ranges = (1, 255, 65535) if image.mode == "F" else (255, 65535)
    return next((white for white in ranges if largest <= white), largest)


def _reason(error: Exception, file: BinaryIO) -> str:
    """Returns what is wrong, without the path or Python object that Pillow quotes."""
    if isinstance(error, UnidentifiedImageError):
        return _described(file)
    said = getattr(error, "strerror", None) or re.split(" ['<]", str(error))[0]
    return said or type(error).__name__


def _described(file: BinaryIO) -> str:
    """Returns what a file is that Pillow does not take for an image."""
    file.seek(0)
    start = file.read(SNIFFED_BYTES)
    return next((what for known, what in NO_IMAGES if known.match(start)), "of no known format")
