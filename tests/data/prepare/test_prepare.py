"""`prepare shards`: every kind of source, made small but real, to the same samples."""

import contextlib
import errno
import gzip
import hashlib
import io
import json
import os
import shutil
import signal
import socket
import subprocess
import sys
import tarfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from PIL import Image

from resnet_dist.cli import main
from resnet_dist.config import DataConfig
from resnet_dist.data.formats import build_index, recognized
from resnet_dist.data.index.image_file import UnreadableImage
from resnet_dist.data.index.quarantine import read_quarantine, write_quarantine
from resnet_dist.data.load.reader import Reader
from resnet_dist.data.prepare.reencode import Limit, reencode
from resnet_dist.data.prepare.sources import KINDS
from resnet_dist.data.prepare.write_shards import Settings, prepare_shards
from resnet_dist.errors import UserError
from resnet_dist.verbs.verify import verify
from tests.support.cifar import write_binary
from tests.support.images import all_kinds

SYNSETS = ("n01440764", "n01443537", "n02123045")
IDS = {1: "n02123045", 2: "n01440764", 3: "n01443537"}  # ILSVRC2012_ID: not in synset order
COPY = Settings(images_per_shard=4, limit=None)
SPLITS = ("train", "val")

Photos = dict[str, dict[tuple[str, str], bytes]]  # split -> (synset, file) -> bytes


def photo(number: int, kind: str = "JPEG", mode: str = "RGB", **options: object) -> bytes:
    rng = np.random.default_rng(number)
    pixels = rng.integers(0, 256, (6 + number % 3, 7, 3), np.uint8).repeat(8, 0).repeat(8, 1)
    file = io.BytesIO()
    Image.fromarray(pixels).convert(mode).save(file, kind, **options)
    return file.getvalue()


@pytest.fixture(scope="module")
def photos() -> Photos:
    """13 train and 6 val images. An empty one, a torn header, a PNG named JPEG, a CMYK JPEG."""
    train = {
        (synset, f"{synset}_{n}.JPEG"): photo(10 * label + n)
        for label, synset in enumerate(SYNSETS)
        for n in range(4 + (label == 0))
    }
    train[SYNSETS[0], "n01440764_1.JPEG"] = b""
    train[SYNSETS[1], "n01443537_2.JPEG"] = photo(3)[:40]
    train[SYNSETS[1], "n01443537_3.JPEG"] = photo(4, "PNG")
    train[SYNSETS[2], "n02123045_0.JPEG"] = photo(5, mode="CMYK")
    val = {(SYNSETS[n % 3], f"ILSVRC2012_val_{n + 1:08}.JPEG"): photo(100 + n) for n in range(6)}
    return {"train": dict(sorted(train.items())), "val": dict(sorted(val.items()))}


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


