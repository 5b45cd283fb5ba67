"""Encoded images, and tars of them as other tools write them."""

import io
import json
import tarfile
from collections.abc import Iterable
from pathlib import Path

from PIL import Image


def jpeg(width: int, height: int, orientation: int | None = None, exif_bytes: int = 0) -> bytes:
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    exif[0x010E] = "x" * exif_bytes
    stream = io.BytesIO()
    Image.new("RGB", (width, height), (200, 100, 50)).save(stream, "JPEG", exif=exif)
    return stream.getvalue()


def write_tar(
    path: Path, members: Iterable[tuple[str, bytes]], form: int = tarfile.GNU_FORMAT
) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w", format=form) as tar:
        for name, content in members:
            info = tarfile.TarInfo(name)
            info.size = len(content)
            tar.addfile(info, io.BytesIO(content))


def hub_sample(synset: str, number: int, label: int, image: bytes) -> list[tuple[str, bytes]]:
    """The three members of a sample of timm/imagenet-1k-wds."""
    about = {"filename": f"{synset}/{synset}_{number}.JPEG", "label": label, "height": 1}
    key = f"{synset}_{number}"
    return [
        (f"{key}.cls", str(label).encode()),
        (f"{key}.jpg", image),
        (f"{key}.json", json.dumps(about).encode()),
    ]
