"""ImageNet-1k from the Hugging Face hub: parquet files with columns image {bytes, path} and label.

https://huggingface.co/datasets/ILSVRC/imagenet-1k. Its test images have no labels, and are left.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pyarrow as pa

from resnet_dist.data.prepare.images import ParquetRows, unreadable
from resnet_dist.errors import UserError

FILE = re.compile(r"(?P<split>.+)-(?P<number>\d{5})-of-(?P<count>\d{5})\.parquet")
HUB_SPLITS = {"train": "train", "val": "validation"}
# n01440764_10026_n01440764.JPEG and ILSVRC2012_val_00000001_n01751748.JPEG name the class last.
SYNSET = re.compile(r"_(n\d{8})\.\w+$")


@dataclass(frozen=True)
class HubSplit:
    labels: np.ndarray  # int64 [N], the hub's own numbers
    names: Sequence[str]  # of the original files
    images: ParquetRows
    class_names: Sequence[str]  # by the hub's label; empty if the files do not name them


def parquet_folder(root: Path) -> Path | None:
    """Where `root` holds the hub's files; None if nowhere."""
    for folder in (root, root / "data"):
        if any(FILE.fullmatch(path.name) for path in folder.glob("*.parquet")):
            return folder
    return None


def list_parquet(folder: Path, split: str) -> HubSplit:
    """The rows of a split ("train" or "val"), in the order of the files.

    Raises:
        UserError: a missing or damaged file, or a row without a label.
    """
    import pyarrow.parquet as pq  # only this source needs it

    files = _files(folder, HUB_SPLITS[split])
    labels: list[np.ndarray] = []
    names: list[str] = []
    class_names: Sequence[str] = ()
    for path in files:
        try:
            with pq.ParquetFile(path) as file:
                table = file.read(["label", "image.path"])
                class_names = _class_names(file.schema_arrow)
            label = table["label"].to_numpy()
            found = table["image"].combine_chunks().field("path").to_pylist()
        except OSError as error:
            raise unreadable(path, error) from None
        except (pa.ArrowException, KeyError, ValueError) as error:
            reason = str(error).splitlines()[0]
            raise UserError(
                f"{path}: not a file of image, label ({reason}); copy it again"
            ) from None
        if label.dtype != np.int64 or (label < 0).any():
            row = int((label < 0).argmax()) if label.dtype == np.int64 else 0
            raise UserError(f"{path}: row {row} has no label; expected the hub's {path.name}")
        labels.append(label)
        names += [name or f"{path.stem}/{row}" for row, name in enumerate(found)]
    rows = tuple(len(part) for part in labels)
    images = ParquetRows(tuple(map(str, files)), rows, 0, sum(rows))
    return HubSplit(np.concatenate(labels), names, images, class_names)


def class_of_labels(splits: Sequence[HubSplit]) -> dict[int, str]:
    """Class name of each of the hub's labels: its synset where the file names tell it.

    Raises:
        UserError: nothing tells the names, or two things tell different ones.
    """
    synset_of: dict[int, str] = {}
    for split in splits:
        for label, name in zip(split.labels.tolist(), split.names, strict=True):
            found = SYNSET.search(name)
            if found is None:
                return _named(splits)
            if synset_of.setdefault(label, found[1]) != found[1]:
                raise UserError(
                    f"{name}: label {label} is {synset_of[label]} elsewhere; copy the files again"
                )
    if len(set(synset_of.values())) < len(synset_of):
        raise UserError(f"{name}: two labels of one synset; copy the files again")
    return synset_of


def _named(splits: Sequence[HubSplit]) -> dict[int, str]:
    names = splits[0].class_names
    highest = max(int(split.labels.max()) for split in splits)
    if highest >= len(names) or any(split.class_names != names for split in splits):
        raise UserError(
            f"{splits[0].images.files[0]}: label {highest}, and {len(names)} class names in the "
            "metadata; expected the files as the hub has them"
        )
    return dict(enumerate(names))


def _files(folder: Path, hub_split: str) -> list[Path]:
    found = {}
    for path in folder.glob("*.parquet"):
        part = FILE.fullmatch(path.name)
        if part and part["split"] == hub_split:
            found[int(part["number"])] = (path, int(part["count"]))
    counts = {count for _, count in found.values()}
    if len(counts) != 1 or set(found) != set(range(*counts)):
        expected = f"{hub_split}-00000-of-NNNNN.parquet and all that follow"
        raise UserError(f"{folder}: expected {expected}; {len(found)} are there")
    return [found[number][0] for number in sorted(found)]


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """As the `datasets` library notes them; () if it did not write the file."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
