"""What each format of data has to tell; formats.py has the table of them.

Only the standard library is imported here, and at the top of each format's file, so that a plan can
be made on a login node. What makes an index is imported when an index is made.
"""

from abc import ABC, abstractmethod
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.listing import Listing

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index


class Format(ABC):
    """One kind of data set. `root` is data.root, `split` "train" or "val"."""

    name: str  # as data.format has it
    is_pixels = False  # in memory, all of one size: windows are cut out of them, unscaled
    outline_noun = "files"  # what `outline` names, for messages

    @abstractmethod
    def is_in(self, root: Path) -> bool:
        """Whether the data in `root` look like this."""

    @abstractmethod
    def count(self, root: Path, split: str) -> int:
        """Images in a split, without opening one of them.

        Raises:
            UserError: they are not there, or cannot be counted at once.
        """

    @abstractmethod
    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        """What there is. An image that cannot be read does not fail: it is in the index's `bad`.

        kept: an index file, which is used while it holds true, and written otherwise. Where it
        cannot be written, the index is made each time.

        Raises:
            UserError: the data are missing or damaged.
        """

    def has_split(self, root: Path, split: str) -> bool:
        """Whether there is anything of it: with data.holdout_images there need be no val. True
        also stands for what has to be looked at to be told."""
        return True

    def outline(self, root: Path, split: str) -> dict[str, str]:
        """Names -> contents that must be the same on every node; quickly told. The index's shards,
        or up to 10,000 of its files, are compared besides.

        Raises:
            OSError, UserError: something is missing, or cannot be read.
        """
        return {}

    def own_index(self, root: Path, split: str) -> Path | None:
        """The index file that belongs to the data themselves, if data of this format may have
        one."""
        return None


class ImageFiles(Format):
    """A format whose images are files of their own: it has to list them, and gets the rest."""

    @abstractmethod
    def listing(self, root: Path, split: str) -> Listing:
        """
        Raises:
            UserError: what is there cannot be listed; names the file, and the line where there is
                one.
        """

    def top(self, root: Path, split: str) -> Path:
        """The folder that relative paths of the listing start from."""
        return root

    def count(self, root: Path, split: str) -> int:
        return len(self.listing(root, split).paths)

    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        from resnet_dist.data.index.files import index_of_files

        return index_of_files(lambda: self.listing(root, split), self.top(root, split), root, kept)
