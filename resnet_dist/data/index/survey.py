"""What can be told about a split without opening its images. Imports only the standard library."""

from collections.abc import Sequence
from dataclasses import dataclass

from resnet_dist.errors import some_of


@dataclass(frozen=True)
class Survey:
    """What can be told about a split without opening images."""

    images: int
    classes: str  # how many there are, and the names of some
    notes: tuple[str, ...] = ()  # what a user should know, a line each


def describe_classes(names: Sequence[str]) -> str:
    """Returns how many classes there are, with the names of the first few."""
    return f"{len(names):,} ({some_of(names)})"


def empty_classes(names: Sequence[str], has_images: Sequence[bool], where: object) -> list[str]:
    """Returns a line that names the classes without images, if there are any.

    has_images: for each class. where: the split, for the message.
    """
    empty = [name for name, has in zip(names, has_images, strict=True) if not has]
    if not empty:
        return []
    return [
        f"{where}: {len(empty):,} of {len(names):,} classes have no image: {some_of(empty)} "
        "(labels count from 0)"
    ]
