"""Finds out what is special about an image, and what is done with it in training."""

import io
import os

from PIL import ImageFile

from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.pillow import PNG_SIGNATURE, TURNED, UPRIGHT, opened, orientation_of
from resnet_dist.data.index.plain import JPEG_END, JPEG_SIGNATURE, why_not_plain

FORMATS = {
    ".jpg": "JPEG",
    ".jpeg": "JPEG",
    ".jpe": "JPEG",
    ".jfif": "JPEG",
    ".png": "PNG",
    ".bmp": "BMP",
    ".gif": "GIF",
    ".tif": "TIFF",
    ".tiff": "TIFF",
    ".webp": "WEBP",
    ".avif": "AVIF",
    ".ppm": "PPM",
    ".pgm": "PPM",
}
PNG_BIT_DEPTH_AT = 24  # in the header chunk, the first one
ADOBE_YCCK = 2  # "color transform" of Adobe's APP14 segment
END_BYTES = 1024  # some programs write a few bytes after the end mark
END_MARKS = {JPEG_SIGNATURE: JPEG_END, PNG_SIGNATURE: b"IEND"}


def particulars(data: bytes, name: str) -> dict[str, str]:
    """Returns kind -> what is done with such an image in training; empty for a plain RGB image.

    data: a whole encoded image. name: its file name, whose suffix says which format to expect.
    """
    try:
        with opened(io.BytesIO(data)) as image:
            return _particulars(image, data, os.path.splitext(name)[1].lower())
    except UnreadableImage:
        return {}  # whether it is readable is for the decoder to say


def _particulars(image: ImageFile.ImageFile, data: bytes, suffix: str) -> dict[str, str]:
    mode, info = image.mode, image.info
    found = {}
    named, form = FORMATS.get(suffix), image.format or ""
    form = "JPEG" if form == "MPO" else form  # a JPEG followed by more pictures
    if named is not None and form != named:
        found["other format"] = f"is a {form} with the suffix of a {named}; decoded as {form}"
    orientation = orientation_of(image)
    height, width = image.height, image.width
    why = why_not_plain(data, (width, height) if orientation in TURNED else (height, width))
    if why is not None:
        found["by Pillow"] = f"decoded by Pillow instead of DALI: {form} ({why})"
    if mode == "CMYK":
        kind = "YCCK" if info.get("adobe_transform") == ADOBE_YCCK else "CMYK"
        found[kind] = "converted to RGB"
    if mode in ("1", "L", "LA", "F") or mode.startswith("I"):
        found["grayscale"] = "its gray is used for R, G and B"
    if mode in ("P", "PA"):
        found["palette"] = "its colours are looked up"
    if mode in ("LA", "PA", "RGBA") or "transparency" in info:
        found["transparent"] = "its transparency is dropped"
    if mode.startswith("I") or (form == "PNG" and data[PNG_BIT_DEPTH_AT] == 16):
        found["16-bit"] = "scaled to 8 bits"
    if getattr(image, "is_animated", False):
        found["several pictures"] = "its first picture is used"
    if info.get("progressive"):
        found["progressive"] = "decoded like any JPEG, but more slowly"
    if orientation in UPRIGHT:
        found["EXIF"] = f"rotated by its EXIF orientation {orientation}"
    return found


def ends_early(data: bytes) -> bool:
    """Whether the end mark of a JPEG or PNG is missing."""
    marks = [mark for start, mark in END_MARKS.items() if data.startswith(start)]
    return bool(marks) and marks[0] not in data[-END_BYTES:]
