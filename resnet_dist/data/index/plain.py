"""Recognizes plain images: those that DALI decodes to the same pixels as Pillow.

Which images these are was found by decoding all kinds with both (tests/data/load/test_pixels.py).
Of the rest, DALI refuses some, misreads or turns others without a word, and crashes on some that
are damaged: DALI 2.4 parses and decodes a large batch in several threads. So an image goes there
only if its structure says that it is plain. That is a function of its bytes alone, and it is known
before anything is decoded.
"""

import struct
import zlib

from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.pillow import (
    EXIF_ORIENTATION,
    MAX_PIXELS,
    PNG_SIGNATURE,
    TURNED,
    check_size,
)

JPEG_SIGNATURE = b"\xff\xd8"
JPEG_END = b"\xff\xd9"
EXIF_PREFIX = b"Exif\0\0"
SOF_HUFFMAN = (0xFFC0, 0xFFC1, 0xFFC2)  # baseline, extended and progressive
SOF_OTHERS = (0xFFC3, *range(0xFFC5, 0xFFC8), *range(0xFFC9, 0xFFCC), *range(0xFFCD, 0xFFD0))
SOS, APP1 = 0xFFDA, 0xFFE1
# TIFF 6.0, section 2: number of bytes of each type of value in a directory of tags.
TYPE_BYTES = (0, 1, 1, 2, 4, 8, 1, 1, 2, 4, 8, 4, 8)
TIFF_SHORT = 3


class _NotPlain(Exception):
    """An image is not plain; the message says what is special about it."""


def why_not_plain(data: bytes, size: tuple[int, int]) -> str | None:
    """Returns what is special about an image, which Pillow must decode; None if it is plain.

    size: height and width in the index.

    Raises:
        UnreadableImage: it is empty or damaged, or it is plain and has a different size.
    """
    if not data:
        raise UnreadableImage("an empty file")
    try:
        if data.startswith(JPEG_SIGNATURE):
            height, width = _jpeg_size(data)
        elif data.startswith(PNG_SIGNATURE):
            height, width = _png_size(data)
        elif data.startswith(b"RIFF"):
            height, width = _webp_size(data)
        else:
            return "not a JPEG, PNG or WebP"
    except struct.error:  # the data end inside a header
        return "it ends early"
    except _NotPlain as what:
        return str(what)
    if not 0 < height * width <= MAX_PIXELS:
        return "its size is absurd"
    check_size((height, width), size)
    return None


def _jpeg_size(data: bytes) -> tuple[int, int]:
    """Walks the segments to the start of scan (ITU-T T.81, annex B)."""
    at, size, end = 2, None, len(data)
    exif: list[bytes] = []
    while at < end:
        marker, length = struct.unpack_from(">HH", data, at)
        if not 0xFFC0 <= marker <= 0xFFFE or length < 2:
            break
        if marker == SOS:
            if size is None or at + 2 + length >= end:
                break
            if data.rfind(JPEG_END, at) < 0:  # truncated
                raise _NotPlain("no end mark")
            return _turned(size, exif)
        if marker in SOF_HUFFMAN and size is None:
            bits, *size, components = struct.unpack_from(">BHHB", data, at + 4)
            if bits != 8:
                raise _NotPlain(f"{bits} bits per value")
            if components not in (1, 3):
                raise _NotPlain("CMYK" if components == 4 else f"{components} components")
        elif marker in SOF_HUFFMAN or marker in SOF_OTHERS:
            raise _NotPlain("arithmetic or lossless coding, or several frames")
        elif marker == APP1 and data[at + 4 : at + 8] == EXIF_PREFIX[:4]:
            exif.append(data[at + 4 : at + 2 + length])
        at += 2 + length
    raise _NotPlain("an irregular header")


def _png_size(data: bytes) -> tuple[int, int]:
    """Walks all chunks and their checksums (W3C PNG, section 5)."""
    at, size, has_pixels = len(PNG_SIGNATURE), None, False
    exif: list[bytes] = []
    while True:
        length, kind = struct.unpack_from(">I4s", data, at)
        content_end = at + 8 + length
        (crc,) = struct.unpack_from(">I", data, content_end)
        if zlib.crc32(memoryview(data)[at + 4 : content_end]) != crc:
            if kind.isupper():  # without it there is no image, and Pillow would not look
                name = kind.decode("latin1")
                raise UnreadableImage(f"not a readable image (wrong checksum of {name})")
            raise _NotPlain("a damaged chunk")
        if kind == b"IHDR":
            width, height = struct.unpack_from(">II", data, at + 8)
            size = [height, width]
        elif kind == b"IDAT":
            has_pixels = True
        elif kind == b"eXIf":
            if has_pixels:
                raise _NotPlain("EXIF after the pixels")
            exif.append(EXIF_PREFIX + data[at + 8 : content_end])
        elif kind == b"IEND":
            if size is None:
                raise _NotPlain("an irregular header")
            return _turned(size, exif)
        at = content_end + 4


def _webp_size(data: bytes) -> tuple[int, int]:
    """Reads the size in the first chunk (RFC 9649, section 2)."""
    if b"EXIF" in data:  # nvImageCodec 0.9 forgets that a chunk of odd length is padded
        raise _NotPlain("with EXIF")
    if b"ANIM" in data:
        raise _NotPlain("animated")
    kind = data[8:16]
    if kind == b"WEBPVP8X":
        width, height = (int.from_bytes(data[at : at + 3], "little") + 1 for at in (24, 27))
    elif kind == b"WEBPVP8L":
        (bits,) = struct.unpack_from("<I", data, 21)
        width, height = (bits & 0x3FFF) + 1, (bits >> 14 & 0x3FFF) + 1
    elif kind == b"WEBPVP8 ":
        width, height = (side & 0x3FFF for side in struct.unpack_from("<HH", data, 26))
    else:
        raise _NotPlain("an irregular header")
    return height, width


def _turned(size: list[int], exif: list[bytes]) -> tuple[int, int]:
    """Returns (height, width) after the orientation in EXIF blocks, with their prefix.

    Raises _NotPlain if there is an orientation that two readers may understand differently.
    """
    height, width = size
    if not any(b"\x01\x12" in block or b"\x12\x01" in block for block in exif):
        return height, width  # no block has an orientation
    if len(exif) > 1:
        raise _NotPlain("several EXIF blocks")
    return (width, height) if _orientation(exif[0]) in TURNED else (height, width)


def _orientation(block: bytes) -> int:
    """Returns the orientation in an EXIF block without oddities (EXIF 2.32, section 4.6.2)."""
    odd = _NotPlain("an irregular EXIF block")
    tiff = block.removeprefix(EXIF_PREFIX)
    order = {b"II*\0": "<", b"MM\0*": ">"}.get(tiff[:4])
    if order is None or len(tiff) == len(block):
        raise odd
    found: list[int] = []
    try:
        (start,) = struct.unpack_from(f"{order}I", tiff, 4)
        (count,) = struct.unpack_from(f"{order}H", tiff, start)
        for entry in range(count):
            at = start + 2 + 12 * entry
            tag, kind, values, offset = struct.unpack_from(f"{order}HHII", tiff, at)
            nbytes = TYPE_BYTES[kind] * values
            if not kind or (nbytes > 4 and offset + nbytes > len(tiff)):
                raise odd
            if tag == EXIF_ORIENTATION:
                if kind != TIFF_SHORT or values != 1:
                    raise odd
                found += struct.unpack_from(f"{order}H", tiff, at + 8)
    except (struct.error, IndexError):
        raise odd from None
    if len(found) > 1:
        raise odd
    return found[0] if found else 1
