"""ImageNet-1k from the Hugging Face hub: parquet files with columns image {bytes, path} and label.

https://huggingface.co/datasets/ILSVRC/imagenet-1k. Its test images have no labels and are ignored.
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
# In n01440764_10026_n01440764.JPEG and ILSVRC2012_val_00000001_n01751748.JPEG the class comes last.
SYNSET = re.compile(r"_(n\d{8})\.\w+$")


@dataclass(frozen=True)
class HubSplit:
    """A split, as the hub has it."""

    labels: np.ndarray  # int64 [N], as numbered by the hub
    names: Sequence[str]  # names of the original files
    images: ParquetRows
    class_names: Sequence[str]  # by label; empty if the files do not have them


def parquet_folder(root: Path) -> Path | None:
    """Returns the folder with the hub's files, `root` or `root`/data; None if there are none."""
    for folder in (root, root / "data"):
        if any(FILE.fullmatch(path.name) for path in folder.glob("*.parquet")):
            return folder
    return None


def list_parquet(folder: Path, split: str) -> HubSplit:
    """Returns the rows of a split ("train" or "val"), in the order of the files.

    Raises:
        UserError: a file is missing or damaged, or a row has no label.
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
                f"{path}: not a file with image and label ({reason}); copy it again"
            ) from None
        if label.dtype != np.int64 or (label < 0).any():
            row = int((label < 0).argmax()) if label.dtype == np.int64 else 0
            raise UserError(f"{path}: row {row} has no label; expected {path.name} from the hub")
        labels.append(label)
        names += [name or f"{path.stem}/{row}" for row, name in enumerate(found)]
    rows = tuple(len(of_file) for of_file in labels)
    images = ParquetRows(tuple(map(str, files)), rows, 0, sum(rows))
    return HubSplit(np.concatenate(labels), names, images, class_names)


def class_of_labels(splits: Sequence[HubSplit]) -> dict[int, str]:
    """Returns the class name of each label: its synset, if the file names have it.

    Raises:
        UserError: there are no class names, or contradictory ones.
    """
    synset_of: dict[int, str] = {}
    for split in splits:
        for label, name in zip(split.labels.tolist(), split.names, strict=True):
            found = SYNSET.search(name)
            if found is None:
                return _named(splits)
            if synset_of.setdefault(label, found[1]) != found[1]:
                raise UserError(
                    f"{name}: label {label} is {synset_of[label]} in other files; copy them again"
                )
    if len(set(synset_of.values())) < len(synset_of):
        raise UserError(f"{name}: two labels for one synset; copy the files again")
    return synset_of


def _named(splits: Sequence[HubSplit]) -> dict[int, str]:
    names = splits[0].class_names
    highest = max(int(split.labels.max()) for split in splits)
    if highest >= len(names) or any(split.class_names != names for split in splits):
        raise UserError(
            f"{splits[0].images.files[0]}: label {highest}, but {len(names)} class names in the "
            "metadata; expected the original files from the hub"
        )
    return dict(enumerate(names))


def _files(folder: Path, hub_split: str) -> list[Path]:
    found = {}
    for path in folder.glob("*.parquet"):
        match = FILE.fullmatch(path.name)
        if match and match["split"] == hub_split:
            found[int(match["number"])] = (path, int(match["count"]))
    counts = {count for _, count in found.values()}
    if len(counts) != 1 or set(found) != set(range(*counts)):
        expected = f"{hub_split}-00000-of-NNNNN.parquet and all that follow it"
        raise UserError(f"{folder}: expected {expected}, found {len(found)}")
    return [found[number][0] for number in sorted(found)]


def _class_names(schema: pa.Schema) -> tuple[str, ...]:
    """Returns the class names that the `datasets` library has stored; () if there are none."""
    try:
        features = json.loads((schema.metadata or {})[b"huggingface"])["info"]["features"]
        return tuple(map(str, features["label"]["names"]))
    except (KeyError, TypeError, ValueError):
        return ()
