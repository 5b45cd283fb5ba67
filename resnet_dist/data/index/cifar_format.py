"""data.format=cifar10 and data.format=cifar100."""

from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.cifar_files import (
    CIFAR_FORMS,
    CIFAR_LABELS,
    CIFAR_PIXEL_BYTES,
    cifar_files,
)
from resnet_dist.data.index.cifar_pickle import read_pickle
from resnet_dist.data.index.format import Format

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index


class Cifar(Format):
    is_pixels = True

    def __init__(self, name: str) -> None:
        """name: "cifar10" or "cifar100"."""
        self.name = name

    def is_in(self, root: Path) -> bool:
        return any(
            (root / form.folder).is_dir() or (root / form.train[0]).is_file()
            for form in CIFAR_FORMS[self.name]
        )

    def count(self, root: Path, split: str) -> int:
        names = CIFAR_LABELS[self.name]
        return sum(
            file.stat().st_size // (len(names) + CIFAR_PIXEL_BYTES)
            if file.suffix == ".bin"
            else len(read_pickle(file).get(names[-1], ()))
            for file in cifar_files(self.name, root, split)[0]
        )

    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        from resnet_dist.data.index.cifar import cifar_index

        return cifar_index(self.name, root, split)
