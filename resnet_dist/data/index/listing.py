"""Lists the image files of a split by name, without opening them.

Imports only the standard library, so that a login node can make a plan.
"""

import os
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import UserError

IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp", ".tif", ".tiff", ".webp", ".ppm", ".pgm")


@dataclass(frozen=True)
class Listing:
    """The image files of one split, in an order that every machine agrees on."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]  # relative to ImageFiles.top, or absolute
    labels: tuple[int, ...]
    # The folders and lists that were read for this: path relative to top -> st_mtime_ns before
    # reading, None if it did not exist. While these stay the same, so does the listing.
    read: dict[str, int | None]


def images_below(
    folder: str | Path, name: str, folders: dict[str, int | None] | None = None
) -> list[str]:
    """Returns the paths of image files in `folder` and its sub-folders, which start with `name`.

    If links lead to a folder twice, its files count once, under the path that sorts first. folders:
    is filled with path -> st_mtime_ns of every folder that was read.

    Raises:
        UserError: a folder cannot be read.
    """
    found: list[str] = []
    seen = set()
    todo = [""]
    try:
        while todo:
            inner = todo.pop()
            facts = os.stat(os.path.join(folder, inner))
            if (facts.st_dev, facts.st_ino) in seen:  # a link to a folder that was visited
                continue
            seen.add((facts.st_dev, facts.st_ino))
            prefix = os.path.join(name, inner) if inner else name
            if folders is not None:
                folders[prefix] = facts.st_mtime_ns
            below = []
            for entry in os.scandir(os.path.join(folder, inner)):
                if entry.is_dir():
                    below.append(os.path.join(inner, entry.name))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) and entry.name[0] != ".":
                    found.append(os.path.join(prefix, entry.name))
            todo += sorted(below, reverse=True)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; make the folder readable or remove it"
        ) from None
    return found
