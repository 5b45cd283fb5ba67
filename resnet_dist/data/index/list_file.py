"""data.format=list: a CSV or TSV file with a row `path,label[,split]` per image.

    root/train.csv, root/val.csv    a list for each split (or .tsv)
    root/ANY.csv                    otherwise, the only list in root, with a column for the split
    root/classes.txt                the classes, one per line; otherwise, the training labels

Paths are absolute or relative to root. A header is optional; with a header, columns may be in any
order, and other columns are ignored.
"""

import csv
from collections.abc import Iterator, Sequence
from pathlib import Path

from resnet_dist.data.index.class_list import encoding_of, not_utf16
from resnet_dist.data.index.quarantine import QUARANTINE
from resnet_dist.data.index.row_files import FIX, NoRows, Row, RowFiles
from resnet_dist.errors import UserError

DELIMITERS = {".csv": ",", ".tsv": "\t"}
# Names of the columns in a header.
TITLES = {
    "path": ("path", "image", "file", "filename", "filepath", "image_path"),
    "label": ("label", "class", "target"),
    "split": ("split",),
}
# Names of splits in a row; None: used neither for training nor for validation.
SPLIT_NAMES = {
    "train": "train",
    "training": "train",
    "val": "val",
    "valid": "val",
    "validation": "val",
    "test": None,
}


class ListFile(RowFiles):
    name = "list"

    def names_of(self, split: str) -> Sequence[str]:
        return [f"{split}{suffix}" for suffix in DELIMITERS]

    def file_of(self, root: Path, split: str) -> Path:
        if not root.is_dir():
            raise NoRows(f"data.root={root}: no such folder; it must contain train.csv and val.csv")
        own = [path for name in self.names_of(split) if (path := root / name).is_file()]
        if len(own) > 1:
            raise UserError(f"{own[0]}: there is also {own[1].name}; remove one of them")
        if own:
            return own[0]
        others = [
            path
            for path in sorted(root.iterdir())
            if path.suffix.lower() in DELIMITERS
            and path.name[0] != "."
            and path.name != QUARANTINE
            and path.is_file()
        ]
        if len(others) != 1 or others[0].stem in SPLIT_NAMES:
            raise NoRows(
                f"data.root={root}: has neither {split}.csv or {split}.tsv nor a single list with "
                "a column for the split"
            )
        return others[0]

    def rows(self, file: Path, split: str) -> Iterator[Row]:
        number = 0
        try:
            # A path may contain any bytes, and Excel writes a byte order mark at the start.
            with open(file, "rb") as start:
                encoding = encoding_of(start.read(2))
            with open(file, encoding=encoding, errors="surrogateescape", newline="") as text:
                reader = csv.reader(text, delimiter=DELIMITERS[file.suffix.lower()], strict=True)
                columns: dict[str, int] | None = None
                width = 0
                for cells in reader:
                    number = reader.line_num
                    where = f"{file}:{number}"
                    if not any(cells):
                        continue
                    if columns is None:
                        columns, is_header = _columns(cells, where)
                        width = len(cells)
                        if "split" not in columns and file.stem != split:
                            raise UserError(
                                f"{where}: no column for the split; add one, or make two lists, "
                                "train and val"
                            )
                        if is_header:
                            continue
                    if len(cells) != width:
                        raise UserError(
                            f"{where}: {len(cells)} cells, but {width} in the first row (a path "
                            f"with a delimiter needs quotes); {FIX}"
                        )
                    if "split" in columns and _split(cells[columns["split"]], where) != split:
                        continue
                    yield Row(where, cells[columns["path"]], cells[columns["label"]])
        except csv.Error as error:
            raise UserError(f"{file}:{number + 1}: {error}; {FIX}") from None
        except UnicodeDecodeError as error:
            raise not_utf16(file, error) from None
        except OSError as error:
            raise UserError(f"{file}: {error.strerror}; make it readable") from None


def _columns(cells: list[str], where: str) -> tuple[dict[str, int], bool]:
    """Returns the number of each column, and whether the first row is a header."""
    titles = [cell.strip().lower() for cell in cells]
    found = {
        column: [number for number, title in enumerate(titles) if title in names]
        for column, names in TITLES.items()
    }
    if found["path"] and found["label"]:
        for column, numbers in found.items():
            if len(numbers) > 1:
                raise UserError(
                    f"{where}: {len(numbers)} columns for the {column}; remove all but one"
                )
        return {column: numbers[0] for column, numbers in found.items() if numbers}, True
    # Without a header the first cell must look like a file name. (In other rows it need not.)
    if not 2 <= len(cells) <= 3 or "." not in cells[0]:
        raise UserError(
            f"{where}: expected path, label and perhaps split, or a header with these titles "
            f"({', '.join(names[0] for names in TITLES.values())}), not {', '.join(cells)[:80]}"
        )
    return {column: number for number, column in enumerate([*TITLES][: len(cells)])}, False


def _split(cell: str, where: str) -> str | None:
    try:
        return SPLIT_NAMES[cell.strip().lower()]
    except KeyError:
        raise UserError(
            f"{where}: split {cell[:80]!r}; expected {', '.join(SPLIT_NAMES)}; {FIX}"
        ) from None
