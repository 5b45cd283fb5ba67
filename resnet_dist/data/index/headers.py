"""What an image's header says: its size, and whether its bytes can be trusted to the decoder.

DALI 2.4 parses the headers of a large batch in several threads, and decodes in several; where an
image of some formats is bad, the process may crash. So they are looked at before they go there.
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
MAX_PIXELS = 2 * (Image.MAX_IMAGE_PIXELS or 0)  # from here Pillow takes an image for an attack
JPEG_SIGNATURE = b"\xff\xd8"
HARMLESS_SIGNATURES = (b"RIFF", b"P2", b"P3", b"P5", b"P6")
PNG_SIGNATURE = b"\x89PNG\r\n\x1a\n"


class UnreadableImage(UserError):
    """One image cannot be read; the text says why, and leaves it to others to name it."""


def displayed_size(file: str | os.PathLike[str] | BinaryIO) -> tuple[int, int]:
    """(height, width) as a viewer shows the image: after its EXIF orientation.

    Raises:
        UnreadableImage: the header cannot be read, or names an absurd size.
    """
    try:
        with Image.open(file) as image:
            width, height = image.size
            # Only the EXIF block itself: Pillow's getexif() also looks in XMP, which DALI does not,
            # and in a TIFF's own tags, by which Pillow has turned `size` already.
            turned = exif_orientation(image.info.get("exif", b"")) in (5, 6, 7, 8)
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise UnreadableImage(f"not a readable image ({said_by_pillow(error)})") from None
    return (width, height) if turned else (height, width)


def why_undecodable(data: bytes) -> str:
    """What is wrong with an image that DALI, which does not say, could not decode."""
    try:
        with warnings.catch_warnings(), Image.open(io.BytesIO(data)) as image:
            warnings.simplefilter("ignore")
            image.load()
    except Exception as error:  # Pillow's plugins raise whatever they meet
        return f"not a readable image ({said_by_pillow(error)})"
    return "not a readable image (of a kind that DALI does not decode)"


def screen(data: bytes, size: tuple[int, int]) -> bool:
    """Whether the decoder may be given `data` among others; if not, only alone.

    size: height and width that the index has.

    Raises:
        UnreadableImage: no image, or one of another size.
    """
    if not data:
        raise UnreadableImage("an empty file")
    found = _plain_size(data)
    # Of other formats, damaged BMP and TIFF files crash it; damaged WebP and PNM files do not.
    trusted = found is not None or data.startswith(HARMLESS_SIGNATURES)
    found = found or displayed_size(io.BytesIO(data))
    if sorted(found) != sorted(size):  # EXIF may have turned it
        raise UnreadableImage(
            f"is {found[1]} x {found[0]} pixels, and was {size[1]} x {size[0]} in the index"
        )
    return trusted


def _plain_size(data: bytes) -> tuple[int, int] | None:
    """(height, width) before EXIF of a JPEG whose header is complete and without oddities, or of a
    PNG that is whole; None for all else."""
    size = None
    try:
        if data.startswith(JPEG_SIGNATURE):
            size = _plain_jpeg_size(data)
        elif data.startswith(PNG_SIGNATURE):
            size = _plain_png_size(data)
    except struct.error:  # the data end in the header
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
    """What is wrong with an image, without the path, or the Python object, that it quotes."""
    said = getattr(error, "strerror", None) or re.split(" ['<]", str(error))[0]
    return said or type(error).__name__


def exif_orientation(exif_block: bytes) -> object:
    """1 to 8, or whatever stands there; None if nothing does."""
    exif = Image.Exif()
    try:
        exif.load(exif_block)
        return exif.get(EXIF_ORIENTATION)
    except (OSError, ValueError, SyntaxError, struct.error):
        return None  # a damaged block turns nothing, and the image is whole
