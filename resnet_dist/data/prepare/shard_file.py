"""Writes one shard: a tar with KEY.jpg, KEY.cls and KEY.json for each sample.

This is WebDataset's format, https://github.com/webdataset/webdataset. It contains nothing about the
machine or the time, so the same samples give the same bytes.
"""

import io
import json
import tarfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import IO

import numpy as np

from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.listing import SIGNATURE_BYTES, image_suffix
from resnet_dist.data.index.pillow import displayed_size
from resnet_dist.data.prepare.images import Images
from resnet_dist.data.prepare.reencode import Limit, reencode
from resnet_dist.errors import UserError
from resnet_dist.files import replacing


@dataclass(frozen=True)
class ShardTask:
    """What a worker needs to make a shard."""

    path: Path
    first: int  # the first sample's number in the split
    labels: Sequence[int]
    names: Sequence[str]  # names of the original files, CLASS/FILE
    class_names: Sequence[str]  # for each sample
    images: Images
    bad: dict[int, str]  # known to be bad: number in the split -> reason
    limit: Limit | None


@dataclass(frozen=True)
class ShardFacts:
    """What the index needs to know about the n samples of a shard."""

    members: list[str]  # names of the images in the tar
    offsets: np.ndarray  # int64 [n]: offset of the image's first byte in the tar
    nbytes: np.ndarray  # int64 [n]
    sizes: np.ndarray  # int32 [n, 2]: height, width; 0, 0 if bad
    bad: dict[int, str]  # number in the shard -> reason


def make_shard(task: ShardTask) -> tuple[ShardFacts, bool]:
    """Writes the shard unless it exists. Returns its facts, and whether it was written now.

    A shard is renamed to its final name once its last byte is on the disk, so one that exists is
    complete.

    Raises:
        UserError: an image cannot be read, or the shard cannot be written.
    """
    fresh = not task.path.exists()
    if fresh:
        try:
            with replacing(task.path) as file:
                _write(task, file)
        except OSError as error:
            raise UserError(
                f"{task.path}: cannot be written: {error.strerror}; "
                "complete shards are kept, and the same command resumes"
            ) from None
    return _read_facts(task.path, len(task.labels)), fresh


def _write(task: ShardTask, file: IO[bytes]) -> None:
    with tarfile.open(fileobj=file, mode="w", format=tarfile.USTAR_FORMAT) as tar:
        samples = zip(task.images, task.labels, task.names, task.class_names, strict=True)
        for number, (data, label, name, class_name) in enumerate(samples, task.first):
            data, (height, width), why = _checked(data, task.limit, task.bad.get(number))
            facts = {
                "class": class_name,
                "filename": name,
                "height": height,
                "label": label,
                "width": width,
            }
            if why is not None:
                facts["bad"] = why
            for suffix, content in (
                (_suffix(data), data),
                (".cls", str(label).encode()),
                (".json", json.dumps(facts).encode()),
            ):
                # Our own key, since names in the source may be anything.
                member = tarfile.TarInfo(f"{number:08}{suffix}")  # mtime, uid and gid are 0
                member.size = len(content)
                tar.addfile(member, io.BytesIO(content))


def _checked(
    data: bytes | UserError, limit: Limit | None, known: str | None
) -> tuple[bytes, tuple[int, int], str | None]:
    """Returns the bytes to write, the size (0, 0 if bad), and why the image is bad or None.

    Raises UserError if an image that is not known to be bad cannot be read now.
    """
    if isinstance(data, UnreadableImage):
        return b"", (0, 0), str(data)
    if isinstance(data, UserError):
        if known is None:
            raise UserError(
                f"{data}; run the same command again, or first `resnet-dist verify` on the source, "
                "which sets bad images aside"
            )
        return b"", (0, 0), known
    try:
        if known or not data:
            raise UnreadableImage(known or "an empty file")
        if limit is not None:
            data = reencode(data, limit)
        return data, displayed_size(io.BytesIO(data)), None
    except UnreadableImage as error:
        return data, (0, 0), str(error)


def _suffix(data: bytes) -> str:
    """Returns the suffix for the actual format, whatever the file was called; .jpg if unknown."""
    return image_suffix(data[:SIGNATURE_BYTES]) or ".jpg"


def _read_facts(path: Path, samples: int) -> ShardFacts:
    """Reads the facts from the tar itself, whether it was written now or earlier."""
    images: list[tarfile.TarInfo] = []
    sizes: list[tuple[int, int]] = []
    bad: dict[int, str] = {}
    try:
        with tarfile.open(path, "r:") as tar:
            for member in tar:
                if member.name.endswith(".json"):
                    content = tar.extractfile(member)
                    assert content is not None
                    told = json.loads(content.read())
                    if "bad" in told:
                        bad[len(sizes)] = told["bad"]
                    sizes.append((told["height"], told["width"]))
                elif not member.name.endswith(".cls"):
                    images.append(member)
        if not len(images) == len(sizes) == samples:
            raise ValueError(f"{len(images)} images, not {samples}")
    except (OSError, tarfile.TarError, ValueError, KeyError) as error:
        raise UserError(f"{path}: damaged ({error}); remove it and run again") from None
    return ShardFacts(
        members=[image.name for image in images],
        offsets=np.array([image.offset_data for image in images], np.int64),
        nbytes=np.array([image.size for image in images], np.int64),
        sizes=np.array(sizes, np.int32),
        bad=bad,
    )
