"""ImageNet-1k from the Hugging Face hub: parquet files with columns image {bytes, path} and label.

https://huggingface.co/datasets/ILSVRC/imagenet-1k. Its test images have no labels and are ignored.
"""

import json
import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from resnet_dist.data.index.raw_source import HUB_FILE
from resnet_dist.data.prepare.images import ParquetRows, unreadable
from resnet_dist.errors import UserError, some_of
from resnet_dist.files import regular

HUB_SPLITS = {"train": "train", "val": "validation"}
# In n01440764_10026_n01440764.JPEG and ILSVRC2012_val_00000001_n01751748.JPEG the class comes last.
SYNSET = re.compile(r"_(n\d{8})\.\w+$")


@dataclass(frozen=True)
class HubSplit:
    """A split, as the hub has it."""

    labels: Sequence[int | str]  # [N], as numbered by the hub, or names
    names: Sequence[str]  # names of the original files
    images: ParquetRows
    class_names: Sequence[str]  # by number; empty if the files do not have them


def splits_in(folder: Path) -> set[str]:
    """Returns the splits ("train", "val") of which the folder has files; always "train"."""
    names = [
        match["split"] for path in folder.iterdir() if (match := HUB_FILE.fullmatch(path.name))
    ]
    return {"train"} | {split for split, name in HUB_SPLITS.items() if name in names}


def list_parquet(folder: Path, split: str) -> HubSplit:
    """Returns the rows of a split ("train" or "val"), in the order of the files.

    Raises:
        UserError: a file is missing or damaged, or a row has no label.
    """
    import pyarrow.parquet as pq  # only this source needs it

    files = _files(folder, HUB_SPLITS[split])
    labels: list[int | str] = []
    rows: list[int] = []
    names: list[str] = []
    class_names: Sequence[str] = ()
    for path in files:
        try:
            with open(path, "rb", opener=regular) as raw, pq.ParquetFile(raw) as file:
                _check_columns(file.schema_arrow, path)
                table = file.read(["label", "image.path"])
                class_names = _class_names(file.schema_arrow)
                if _has_no_bytes(file.metadata):
                    raise UserError(f"{path}: has paths only, no image bytes; copy it from the hub")
            of_file = _labels(table["label"].combine_chunks(), path)
            found = table["image"].combine_chunks().field("path").to_pylist()
        except OSError as error:
            raise unreadable(path, error) from None
        except pa.ArrowException as error:
            reason = str(error).splitlines()[0]
            raise UserError(f"{path}: not a parquet file ({reason}); copy it again") from None
        labels += of_file
        rows.append(len(of_file))
        names += [name or f"{path.stem}/{row}" for row, name in enumerate(found)]
    images = ParquetRows(tuple(map(str, files)), tuple(rows), 0, sum(rows))
    return HubSplit(labels, names, images, class_names)


def _check_columns(schema: pa.Schema, path: Path) -> None:
    """Raises UserError if there is no column for images or for labels."""
    image = schema.field("image").type if "image" in schema.names else pa.null()
    parts = {part.name: part.type for part in image} if pa.types.is_struct(image) else {}
    data = parts.get("bytes", pa.string())
    is_data = pa.types.is_binary(data) or pa.types.is_large_binary(data) or pa.types.is_null(data)
    if not (is_data and "path" in parts and "label" in schema.names):
        found = some_of([f"{column.name} ({column.type})" for column in schema])
        raise UserError(
            f"{path}: has the columns {found}; expected image (struct<bytes: binary, path: "
            "string>) and label; rename or convert them"
        )


def _has_no_bytes(metadata: Any) -> bool:
    """Whether image.bytes is null in all rows, as far as the file's statistics say."""
    nulls = 0
    for group in map(metadata.row_group, range(metadata.num_row_groups)):
        for column in map(group.column, range(group.num_columns)):
            if column.path_in_schema == "image.bytes" and column.statistics is not None:
                nulls += column.statistics.null_count or 0
    return 0 < metadata.num_rows == nulls


def _labels(column: pa.Array, path: Path) -> list[int | str]:
    """Returns labels of any type of integer or string.

    Raises:
        UserError: a row has no label, or the labels are of another type.
    """
    kind = column.type.value_type if pa.types.is_dictionary(column.type) else column.type
    is_text = pa.types.is_string(kind) or pa.types.is_large_string(kind)
    if not (is_text or pa.types.is_integer(kind) or pa.types.is_boolean(kind)):
        raise UserError(f"{path}: labels are of type {kind}; expected integers or strings")
    labels: list[Any] = column.to_pylist()
    for row, label in enumerate(labels):
        if label is None or (not is_text and label < 0):
            what = "no label" if label is None else f"label {label}"
            raise UserError(f"{path}: row {row} has {what}; expected {path.name} from the hub")
    return labels if is_text else [int(label) for label in labels]


def class_of_labels(splits: Sequence[HubSplit]) -> dict[int | str, str]:
    """Returns the class name of each label: its synset, if all file names have one; else the name
    in the metadata; else the label itself.

    Raises:
        UserError: the class names contradict each other.
    """
    synset_of: dict[int | str, str] = {}
    if any(isinstance(label, str) for split in splits for label in split.labels):
        return {label: str(label) for split in splits for label in split.labels}
    for split in splits:
        for label, name in zip(split.labels, split.names, strict=True):
            found = SYNSET.search(name)
            if found is None:
                return _named(splits)
            if synset_of.setdefault(label, found[1]) != found[1]:
                raise UserError(
                    f"{name}: label {label} is {synset_of[label]} elsewhere; copy the files again"
                )
    if len(set(synset_of.values())) < len(synset_of):
        raise UserError(f"{name}: two labels for one synset; copy the files again")
    return synset_of


def _named(splits: Sequence[HubSplit]) -> dict[int | str, str]:
    names = splits[0].class_names
    labels = {int(label) for split in splits for label in split.labels}
    highest = max(labels)
    if not any(split.class_names for split in splits):
        width = max(4, len(str(highest)))  # so that the classes are sorted by number, too
        return {label: f"{label:0{width}}" for label in labels}
    if highest >= len(names) or any(split.class_names != names for split in splits):
        raise UserError(
            f"{splits[0].images.files[0]}: label {highest}, but {len(names)} class names in the "
            "metadata; expected the original files from the hub"
        )
    return dict(enumerate(names))


def _files(folder: Path, hub_split: str) -> list[Path]:
    found = {}
    for path in folder.glob("*.parquet"):
        match = HUB_FILE.fullmatch(path.name)
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
