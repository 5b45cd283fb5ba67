"""The hub's parquet files: any labels and names; one line for what is missing."""

import json
from collections.abc import Sequence
from pathlib import Path

import pyarrow as pa
import pytest

from resnet_dist.data.formats import build_index
from resnet_dist.data.prepare.sources import open_source
from resnet_dist.data.prepare.write_shards import Settings, prepare_shards
from resnet_dist.errors import UserError
from tests.support.sources import list_train_here, photo


def test_hub_files_without_synsets_are_sorted_by_class_name(tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    names, image = ["zebra", "ant", "moth"], photo(0)
    huggingface = json.dumps({"info": {"features": {"label": {"names": names}}}})
    for hub in ("train", "validation"):
        table = pa.table(
            {"image": [{"bytes": image, "path": None}] * 4, "label": [0, 1, 2, 0]}
        ).replace_schema_metadata({"huggingface": huggingface})
        pq.write_table(table, tmp_path / f"{hub}-00000-of-00001.parquet")
    _, source = open_source(tmp_path, map)
    assert source.classes == ("ant", "moth", "zebra")
    assert source.splits["train"].labels.tolist() == [2, 0, 1, 2]
    # Parts that end inside a group of rows.
    assert list(source.splits["train"].images.cut(1, 3)) == [image, image]


def hub_files(
    root: Path, labels: pa.Array, data: bytes | None = b"", names: Sequence[str] = ("b", "a")
) -> None:
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    root.mkdir()
    for split in ("train", "validation"):
        images = [
            {"bytes": None if data is None else photo(n), "path": f"{n}.jpg"}
            for n in range(len(labels))
        ]
        kind = pa.struct([("bytes", pa.binary()), ("path", pa.string())])
        features = {"label": {"names": names}}
        schema = {"huggingface": json.dumps({"info": {"features": features}})}
        table = pa.table({"image": pa.array(images, kind), "label": labels})
        table = table.replace_schema_metadata(schema)
        pq.write_table(table, root / f"{split}-00000-of-00001.parquet")


def test_labels_of_any_type(tmp_path: Path) -> None:
    numbers = [0, 1, 1, 0]
    types = (pa.int8(), pa.uint8(), pa.int32(), pa.uint64(), pa.bool_())
    of = {str(kind): pa.array(numbers, pa.int64()).cast(kind) for kind in types}
    text = pa.array(["b", "a", "a", "b"])
    of |= {"text": text, "large": text.cast(pa.large_string()), "coded": text.dictionary_encode()}
    for name, labels in of.items():
        hub_files(tmp_path / name, labels)
        prepare_shards(tmp_path / name, tmp_path / f"{name}-shards", Settings(100, None), 1)
        index = build_index("shards", tmp_path / f"{name}-shards", "train", None)
        assert (index.classes, index.labels.tolist()) == (("a", "b"), [1, 0, 0, 1]), name


@pytest.mark.parametrize(
    ("labels", "why"),
    [
        (pa.array([0, 1, 0, None]), "row 3 has no label"),
        (pa.array([0, 1, -1, 0]), "row 2 has label -1"),
        (pa.array([0.5, 1.0]), "labels are of type double"),
        (pa.array([0, 1]), "has paths only, no image bytes"),
    ],
)
def test_what_is_wrong_with_hub_files(labels: pa.Array, why: str, tmp_path: Path) -> None:
    hub_files(tmp_path / "hub", labels, None if "paths" in why else b"")
    with pytest.raises(UserError, match=why):
        prepare_shards(tmp_path / "hub", tmp_path / "dest", Settings(100, None), 1)


def test_numbers_without_names_are_the_names(tmp_path: Path) -> None:
    for name, labels in (("int", pa.array([7, 12345, 7])), ("bool", pa.array([True, False, True]))):
        hub_files(tmp_path / name, labels, names=())
        prepare_shards(tmp_path / name, tmp_path / f"{name}-shards", Settings(100, None), 1)
    index = build_index("shards", tmp_path / "int-shards", "train", None)
    assert (index.classes, index.labels.tolist()) == (("00007", "12345"), [0, 1, 0])
    index = build_index("shards", tmp_path / "bool-shards", "train", None)
    assert (index.classes, index.labels.tolist()) == (("0000", "0001"), [1, 0, 1])


@pytest.mark.parametrize(
    ("columns", "why"),
    [
        ({"img": [{"bytes": b"", "path": "a"}], "fine_label": [0]}, r"img \(struct.*, fine_label"),
        ({"image": [b""], "label": [0]}, r"image \(binary\), label \(int64\); expected image"),
        ({"image": [{"path": "a"}], "label": [0]}, r"struct<path: string>\), label"),
        ({"image": [{"bytes": b""}], "label": [0]}, r"struct<bytes: binary>\), label"),
        ({"image": [{"bytes": "a", "path": "a"}], "label": [0]}, r"struct<bytes: string"),
        ({"image": [{"bytes": photo(0), "path": "a"}], "label": ["\n"]}, "is empty or has a line"),
        ({"image": [{"bytes": photo(0), "path": "a"}], "label": [""]}, "class '': is empty"),
    ],
)
def test_hub_files_with_other_columns_or_classes_are_refused(
    columns: dict[str, list], why: str, tmp_path: Path
) -> None:
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    pq.write_table(pa.table(columns), tmp_path / "train-00000-of-00001.parquet")
    with pytest.raises(UserError, match=why):
        list_train_here(tmp_path)


def test_a_source_without_images_is_refused(tmp_path: Path) -> None:
    hub_files(tmp_path / "hub", pa.array([], pa.int64()))
    with pytest.raises(UserError, match="hub: has no train images"):
        list_train_here(tmp_path / "hub")
