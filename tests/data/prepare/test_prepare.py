"""`prepare shards`: every kind of source, made small but real, to the same samples."""

import contextlib
import errno
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
from pathlib import Path

import numpy as np
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
from tests.support.sources import (
    MAKERS,
    SPLITS,
    SYNSETS,
    Photos,
    digests,
    list_train_here,
    make_folder,
    make_ilsvrc,
    make_parquet,
    make_tar,
    photo,
)
from tests.support.waiting import HANG_SECONDS, wait_until

COPY = Settings(images_per_shard=4, limit=None)


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
        process_dir = Path(f"/proc/{worker}")
        wait_until(lambda path=process_dir: not path.exists(), f"worker {worker} still runs")
    run.communicate()

    (dest / "train" / ".partial-000005.tar-0123abcd").write_bytes(b"torn")
    again = start(folder, dest, *options)
    stdout, stderr = again.communicate(timeout=HANG_SECONDS)
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
    run = subprocess.run(command, capture_output=True, text=True, timeout=HANG_SECONDS, check=False)
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
    _, stderr = run.communicate(timeout=HANG_SECONDS)
    assert run.returncode == 0, stderr


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


def test_a_source_without_a_readable_image_is_refused(tmp_path: Path) -> None:
    make_folder(tmp_path / "source", {split: {("a", "0.jpg"): b"junk"} for split in SPLITS})
    with pytest.raises(UserError, match=r"none of 2 images can be read, such as train/000000\.tar"):
        prepare_shards(tmp_path / "source", tmp_path / "dest", Settings(100, None), 1)
