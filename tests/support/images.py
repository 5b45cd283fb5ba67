"""Encoded images of all kinds, and the pixels that a viewer shows: uint8 [h, w, 3], upright."""

import io
import struct
import zlib
from collections.abc import Iterator
from typing import Any

import numpy as np
from PIL import Image, ImageOps

HEIGHT, WIDTH = 40, 56
EXIF_ORIENTATION = 0x0112

_y, _x = np.mgrid[:HEIGHT, :WIDTH]
GREY = ((3 * _x + 2 * _y) * 255 // (3 * WIDTH + 2 * HEIGHT - 5)).astype(np.uint8)
RGB = np.dstack([GREY, GREY[:, ::-1], np.roll(GREY, 9, 0)])
ALPHA = np.roll(GREY, 5, 1)

Case = tuple[str, bytes, np.ndarray]  # name of a file, its content, what it shows


def encoded(pixels: np.ndarray | Image.Image, kind: str, **options: Any) -> bytes:
    image = Image.fromarray(pixels) if isinstance(pixels, np.ndarray) else pixels
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def as_viewed(data: bytes) -> np.ndarray:
    """What Pillow makes of an image with 8 bits per value."""
    with Image.open(io.BytesIO(data)) as image:
        return np.asarray(ImageOps.exif_transpose(image).convert("RGB"))


def turned(pixels: np.ndarray, orientation: int) -> np.ndarray:
    """What is shown of stored pixels (EXIF 2.32, table "Orientation")."""
    flips = {2: (1,), 3: (0, 1), 4: (0,), 6: (0,), 7: (0, 1), 8: (1,)}
    stored = np.flip(pixels, flips[orientation]) if orientation in flips else pixels
    return stored.transpose(1, 0, 2) if orientation >= 5 else stored


def exif(orientation: int, kind: int = 3, order: str = "<", prefix: bytes = b"Exif\0\0") -> bytes:
    """An EXIF block with an orientation of another type: 1 byte, 3 short, 4 long."""
    value = struct.pack(order + {1: "B3x", 3: "H2x", 4: "I"}[kind], orientation)
    start = (b"II" if order == "<" else b"MM") + struct.pack(order + "HIH", 42, 8, 1)
    return prefix + start + struct.pack(order + "HHI", EXIF_ORIENTATION, kind, 1) + value + bytes(4)


def with_app1(jpeg: bytes, block: bytes) -> bytes:
    return jpeg[:2] + b"\xff\xe1" + struct.pack(">H", len(block) + 2) + block + jpeg[2:]


# Adam7 of the PNG specification: first row and column, and the distances to the next ones.
INTERLACED = (
    *((0, 0, 8, 8), (0, 4, 8, 8), (4, 0, 8, 4), (0, 2, 4, 4)),
    *((2, 0, 4, 2), (0, 1, 2, 2), (1, 0, 2, 1)),
)
WHOLE = ((0, 0, 1, 1),)


def png(
    bits: int,
    color: int,
    values: np.ndarray,
    *before: bytes,
    after: bytes = b"",
    passes: tuple[tuple[int, int, int, int], ...] = WHOLE,
) -> bytes:
    """values: [h, w, channels]. before, after: chunks before and after the pixels."""
    rows = []
    for top, left, down, right in passes:
        part = values[top::down, left::right]
        for row in part.reshape(len(part), -1):
            if bits == 16:
                rows.append(row.astype(">u2").tobytes())
            else:
                places = row[:, None] >> np.arange(bits - 1, -1, -1) & 1
                rows.append(np.packbits(places.astype(np.uint8).reshape(-1)).tobytes())
    height, width = values.shape[:2]
    header = struct.pack(">IIBBBBB", width, height, bits, color, 0, 0, passes == INTERLACED)
    pixels = chunk(b"IDAT", zlib.compress(b"".join(b"\0" + row for row in rows)))
    parts = (chunk(b"IHDR", header), *before, pixels, after, chunk(b"IEND", b""))
    return b"\x89PNG\r\n\x1a\n" + b"".join(parts)


def chunk(kind: bytes, data: bytes) -> bytes:
    return struct.pack(">I", len(data)) + kind + data + struct.pack(">I", zlib.crc32(kind + data))


def tiff(bits: int, values: np.ndarray) -> bytes:
    """A grey TIFF, uncompressed. values: [h, w]."""
    places = (values.astype(int)[..., None] >> np.arange(bits - 1, -1, -1)) & 1
    rows = b"".join(np.packbits(row.reshape(-1)).tobytes() for row in places.astype(np.uint8))
    height, width = values.shape
    tags = {256: width, 257: height, 258: bits, 259: 1, 262: 1, 273: 0, 277: 1, 278: height}
    tags[279] = len(rows)
    tags[273] = 8 + 2 + 12 * len(tags) + 4
    entries = b"".join(struct.pack("<HHII", tag, 4, 1, tags[tag]) for tag in sorted(tags))
    return b"II*\0" + struct.pack("<IH", 8, len(tags)) + entries + bytes(4) + rows


def grey(values: np.ndarray) -> np.ndarray:
    return np.repeat(values[..., None], 3, 2)


def in_bits(bits: int) -> tuple[np.ndarray, np.ndarray]:
    """GREY with so many bits per value, and how it is shown in 8."""
    white = 2**bits - 1
    values = GREY.astype(int) * white // 255
    return values, np.rint(values * 255 / white).astype(np.uint8)


def all_kinds() -> Iterator[Case]:
    yield from jpegs()
    yield from pngs()
    yield from tiffs()
    yield from webps()
    yield from others()


def jpegs() -> Iterator[Case]:
    def viewed(name: str, data: bytes) -> Case:
        return f"{name}.jpg", data, as_viewed(data)

    for mode in ("L", "RGB", "CMYK"):
        for progressive in (False, True):
            for subsampling in (0, 1, 2) if mode == "RGB" else (0,):
                options = {"progressive": progressive, "subsampling": subsampling}
                data = encoded(Image.fromarray(RGB).convert(mode), "JPEG", **options)
                yield viewed(f"{mode}-{progressive}-{subsampling}", data)
    cmyk = encoded(Image.fromarray(RGB // 2).convert("CMYK"), "JPEG")
    adobe = cmyk.index(b"\xff\xee")
    (length,) = struct.unpack_from(">H", cmyk, adobe + 2)
    yield viewed("cmyk-without-adobe", cmyk[:adobe] + cmyk[adobe + 2 + length :])
    plain = encoded(RGB, "JPEG")
    yield viewed("rubbish", plain[:20] + b"\x00\x01\x02\x03" + plain[20:])
    yield viewed("trailer", plain + bytes(5000) + b"video" * 1000)
    yield viewed("kept-rgb", encoded(RGB, "JPEG", keep_rgb=True))
    other = Image.fromarray(RGB[::-1])
    yield viewed("mpo", encoded(RGB, "MPO", save_all=True, append_images=[other]))
    for orientation in range(10):
        yield viewed(f"exif-{orientation}", with_app1(plain, exif(orientation)))
    for orientation in (2, 6):  # which keeps the size, and which does not
        block = exif(orientation)
        yield viewed(f"long-{orientation}", with_app1(plain, exif(orientation, 4, ">")))
        yield viewed(f"byte-{orientation}", with_app1(plain, exif(orientation, 1)))
        yield viewed(f"prefix-{orientation}", with_app1(plain, b"Exif\0\0" + block))
        for second in (1, 3):
            blocks = with_app1(with_app1(plain, exif(second)), block)
            yield viewed(f"two-{orientation}-{second}", blocks)
        start = b"Exif\0\0II*\0" + struct.pack("<IH", 8, 2)
        broken = struct.pack("<HHII", 0x10F, 2, 4000, 999999)
        tag = struct.pack("<HHIHH", EXIF_ORIENTATION, 3, 1, orientation, 0)
        yield viewed(f"offset-{orientation}", with_app1(plain, start + broken + tag + bytes(4)))
        twice = start + tag + tag.replace(bytes([orientation]), b"\x03") + bytes(4)
        yield viewed(f"twice-{orientation}", with_app1(plain, twice))


def pngs() -> Iterator[Case]:
    for bits in (1, 2, 4, 8, 16):
        values, shown = in_bits(bits)
        yield f"L{bits}.png", png(bits, 0, values[..., None]), grey(shown)
        key = chunk(b"tRNS", struct.pack(">H", int(values[5, 5])))
        yield f"L{bits}-key.png", png(bits, 0, values[..., None], key), grey(shown)
        if bits <= 8:
            palette = np.random.default_rng(0).integers(0, 256, (2**bits, 3), np.uint8)
            colors = chunk(b"PLTE", palette.tobytes())
            alpha = chunk(b"tRNS", bytes(range(2**bits)))
            yield f"P{bits}.png", png(bits, 3, values[..., None], colors), palette[values]
            data = png(bits, 3, values[..., None], colors, alpha)
            yield f"P{bits}-alpha.png", data, palette[values]
    for bits in (8, 16):
        white = (2**bits - 1) // 255
        values, alpha_values = RGB.astype(int) * white, ALPHA[..., None].astype(int) * white
        two = np.concatenate([values[..., :1], alpha_values], 2)
        yield f"RGB{bits}.png", png(bits, 2, values), RGB
        yield f"LA{bits}.png", png(bits, 4, two), grey(RGB[..., 0])
        yield f"RGBA{bits}.png", png(bits, 6, np.concatenate([values, alpha_values], 2)), RGB
    for orientation in range(1, 9):
        shown = turned(RGB, orientation)
        block = chunk(b"eXIf", exif(orientation, prefix=b""))
        yield f"exif-{orientation}.png", png(8, 2, RGB, block), shown
        text = chunk(b"tEXt", b"Comment\0" + bytes(range(1, 200)))
        yield f"late-{orientation}.png", png(8, 2, RGB, after=block + text), shown
        prefixed = chunk(b"eXIf", exif(orientation))
        yield f"prefix-{orientation}.png", png(8, 2, RGB, prefixed), shown
    for bits in (1, 8, 16):
        values, shown = in_bits(bits)
        data = png(bits, 0, values[..., None], passes=INTERLACED)
        yield f"interlaced-{bits}.png", data, grey(shown)
    yield "interlaced.png", png(8, 2, RGB, passes=INTERLACED), RGB


def tiffs() -> Iterator[Case]:
    images = {mode: Image.fromarray(RGB).convert(mode) for mode in ("1", "P", "CMYK", "YCbCr")}
    images |= {"L": Image.fromarray(GREY), "RGB": Image.fromarray(RGB)}
    images["LA"] = Image.merge("LA", [Image.fromarray(GREY), Image.fromarray(ALPHA)])
    images["RGBA"] = Image.fromarray(np.dstack([RGB, ALPHA]))
    for mode, image in images.items():
        shown = np.asarray(image.convert("RGB"))
        yield f"{mode}.tif", encoded(image, "TIFF"), shown
        if mode != "YCbCr":
            yield f"{mode}-lzw.tif", encoded(image, "TIFF", compression="tiff_lzw"), shown
    for bits in (1, 2, 4, 8, 12, 16):
        values, seen = in_bits(bits)
        yield f"L{bits}.tif", tiff(bits, values.astype("<u2") if bits < 16 else values), grey(seen)
    share = GREY.astype(np.float32) / 255
    for name, white in (("unit", 1), ("byte", 255), ("short", 65535)):
        yield f"float-{name}.tif", encoded(share * np.float32(white), "TIFF"), grey(GREY)
    for orientation in range(1, 9):
        data = encoded(RGB, "TIFF", tiffinfo={EXIF_ORIENTATION: orientation})
        yield f"turned-{orientation}.tif", data, turned(RGB, orientation)


def webps() -> Iterator[Case]:
    transparent = Image.fromarray(np.dstack([RGB, ALPHA]))
    for name, image in (("RGB", Image.fromarray(RGB)), ("RGBA", transparent)):
        for lossless in (False, True):
            data = encoded(image, "WEBP", lossless=lossless, exact=True)
            yield f"{name}-{lossless}.webp", data, as_viewed(data)
            several = {"save_all": True, "append_images": [image.transpose(0)]}
            data = encoded(image, "WEBP", lossless=lossless, exact=True, **several)
            yield f"{name}-{lossless}-animated.webp", data, as_viewed(data)
    for orientation in range(1, 9):
        for length in (100, 101):  # of the profile, which comes before the EXIF block
            options = {"lossless": True, "exif": exif(orientation), "icc_profile": bytes(length)}
            yield (
                f"exif-{orientation}-{length}.webp",
                encoded(RGB, "WEBP", **options),
                turned(RGB, orientation),
            )


def others() -> Iterator[Case]:
    for mode in ("1", "L", "P", "RGB"):
        image = Image.fromarray(RGB).convert(mode)
        yield f"{mode}.bmp", encoded(image, "BMP"), np.asarray(image.convert("RGB"))
    fives = (RGB >> 3).astype("<u2")
    words = (fives[..., 0] << 10 | fives[..., 1] << 5 | fives[..., 2])[::-1].astype("<u2").tobytes()
    info = struct.pack("<IiiHHIIiiII", 40, WIDTH, HEIGHT, 1, 16, 0, len(words), 0, 0, 0, 0)
    data = b"BM" + struct.pack("<IHHI", 54 + len(words), 0, 0, 54) + info + words
    yield "555.bmp", data, as_viewed(data)
    for mode in ("1", "L", "P"):
        image = Image.fromarray(RGB).convert(mode)
        yield f"{mode}.gif", encoded(image, "GIF"), np.asarray(image.convert("RGB"))
    image = Image.fromarray(RGB).convert("P")
    moving = {"save_all": True, "append_images": [image.transpose(0)], "transparency": 3}
    yield "moving.gif", encoded(image, "GIF", **moving), np.asarray(image.convert("RGB"))
    yield "RGB.jp2", encoded(RGB, "JPEG2000"), RGB
    for orientation in range(1, 9):
        block = Image.Exif()
        block[EXIF_ORIENTATION] = orientation
        data = encoded(RGB, "AVIF", quality=100, subsampling="4:4:4", exif=block)
        yield f"{orientation}.avif", data, as_viewed(data)
    for white in (15, 100, 255, 1023, 4095, 65535):
        values = GREY.astype(int) * white // 255
        shown = np.rint(values * 255 / white).astype(np.uint8)
        raw = values.astype(">u2" if white > 255 else np.uint8).tobytes()
        yield f"{white}.pgm", b"P5 %d %d %d\n" % (WIDTH, HEIGHT, white) + raw, grey(shown)
        text = " ".join(map(str, values.reshape(-1))).encode()
        yield f"{white}-text.pgm", b"P2 %d %d %d\n" % (WIDTH, HEIGHT, white) + text, grey(shown)
        if white <= 255:
            values = RGB.astype(int) * white // 255
            data = b"P6 %d %d %d\n" % (WIDTH, HEIGHT, white) + values.astype(np.uint8).tobytes()
            yield f"{white}.ppm", data, np.rint(values * 255 / white).astype(np.uint8)
