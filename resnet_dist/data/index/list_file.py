"""data.format=list: a CSV or TSV of `path,label[,split]`, a row per image.

    root/train.csv, root/val.csv    a list for each split (or .tsv)
    root/ANY.csv                    else the only list in root, whose rows name their split
    root/classes.txt                the classes, a line each; else they are the training labels

A header is optional; with one the columns stand in any order, and others are passed over. Paths are
absolute or relative to root. A label is a class's name, or its number in classes.txt.
"""

import csv
import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.data.index.class_list import class_list
from resnet_dist.data.index.folder import class_folders
from resnet_dist.data.index.format import ImageFiles
from resnet_dist.data.index.listing import Listing
from resnet_dist.data.index.quarantine import QUARANTINE
from resnet_dist.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
COLUMNS = ("path", "label", "split")
# What a row's split may be called; None: left out of training and validation.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": None,
}
CLASSES = "classes.txt"


@dataclass(frozen=True)
class Row:
    where: str  # FILE:LINE, for messages
    path: str
    label: str


class NoRows(UserError):
    """A split has no list, or its list has no row of it."""


class ListFile(ImageFiles):
    name = "list"
    outlined = "lists"

    def is_in(self, root: Path) -> bool:
        """Also beside a folder train/ that holds images, but no classes."""
        try:
            _list_of(root, "train")
            return not ((root / "train").is_dir() and class_folders(root / "train"))
        except (OSError, UserError):
            return False

    def has_split(self, root: Path, split: str) -> bool:
        try:
            next(_rows(_list_of(root, split), split))
        except UserError as error:
            return not isinstance(error, NoRows)  # of others it is to be told
        return True

    def list(self, root: Path, split: str) -> Listing:
        lists = {split: _list_of(root, split)}
        read = {CLASSES: _time_of(root / CLASSES)}
        names = class_list(root / CLASSES)
        has_class_list = names is not None
        if names is None:  # training's labels are the classes of both
            lists["train"] = _list_of(root, "train")
        read |= {file.name: _time_of(file) for file in lists.values()}
        rows = {name: list(_rows(file, name)) for name, file in lists.items()}
        if names is None:
            names = sorted({row.label for row in rows["train"]}, key=_by_number)
        number = {name: label for label, name in enumerate(names)}
        seen: dict[str, Row] = {}
        for row in rows[split]:
            first = seen.setdefault(row.path, row)
            if first.label != row.label:
                raise UserError(
                    f"{row.where}: {row.path} is of class {row.label}, and of {first.label} in "
                    f"line {first.where.rpartition(':')[2]}; remove one of them"
                )
        return Listing(
            classes=tuple(names),
            paths=tuple(row.path for row in rows[split]),
            labels=tuple(_label(row, number, has_class_list) for row in rows[split]),
            read=read,
        )

    def outline(self, root: Path, split: str) -> dict[str, str]:
        files = {_list_of(root, name) for name in (split, "train")} | {root / CLASSES}
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.is_file()
        }


def _time_of(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _list_of(root: Path, split: str) -> Path:
    """The file with the rows of a split. Raises UserError: none, or more than one."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; it must hold train.csv and val.csv")
    own = [path for suffix in DELIMITERS if (path := root / f"{split}{suffix}").is_file()]
    if len(own) > 1:
        raise UserError(f"{own[0]}: beside {own[1].name}; remove one of them")
    if own:
        return own[0]
    others = [
        path
        for path in sorted(root.iterdir())
        if path.suffix in DELIMITERS and path.name != QUARANTINE
    ]
    if len(others) != 1 or others[0].stem in SPLIT_NAMES:
        raise NoRows(
            f"data.root={root}: no {split}.csv or {split}.tsv in it, nor one list alone whose rows "
            "name their split"
        )
    return others[0]


def _rows(file: Path, split: str) -> Iterator[Row]:
    """The rows of a split, in their order.

    Raises:
        UserError: the file cannot be read, a row is not what it should be, or there are none.
    """
    is_of_split = file.stem == split
    count = 0
    try:
        # A path may hold any bytes; and Excel writes a mark at the start.
        with open(file, encoding="utf-8-sig", errors="surrogateescape", newline="") as text:
            reader = csv.reader(text, delimiter=DELIMITERS[file.suffix])
            columns: dict[str, int] | None = None
            for cells in reader:
                where = f"{file}:{reader.line_num}"
                if not any(cells):
                    continue
                if columns is None:
                    columns, is_header = _columns(cells, where, is_of_split)
                    if is_header:
                        continue
                if max(columns.values()) >= len(cells):
                    raise UserError(
                        f"{where}: {len(cells)} cells; expected {', '.join(columns)}: mend or "
                        "remove this row"
                    )
                path, label = cells[columns["path"]], cells[columns["label"]].strip()
                if not path or not label:
                    raise UserError(
                        f"{where}: no {'label' if path else 'path'}; mend or remove this row"
                    )
                if "split" in columns and _split(cells[columns["split"]], where) != split:
                    continue
                count += 1
                yield Row(where, path, label)
    except csv.Error as error:
        raise UserError(f"{file}:{reader.line_num}: {error}; mend this row") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; make it readable") from None
    if not count:
        raise NoRows(f"{file}: no rows of {split} in it")


def _columns(cells: list[str], where: str, is_of_split: bool) -> tuple[dict[str, int], bool]:
    """Where each column stands, and whether the first row says so itself."""
    titles = [cell.strip().lower() for cell in cells]
    is_header = {"path", "label"} <= set(titles)
    if is_header:
        columns = {name: titles.index(name) for name in COLUMNS if name in titles}
    else:
        columns = {name: number for number, name in enumerate(COLUMNS[: len(cells)])}
    if "label" not in columns or (not is_header and len(cells) > len(COLUMNS)):
        raise UserError(
            f"{where}: {len(cells)} cells; expected path, label and perhaps split, or a header "
            "that names them"
        )
    if "split" not in columns and not is_of_split:
        raise UserError(
            f"{where}: no split; add it to each row, or make a train and a val list of this one"
        )
    return columns, is_header


def _split(cell: str, where: str) -> str | None:
    try:
        return SPLIT_NAMES[cell.strip().lower()]
    except KeyError:
        raise UserError(
            f"{where}: split {cell!r}; expected {', '.join(SPLIT_NAMES)}: mend or remove this row"
        ) from None


def _label(row: Row, number: dict[str, int], has_class_list: bool) -> int:
    if row.label in number:
        return number[row.label]
    if has_class_list and row.label.isdecimal() and int(row.label) < len(number):
        return int(row.label)
    known = f"{CLASSES} has no such class" if has_class_list else "no training image has it"
    raise UserError(f"{row.where}: label {row.label!r}: {known}; mend or remove this row")


def _by_number(label: str) -> tuple[int, int, str]:
    """Numbers in the order of their values, before names."""
    return (0, int(label), label) if label.isdecimal() else (1, 0, label)
