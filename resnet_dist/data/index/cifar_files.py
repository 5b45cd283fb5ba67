"""Finds CIFAR's files, of the binary or the Python version.

https://www.cs.toronto.edu/~kriz/cifar.html describes both.
"""

from dataclasses import dataclass
from pathlib import Path

from resnet_dist.errors import UserError


@dataclass(frozen=True)
class CifarForm:
    """One version of CIFAR: the folder of the archive, and the files in it."""

    folder: str
    train: tuple[str, ...]
    val: tuple[str, ...]
    names: str  # file with the class names


CIFAR10_BATCHES = tuple(f"data_batch_{number}" for number in range(1, 6))
CIFAR_FORMS = {  # the binary and the Python version
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
# A record has the labels, one byte each, and three planes of pixels. The last label is used.
CIFAR_LABELS = {"cifar10": ("labels",), "cifar100": ("coarse_labels", "fine_labels")}
CIFAR_PIXEL_BYTES = 3 * 32 * 32


def cifar_files(data_format: str, root: Path, split: str) -> tuple[list[Path], CifarForm]:
    """Returns the files of a split, of the binary version if it is there, and their version.

    They may be in `root` or in the archive's usual sub-folder.

    Raises:
        UserError: a file is missing, or is binary and not a whole number of records.
    """
    found = [
        ([folder / name for name in getattr(form, split)], form)
        for form in CIFAR_FORMS[data_format]
        for folder in (root / form.folder, root)
        if folder.is_dir()
    ]
    if not found:
        raise UserError(
            f"data.root={root}: no such folder; it must contain the files of {data_format}"
        )
    files, form = next((one for one in found if any(map(Path.is_file, one[0]))), found[0])
    record_bytes = len(CIFAR_LABELS[data_format]) + CIFAR_PIXEL_BYTES
    for file in files:
        if not file.is_file():
            raise UserError(
                f"data.root={root}: has no {file.name}; expected the files of {form.folder}"
            )
        size = file.stat().st_size
        if file.suffix == ".bin" and (size % record_bytes or not size):
            raise UserError(
                f"{file}: does not consist of {record_bytes}-byte records; copy it again"
            )
    return files, form
