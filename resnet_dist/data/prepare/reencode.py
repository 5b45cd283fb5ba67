"""Shrinks large images: decodes them with Pillow, applies EXIF, resizes, and encodes as JPEG.

What is shrunk is the picture that the loader sees, since `as_rgb` makes both.
"""

import io
from dataclasses import dataclass

from PIL import Image

from resnet_dist.data.index.pillow import UPRIGHT, as_rgb, opened, orientation_of

# A JPEG is decoded at the smallest of 8/8, 4/8, 2/8 and 1/8 of its size that is still this many
# times larger than needed. According to Pillow, 3 gives nearly the same as decoding in full.
REDUCING_GAP = 3.0


@dataclass(frozen=True)
class Limit:
    """The largest size of an image."""

    side: str  # "longest" or "shortest"
    px: int
    quality: int  # JPEG quality, 1..100


def reencode(data: bytes, limit: Limit) -> bytes:
    """Returns a JPEG (8-bit RGB, no EXIF) whose side is limit.px, or `data` if it is not larger.

    Raises:
        UnreadableImage: it cannot be decoded.
    """
    with opened(io.BytesIO(data)) as image:
        side = max(image.size) if limit.side == "longest" else min(image.size)
        if side <= limit.px:
            return data
        orientation = orientation_of(image)
        width, height = (max(1, round(px * limit.px / side)) for px in image.size)
        fraction = None
        if image.format == "JPEG" and image.mode in ("L", "RGB"):
            fraction = image.draft(None, (int(width * REDUCING_GAP), int(height * REDUCING_GAP)))
        smaller = as_rgb(image).resize(
            (width, height),
            Image.Resampling.LANCZOS,
            box=fraction[1] if fraction else None,
            reducing_gap=REDUCING_GAP,
        )
        if orientation in UPRIGHT:
            smaller = smaller.transpose(UPRIGHT[orientation])
        file = io.BytesIO()
        smaller.save(file, "JPEG", quality=limit.quality)
        return file.getvalue()
