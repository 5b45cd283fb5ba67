"""The common part of formats that have a file with a row per image."""

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

CLASSES = "classes.txt"  # one class per line; without it the training labels are the classes
FIX = "fix or remove this row"


@dataclass(frozen=True)
class Row:
    """A row: an image and its label."""

    where: str  # FILE:LINE, for messages
    path: str  # absolute, or relative to data.root
    label: str  # name of a class, or its line number in classes.txt, from 0


class NoRows(UserError):
    """There is no file with rows for a split, or no row for it in the file."""


class RowFiles(ImageFiles):
    """A format with a file of rows. It has to find the file of a split and to read its rows."""

    outline_noun = "files"

    @abstractmethod
    def file_of(self, root: Path, split: str) -> Path:
        """Returns the file with the rows of a split.

        Raises:
            NoRows: there is none.
            UserError: it is ambiguous which file it is.
        """

    @abstractmethod
    def names_of(self, split: str) -> Sequence[str]:
        """Returns possible names of that file. If one of them appears, `file_of` may change."""

    @abstractmethod
    def rows(self, file: Path, split: str) -> Iterator[Row]:
        """Yields the rows of a split, in order.

        Raises:
            UserError: the file cannot be read, or a row is malformed.
        """

    def is_in(self, root: Path) -> bool:
        """Whether there is a file of rows.

        If there are folders train/CLASS/ too, the first row must be of an existing image, so that
        an unrelated table does not hide an image folder.
        """
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
        except UserError:  # reported when the rows are read
            return True

    def listing(self, root: Path, split: str) -> Listing:
        # Times are read first, so that a change during reading shows at the next start.
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
                raise UserError(f"{row.where}: label {row.label[:80]!r}: {missing}; {FIX}")
            labels.append(number[row.label])
            label, first = seen.setdefault(row.path, (labels[-1], row))
            if label != labels[-1]:
                raise UserError(
                    f"{row.where}: {row.path} has label {row.label}, but {first.label} in "
                    f"line {first.where.rpartition(':')[2]}; remove one of them"
                )
        return Listing(tuple(classes), tuple(row.path for row in rows), tuple(labels), read)

    def _rows_of(self, root: Path, split: str) -> list[Row]:
        file = self.file_of(root, split)
        rows = [
            Row(row.where, _path(row, root), row.label.strip()) for row in self.rows(file, split)
        ]
        if not rows:
            raise NoRows(f"{file}: has no rows for {split}")
        return rows

    def outline(self, root: Path, split: str) -> dict[str, str]:
        files = {self.file_of(root, split), root / CLASSES}
        if not (root / CLASSES).is_file():  # then the training labels are the classes
            files.add(self.file_of(root, "train"))
        return {
            file.name: hashlib.sha256(file.read_bytes()).hexdigest()
            for file in files
            if file.is_file()
        }


def _path(row: Row, root: Path) -> str:
    """Returns a normalized path, relative to root if it is below, so that data can be moved."""
    path = os.path.expanduser(row.path.strip())
    if not path or not row.label.strip():
        raise UserError(f"{row.where}: no {'label' if path else 'path'}; {FIX}")
    try:
        if b"\0" in os.fsencode(path):
            raise ValueError
    except ValueError:  # also half of a surrogate pair
        raise UserError(
            f"{row.where}: path {path[:80]!r}: no file can have this name; {FIX}"
        ) from None
    if ".." not in path.split("/"):  # ".." may follow a link, so it cannot be resolved here
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
    """A sort key: numbers by their value, before names."""
    if not _is_number(label):
        return (True, 0, label)
    digits = label.lstrip("0")
    return (False, len(digits), digits + label)
