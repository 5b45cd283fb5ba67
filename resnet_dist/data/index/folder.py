"""data.format=folder: root/SPLIT/CLASS/**, like torchvision's ImageFolder."""

import os
from pathlib import Path

from resnet_dist.data.index.format import ImageFiles
from resnet_dist.data.index.listing import (
    IMAGE_SUFFIXES,
    LeftOut,
    Listing,
    entries_of,
    images_below,
    is_dir,
    is_ignored,
)
from resnet_dist.errors import UserError, some_of

OTHER_NAMES = {
    "train": ("train", "training"),
    "val": ("val", "valid", "validation", "test"),
}


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
            f"{_nearest(root, split)}"
        )
    try:
        folders: dict[str, int | None] = {"": os.stat(top).st_mtime_ns}
        classes = class_folders(top)
        lost = [e.name for e in entries_of(top) if e.is_symlink() and not os.path.exists(e.path)]
    except OSError as error:
        raise UserError(f"{top}: {error.strerror}; make the folder readable") from None
    if not classes:
        raise UserError(f"data.root={root}: {split}/ has no class folders; expected one per class")
    paths: list[str] = []
    labels: list[int] = []
    left_out, nested = LeftOut(), []
    for label, name in enumerate(classes):
        found = sorted(images_below(top / name, name, folders, left_out))
        if not found:
            raise UserError(
                f"{top / name}: a class without images ({', '.join(IMAGE_SUFFIXES)}); "
                "add some or remove the folder"
            )
        if all(path.count("/") > 1 for path in found):
            inner = sorted({path.split("/")[1] for path in found})
            nested += [f"{name} ({some_of(inner)})"] if len(inner) > 1 else []
        paths.extend(found)
        labels.extend([label] * len(found))
    notes = left_out.notes(top)
    if lost:
        notes += [f"{top}: links that lead nowhere are no classes: {some_of(sorted(lost))}"]
    if nested:
        notes += [f"{top}: folders of folders are one class each: {some_of(nested)}"]
    return Listing(classes, tuple(paths), tuple(labels), folders, tuple(notes))


def _nearest(root: Path, split: str) -> str:
    """Returns a hint at a folder that is probably meant; "" if there is none."""
    names = [entry.name for entry in entries_of(root) if is_dir(entry)]
    for name in names:
        if name.lower() in OTHER_NAMES[split]:
            return f" (there is {name}/: rename it, or link {split} to it)"
    for name in names:
        if (root / name / split).is_dir():
            return f" ({name}/ has one: give that as data.root)"
    return ""


def class_folders(top: Path) -> tuple[str, ...]:
    """Returns the names of the class folders in `top`, sorted."""
    return tuple(sorted(entry.name for entry in entries_of(top) if is_dir(entry)))


def has_class_images(top: Path) -> bool:
    """Whether `top` has a folder with an image file directly in it. False if it does not exist."""
    try:
        return any(
            name.lower().endswith(IMAGE_SUFFIXES) and not is_ignored(name)
            for folder in class_folders(top)
            for name in os.listdir(top / folder)
        )
    except OSError:
        return False
