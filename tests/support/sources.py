"""Small data sets of each kind that `prepare` takes, with the same photos."""

import gzip
import hashlib
import io
import json
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from resnet_dist.data.prepare.sources import open_source

SYNSETS = ("n01440764", "n01443537", "n02123045")
IDS = {1: "n02123045", 2: "n01440764", 3: "n01443537"}  # ILSVRC2012_ID: not in synset order
SPLITS = ("train", "val")

Photos = dict[str, dict[tuple[str, str], bytes]]  # split -> (synset, file) -> bytes


def photo(number: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (6 + number % 3, 7, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


def make_folder(root: Path, photos: Photos) -> None:
    for split, files in photos.items():
        for (synset, name), data in files.items():
            path = root / split / synset / name
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(data)


def make_tar(files: dict[str, bytes]) -> bytes:
    file = io.BytesIO()
    with tarfile.open(fileobj=file, mode="w") as tar:
        for name, data in files.items():
            member = tarfile.TarInfo(name)
            member.size = len(data)
            tar.addfile(member, io.BytesIO(data))
    return file.getvalue()


def make_ilsvrc(root: Path, photos: Photos) -> None:
    """As https://image-net.org gives it: IDs out of order, and meta.mat with a parent synset."""
    scipy_io = pytest.importorskip("scipy.io")
    root.mkdir(parents=True, exist_ok=True)
    tars = {}
    for synset in reversed(SYNSETS):
        own = {name: data for (s, name), data in photos["train"].items() if s == synset}
        tars[f"{synset}.tar"] = make_tar(dict(reversed(own.items())))
    (root / "ILSVRC2012_img_train.tar").write_bytes(make_tar(tars))
    val = {name: (synset, data) for (synset, name), data in photos["val"].items()}
    (root / "ILSVRC2012_img_val.tar").write_bytes(make_tar({n: d for n, (_, d) in val.items()}))

    id_of = {synset: number for number, synset in IDS.items()}
    truth = "".join(f"{id_of[val[name][0]]}\n" for name in sorted(val))
    rows = [(number, synset, 0) for number, synset in IDS.items()] + [(4, "n00001740", 3)]
    columns = [("ILSVRC2012_ID", float), ("WNID", object), ("num_children", float)]
    file = io.BytesIO()
    scipy_io.savemat(file, {"synsets": np.array(rows, columns).reshape(-1, 1)})
    devkit = make_tar(
        {
            "ILSVRC2012_devkit_t12/readme.txt": b"",
            "ILSVRC2012_devkit_t12/data/ILSVRC2012_validation_ground_truth.txt": truth.encode(),
            "ILSVRC2012_devkit_t12/data/meta.mat": file.getvalue(),
        }
    )
    (root / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(gzip.compress(devkit))


def make_parquet(root: Path, photos: Photos) -> None:
    """As the hub has it: shuffled, in synset order, class names in words, unlabelled test."""
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    words = [{"names": ["tench", "goldfish", "tabby"], "_type": "ClassLabel"}]
    huggingface = json.dumps({"info": {"features": {"image": {}, "label": words[0]}}})
    (root / "data").mkdir(parents=True)
    for split, hub, parts in (("train", "train", 3), ("val", "validation", 1)):
        files = list(photos[split].items())
        order = np.random.default_rng(0).permutation(len(files))
        for part, rows in enumerate(np.array_split(order, parts)):
            images = [
                {"bytes": data, "path": f"{name.removesuffix('.JPEG')}_{synset}.JPEG"}
                for (synset, name), data in (files[row] for row in rows)
            ]
            labels = [SYNSETS.index(files[row][0][0]) for row in rows]
            table = pa.table({"image": images, "label": labels})
            table = table.replace_schema_metadata({"huggingface": huggingface})
            path = root / "data" / f"{hub}-{part:05}-of-{parts:05}.parquet"
            pq.write_table(table, path, row_group_size=2)
    pq.write_table(
        pa.table({"image": images, "label": [-1] * len(images)}),
        root / "data" / "test-00000-of-00001.parquet",
    )


def make_hub_shards(root: Path, photos: Photos) -> None:
    """As timm/imagenet-1k-wds is laid out, with labels that are not in synset order."""
    root.mkdir(parents=True)
    order = [SYNSETS[2], SYNSETS[0], SYNSETS[1]]
    (root / "classes.txt").write_text("".join(f"{synset}\n" for synset in order))
    for split, word in (("train", "train"), ("val", "validation")):
        members = {}
        for (synset, name), data in reversed(photos[split].items()):
            key, label = name.removesuffix(".JPEG"), order.index(synset)
            members |= {f"{key}.jpg": data, f"{key}.cls": f"{label}".encode(), f"{key}.json": b"{}"}
        (root / f"imagenet1k-{word}-0000.tar").write_bytes(make_tar(members))


def make_kaggle(root: Path, photos: Photos) -> None:
    """As Kaggle's archive unpacks: the labels of a flat val/ are three folders up."""
    images = root / "ILSVRC/Data/CLS-LOC"
    make_folder(images, {"train": photos["train"]})
    lines = ["ImageId,PredictionString"]
    (images / "val").mkdir()
    for (synset, name), data in photos["val"].items():
        (images / "val" / name).write_bytes(data)
        lines.append(f"{name.removesuffix('.JPEG')},{synset} 1 2 30 40 {synset} 5 6 70 80")
    (root / "LOC_val_solution.csv").write_text("\n".join(lines) + "\n")


MAKERS: dict[str, Callable[[Path, Photos], None]] = {
    "folder": make_folder,
    "kaggle": make_kaggle,
    "ilsvrc": make_ilsvrc,
    "parquet": make_parquet,
    "shards": make_hub_shards,
}


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def list_train_here(source: Path) -> None:
    """Without the half second that worker processes take to start."""
    open_source(source, map)
