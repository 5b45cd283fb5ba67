"""Reads image headers: the size of an image, and whether it is safe to decode with others.

DALI 2.4 parses the headers of a large batch, and decodes it, in several threads; a bad image of
some formats may then crash the process. So headers are checked before the images go there.
"""

import io
import os
import re
import struct
import warnings
import zlib
from typing import BinaryIO

from PIL import Image

from resnet_dist.errors import UserError

EXIF_ORIENTATION = 0x0112
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # with more, Pillow assumes an attack
JPEG_SIGNATURE = b"\xff\xd8"
HARMLESS_SIGNATURES = (b"RIFF", b"P2", b"P3", b"P5", b"P6")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class UnreadableImage(UserError):
    """One image cannot be read. The message says why, but not which image it is."""


def displayed_size(file: str | os.PathLike[str] | BinaryIO) -> tuple[int, int]:
    """Returns (height, width) as a viewer shows the image, after its EXIF orientation.

    Raises:
        UnreadableImage: the header cannot be read, or gives an absurd size.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Only the EXIF block counts. Pillow's getexif() would also read XMP, which DALI
            # ignores, and a TIFF's own tags, which Pillow has already applied to `size`.
            turned = exif_orientation(image.info.get("exif", b"")) in (5, 6, 7, 8)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise UnreadableImage(f"not a readable image ({said_by_pillow(error)})") from None
    return (width, height) if turned else (height, width)


def why_undecodable(data: bytes) -> str:
    """Returns what is wrong with an image that DALI could not decode, as DALI does not say."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:  # Pillow's plugins raise whatever they meet
        return f"not a readable image ({said_by_pillow(error)})"
    return "not a readable image (a kind that DALI does not decode)"


def is_trusted(data: bytes, size: tuple[int, int]) -> bool:
    """Whether an encoded image can safely be decoded together with others.

    size: height and width in the index.

    Raises:
        UnreadableImage: it is not an image, or has a different size.
    """
    if not data:
        raise UnreadableImage("an empty file")
    found = _plain_size(data)
    # Among other formats, damaged BMP and TIFF files crash DALI; damaged WebP and PNM files do not.
    trusted = found is not None or data.startswith(HARMLESS_SIGNATURES)
    found = found or displayed_size(io.BytesIO(data))
    if sorted(found) != sorted(size):  # EXIF may have turned it
        raise UnreadableImage(
            f"is {found[1]} x {found[0]} pixels, but {size[1]} x {size[0]} in the index"
        )
    return trusted


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """Returns (height, width) before EXIF for a JPEG with a complete and ordinary header, or for a
    complete PNG; None for everything else."""
    size = None
    try:
        if data.startswith(JPEG_SIGNATURE):
            size = _plain_jpeg_size(data)
        elif data.startswith(PNG_SIGNATURE):
            size = _plain_png_size(data)
    except struct.error:  # the data end inside the header
        return None
    return size if size is not None and size[0] * size[1] <= MAX_PIXELS else None


def _plain_jpeg_size(data: bytes) -> tuple[int, int] | None:
    """Walks the segments to the start of scan (ITU-T T.81, annex B)."""
    at, size, end = 2, None, len(data)
    while at < end:
        marker, length = struct.unpack_from(">HH", data, at)
        if not 0xFFC0 <= marker <= 0xFFFE or length < 2:
            return None
        if marker == 0xFFDA:  # start of scan
            return size if at + 2 + length < end else None
        if marker <= 0xFFCF and marker not in (0xFFC4, 0xFFC8, 0xFFCC):  # a frame header
            size = struct.unpack_from(">HH", data, at + 5)
            if 0 in size:
                return None
        at += 2 + length
    return None


def _plain_png_size(data: bytes) -> tuple[int, int] | None:
    """Walks all chunks and their checksums (W3C PNG, section 5)."""
    at, size = len(PNG_SIGNATURE), None
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        content_end = at + 8 + length
        (crc,) = struct.unpack_from(">I", data, content_end)
        if zlib.crc32(memoryview(data)[at + 4 : content_end]) != crc:
            return None
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", data, at + 8)
            size = (height, width)
        if kind == b"IEND":
            return size if size is not None and 0 not in size else None
        at = content_end + 4


def said_by_pillow(error: Exception) -> str:
    """Returns Pillow's reason, without the path or Python object that it quotes."""
    said = getattr(error, "strerror", None) or re.split(" ['<]", str(error))[0]
    return said or type(error).__name__


def exif_orientation(exif_block: bytes) -> object:
    """Returns the orientation, 1 to 8, or whatever value is stored; None if there is none."""
    exif = Image.Exif()
    try:
        exif.load(exif_block)
        return exif.get(EXIF_ORIENTATION)
    except (OSError, ValueError, SyntaxError, struct.error):
        return None  # a damaged block does not make the image unreadable
