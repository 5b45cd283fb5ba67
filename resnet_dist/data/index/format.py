"""The interface of a data format; formats.py has the table of formats.

This file, and each format's file at its top, imports only the standard library, so that a login
node can make a plan. What is needed to make an index is imported when one is made.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.listing import Listing
from resnet_dist.data.index.survey import Survey, describe_classes, empty_classes

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index


class Format(ABC):
    """A kind of data set. In its methods, `root` is data.root and `split` is "train" or "val"."""

    name: str  # the value of data.format
    is_pixels = False  # True: pixels in memory, all of one size; windows are cut out, not resized
    outline_noun = "files"  # what the keys of `outline` are, for messages

    @abstractmethod
    def is_in(self, root: Path) -> bool:
        """Whether the data in `root` look like this."""

    @abstractmethod
    def survey(self, root: Path, split: str) -> Survey:
        """Counts the images and classes of a split, without opening images.

        Raises:
            UserError: they are missing, or cannot be counted quickly.
        """

    @abstractmethod
    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        """Returns the index of a split. Images that cannot be read are in its `bad`.

        kept: an index file to use if it is still valid, and to write otherwise. If it cannot be
        written, the index is made again each time.

        Raises:
            UserError: the data are missing or damaged.
        """

    def has_split(self, root: Path, split: str) -> bool:
        """Whether the split exists; with data.holdout_images there may be no val.

        May return True if that cannot be told without reading the data.
        """
        return True

    def outline(self, root: Path, split: str) -> dict[str, str]:
        """Returns names and contents that must be the same on every node, and are quick to get.

        In addition, the sizes of all shards, or of up to 10,000 files, are compared anyway.

        Raises:
            OSError, UserError: something is missing or cannot be read.
        """
        return {}

    def own_index(self, root: Path, split: str) -> Path | None:
        """Returns the path of an index file that is part of the data, if the format has such."""
        return None


class ImageFiles(Format):
    """A format whose images are files of their own. It only has to list them."""

    @abstractmethod
    def listing(self, root: Path, split: str) -> Listing:
        """Returns the image files of a split and their labels.

        Raises:
            UserError: they cannot be listed; with the file, and the line if there is one.
        """

    def top(self, root: Path, split: str) -> Path:
        """Returns the folder to which paths in the listing are relative."""
        return root

    def survey(self, root: Path, split: str) -> Survey:
        found = self.listing(root, split)
        has_images = [False] * len(found.classes)
        for label in found.labels:
            has_images[label] = True
        notes = (*found.notes, *empty_classes(found.classes, has_images, root / split))
        return Survey(len(found.paths), describe_classes(found.classes), notes)

    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        from resnet_dist.data.index.files import index_of_files

        return index_of_files(lambda: self.listing(root, split), self.top(root, split), root, kept)
