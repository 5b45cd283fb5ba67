"""Which files are samples, what is said about the others, and what leads out of a wrong folder."""

import gzip
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from resnet_dist import cli
from resnet_dist.data.formats import build_index, recognized, survey
from resnet_dist.data.index.index import notes_of
from resnet_dist.data.index.listing import images_below
from resnet_dist.errors import MAX_LINE
from tests.support.images import RGB, encoded
from tests.support.shards import jpeg, write_tar


def write(root: Path, *names: str, data: bytes = b"") -> None:
    for number, name in enumerate(names):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data or jpeg(8 + number, 9))


def two_classes(root: Path) -> None:
    write(root, *(f"{split}/{name}/0.jpg" for split in ("train", "val") for name in ("cat", "dog")))


@pytest.mark.parametrize(
    "name", [".ipynb_checkpoints", "@eaDir", "__MACOSX", "#recycle", "lost+found", ".@__thumb"]
)
def test_folders_of_tools_are_neither_classes_nor_samples(tmp_path: Path, name: str) -> None:
    two_classes(tmp_path)
    write(tmp_path, f"train/cat/{name}/0.jpg", f"train/{name}/0.jpg", f"train/cat/a/{name}/1.jpg")
    index = build_index("folder", tmp_path, "train", None)
    assert index.classes == ("cat", "dog")
    assert survey("folder", tmp_path, "train").images == len(index) == 2
    assert sorted(images_below(tmp_path / "train", "")) == ["cat/0.jpg", "dog/0.jpg"]
    assert images_below(tmp_path / "train/cat" / name, "") == ["0.jpg"]  # what the user names


def test_names_that_are_images_and_files_without_a_suffix(tmp_path: Path) -> None:
    two_classes(tmp_path)
    names = ["a.JFIF", "b.jpe", "c.GIF", "d.avif", "e.WebP", "f.PNG", "g.tiff", "n01440764_10026"]
    write(tmp_path, *(f"train/cat/{name}" for name in names))
    write(tmp_path, "train/cat/README", data=b"These are cats.")
    os.mkfifo(tmp_path / "train/cat/pipe")
    index = build_index("folder", tmp_path, "train", None)
    found = {Path(path).name for path in index.paths}
    assert found == {"0.jpg", *names}
    for kind, data in (("webp", encoded(RGB, "WEBP")), ("avif", encoded(RGB, "AVIF"))):
        write(tmp_path, f"train/cat/{kind}", data=data)
    assert len(build_index("folder", tmp_path, "train", None)) == len(index) + 2


def test_what_is_left_out_is_counted_and_named(tmp_path: Path) -> None:
    two_classes(tmp_path)
    write(tmp_path, "train/cat/x.jp2", "train/dog/y.jp2", "train/dog/1.jpg.bak", "train/dog/.hid")
    (note,) = build_index("folder", tmp_path, "train", tmp_path / "cache").notes
    assert "3 files are left out" in note
    assert ".jp2 (2), .bak (1), such as cat/x.jp2" in note
    assert survey("folder", tmp_path, "train").notes == (note,)
    assert build_index("folder", tmp_path, "train", tmp_path / "cache").notes == ()  # said before
    assert survey("folder", tmp_path, "val").notes == ()


