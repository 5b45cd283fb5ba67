"""CIFAR-10 and CIFAR-100, binary and Python's batches."""

import hashlib
import os
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from resnet_dist.data.formats import build_index, survey
from resnet_dist.data.index.cifar import CLASSES
from resnet_dist.errors import UserError
from tests.support.cifar import TRAIN_IMAGES, VAL_IMAGES, some_pixels, write_binary, write_python

FORMS: list[Callable[[Path, str], None]] = [
    write_binary,
    write_python,
    lambda root, data_format: write_python(root, data_format, 4),
    lambda root, data_format: write_python(root, data_format, 5),
]


@pytest.mark.parametrize("write", FORMS)
@pytest.mark.parametrize("data_format", ["cifar10", "cifar100"])
def test_every_form_holds_the_same(
    tmp_path: Path, data_format: str, write: Callable[[Path, str], None]
) -> None:
    write(tmp_path, data_format)
    (folder,) = tmp_path.iterdir()
    labels = {"cifar10": [3, 9, 0, 1, 2], "cifar100": [0, 99, 50, 1, 2]}[data_format]
    coarse = {"cifar10": [[]] * 5, "cifar100": [[4], [19], [7], [0], [0]]}[data_format]
    pixels = some_pixels(TRAIN_IMAGES, 1)
    for root in (tmp_path, folder):
        index = build_index(data_format, root, "train", None)
        assert index.labels.tolist() == labels  # of CIFAR-100, the fine ones
        assert index.pixels is not None
        expected = pixels.reshape(-1, 3, 32, 32).transpose(0, 2, 3, 1)
        assert np.array_equal(index.pixels, expected)
        rows = zip(coarse, labels, pixels, strict=True)
        records = b"".join(bytes([*first, label]) + row.tobytes() for first, label, row in rows)
        assert index.fingerprint == hashlib.sha256(records).hexdigest()
        assert index.classes == tuple(CLASSES[data_format].split())
        assert survey(data_format, root, "train").images == len(index) == TRAIN_IMAGES
        val = build_index(data_format, root, "val", None)
        assert survey(data_format, root, "val").images == len(val) == VAL_IMAGES


def test_class_names_are_those_that_come_with_the_data(tmp_path: Path) -> None:
    assert [len(set(names.split())) for names in CLASSES.values()] == [10, 100]
    for data_format, write, file in (
        ("cifar10", write_binary, "cifar-10-batches-bin/batches.meta.txt"),
        ("cifar100", write_binary, "cifar-100-binary/fine_label_names.txt"),
        ("cifar10", write_python, "cifar-10-batches-py/batches.meta"),
        ("cifar100", write_python, "cifar-100-python/meta"),
    ):
        root = tmp_path / data_format / write.__name__
        write(root, data_format)
        names = [f"my_{name}" for name in CLASSES[data_format].split()]
        key = "label_names" if data_format == "cifar10" else "fine_label_names"
        as_pickle = pickle.dumps({key: names}, 2)
        as_text = "\n".join([*names, "", ""]).encode()
        (root / file).write_bytes(as_text if file.endswith(".txt") else as_pickle)
        assert build_index(data_format, root, "train", None).classes == tuple(names)
        (root / file).write_bytes(pickle.dumps({key: names[:7]}, 2))
        with pytest.raises(UserError, match=r" different names instead of 10"):
            build_index(data_format, root, "train", None)


class Canary:
    """A pickle that runs a command when it is read."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> tuple[Any, ...]:
        return os.mkdir, (str(self.path),)


def test_a_pickle_runs_nothing(tmp_path: Path) -> None:
    write_python(tmp_path, "cifar100")
    canary = tmp_path / "canary"
    (tmp_path / "cifar-100-python" / "train").write_bytes(pickle.dumps({"data": Canary(canary)}))
    for read in (lambda: build_index("cifar100", tmp_path, "train", None),
                 lambda: survey("cifar100", tmp_path, "train")):  # fmt: skip
        with pytest.raises(UserError, match=r"train: not a CIFAR batch \(it refers to posix\.mk"):
            read()
    assert not canary.exists()
    pickle.loads(pickle.dumps(Canary(canary)))
    assert canary.exists()  # it does run where it is let


def test_one_line_for_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        build_index("cifar10", tmp_path / "nowhere", "train", None)
    with pytest.raises(UserError, match=r"has no train\.bin; expected the files of cifar-100-b"):
        build_index("cifar100", tmp_path, "train", None)
    write_binary(tmp_path, "cifar10")
    folder = tmp_path / "cifar-10-batches-bin"
    (folder / "test_batch.bin").write_bytes(b"\x0a" + bytes(3072))
    with pytest.raises(UserError, match=r"record 0 of val has label 10"):
        build_index("cifar10", tmp_path, "val", None)
    (folder / "test_batch.bin").write_bytes(b"x" * 3072)
    with pytest.raises(UserError, match=r"test_batch\.bin: does not consist of 3073-byte records"):
        build_index("cifar10", tmp_path, "val", None)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"no test_batch\.bin"):
        build_index("cifar10", tmp_path, "val", None)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"not a pickle",
        pickle.dumps([1, 2]),
        pickle.dumps({"data": some_pixels(2, 0)}, 2),
        pickle.dumps({"data": b"ab", "labels": [1, 2]}, 2),
        pickle.dumps({"data": some_pixels(2, 0), "labels": [1]}, 2),
        pickle.dumps({"data": some_pixels(2, 0), "labels": [1, 256]}, 2),
        pickle.dumps({"data": some_pixels(2, 0)[:, 1:], "labels": [1, 2]}, 2),
        pickle.dumps({"data": some_pixels(2, 0).astype(np.float32), "labels": [1, 2]}, 2),
        pickle.dumps({"data": some_pixels(2, 0), "labels": [1, 2]}, 2)[:-3000],
    ],
    ids=range(10),
)
def test_a_damaged_batch_is_one_line(tmp_path: Path, content: bytes) -> None:
    write_python(tmp_path, "cifar10")
    (tmp_path / "cifar-10-batches-py" / "data_batch_3").write_bytes(content)
    with pytest.raises(UserError, match=r"data_batch_3: not a CIFAR batch \(") as caught:
        build_index("cifar10", tmp_path, "train", None)
    assert "\n" not in str(caught.value)
