"""What formats share that have a file with a row per image: labels, classes, and what is wrong."""

import hashlib
import os
from abc import abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.data.index.class_list import class_list
from resnet_dist.data.index.folder import class_folders
from resnet_dist.data.index.format import ImageFiles
from resnet_dist.data.index.listing import Listing
from resnet_dist.errors import UserError

CLASSES = "classes.txt"  # a class on each line; without it the training labels are the classes
MEND = "mend or remove this row"


@dataclass(frozen=True)
class Row:
    where: str  # FILE:LINE, for messages
    path: str  # absolute, or relative to data.root
    label: str  # the name of a class, or its number in classes.txt


class NoRows(UserError):
    """A split has no file of rows, or its file has no row of it."""


class RowFiles(ImageFiles):
    """Such a format has to tell which file holds a split, and to read its rows."""

    outline_noun = "files"

    @abstractmethod
    def file_of(self, root: Path, split: str) -> Path:
        """The file with the rows of a split.

        Raises:
            NoRows: there is none.
            UserError: it cannot be told.
        """

    @abstractmethod
    def names_of(self, split: str) -> Sequence[str]:
        """Names that such a file may have: where one comes to be, `file_of` may be another."""

    @abstractmethod
    def rows(self, file: Path, split: str) -> Iterator[Row]:
        """The rows of a split, in their order.

        Raises:
            UserError: the file cannot be read, or a row is not what it should be.
        """

    def is_in(self, root: Path) -> bool:
        """Whether there is a file of rows. Beside folders train/CLASS/, only if its first row
        names an image that is there: a stray table hides no image folder."""
        try:
            row = next(self.rows(self.file_of(root, "train"), "train"), None)
        except NoRows:
            return False
        except UserError:
            row = None
        if row is not None and (root / row.path).is_file():
            return True
        try:
            return not class_folders(root / "train")
        except OSError:
            return True

    def has_split(self, root: Path, split: str) -> bool:
        try:
            return next(self.rows(self.file_of(root, split), split), None) is not None
        except NoRows:
            return False
        except UserError:  # to be told
            return True

    def listing(self, root: Path, split: str) -> Listing:
        # Times first: what changes while it is read has another time in the next start.
        watched = {CLASSES, *self.names_of(split), *self.names_of("train")}
        watched |= {self.file_of(root, split).name}
        read = {name: _time_of(root / name) for name in sorted(watched)}
        given = class_list(root / CLASSES)
        rows = self._rows_of(root, split)
        if given is None:
            training = rows if split == "train" else self._rows_of(root, "train")
            classes = sorted({row.label for row in training}, key=_by_number)
        else:
            classes = given
        number = {name: label for label, name in enumerate(classes)}
        if given is not None and not any(map(_is_number, given)):
            number |= {str(label): label for label in range(len(given))}
        missing = "no training image has it" if given is None else f"{CLASSES} has no such class"
        labels: list[int] = []
        seen: dict[str, tuple[int, Row]] = {}
        for row in rows:
            if row.label not in number:
                raise UserError(f"{row.where}: label {row.label[:80]!r}: {missing}; {MEND}")
            labels.append(number[row.label])
            label, first = seen.setdefault(row.path, (labels[-1], row))
            if label != labels[-1]:
                raise UserError(
                    f"{row.where}: {row.path} is of class {row.label}, and of {first.label} in "
                    f"line {first.where.rpartition(':')[2]}; remove one of them"
                )
        return Listing(tuple(classes), tuple(row.path for row in rows), tuple(labels), read)

    def _rows_of(self, root: Path, split: str) -> list[Row]:
        file = self.file_of(root, split)
        rows = [
            Row(row.where, _path(row, root), row.label.strip()) for row in self.rows(file, split)
        ]
        if not rows:
            raise NoRows(f"{file}: no rows of {split} in it")
        return rows

    def outline(self, root: Path, split: str) -> dict[str, str]:
        files = {self.file_of(root, split), root / CLASSES}
        if not (root / CLASSES).is_file():  # training's labels are the classes
            files.add(self.file_of(root, "train"))
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.is_file()
        }


def _path(row: Row, root: Path) -> str:
    """Relative to root if it lies below, so that data may be moved; one path for one file."""
    path = row.path.strip()
    if not path or not row.label.strip():
        raise UserError(f"{row.where}: no {'label' if path else 'path'}; {MEND}")
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:  # halves of characters are one, too
        raise UserError(f"{row.where}: path {path[:80]!r}: no file has it; {MEND}") from None
    if ".." not in path.split("/"):  # which may lead on from a link
        path = os.path.normpath(path)
    return path.removeprefix(os.path.join(root.absolute(), ""))


def _time_of(file: Path) -> int | None:
    try:
        return file.stat().st_mtime_ns
    except OSError:
        return None


def _is_number(text: str) -> bool:
    return text.isascii() and text.isdecimal()


def _by_number(label: str) -> tuple[bool, int, str]:
    """Numbers in the order of their values, before names."""
    if not _is_number(label):
        return (True, 0, label)
    digits = label.lstrip("0")
    return (False, len(digits), digits + label)
