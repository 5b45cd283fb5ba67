"""data.format=list: rows of path and label; one line for what is wrong; every verb takes it."""

import csv
import os
import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch

from resnet_dist import cli
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.data.formats import build_index, recognized, survey
from resnet_dist.data.index.class_list import class_list
from resnet_dist.data.index.index_file import load_index_file, save_index
from resnet_dist.data.index.quarantine import read_quarantine
from resnet_dist.errors import UserError
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train
from tests.support.shards import jpeg


def write_images(root: Path, names: list[str]) -> None:
    for number, name in enumerate(names, start=1):
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(jpeg(8 + number, 20))


def as_lists(folder: Path, root: Path) -> None:
    """The image folder `folder` as lists in `root`: train with absolute paths, val with others."""
    root.mkdir(parents=True)
    for split in ("train", "val"):
        files = sorted((folder / split).glob("*/*.jpg"))
        with open(root / f"{split}.csv", "w", newline="") as file:
            rows = csv.writer(file)
            rows.writerow(["label", "path", "comment"])
            for path in files:
                name = path if split == "train" else os.path.relpath(path, root)
                rows.writerow([path.parent.name, name, "of no interest"])


@pytest.fixture
def root(tmp_path: Path) -> Path:
    write_images(tmp_path, ["a/1.jpg", "b/2.jpg", "c,d/3.jpg", "4.jpg"])
    return tmp_path


def listed(root: Path, split: str = "train") -> list[tuple[str, str]]:
    """(path relative to root, class) of each image."""
    index = build_index("list", root, split, None)
    names = (os.path.relpath(path, root) for path in index.paths)
    return [(n, index.classes[label]) for n, label in zip(names, index.labels, strict=True)]


def test_rows_in_their_order(root: Path) -> None:
    (root / "train.csv").write_text('b/2.jpg,dog\n"c,d/3.jpg",cat\n\na/1.jpg,dog\n')
    (root / "val.tsv").write_text("4.jpg\tcat\r\n")
    assert listed(root) == [("b/2.jpg", "dog"), ("c,d/3.jpg", "cat"), ("a/1.jpg", "dog")]
    assert listed(root, "val") == [("4.jpg", "cat")]
    train = build_index("list", root, "train", None)
    assert train.classes == build_index("list", root, "val", None).classes == ("cat", "dog")
    assert train.sizes.tolist() == [[20, 10], [20, 11], [20, 9]]
    assert survey("list", root, "train").images == 3
    assert recognized(root) == "list"


@pytest.mark.parametrize(
    "text",
    [
        "a/1.jpg,x,train\nb/2.jpg,y,training\n4.jpg,x,val\nb/2.jpg,x,test\n",
        "\ufeffsplit,width,label,path\ntrain,5,x,a/1.jpg\nTrain,5,y,b/2.jpg\nvalidation,,x,4.jpg\n",
    ],
)
def test_one_list_whose_rows_name_their_split(root: Path, text: str) -> None:
    """With and without a header."""
    (root / "anything.csv").write_text(text)
    assert listed(root) == [("a/1.jpg", "x"), ("b/2.jpg", "y")]
    assert listed(root, "val") == [("4.jpg", "x")]
    assert recognized(root) == "list"


def test_labels_are_names_or_numbers(root: Path) -> None:
    (root / "train.csv").write_text("a/1.jpg,10\nb/2.jpg,9\n")
    assert build_index("list", root, "train", None).classes == ("9", "10")
    (root / "classes.txt").write_text("zebra\nant\nbee\n")
    (root / "train.csv").write_text("a/1.jpg,2\nb/2.jpg,zebra\n")
    assert listed(root) == [("a/1.jpg", "bee"), ("b/2.jpg", "zebra")]
    assert build_index("list", root, "train", None).labels.tolist() == [2, 0]


