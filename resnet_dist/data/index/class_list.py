"""Reads classes.txt: the names of the classes, one per line, in the order of their labels."""

from pathlib import Path

from resnet_dist.errors import UserError


def class_list(file: Path) -> list[str] | None:
    """Returns the class names, or None if there is no such file.

    Raises:
        UserError: there is an empty line or a duplicate.
    """
    if not file.is_file():
        return None
    names = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    names = names[:-1] if names[-1] == "" else names
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"{file}: has an empty line or a duplicate; expected one class per line")
    return names