@pytest.fixture(scope="module")
def folder(photos: Photos, tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("folder")
    make_folder(root, photos)
    return root


@pytest.fixture(scope="module")
def unbroken(folder: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Of `folder`, in one run by one worker."""
    dest = tmp_path_factory.mktemp("unbroken") / "dest"
    prepare_shards(folder, dest, COPY, workers=1)
    return dest


def digests(root: Path) -> dict[str, str]:
    return {
        str(path.relative_to(root)): hashlib.sha256(path.read_bytes()).hexdigest()
        for path in sorted(root.rglob("*"))
        if path.is_file()
    }


def samples_in(dest: Path, split: str) -> list[tuple[str, int, bytes, dict]]:
    """(file, label, bytes, .json) of each sample, by Python's tarfile alone."""
    samples = []
    for path in sorted((dest / split).glob("*.tar")):
        with tarfile.open(path) as tar:
            content = {m.name: tar.extractfile(m).read() for m in tar}  # type: ignore[union-attr]
        keys = list(dict.fromkeys(name.partition(".")[0] for name in content))
        for key in keys:
            image, label, facts = (content[n] for n in content if n.startswith(f"{key}."))
            about = json.loads(facts)
            samples.append((about["filename"], int(label), image, about))
    return samples


@pytest.mark.parametrize("kind", MAKERS)
def test_a_source_keeps_its_bytes_and_gets_labels_in_synset_order(
    kind: str, photos: Photos, tmp_path: Path
) -> None:
    MAKERS[kind](tmp_path / "source", photos)
    dest = tmp_path / "dest"
    prepare_shards(tmp_path / "source", dest, COPY, workers=2)
    assert (dest / "classes.txt").read_text().split() == list(SYNSETS)
    for split in SPLITS:
        expected = sorted((SYNSETS.index(s), data) for (s, _), data in photos[split].items())
        samples = samples_in(dest, split)
        assert sorted((label, data) for _, label, data, _ in samples) == expected
        index = build_index("shards", dest, split, None)
        assert index.classes == SYNSETS
        assert index.labels.tolist() == [label for _, label, _, _ in samples]
        assert index.shards is not None
        for sample, (file, label, data, about) in enumerate(samples):
            assert file.startswith(f"{SYNSETS[label]}/")
            assert about["class"] == SYNSETS[label]
            assert index.sizes[sample].tolist() == [about["height"], about["width"]]
            if sample not in index.bad:
                shard = Path(index.shards.files[index.shards.shard[sample]]).read_bytes()
                assert shard[index.shards.offset[sample] :].startswith(data)
                assert index.nbytes is not None
                assert index.nbytes[sample] == len(data)
        # What another reader of these tars finds is the same, but for nothing.
        (dest / split / "index.arrow").unlink()
        (dest / "prepare.json").unlink(missing_ok=True)  # or it would be told to finish first
        scanned = build_index("shards", dest, split, None)
        assert scanned.fingerprint == index.fingerprint
        assert set(scanned.bad) == set(index.bad)
        assert len(index.bad) == (2 if split == "train" else 0)


def test_the_original_tars_make_what_the_unpacked_folder_makes(
    photos: Photos, unbroken: Path, tmp_path: Path
) -> None:
    make_ilsvrc(tmp_path / "source", photos)
    prepare_shards(tmp_path / "source", tmp_path / "dest", COPY, workers=2)
    assert digests(tmp_path / "dest") == digests(unbroken)


def test_the_bytes_do_not_depend_on_the_number_of_workers(
    folder: Path, unbroken: Path, tmp_path: Path
) -> None:
    prepare_shards(folder, tmp_path / "dest", COPY, workers=3)
    assert digests(tmp_path / "dest") == digests(unbroken)
    assert {f"train/{n:06}.tar" for n in range(4)} <= digests(unbroken).keys()


def test_member_headers_hold_nothing_of_the_machine(unbroken: Path) -> None:
    with tarfile.open(unbroken / "train" / "000001.tar") as tar:
        member = tar.next()
        assert member is not None
        about = (member.mtime, member.uid, member.gid, member.uname, member.gname, member.mode)
        assert about == (0, 0, 0, "", "", 0o644)
        assert tar.getnames()[:3] == ["00000004.jpg", "00000004.cls", "00000004.json"]


def test_bad_images_keep_their_places_and_are_listed(unbroken: Path, photos: Photos) -> None:
    index = build_index("shards", unbroken, "train", None)
    assert len(index) == len(photos["train"])
    bad = read_quarantine(unbroken)
    empty, torn = "train/000000.tar/00000001.jpg", "train/000001.tar/00000007.jpg"
    assert set(bad) == {empty, torn}
    assert bad[empty] == "an empty file"
    assert dict(index.bad) == {1: bad[empty], 7: bad[torn]}
    assert index.sizes[[1, 7]].tolist() == [[0, 0], [0, 0]]
    assert (index.sizes[[0, 2, 3]] > 0).all()
    kinds = [name[-4:] for name in (str(index.paths[i]) for i in range(len(index)))]
    assert kinds[8] == ".png"  # under a JPEG's name in the source
    assert kinds.count(".jpg") == len(index) - 1


def test_what_the_source_knows_to_be_bad_stays_known(photos: Photos, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", photos)
    write_quarantine(
        tmp_path / "source", {"train/n02123045/n02123045_2.JPEG": "grey from row 9 on"}
    )
    prepare_shards(tmp_path / "source", tmp_path / "dest", COPY, workers=1)
    index = build_index("shards", tmp_path / "dest", "train", None)
    assert index.bad[11] == "grey from row 9 on"
    # So they are after another round.
    prepare_shards(tmp_path / "dest", tmp_path / "again", COPY, workers=1)
    assert dict(build_index("shards", tmp_path / "again", "train", None).bad) == dict(index.bad)


@pytest.mark.parametrize("name", ["cifar10", "cifar100"])
def test_cifar_becomes_png_without_loss(name: str, tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    source, labels = tmp_path / "source", {"cifar10": 1, "cifar100": 2}[name]
    source.mkdir()
    if name == "cifar10":
        files, classes = [f"data_batch_{n}.bin" for n in range(1, 6)] + ["test_batch.bin"], 10
        (source / "batches.meta.txt").write_text("\n".join("jihgfedcba") + "\n")
    else:
        files, classes = ["train.bin", "test.bin"], 100
        (source / "fine_label_names.txt").write_text("".join(f"c{99 - n:02}\n" for n in range(100)))
    for file in files:
        records = rng.integers(0, 256, (6, labels + 3072), np.uint8)
        records[:, :labels] %= 10
        (source / file).write_bytes(records.tobytes())
    prepare_shards(source, tmp_path / "dest", COPY, workers=1)
    for split in SPLITS:
        truth = build_index(name, source, split, None)
        assert truth.pixels is not None
        samples = samples_in(tmp_path / "dest", split)
        written = np.stack([np.asarray(Image.open(io.BytesIO(data))) for _, _, data, _ in samples])
        np.testing.assert_array_equal(written, truth.pixels)
        index = build_index("shards", tmp_path / "dest", split, None)
        assert index.classes == tuple(sorted(truth.classes))
        assert len(index.classes) == classes
        for sample in range(len(index)):
            old = truth.classes[truth.labels[sample]]
            assert index.classes[index.labels[sample]] == old


# --- after a kill ---------------------------------------------------------------------------------


def start(*arguments: object) -> subprocess.Popen:
    command = [sys.executable, "-m", "resnet_dist", "prepare", "shards", *map(str, arguments)]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def test_a_killed_run_goes_on_to_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    settings = Settings(1, Limit("longest", 30, 80))
    prepare_shards(folder, tmp_path / "unbroken", settings, workers=2)
    dest = tmp_path / "dest"
    options = ("--images-per-shard", 1, "--longest-px", 30, "--quality", 80, "--workers", 2)
    run = start(folder, dest, *options)
    while not (dest / "train" / "000002.tar").exists():
        assert run.poll() is None
        time.sleep(0.0005)
    workers = Path(f"/proc/{run.pid}/task/{run.pid}/children").read_text().split()
    run.kill()
    run.wait()
    assert not (dest / "val" / "index.arrow").exists()
    whole = {path: path.stat().st_mtime_ns for path in dest.rglob("0*.tar")}
    assert 0 < len(whole) < 19
    for worker in workers:  # they end with their parent, who could tell them nothing
        for _ in range(500):
            if not Path(f"/proc/{worker}").exists():
                break
            time.sleep(0.01)
        else:
            os.kill(int(worker), signal.SIGKILL)
            raise AssertionError(f"worker {worker} was still there")
    run.communicate()

    (dest / "train" / ".partial-000005.tar-0123abcd").write_bytes(b"torn")
    again = start(folder, dest, *options)
    stdout, stderr = again.communicate(timeout=60)
    assert again.returncode == 0, stderr
    assert digests(dest) == digests(tmp_path / "unbroken")
    for path, written in whole.items():
        assert path.stat().st_mtime_ns == written  # not a second time
    assert "13 train and 6 val images of 3 classes in 19 shards" in stdout
    assert [line for line in stdout.splitlines() if "100 %" in line]


def test_other_settings_or_data_are_refused(unbroken: Path, folder: Path, tmp_path: Path) -> None:
    before = digests(unbroken)
    with pytest.raises(UserError, match="was made with images_per_shard 4, now it is 5"):
        prepare_shards(folder, unbroken, Settings(5, None), workers=1)
    with pytest.raises(UserError, match=r"was made with limit null, now it is \{"):
        prepare_shards(folder, unbroken, Settings(4, Limit("longest", 9, 90)), workers=1)
    other = tmp_path / "other"
    subprocess.run(["cp", "-r", folder, other], check=True)
    longer = other / "train" / SYNSETS[0] / "n01440764_0.JPEG"
    longer.write_bytes(longer.read_bytes() + b"\0")
    with pytest.raises(UserError, match="was made with source"):
        prepare_shards(other, unbroken, COPY, workers=1)
    assert digests(unbroken) == before
    prepare_shards(folder, unbroken, COPY, workers=1)
    assert digests(unbroken) == before


def test_a_folder_that_is_not_ours_is_left_alone(folder: Path, tmp_path: Path) -> None:
    (tmp_path / "thesis.txt").write_text("mine")
    with pytest.raises(UserError, match="not empty, and not made by"):
        prepare_shards(folder, tmp_path, COPY, workers=1)
    assert os.listdir(tmp_path) == ["thesis.txt"]
    with pytest.raises(UserError, match="is inside the source"):
        prepare_shards(folder, folder / "train" / "shards", COPY, workers=1)
    with pytest.raises(UserError, match=r"thesis.txt/dest: cannot be written: Not a directory"):
        prepare_shards(folder, tmp_path / "thesis.txt" / "dest", COPY, workers=1)


def test_a_full_disk_is_one_line_and_loses_nothing(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    sizes = {"a": 5, "b": 5, "c": 200}  # times 8 x 8 pixels of noise
    rng = np.random.default_rng(0)
    for split in SPLITS:
        for name, size in sizes.items():
            (source / split / name).mkdir(parents=True)
            pixels = rng.integers(0, 256, (8 * size, 8, 3), np.uint8)
            Image.fromarray(pixels).save(source / split / name / "0.png")
    code = (
        "import resource; resource.setrlimit(resource.RLIMIT_FSIZE, (20480, 20480));"
        "from resnet_dist.cli import main; import sys; main(sys.argv[1:])"
    )
    command = [sys.executable, "-c", code, "prepare", "shards", str(source), str(dest)]
    command += ["--images-per-shard", "1", "--workers", "1"]
    run = subprocess.run(command, capture_output=True, text=True, timeout=60, check=False)
    assert run.returncode == 2
    assert run.stderr.splitlines() == [
        f"resnet-dist: {dest}/train/000002.tar: cannot be written: File too large; complete "
        "shards are kept, and the same command resumes"
    ]
    assert sorted(os.listdir(dest / "train")) == ["000000.tar", "000001.tar"]
    prepare_shards(source, dest, Settings(1, None), workers=1)
    assert len(build_index("shards", dest, "train", None)) == 3


def test_two_runs_do_not_write_the_same_folder(folder: Path, tmp_path: Path) -> None:
    run = start(folder, tmp_path / "dest", "--images-per-shard", 1, "--workers", 1)
    while not (tmp_path / "dest" / "prepare.json").exists():
        assert run.poll() is None
        time.sleep(0.001)
    run.send_signal(signal.SIGSTOP)
    try:
        with pytest.raises(UserError, match="another `prepare` is writing there"):
            prepare_shards(folder, tmp_path / "dest", Settings(1, None), workers=1)
    finally:
        run.send_signal(signal.SIGCONT)
    _, stderr = run.communicate(timeout=60)
    assert run.returncode == 0, stderr


# --- hostile and damaged sources ------------------------------------------------------------------


def member(name: str, data: bytes = b"", **facts: object) -> bytes:
    """A tar of one member with these facts in its header."""
    info = tarfile.TarInfo(name)
    info.size = len(data)
    for fact, value in facts.items():
        setattr(info, fact, value)
    padding = bytes(-len(data) % 512)
    return info.tobuf(tarfile.GNU_FORMAT) + data + padding + bytes(1024)


IMAGE = photo(0)
HOSTILE = {
    "traversal": (member("../../evil.JPEG", IMAGE), "'../../evil.JPEG': a path that leads outside"),
    "absolute": (member("/etc/evil.JPEG", IMAGE), "'/etc/evil.JPEG': a path that leads outside"),
    "symlink": (member("a.JPEG", type=tarfile.SYMTYPE, linkname="/etc/passwd"), "a link"),
    "hard link": (member("a.JPEG", type=tarfile.LNKTYPE, linkname="b.JPEG"), "a link"),
    "device": (member("a.JPEG", type=tarfile.CHRTYPE, devmajor=1, devminor=5), "a device"),
    "fifo": (member("a.JPEG", type=tarfile.FIFOTYPE), "a device or another special"),
    "sparse": (member("a.JPEG", IMAGE, type=tarfile.GNUTYPE_SPARSE), "special member"),
    "absurd size": (member("a.JPEG", IMAGE, size=1 << 60), "1152921504606846976 bytes, past"),
    "negative size": (member("a.JPEG", IMAGE, size=-512), "-512 bytes"),
    "name of 1 GB": (member("a", type=tarfile.GNUTYPE_LONGNAME, size=1 << 30), "a header of"),
    "cut short": (member("a.JPEG", IMAGE)[:-1100], "bytes, past the end"),
    "no end": (member("a.JPEG", IMAGE)[:-1024], "past the end of the tar"),  # runs on into the next
    "damaged header": (member("a.JPEG", IMAGE)[:-1024] + b"x" * 2048, "damaged or truncated"),
    "a tar inside": (member("bomb.tar", member("a.JPEG", IMAGE)), "member 'bomb.tar': not .jpg"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_class_tar_is_refused(case: str, photos: Photos, tmp_path: Path) -> None:
    tar, why = HOSTILE[case]
    source, dest = tmp_path / "source", tmp_path / "dest"
    make_ilsvrc(source, photos)
    path = source / "ILSVRC2012_img_train.tar"
    good = {"n01440764.tar": make_tar({"a.JPEG": IMAGE})}
    path.write_bytes(make_tar({**good, "n01443537.tar": tar, "n02123045.tar": tar}))
    before = digests(tmp_path)
    with pytest.raises(UserError) as refused:
        list_train_here(source)
    text = str(refused.value)
    assert f"{path}: member 'n01443537.tar': " in text
    assert why in text
    assert "\n" not in text
    assert digests(tmp_path) == before
    assert not dest.exists()


def list_train_here(source: Path) -> None:
    """Without the half second that worker processes take to start."""
    from resnet_dist.data.prepare.sources import open_source

    open_source(source, map)


@pytest.mark.parametrize("case", [c for c in HOSTILE if c not in ("no end", "a tar inside")])
@pytest.mark.parametrize("name", ["ILSVRC2012_img_train.tar", "ILSVRC2012_img_val.tar"])
def test_a_hostile_outer_tar_is_refused(
    case: str, name: str, photos: Photos, tmp_path: Path
) -> None:
    make_ilsvrc(tmp_path, photos)
    (tmp_path / name).write_bytes(HOSTILE[case][0])
    with pytest.raises(UserError, match=f"{name}: ") as refused:
        list_train_here(tmp_path)
    assert "\n" not in str(refused.value)


def test_a_hostile_shard_is_refused_before_anything_is_written(tmp_path: Path) -> None:
    source, dest = tmp_path / "source", tmp_path / "dest"
    for split in SPLITS:
        (source / split).mkdir(parents=True)
        (source / split / "0.tar").write_bytes(member("../../evil.jpg", IMAGE))
    before = digests(tmp_path)
    with pytest.raises(UserError, match=r"0\.tar: .*evil\.jpg"):
        prepare_shards(source, dest, COPY, workers=1)
    assert digests(tmp_path) == before
    assert not dest.exists()


def test_an_incomplete_source_is_named(photos: Photos, tmp_path: Path) -> None:
    with pytest.raises(UserError, match="nothing to prepare; expected"):
        list_train_here(tmp_path)
    with pytest.raises(UserError, match="no such folder"):
        list_train_here(tmp_path / "nowhere")

    make_parquet(tmp_path / "hub", photos)
    (tmp_path / "hub" / "data" / "train-00001-of-00003.parquet").unlink()
    with pytest.raises(UserError, match=r"train-00000-of-NNNNN.parquet .* found 2"):
        list_train_here(tmp_path / "hub")
    (tmp_path / "hub" / "data" / "train-00001-of-00003.parquet").write_bytes(b"PAR1")
    with pytest.raises(UserError, match=r"train-00001-of-00003.parquet: not a parquet file"):
        list_train_here(tmp_path / "hub")

    make_ilsvrc(tmp_path / "tars", photos)
    (tmp_path / "tars" / "ILSVRC2012_devkit_t12.tar.gz").rename(tmp_path / "devkit")
    with pytest.raises(UserError, match=r"devkit_t12.tar.gz: cannot be read: No such file"):
        list_train_here(tmp_path / "tars")
    (tmp_path / "tars" / "ILSVRC2012_devkit_t12.tar.gz").write_bytes(b"\x1f\x8b torn")
    with pytest.raises(UserError, match=r"devkit_t12.tar.gz: damaged"):
        list_train_here(tmp_path / "tars")
    (tmp_path / "devkit").replace(tmp_path / "tars" / "ILSVRC2012_devkit_t12.tar.gz")
    fewer = {name: data for (_, name), data in list(photos["val"].items())[1:]}
    (tmp_path / "tars" / "ILSVRC2012_img_val.tar").write_bytes(make_tar(fewer))
    with pytest.raises(UserError, match=r"img_val.tar: 5 images, but 6 in the devkit"):
        list_train_here(tmp_path / "tars")

    make_folder(tmp_path / "folder", photos)
    (tmp_path / "folder" / "val" / SYNSETS[1]).rename(tmp_path / "folder" / "val" / "n09999999")
    with pytest.raises(UserError, match=r"class 'n01443537' is only in train \(3 .* 3 in val\)"):
        list_train_here(tmp_path / "folder")


def test_hub_files_without_synsets_are_sorted_by_class_name(photos: Photos, tmp_path: Path) -> None:
    pq = pytest.importorskip("pyarrow.parquet", exc_type=ImportError)
    names = ["zebra", "ant", "moth"]
    huggingface = json.dumps({"info": {"features": {"label": {"names": names}}}})
    for hub in ("train", "validation"):
        table = pa.table(
            {"image": [{"bytes": IMAGE, "path": None}] * 4, "label": [0, 1, 2, 0]}
        ).replace_schema_metadata({"huggingface": huggingface})
        pq.write_table(table, tmp_path / f"{hub}-00000-of-00001.parquet")
    from resnet_dist.data.prepare.sources import open_source

    _, source = open_source(tmp_path, map)
    assert source.classes == ("ant", "moth", "zebra")
    assert source.splits["train"].labels.tolist() == [2, 0, 1, 2]
    # Parts that end inside a group of rows.
    assert list(source.splits["train"].images.cut(1, 3)) == [IMAGE, IMAGE]


# --- re-encoding ----------------------------------------------------------------------------------


def encoded(image: Image.Image, kind: str, **options: object) -> bytes:
    file = io.BytesIO()
    image.save(file, kind, **options)
    return file.getvalue()


def gradient(height: int, width: int) -> np.ndarray:
    """uint8 [height, width, 3]: red grows to the right, green downwards."""
    red = np.linspace(0, 250, width)[None].repeat(height, 0)
    green = np.linspace(0, 250, height)[:, None].repeat(width, 1)
    return np.stack([red, green, np.full_like(red, 60)], axis=2).round().astype(np.uint8)


def decoded(data: bytes) -> np.ndarray:
    with Image.open(io.BytesIO(data)) as image:
        assert (image.format, image.mode) == ("JPEG", "RGB")
        assert "exif" not in image.info
        return np.asarray(image).astype(int)


@pytest.mark.parametrize(
    ("limit", "size"),
    [
        (Limit("longest", 100, 95), (50, 100)),
        (Limit("shortest", 100, 95), (100, 200)),
        (Limit("shortest", 101, 95), (101, 202)),
    ],
)
def test_the_side_is_the_limit_and_the_picture_the_same(
    limit: Limit, size: tuple[int, int]
) -> None:
    data = encoded(Image.fromarray(gradient(400, 800)), "JPEG", quality=95)
    found = decoded(reencode(data, limit))
    assert found.shape == (*size, 3)
    assert np.abs(found - gradient(*size)).mean() < 2


def test_an_image_within_the_limit_keeps_its_bytes() -> None:
    data = encoded(Image.fromarray(gradient(100, 200)), "PNG")
    assert reencode(data, Limit("longest", 200, 90)) is data
    assert reencode(data, Limit("shortest", 100, 90)) is data
    assert reencode(data, Limit("shortest", 99, 90)) != data


@pytest.mark.parametrize("orientation", range(1, 9))
def test_what_exif_turns_is_turned(orientation: int) -> None:
    exif = Image.Exif()
    exif[0x0112] = orientation
    upright = Image.fromarray(gradient(320, 160))
    undo = {2: 0, 3: 3, 4: 1, 5: 5, 6: 2, 7: 6, 8: 4}  # Image.Transpose that stores it so
    stored = upright.transpose(undo[orientation]) if orientation in undo else upright  # type: ignore[arg-type]
    data = encoded(stored, "JPEG", quality=95, exif=exif)
    found = decoded(reencode(data, Limit("longest", 80, 95)))
    assert found.shape == (80, 40, 3)
    assert np.abs(found - gradient(80, 40)).mean() < 3


def test_other_kinds_of_pixels_become_8_bit_rgb() -> None:
    limit, small = Limit("longest", 40, 95), gradient(20, 40)
    rgb = Image.fromarray(gradient(80, 160))
    for data in (
        encoded(rgb.convert("CMYK"), "JPEG", quality=95),
        encoded(rgb.quantize(256), "PNG"),
        encoded(rgb.convert("RGBA"), "PNG"),
        encoded(rgb, "JPEG", quality=95, progressive=True),
    ):
        assert np.abs(decoded(reencode(data, limit)) - small).mean() < 4
    grey = gradient(80, 160)[..., 0]
    for data in (
        encoded(Image.fromarray(grey), "PNG"),
        encoded(Image.fromarray(grey.astype(np.uint16) * 257), "PNG"),
        encoded(Image.fromarray(grey.astype(np.int32) * 257), "TIFF"),
    ):
        found = decoded(reencode(data, limit))
        assert np.abs(found - small[..., :1]).mean() < 3


def test_lower_quality_takes_fewer_bytes() -> None:
    data = photo(1, quality=95)
    assert len(reencode(data, Limit("longest", 40, 60))) < len(
        reencode(data, Limit("longest", 40, 95))
    )


def test_what_cannot_be_decoded_is_bad_and_keeps_its_bytes(tmp_path: Path) -> None:
    torn = photo(1, quality=95)[:-600]
    with pytest.raises(UnreadableImage, match="image file is truncated"):
        reencode(torn, Limit("longest", 20, 90))
    make_folder(
        tmp_path / "source",
        {split: {("a", "0.jpg"): photo(0), ("a", "1.jpg"): torn} for split in SPLITS},
    )
    prepare_shards(
        tmp_path / "source", tmp_path / "dest", Settings(4, Limit("longest", 20, 90)), workers=1
    )
    (_, _, small, _), (_, _, kept, about) = samples_in(tmp_path / "dest", "train")
    assert max(Image.open(io.BytesIO(small)).size) == 20
    assert kept == torn
    assert "image file is truncated" in about["bad"]
    assert set(read_quarantine(tmp_path / "dest")) == {
        "train/000000.tar/00000001.jpg",
        "val/000000.tar/00000001.jpg",
    }


def test_why_an_image_is_bad_is_said_in_the_same_words_each_time() -> None:
    torn = encoded(Image.fromarray(gradient(80, 160)), "TIFF")[:-9000]
    said = set()
    for _ in range(2):
        with pytest.raises(UnreadableImage) as bad:
            reencode(torn, Limit("longest", 20, 90))
        said.add(str(bad.value))
    assert len(said) == 1
    assert "0x" not in said.pop()


def test_a_header_that_pillow_alone_refuses_is_a_bad_image(tmp_path: Path) -> None:
    data = photo(0)
    twelve_bits = data.replace(b"\xff\xc0\x00\x11\x08", b"\xff\xc1\x00\x11\x0c")
    assert twelve_bits != data
    images = {("a", "0.jpg"): twelve_bits, ("a", "1.jpg"): data}
    make_folder(tmp_path / "source", dict.fromkeys(SPLITS, images))
    prepare_shards(tmp_path / "source", tmp_path / "dest", COPY, workers=1)
    index = build_index("shards", tmp_path / "dest", "train", None)
    assert list(index.bad) == [0]
    assert index.sizes[1].tolist() == [48, 56]


def test_quality_alone_is_refused(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as left:
        main(["prepare", "shards", str(tmp_path), str(tmp_path / "dest"), "--quality", "80"])
    assert left.value.code == 2
    assert "--quality goes with --longest-px or --shortest-px" in capsys.readouterr().err


def test_what_is_no_file_is_a_bad_image(photos: Photos, tmp_path: Path) -> None:
    """As in training. Opening a pipe would wait, and /dev/zero never ends."""
    source = tmp_path / "source"
    make_folder(source, photos)
    top = source / "train" / SYNSETS[0]
    os.mkfifo(top / "x0.jpg")
    (top / "x1.jpg").symlink_to("/dev/zero")
    (top / "x2.jpg").symlink_to("/nowhere")
    (top / "x3.jpg").symlink_to("x3.jpg")
    (top / "x6.jpg").symlink_to("/proc/self/status")  # like a file that grows: longer than its size
    with open(top / "x5.jpg", "wb") as huge:
        huge.write(photo(1))
        huge.truncate(2**31)
    with socket.socket(socket.AF_UNIX) as made:
        here = os.getcwd()
        os.chdir(top)  # the path of a socket must be short
        made.bind("x4.jpg")
        os.chdir(here)
    prepare_shards(source, tmp_path / "dest", Settings(100, None), 1)
    index = build_index("shards", tmp_path / "dest", "train", None)
    names = {about["filename"]: n for n, (_, _, _, about) in
             enumerate(samples_in(tmp_path / "dest", "train"))}  # fmt: skip
    found = {name[-6:]: index.bad[number] for name, number in names.items() if "/x" in name}
    assert found == {
        "x0.jpg": "not a regular file",
        "x1.jpg": "not a regular file",
        "x2.jpg": "No such file or directory",
        "x3.jpg": "Too many levels of symbolic links",
        "x4.jpg": found["x4.jpg"],  # a socket: what the system says
        "x5.jpg": "2,147,483,648 bytes, too large for an image",
        "x6.jpg": "an empty file",
    }
    trained = build_index("folder", source, "train", None)
    assert len(index) == len(trained)
    config = DataConfig(root=str(source), decode_threads=1)
    reader = Reader(trained, config.read_threads)
    readable = 0
    for sample in range(len(trained)):
        with contextlib.suppress(UnreadableImage):
            reader.read(sample, (0, 0, 1, 1))
            readable += 1
    assert len(index) - len(index.bad) == readable


def test_a_name_that_no_file_can_have_is_a_bad_image(tmp_path: Path) -> None:
    (tmp_path / "source").mkdir()
    (tmp_path / "source/a.jpg").write_bytes(photo(0))
    for split in SPLITS:
        rows = f"a.jpg,cat\n{'x' * 300}.jpg,dog\n"
        (tmp_path / f"source/{split}.csv").write_text(rows)
    prepare_shards(tmp_path / "source", tmp_path / "dest", Settings(100, None), 1)
    index = build_index("shards", tmp_path / "dest", "train", None)
    assert dict(index.bad) == {1: "File name too long"}


# Reading it is an error of input or output, like that of a failing disk, wherever it exists.
FAILING = Path("/sys/devices/platform/power/autosuspend_delay_ms")


def test_an_image_on_a_failing_disk_ends_prepare_unless_verify_has_set_it_aside(
    tmp_path: Path,
) -> None:
    try:
        FAILING.read_bytes()
        pytest.skip(f"{FAILING}: can be read here")
    except OSError as error:
        if error.errno != errno.EIO:
            pytest.skip(str(error))
    source, dest = tmp_path / "source", tmp_path / "dest"
    make_folder(source, {split: {("a", "0.jpg"): photo(0)} for split in SPLITS})
    (source / "train/a/1.jpg").symlink_to(FAILING)
    with pytest.raises(
        UserError, match=r"1\.jpg: cannot be read: .* first `resnet-dist verify` on"
    ):
        prepare_shards(source, dest, Settings(100, None), 1)
    assert list((dest / "train").glob("*.tar")) == []
    assert not verify(source, None, threads=1, dry_run=False)
    prepare_shards(source, dest, Settings(100, None), 1)
    index = build_index("shards", dest, "train", None)
    assert dict(index.bad) == {1: os.strerror(errno.EIO)}
    assert index.nbytes is not None
    assert index.nbytes.tolist() == [len(photo(0)), 0]


@pytest.mark.parametrize(
    ("kind", "file"),
    [
        ("ilsvrc", "ILSVRC2012_img_train.tar"),
        ("ilsvrc", "ILSVRC2012_img_val.tar"),
        ("ilsvrc", "ILSVRC2012_devkit_t12.tar.gz"),
        ("parquet", "data/train-00001-of-00003.parquet"),
        ("shards", "imagenet1k-train-0000.tar"),
    ],
)
def test_a_device_or_pipe_in_place_of_an_archive_is_not_read(
    kind: str, file: str, photos: Photos, tmp_path: Path
) -> None:
    """Tried with a device, as a pipe would be waited for without end."""
    source = tmp_path / "source"
    MAKERS[kind](source, photos)
    (source / file).unlink()
    (source / file).symlink_to("/dev/null")
    with pytest.raises(UserError, match=f"{file}: .*not a regular file"):
        list_train_here(source)


@pytest.mark.parametrize("source", ["folder", "parquet", "shards", "list", "cifar10"])
def test_without_val_there_is_only_train(source: str, photos: Photos, tmp_path: Path) -> None:
    root = tmp_path / "source"
    if source == "cifar10":
        write_binary(root, source)
        (root / "cifar-10-batches-bin/test_batch.bin").unlink()
    elif source == "list":
        make_folder(root, {"train": photos["train"]})
        rows = [f"train/{synset}/{name},{synset}\n" for synset, name in photos["train"]]
        (root / "train.csv").write_text("".join(rows))
    else:
        MAKERS[source](root, photos)
        for path in (*root.glob("data/validation*"), *root.glob("*validation*.tar")):
            path.unlink()
        shutil.rmtree(root / "val", ignore_errors=True)
    said: list[str] = []
    given = tmp_path / "dest", Settings(100, None), 1, None
    summary = prepare_shards(root, *given, said.append)
    assert "without val images: train with data.holdout_images" in summary
    assert said == [f"{root}: {KINDS[source]}"]
    assert len(build_index("shards", tmp_path / "dest", "train", None)) > 0
    assert recognized(tmp_path / "dest") == "shards"


def test_what_a_source_is_can_be_said(photos: Photos, tmp_path: Path) -> None:
    make_folder(tmp_path / "source", photos)
    make_parquet(tmp_path / "source", photos)
    given = Settings(100, None), 1
    for kind in ("folder", "parquet"):
        prepare_shards(tmp_path / "source", tmp_path / kind, *given, kind)
    assert len(samples_in(tmp_path / "folder", "train")) == len(photos["train"])
    with pytest.raises(UserError, match="ILSVRC2012_devkit_t12"):
        prepare_shards(tmp_path / "source", tmp_path / "other", *given, "ilsvrc")


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


def test_a_source_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", {split: {("a", "0.jpg"): b"junk"} for split in SPLITS})
    with pytest.raises(UserError, match=r"none of 2 images can be read, such as train/000000\.tar"):
        prepare_shards(tmp_path / "source", tmp_path / "dest", Settings(100, None), 1)


def test_what_is_shrunk_is_what_the_loader_sees() -> None:
    """Gray values of more than 8 bits, CMYK without Adobe's mark, and transparency."""
    for name, data, shown in all_kinds():
        if name.startswith(("L12", "float", "LA", "RGBA", "CMYK", "cmyk", "1023", "exif", "late")):
            small = decoded(reencode(data, Limit("shortest", 20, 95)))
            size = small.shape[1], small.shape[0]
            expected = np.asarray(Image.fromarray(shown).resize(size, Image.Resampling.LANCZOS))
            assert np.abs(small.astype(int) - expected).mean() < 6, name
