"""Reads classes.txt: the names of the classes, one per line, in the order of their labels."""

import os
from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.files import regular


def class_list(file: Path) -> list[str] | None:
    """Returns the class names, or None if there is no such file.

    Raises:
        UserError: there is an empty line or a duplicate, or no regular file can be read.
    """
    try:
        os.close(regular(str(file), os.O_RDONLY))
    except (FileNotFoundError, NotADirectoryError):
        if not file.is_symlink():
            return None
        raise UserError(f"{file}: a link that leads nowhere; correct or remove it") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected one class per line") from None
    lines = file.read_bytes().decode(encoding_of(file), "surrogateescape").split("\n")
    names = [line.rstrip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"{file}: has an empty line or a duplicate; expected one class per line")
    return names


def encoding_of(file: Path) -> str:
    """Returns the encoding of a text: UTF-8, or what the byte order mark of Windows says."""
    with file.open("rb") as content:
        is_utf16 = content.read(2) in (BOM_UTF16_LE, BOM_UTF16_BE)
    return "utf-16" if is_utf16 else "utf-8-sig"