@pytest.mark.parametrize(
    ("text", "line"),
    [
        (
            "a/1.jpg,x\nb/2.jpg\n",
            r"train\.csv:2: 1 cells, but 2 in the first row \(a path",
        ),
        ("a/1.jpg,x\n,y\n", r"train\.csv:2: no path; fix or remove this row"),
        ("a/1.jpg,x\nb/2.jpg, \n", r"train\.csv:2: no label; fix"),
        ("a/1.jpg,x,train\nb/2.jpg,y,tran\n", r"train\.csv:2: split 'tran'; expected train, "),
        (
            "a/1.jpg,x,train,1\n",
            r"train\.csv:1: expected path, label and perhaps split",
        ),
        ("a/1.jpg\n", r"train\.csv:1: expected path, label and perhaps split"),
        ("a/1.jpg,x\nb/2.jpg,y\na/1.jpg,y\n", r"train\.csv:3: a/1\.jpg has label y, but x in"),
        ("a/1.jpg,x\nc,d/3.jpg,y\n", r"train\.csv:2: 3 cells, but 2 in the first row"),
        ("a/1.jpg,x\n./a/1.jpg,y\n", r"train\.csv:2: a/1\.jpg has label y, but x in line 1"),
        (
            "photo,kind\na/1.jpg,x\n",
            r"train\.csv:1: expected path, .* label, split\), not ph",
        ),
        ("path,label,class\na/1.jpg,x,y\n", r"train\.csv:1: 2 columns for the label; remove all"),
        ("a/1\0.jpg,x\n", r"train\.csv:1: path 'a/1\\x00\.jpg': no file can have this name; fix"),
        ('a/1.jpg,"x\nb/2.jpg,y\n', r"train\.csv:1: unexpected end of data; fix or remove"),
        ("path,label\n", r"train\.csv: has no rows for train"),
        ("a/1.jpg,x,val\n", r"train\.csv: has no rows for train"),
        ('a/1.jpg,"' + "x" * 200_000 + "\n", r"train\.csv:1: field larger than"),
    ],
)
def test_a_bad_row_is_one_line(root: Path, text: str, line: str) -> None:
    (root / "train.csv").write_text(text)
    with pytest.raises(UserError, match=line) as error:
        build_index("list", root, "train", None)
    assert "\n" not in str(error.value)


def test_other_mistakes_are_one_line_too(root: Path) -> None:
    with pytest.raises(UserError, match=r"has neither train\.csv or train\.tsv nor a single list"):
        build_index("list", root, "train", None)
    (root / "some.csv").write_text("a/1.jpg,x\n")
    with pytest.raises(UserError, match=r"some\.csv:1: no column for the split; add one"):
        build_index("list", root, "train", None)
    (root / "train.csv").write_text("a/1.jpg,x\n")
    (root / "val.csv").write_text("a/1.jpg,x\nb/2.jpg,z\n")
    with pytest.raises(UserError, match=r"val\.csv:2: label 'z': no training image has it; fix"):
        build_index("list", root, "val", None)
    (root / "classes.txt").write_text("w\nx\n")
    with pytest.raises(UserError, match=r"val\.csv:2: label 'z': classes\.txt has no such class"):
        build_index("list", root, "val", None)
    (root / "train.tsv").write_text("a/1.jpg\tx\n")
    with pytest.raises(
        UserError, match=r"train\.csv: there is also train\.tsv; remove one of them"
    ):
        build_index("list", root, "train", None)


def test_a_number_is_a_name_before_it_is_a_place(root: Path) -> None:
    (root / "classes.txt").write_text("\ufeff1\n2\n3\n")
    (root / "train.csv").write_text("a/1.jpg,1\nb/2.jpg,3\n")
    assert build_index("list", root, "train", None).labels.tolist() == [0, 2]
    (root / "train.csv").write_text("a/1.jpg,0\n")
    with pytest.raises(UserError, match=r"train\.csv:1: label '0': classes\.txt has no such class"):
        build_index("list", root, "train", None)
    (root / "classes.txt").write_text("cat\ndog\n")
    (root / "train.csv").write_text("a/1.jpg,1\n a/1.jpg , dog\n4.jpg,0\n")
    assert build_index("list", root, "train", None).labels.tolist() == [1, 1, 0]
    (root / "classes.txt").unlink()
    (root / "train.csv").write_text(f"a/1.jpg,{'9' * 5000}\nb/2.jpg,10\n4.jpg,9\n")
    assert build_index("list", root, "train", None).labels.tolist() == [2, 1, 0]


def test_what_is_taken_for_a_list(root: Path) -> None:
    """One that names images, also beside an image folder; a stray table hides no image folder."""
    write_images(root, ["train/x/1.jpg", "val/x/1.jpg"])
    assert recognized(root) == "folder"
    (root / "notes.csv").write_text("name,price,split\nx.y,5,train\n")
    assert recognized(root) == "folder"
    (root / "notes.csv").unlink()
    (root / "._all.csv").write_bytes(b"\0")
    (root / "folder.csv").mkdir()
    (root / "all.CSV").write_text("train/x/1.jpg,x,train\n")
    assert recognized(root) == "list"
    assert listed(root) == [("train/x/1.jpg", "x")]


