"""classes.txt: the names of classes, a line each, by number."""

from pathlib import Path

from resnet_dist.errors import UserError


def class_list(file: Path) -> list[str] | None:
    """None where there is no such file. Raises UserError: an empty line, or a class twice."""
    if not file.is_file():
        return None
    names = file.read_text(encoding="utf-8-sig", errors="surrogateescape").split("\n")
    names = names[:-1] if names[-1] == "" else names
    if len(set(names)) != len(names) or not all(names):
        raise UserError(f"{file}: an empty line, or a class twice; expected a class on each line")
    return names
