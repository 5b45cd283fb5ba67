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
from resnet_dist.data.index.survey import Survey

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

    def has_split(self, root: Path, split: str) -> bool:
        return any(
            (folder / getattr(form, split)[0]).is_file()
            for form in CIFAR_FORMS[self.name]
            for folder in (root / form.folder, root)
        )

    def survey(self, root: Path, split: str) -> Survey:
        names = CIFAR_LABELS[self.name]
        images = sum(
            file.stat().st_size // (len(names) + CIFAR_PIXEL_BYTES)
            if file.suffix == ".bin"
            else len(read_pickle(file).get(names[-1], ()))
            for file in cifar_files(self.name, root, split)[0]
        )
        return Survey(images, self.name.removeprefix("cifar"))

    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        from resnet_dist.data.index.cifar import cifar_index

        return cifar_index(self.name, root, split)