def test_a_path_means_the_same_however_it_is_written(root: Path) -> None:
    """So that a run resumes where the data have moved."""
    fingerprints = set()
    for path in ("a/1.jpg", "./a/1.jpg", f"{root}/a/1.jpg", "a//1.jpg"):
        (root / "train.csv").write_text(f"{path},x\n")
        fingerprints.add(build_index("list", root, "train", None).fingerprint)
    assert len(fingerprints) == 1


def test_a_missing_image_is_a_bad_one(root: Path) -> None:
    (root / "train.csv").write_text("a/1.jpg,x\nnowhere.jpg,x\n")
    assert build_index("list", root, "train", None).bad == {1: "No such file or directory"}


def test_the_kept_index_is_used_until_something_changes(root: Path, tmp_path: Path) -> None:
    """Labels count, which no name tells; and a classes.txt that comes to be."""
    cache = tmp_path / "cache"
    (root / "train.csv").write_text("a/1.jpg,x\nb/2.jpg,y\n")
    first = build_index("list", root, "train", cache)
    (kept,) = cache.glob("list-train-*.arrow")
    written = kept.stat().st_ino
    again = build_index("list", root, "train", cache)
    assert again.fingerprint == first.fingerprint
    (root / "train.csv").write_text("a/1.jpg,y\nb/2.jpg,x\n")
    swapped = build_index("list", root, "train", cache)
    assert swapped.labels.tolist() == [1, 0]
    assert kept.stat().st_ino != written
    (root / "classes.txt").write_text("w\nx\ny\n")
    assert build_index("list", root, "train", cache).labels.tolist() == [2, 1]


def test_a_list_that_comes_to_be_is_seen(root: Path) -> None:
    """By a kept index that proves all by times: everything is older than a tick of the clock."""
    (root / "all.csv").write_text("a/1.jpg,x,train\n")
    os.utime(root / "all.csv", ns=(10**18, 10**18))
    cache = root / "cache"
    assert len(build_index("list", root, "train", cache)) == 1
    (root / "train.csv").write_text("a/1.jpg,x\nb/2.jpg,y\n")
    os.utime(root / "train.csv", ns=(10**18, 10**18))
    assert len(build_index("list", root, "train", cache)) == 2
    (root / "train.tsv").write_text("a/1.jpg\tx\n")
    with pytest.raises(UserError, match="there is also"):
        build_index("list", root, "train", cache)


def test_labels_that_change_within_a_tick_of_the_clock_are_seen(root: Path) -> None:
    """A list as young as the index proves nothing by its time."""
    lists, cache = root / "train.csv", root / "cache"
    lists.write_text("a/1.jpg,x\nb/2.jpg,y\n")
    build_index("list", root, "train", cache)
    time_ns = lists.stat().st_mtime_ns
    lists.write_text("a/1.jpg,y\nb/2.jpg,x\n")
    os.utime(lists, ns=(time_ns, time_ns))
    assert build_index("list", root, "train", cache).labels.tolist() == [1, 0]


def test_images_outside_the_root_keep_their_names(tmp_path: Path) -> None:
    """In an index file, in messages and in a quarantine."""
    root, elsewhere = tmp_path / "root", tmp_path / "elsewhere"
    write_images(elsewhere, ["1.jpg"])
    write_images(root, ["2.jpg"])
    rows = f"{elsewhere}/1.jpg,x\n2.jpg,x\n../elsewhere/1.jpg,x\n"
    (root / "train.csv").write_text(rows)
    index = build_index("list", root, "train", None)
    save_index(index, tmp_path / "i.arrow", root)
    assert list(load_index_file(tmp_path / "i.arrow", root).paths) == list(index.paths)
    shutil.copytree(root, tmp_path / "moved")
    moved = load_index_file(tmp_path / "i.arrow", tmp_path / "moved").paths
    assert list(moved)[:2] == [f"{elsewhere}/1.jpg", f"{tmp_path}/moved/2.jpg"]


