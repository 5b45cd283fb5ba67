"""Reads classes.txt: the names of the classes, one per line, in the order of their labels."""

from codecs import BOM_UTF16_BE, BOM_UTF16_LE
from pathlib import Path

from resnet_dist.errors import UserError
from resnet_dist.files import regular


def class_list(file: Path) -> list[str] | None:
    """Returns the class names, or None if there is no such file.

    Raises:
        UserError: it cannot be read, or has an empty line or a duplicate.
    """
    try:
        with open(file, "rb", opener=regular) as opened:
            content = opened.read()
        text = content.decode(encoding_of(content), "surrogateescape")
    except (FileNotFoundError, NotADirectoryError):
        if not file.is_symlink():
            return None
        raise UserError(f"{file}: a link that leads nowhere; correct or remove it") from None
    except OSError as error:
        raise UserError(f"{file}: {error.strerror}; expected one class per line") from None
    except UnicodeDecodeError as error:
        raise not_utf16(file, error) from None
    lines = text.split("\n")
    names = [line.rstrip() for line in (lines[:-1] if lines[-1] == "" else lines)]
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"{file}: has an empty line or a duplicate; expected one class per line")
    return names


def encoding_of(start: bytes) -> str:
    """Returns the encoding of a text: UTF-8, or what the byte order mark of Windows says."""
    return "utf-16" if start.startswith((BOM_UTF16_LE, BOM_UTF16_BE)) else "utf-8-sig"


def not_utf16(file: Path, error: UnicodeDecodeError) -> UserError:
    """Returns the error for a text that begins as UTF-16. (Any bytes pass as UTF-8.)"""
    return UserError(f"{file}: damaged UTF-16 text ({error.reason}); save it again as UTF-8")
