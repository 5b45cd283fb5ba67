"""Shrinks large images: decodes them with Pillow, applies EXIF, resizes, and encodes as JPEG."""

import io
from dataclasses import dataclass

import numpy as np
from PIL import Image

from resnet_dist.data.index.headers import UnreadableImage, exif_orientation, said_by_pillow

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
    try:
        with Image.open(io.BytesIO(data)) as image:
            side = max(image.size) if limit.side == "longest" else min(image.size)
            if side <= limit.px:
                return data
            # Only the EXIF block counts, as in `displayed_size`.
            orientation = exif_orientation(image.info.get("exif", b""))
            width, height = (max(1, round(px * limit.px / side)) for px in image.size)
            # Convert before resizing, since a palette cannot be resized; but not a JPEG (which may
            # be CMYK), since it can only be decoded at a reduced size if it is not converted.
            smaller = image if image.format == "JPEG" else _rgb(image)
            fraction = smaller.draft(None, (int(width * REDUCING_GAP), int(height * REDUCING_GAP)))
            smaller = smaller.resize(
                (width, height),
                Image.Resampling.LANCZOS,
                box=fraction[1] if fraction else None,
                reducing_gap=REDUCING_GAP,
            )
            smaller = _rgb(smaller)
            if orientation in UPRIGHT:
                smaller = smaller.transpose(UPRIGHT[orientation])
            file = io.BytesIO()
            smaller.save(file, "JPEG", quality=limit.quality)
            return file.getvalue()
    except MemoryError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever they meet
        raise UnreadableImage(f"cannot be decoded ({said_by_pillow(error)})") from None


def _rgb(image: Image.Image) -> Image.Image:
    """Converts to 8 bits per channel; drops transparency, like DALI."""
    if image.mode == "I" or image.mode.startswith("I;16"):  # 16-bit grey, which Pillow would clip
        grey = np.asarray(image).clip(0, 65535) / 257
        image = Image.fromarray(np.rint(grey).astype(np.uint8))
    return image.convert("RGB")