def test_the_first_start_says_so_too(
    tiny_folder: Path, tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    data = shutil.copytree(tiny_folder, tmp_path / "data")
    (data / "train/class0/x.jp2").write_bytes(b"")
    given = ("train", tiny_yaml, f"data.root={data}", "train.epochs=1")
    for name, options, says in (
        ("planned", ["--dry-run"], True),
        ("first", [], True),
        ("second", [], False),
    ):
        assert run(*given, f"name={name}", *options) == 0
        out = capsys.readouterr().out
        assert (
            "train: 1 file is left out for not being named like an image: .jp2 (1)" in out
        ) == says


def test_lost_links_and_folders_of_folders_are_named(tmp_path: Path) -> None:
    two_classes(tmp_path)
    (tmp_path / "train/bird").symlink_to("/nowhere")
    write(tmp_path, "train/animals/owl/0.jpg", "train/animals/eel/0.jpg")
    found = survey("folder", tmp_path, "train")
    assert found.classes == "3 (animals, cat, dog)"
    lost, nested = found.notes
    assert "links that lead nowhere are no classes: bird" in lost
    assert "one class each: animals (eel, owl)" in nested


def test_classes_without_images_are_named(tmp_path: Path) -> None:
    """Labels that count from 1, one that is far too high, and classes.txt with too many names."""
    for name, labels in (("from1", (1, 2)), ("far", (0, 99))):
        members = [
            (f"{number}.{kind}", data)
            for number, label in enumerate(labels)
            for kind, data in (("jpg", jpeg(9, 9)), ("cls", str(label).encode()))
        ]
        write_tar(tmp_path / name / "train/0.tar", members)
    (line,) = notes_of(build_index("shards", tmp_path / "from1", "train", None), "train")
    assert line == "train: 1 of 3 classes have no image: 0000 (labels count from 0)"
    (line,) = notes_of(build_index("shards", tmp_path / "far", "train", None), "train")
    assert "98 of 100 classes have no image: 0001, 0002, 0003, 0004, 0005 and 93 more" in line
    write(tmp_path / "list", "a.jpg")
    (tmp_path / "list/train.csv").write_text("path,label\na.jpg,cat\n")
    (tmp_path / "list/classes.txt").write_text("cat\ndog\n")
    (line,) = survey("list", tmp_path / "list", "train").notes
    assert "1 of 2 classes have no image: dog" in line


def test_a_stray_tar_does_not_hide_the_folders(tmp_path: Path) -> None:
    two_classes(tmp_path)
    write_tar(tmp_path / "train/n01440764.tar", [("0.JPEG", jpeg(9, 9))])
    write_tar(tmp_path / "old.tar", [("0.JPEG", jpeg(9, 9))])
    assert recognized(tmp_path) == "folder"
    write(tmp_path, "train/index.arrow", data=b"ours")
    assert recognized(tmp_path) == "shards"


def run(*arguments: object) -> int:
    try:
        cli.main(list(map(str, arguments)))
    except SystemExit as end:
        return int(end.code or 0)
    return 0


def kaggle(root: Path) -> None:
    write(root, "ILSVRC/Data/CLS-LOC/train/n01/a.JPEG", "ILSVRC/Data/CLS-LOC/val/b.JPEG")


RAW: dict[str, tuple[Callable[[Path], object], str]] = {
    "ilsvrc": (
        lambda root: write_tar(root / "ILSVRC2012_img_train.tar", [("n01440764.tar", b"x" * 512)]),
        "these are ILSVRC2012's tars: run `resnet-dist prepare shards",
    ),
    "class tars": (
        lambda root: write_tar(root / "train/n01440764.tar", [("a.JPEG", jpeg(9, 9))]),
        "is the tar of a class; unpack each",
    ),
    "hub": (
        lambda root: write(root, "data/train-00000-of-00001.parquet", data=b"PAR1"),
        "parquet files from the hub: run `resnet-dist prepare shards",
    ),
    "kaggle": (kaggle, "ImageNet as on Kaggle, with a flat val/: run `resnet-dist prepare shards"),
    "tar.gz": (lambda root: write(root, "train.tar.gz"), "train.tar.gz: is compressed; unpack it"),
    "cifar": (
        lambda root: write(root, "cifar-10-binary.tar.gz"),
        "cifar-10-binary.tar.gz: is compressed; unpack it",
    ),
    "gzip under .tar": (
        lambda root: write(root, "train/0.tar", data=gzip.compress(b"x")),
        "0.tar: is compressed; unpack it",
    ),
}


@pytest.mark.parametrize("kind", RAW)
def test_what_cannot_be_trained_on_yet_says_what_to_do(
    kind: str, tmp_path: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    make, expected = RAW[kind]
    root = tmp_path / "data"
    root.mkdir()
    make(root)
    dry_run = ("train", tiny_yaml, "--dry-run", f"data.root={root}")
    formats = ("shards", "list", "folder")
    given = [("verify", root), *((*dry_run, f"data.format={name}") for name in formats)]
    for arguments in given:
        assert run(*arguments) == 2
        (line,) = capsys.readouterr().err.splitlines()
        assert expected in line
        assert len(line) <= MAX_LINE
    assert run("verify", root / "file.tar.gz") == 2


def test_a_file_as_root_and_a_relative_root(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    write(tmp_path, "cifar-10-python.tar.gz")
    assert run("verify", tmp_path / "cifar-10-python.tar.gz") == 2
    assert "is a file; unpack it, and give the folder" in capsys.readouterr().err
    monkeypatch.chdir(tmp_path)
    assert run("verify", "data") == 2
    assert f"(looked for in {tmp_path}; an absolute path" in capsys.readouterr().err


def test_a_folder_that_is_probably_meant_is_named(
    tmp_path: Path, tiny_yaml: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    hints = {
        "a": (("train", "validation"), "(there is validation/: rename it, or link val to it)"),
        "b": (("Train", "val"), "(there is Train/: rename it, or link train to it)"),
        "c": (("data/train", "data/val"), "(data/ has one: give that as data.root)"),
    }
    for name, (folders, hint) in hints.items():
        write(tmp_path / name, *(f"{folder}/cat/0.jpg" for folder in folders))
        assert run("train", tiny_yaml, "--dry-run", f"data.root={tmp_path / name}") == 2
        assert hint in capsys.readouterr().err
    assert run("verify", tmp_path / "a", "--dry-run") == 0
    assert "note: there are no val images: train with data.holdout" in capsys.readouterr().out


def test_pipes_in_place_of_small_files_are_not_waited_for(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    two_classes(tmp_path)
    for name in ("classes.txt", "train.csv", "val.csv"):
        os.mkfifo(tmp_path / name)
    assert run("verify", tmp_path, "--dry-run") == 0
    os.mkfifo(tmp_path / "bad_samples.tsv")
    assert run("verify", tmp_path, "--dry-run") == 2
    assert "bad_samples.tsv: not a regular file; remove it" in capsys.readouterr().err