def test_verify_sets_aside_what_is_elsewhere(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    root, broken = tmp_path / "root", tmp_path / "elsewhere" / "1.jpg"
    write_images(root, ["2.jpg", "3.jpg"])
    broken.parent.mkdir()
    broken.write_bytes(jpeg(9, 9)[:100])
    (root / "train.csv").write_text(f"{broken},x\n2.jpg,x\n")
    (root / "val.csv").write_text("3.jpg,x\n")
    with pytest.raises(SystemExit) as stopped:
        cli.main(["verify", str(root)])
    assert stopped.value.code == 1
    assert f"{broken}: " in capsys.readouterr().out
    assert list(read_quarantine(root)) == [str(broken)]


@pytest.mark.parametrize("name", ["train.csv", "all.csv"])
def test_verify_needs_no_val(root: Path, name: str, capsys: pytest.CaptureFixture[str]) -> None:
    """With data.holdout_images val is a part of train."""
    (root / name).write_text("path,label,split\na/1.jpg,x,train\nb/2.jpg,x,train\n")
    cli.main(["verify", str(root)])
    assert "all 2 images can be trained on" in capsys.readouterr().out


def trained_on(config: Config) -> dict[str, torch.Tensor]:
    train(config, "test", Interrupt())
    return Checkpoint.load(config.run_dir / "checkpoints/latest").model


def test_a_run_trains_as_on_the_folder(
    tiny_folder: Path, tmp_path: Path, tiny_config: Callable[..., Config]
) -> None:
    """The images in the folder's order, so the same bits."""
    as_lists(tiny_folder, tmp_path / "lists")
    settings = ("train.epochs=1", "train.deterministic=true")
    ours = tiny_config("name=l", f"data.root={tmp_path}/lists", "data.format=list", *settings)
    theirs = trained_on(tiny_config("name=f", *settings))
    for key, value in trained_on(ours).items():
        assert torch.equal(value, theirs[key])


def test_lists_become_shards(tiny_folder: Path, tmp_path: Path) -> None:
    as_lists(tiny_folder, tmp_path / "lists")
    cli.main(["prepare", "shards", str(tmp_path / "lists"), str(tmp_path / "ours")])
    cli.main(["prepare", "shards", str(tiny_folder), str(tmp_path / "theirs")])
    for split in ("train", "val"):
        ours, theirs = (
            build_index("shards", tmp_path / name, split, None) for name in ("ours", "theirs")
        )
        assert ours.classes == theirs.classes
        for column in ("labels", "sizes", "nbytes"):
            assert np.array_equal(getattr(ours, column), getattr(theirs, column))


@pytest.mark.parametrize(
    "content",
    [
        b"\xef\xbb\xbfcat\r\ndog\r\n",
        "\ufeffcat\r\ndog\r\n".encode("utf-16-le"),
        "\ufeffcat\ndog".encode("utf-16-be"),
        b"cat \ndog\t\n",
    ],
)
def test_class_lists_from_windows(tmp_path: Path, content: bytes) -> None:
    (tmp_path / "classes.txt").write_bytes(content)
    assert class_list(tmp_path / "classes.txt") == ["cat", "dog"]


@pytest.mark.parametrize("end", [b"o", b"\x00\xd8x\x00"])
def test_damaged_utf16_is_said(tmp_path: Path, end: bytes) -> None:
    text = "\ufeffa.jpg,cat\nb.jpg,d".encode("utf-16-le") + end
    for name, read in (
        ("classes.txt", class_list),
        ("train.csv", lambda file: build_index("list", file.parent, "train", None)),
    ):
        file = tmp_path / name.partition(".")[0] / name
        file.parent.mkdir()
        file.write_bytes(text)
        with pytest.raises(UserError, match=rf"{name}: damaged UTF-16 text \(.*UTF-8$"):
            read(file)


def test_a_class_list_that_cannot_be_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "classes.txt"
    assert class_list(file) is None
    file.symlink_to(tmp_path / "nowhere")
    with pytest.raises(UserError, match=r"classes\.txt: a link that leads nowhere"):
        class_list(file)
    file.unlink()
    os.mkfifo(file)
    with pytest.raises(UserError, match=r"classes\.txt: not a regular file"):
        class_list(file)


def test_a_tilde_in_a_list_is_the_home_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    (tmp_path / "train.csv").write_text("path,label\n~/a.jpg,cat\n")
    index = build_index("list", tmp_path, "train", None)
    assert list(index.paths) == [str(tmp_path / "home/a.jpg")]
