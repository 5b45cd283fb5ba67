"""The index of CIFAR-10 and CIFAR-100, from the binary or the Python version.

Both give the same labels and pixels. https://www.cs.toronto.edu/~kriz/cifar.html describes them.
"""

import hashlib
from pathlib import Path

import numpy as np

from resnet_dist.data.index.cifar_files import (
    CIFAR_LABELS,
    CIFAR_PIXEL_BYTES,
    CifarForm,
    cifar_files,
)
from resnet_dist.data.index.cifar_pickle import PlainArray, read_pickle
from resnet_dist.data.index.index import Index
from resnet_dist.errors import UserError

CLASSES = {
    "cifar10": "airplane automobile bird cat deer dog frog horse ship truck",
    "cifar100": (
        "apple aquarium_fish baby bear beaver bed bee beetle bicycle bottle bowl boy bridge bus "
        "butterfly camel can castle caterpillar cattle chair chimpanzee clock cloud cockroach "
        "couch crab crocodile cup dinosaur dolphin elephant flatfish forest fox girl hamster house "
        "kangaroo keyboard lamp lawn_mower leopard lion lizard lobster man maple_tree motorcycle "
        "mountain mouse mushroom oak_tree orange orchid otter palm_tree pear pickup_truck "
        "pine_tree plain plate poppy porcupine possum rabbit raccoon ray road rocket rose sea seal "
        "shark shrew skunk skyscraper snail snake spider squirrel streetcar sunflower sweet_pepper "
        "table tank telephone television tiger tractor train trout tulip turtle wardrobe whale "
        "willow_tree wolf woman worm"
    ),
}


def cifar_index(data_format: str, root: Path, split: str) -> Index:
    """Returns the index of a split, with its pixels in memory.

    data_format: "cifar10", or "cifar100", whose fine labels are used.

    Raises:
        UserError: a file is missing or damaged.
    """
    files, form = cifar_files(data_format, root, split)
    names = CIFAR_LABELS[data_format]
    batches = [
        np.fromfile(file, np.uint8).reshape(-1, len(names) + CIFAR_PIXEL_BYTES)
        if file.suffix == ".bin"
        else _records(file, names)
        for file in files
    ]
    records = np.concatenate(batches)
    classes = _class_names(data_format, files[0].parent, form)
    labels = records[:, len(names) - 1].astype(np.int64)
    if labels.max() >= len(classes):
        bad = int(labels.argmax())
        raise UserError(f"{root}: record {bad} of {split} has label {labels[bad]}; copy it again")
    planes = records[:, len(names) :].reshape(-1, 3, 32, 32)  # [N, C, H, W]
    return Index(
        classes=classes,
        labels=labels,
        sizes=np.full((len(labels), 2), 32, np.int32),
        paths=(),
        pixels=np.ascontiguousarray(planes.transpose(0, 2, 3, 1)),
        fingerprint=hashlib.sha256(records.data).hexdigest(),
    )


def _records(file: Path, names: tuple[str, ...]) -> np.ndarray:
    """Returns a Python batch as records of the binary version: uint8 [N, labels + 3072]."""
    batch = read_pickle(file)
    try:
        data = batch["data"]
        if not isinstance(data, PlainArray):
            raise ValueError("data is not an array")
        pixels = np.frombuffer(data.data, np.uint8).reshape(data.shape, order=data.order)
        labels = [np.array(batch[name]) for name in names]
        count = len(pixels)
        if not count or pixels.shape != (count, CIFAR_PIXEL_BYTES):
            raise ValueError(f"data of shape {pixels.shape}")
        if any(of.shape != (count,) or of.min() < 0 or of.max() > 255 for of in labels):
            raise ValueError("without a label for each image")
        return np.column_stack([*(of.astype(np.uint8) for of in labels), pixels])
    except (KeyError, TypeError, ValueError) as error:
        reason = f"no {error}" if isinstance(error, KeyError) else error
        raise UserError(f"{file}: not a CIFAR batch ({reason}); copy it again") from None


def _class_names(data_format: str, folder: Path, form: CifarForm) -> tuple[str, ...]:
    """Returns the class names from their file or, without that file, the original ones."""
    expected = CLASSES[data_format].split()
    file = folder / form.names
    if not file.is_file():
        return tuple(expected)
    if file.suffix == ".txt":
        found = file.read_text(errors="replace").split()
    else:
        key = "label_names" if data_format == "cifar10" else "fine_label_names"
        found = [str(name) for name in read_pickle(file).get(key, ())]
    if len(set(found)) != len(expected):
        raise UserError(
            f"{file}: {len(set(found))} different names instead of {len(expected)}; copy it again"
        )
    return tuple(found)
