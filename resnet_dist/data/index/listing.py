"""Lists the image files of a split by name; only files without a suffix are opened.

Imports only the standard library, so that a login node can make a plan.
"""

import os
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import UserError, some_of
from resnet_dist.files import regular

IMAGE_SUFFIXES = (
    *(".jpg", ".jpeg", ".jpe", ".jfif", ".png", ".webp", ".gif", ".bmp", ".tif", ".tiff", ".avif"),
    *(".ppm", ".pgm"),
)
# The first bytes of a file -> the suffix of its format.
SIGNATURES = (
    (re.compile(rb"\xff\xd8\xff"), ".jpg"),
    (re.compile(rb"\x89PNG\r\n\x1a\n"), ".png"),
    (re.compile(rb"RIFF....WEBP", re.DOTALL), ".webp"),
    (re.compile(rb"GIF8[79]a"), ".gif"),
    (re.compile(rb"BM....\0\0\0\0", re.DOTALL), ".bmp"),
    (re.compile(rb"II\*\0|MM\0\*"), ".tif"),
    (re.compile(rb"....ftypavi[fs]", re.DOTALL), ".avif"),
    (re.compile(rb"P[36]\s"), ".ppm"),
    (re.compile(rb"P[1245]\s"), ".pgm"),
)
SIGNATURE_BYTES = 16
# What Synology, QNAP, Windows, macOS, ext4 and unzip put next to the pictures, in lower case. Most
# programs use a leading dot.
TOOL_FILES = ("@eadir", "@recycle", "#recycle", "$recycle.bin", "system volume information",
              "lost+found", "__macosx", "thumbs.db", "desktop.ini")  # fmt: skip


@dataclass(frozen=True)
class Listing:
    """The image files of one split, in an order that every machine agrees on."""

    classes: tuple[str, ...]
    paths: tuple[str, ...]  # relative to ImageFiles.top, or absolute
    labels: tuple[int, ...]
    # The folders and lists that were read for this: path relative to top -> st_mtime_ns before
    # reading, None if it did not exist. While these stay the same, so does the listing.
    read: dict[str, int | None]
    notes: tuple[str, ...] = ()  # what a user should know about these data, a line each


class LeftOut:
    """Counts the files of a split that are left out, since their names do not look like images."""

    def __init__(self) -> None:
        self._counts: Counter[str] = Counter()
        self._example = ""

    def add(self, path: str) -> None:
        self._counts[os.path.splitext(path)[1] or "no suffix"] += 1
        self._example = min(self._example or path, path)

    def notes(self, top: str | Path) -> list[str]:
        """Returns a line that says how many there are, or none. top: paths are relative to it."""
        if not self._counts:
            return []
        kinds = [f"{kind} ({count:,})" for kind, count in self._counts.most_common()]
        total = self._counts.total()
        files = "1 file is" if total == 1 else f"{total:,} files are"
        return [
            f"{top}: {files} left out for not being named like an image: {some_of(kinds)}, such as "
            f"{self._example}"
        ]


def is_ignored(name: str) -> bool:
    """Whether a file or folder is hidden, or made by a system or program for its own use."""
    return name[0] == "." or name.lower() in TOOL_FILES


def entries_of(folder: str | Path) -> list[os.DirEntry[str]]:
    """Returns what is in a folder, except what is ignored. Raises OSError if it cannot be read."""
    with os.scandir(folder) as entries:
        return [entry for entry in entries if not is_ignored(entry.name)]


def is_dir(entry: os.DirEntry[str]) -> bool:
    """Whether it is a folder or a link to one; False for a link that leads nowhere or to itself."""
    try:
        return entry.is_dir()
    except OSError:
        return False


def image_suffix(start: bytes) -> str | None:
    """Returns the usual suffix of an image file that begins with these bytes; None if it is none.

    start: SIGNATURE_BYTES, or fewer if the file is shorter.
    """
    return next((suffix for known, suffix in SIGNATURES if known.match(start)), None)


def is_image(path: str) -> bool:
    """Whether a regular file begins like an image. False if it cannot be read."""
    try:
        with open(path, "rb", buffering=0, opener=regular) as file:
            return image_suffix(file.read(SIGNATURE_BYTES) or b"") is not None
    except OSError:
        return False


def images_below(
    folder: str | Path,
    name: str,
    folders: dict[str, int | None] | None = None,
    left_out: LeftOut | None = None,
) -> list[str]:
    """Returns the paths of image files in `folder` and its sub-folders, which start with `name`.

    If links lead to a folder twice, its files count once, under the path that sorts first. folders:
    is filled with path -> st_mtime_ns of every folder that was read. left_out: counts other files.

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
            for entry in entries_of(os.path.join(folder, inner)):
                if is_dir(entry):
                    below.append(os.path.join(inner, entry.name))
                elif entry.name.lower().endswith(IMAGE_SUFFIXES) or (
                    "." not in entry.name and is_image(entry.path)
                ):
                    found.append(os.path.join(prefix, entry.name))
                elif left_out is not None:
                    left_out.add(os.path.join(prefix, entry.name))
            todo += sorted(below, reverse=True)
    except OSError as error:
        raise UserError(
            f"{error.filename}: {error.strerror}; make the folder readable or remove it"
        ) from None
    return found
