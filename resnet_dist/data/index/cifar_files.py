"""CIFAR's files as its authors packed them, binary or Python's batches.

https://www.cs.toronto.edu/~kriz/cifar.html describes both forms.
"""

from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import UserError


@dataclass(frozen=True)
class CifarForm:
    """How CIFAR's authors packed it: the archive's folder, the files in it."""

    folder: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    names: str  # the file of class names


CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_FORMS = {  # binary, Python
    "cifar10": (
        CifarForm(
            "cifar-10-batches-bin",
            tuple(f"{name}.bin" for name in CIFAR10_BATCHES),
            ("test_batch.bin",),
            "batches.meta.txt",
        ),
        CifarForm("cifar-10-batches-py", CIFAR10_BATCHES, ("test_batch",), "batches.meta"),
    ),
    "cifar100": (
        CifarForm("cifar-100-binary", ("train.bin",), ("test.bin",), "fine_label_names.txt"),
        CifarForm("cifar-100-python", ("train",), ("test",), "meta"),
    ),
}
# A record: the labels, a byte each, then the red, green and blue planes. The last label counts.
CIFAR_LABELS = {"cifar10": ("labels",), "cifar100": ("coarse_labels", "fine_labels")}
CIFAR_PIXEL_BYTES = 3 * 32 * 32


def cifar_files(data_format: str, root: Path, split: str) -> tuple[list[Path], CifarForm]:
    """CIFAR's files of a split, binary or else Python's, in `root` or in their usual sub-folder.

    Raises:
        UserError: a file is missing, or is binary and not made of whole records.
    """
    places = [
        ([folder / name for name in getattr(form, split)], form)
        for form in CIFAR_FORMS[data_format]
        for folder in (root / form.folder, root)
        if folder.is_dir()
    ]
    if not places:
        raise UserError(f"data.root={root}: no such folder; it must hold {data_format}'s files")
    files, form = next((place for place in places if any(map(Path.is_file, place[0]))), places[0])
    record_bytes = len(CIFAR_LABELS[data_format]) + CIFAR_PIXEL_BYTES
    for file in files:
        if not file.is_file():
            raise UserError(
                f"data.root={root}: no {file.name} in it; expected the files of {form.folder}"
            )
        size = file.stat().st_size
        if file.suffix == ".bin" and (size % record_bytes or not size):
            raise UserError(f"{file}: not made of {record_bytes}-byte records; copy it again")
    return files, form
