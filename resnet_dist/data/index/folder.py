"""data.format=folder: root/SPLIT/CLASS/**, like torchvision's ImageFolder."""

import os
from pathlib import Path

from resnet_dist.data.index.format import ImageFiles
from resnet_dist.data.index.listing import IMAGE_SUFFIXES, Listing, images_below
from resnet_dist.errors import UserError


class Folder(ImageFiles):
    name = "folder"
    outline_noun = "class folders"

    def is_in(self, root: Path) -> bool:
        return True  # the fallback, last in the table of formats

    def has_split(self, root: Path, split: str) -> bool:
        return (root / split).is_dir()

    def top(self, root: Path, split: str) -> Path:
        return root / split

    def listing(self, root: Path, split: str) -> Listing:
        return list_folder(root, split)

    def outline(self, root: Path, split: str) -> dict[str, str]:
        return dict.fromkeys(class_folders(root / split), "")


def list_folder(root: Path, split: str) -> Listing:
    """Lists `root/split/<class>/**`; classes are numbered in sorted order.

    Raises:
        UserError: no such folder, no classes, a class without images, or one that cannot be read.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; it must contain train/ and val/")
    top = root / split
    if not top.is_dir():
        raise UserError(
            f"data.root={root}: has no folder {split}/; expected {split}/<class>/<image files>"
        )
    try:
        folders: dict[str, int | None] = {"": os.stat(top).st_mtime_ns}
        classes = class_folders(top)
    except OSError as error:
        raise UserError(f"{top}: {error.strerror}; make the folder readable") from None
    if not classes:
        raise UserError(f"data.root={root}: {split}/ has no class folders; expected one per class")
    paths: list[str] = []
    labels: list[int] = []
    for label, name in enumerate(classes):
        found = sorted(images_below(top / name, name, folders))
        if not found:
            raise UserError(
                f"{top / name}: a class without images ({', '.join(IMAGE_SUFFIXES)}); "
                "add some or remove the folder"
            )
        paths.extend(found)
        labels.extend([label] * len(found))
    return Listing(classes, tuple(paths), tuple(labels), folders)


def class_folders(top: Path) -> tuple[str, ...]:
    return tuple(sorted(e.name for e in os.scandir(top) if e.is_dir() and e.name[0] != "."))
