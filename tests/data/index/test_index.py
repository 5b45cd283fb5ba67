"""What there is: folders, the index file, sizes after EXIF, and one line for what is wrong."""

import os
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from tempfile import TemporaryDirectory

import numpy as np
import pytest
from PIL import Image

from resnet_dist.data.formats import build_index, survey
from resnet_dist.data.index import files
from resnet_dist.data.index.index import Index, set_aside, without
from resnet_dist.data.index.index_file import load_index_file, read_extra, save_index
from resnet_dist.data.index.pillow import displayed_size
from resnet_dist.data.index.quarantine import read_quarantine, write_quarantine
from resnet_dist.errors import UserError
from tests.support.waiting import HANG_SECONDS


def size_of(path: Path) -> tuple[int, int]:
    with path.open("rb") as file:
        return displayed_size(file)


def picture(path: Path, width: int, height: int, orientation: int | None = None) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    image = Image.new("RGB", (width, height), (200, 100, 50))
    exif = Image.Exif()
    if orientation:
        exif[0x0112] = orientation
    image.save(path, exif=exif)


def small_folder(root: Path) -> None:
    for split in ("train", "val"):
        picture(root / split / "b" / "2.JPEG", 20, 10)
        picture(root / split / "b" / "1.png", 30, 40)
        picture(root / split / "a" / "deep" / "3.jpg", 64, 48, orientation=6)
        (root / split / "a" / "notes.txt").write_text("no image")
        (root / split / "a" / ".hidden.jpg").write_text("no image")


def test_a_folder_in_canonical_order(tmp_path: Path) -> None:
    small_folder(tmp_path)
    index = build_index("folder", tmp_path, "train", None)
    assert index.classes == ("a", "b")
    names = [os.path.relpath(path, tmp_path) for path in index.paths]
    assert names == ["train/a/deep/3.jpg", "train/b/1.png", "train/b/2.JPEG"]
    assert index.labels.tolist() == [0, 1, 1]
    assert index.sizes.tolist() == [[64, 48], [40, 30], [10, 20]]  # 3.jpg is turned by EXIF
    assert all(os.path.isabs(path) for path in index.paths)
    assert survey("folder", tmp_path, "train").images == len(index) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_what_a_viewer_shows(tmp_path: Path, orientation: int) -> None:
    picture(tmp_path / "x.jpg", 64, 48, orientation)
    expected = (48, 64) if orientation < 5 else (64, 48)
    assert size_of(tmp_path / "x.jpg") == expected


def test_a_tiff_is_turned_once(tmp_path: Path) -> None:
    """Pillow turns a TIFF's size by itself."""
    picture(tmp_path / "x.tif", 64, 48, orientation=6)
    with Image.open(tmp_path / "x.tif") as image:
        image.load()
        assert size_of(tmp_path / "x.tif") == (image.height, image.width) == (64, 48)


def test_odd_names_and_a_link_in_a_circle(tmp_path: Path) -> None:
    picture(tmp_path / "train" / "größe 1" / "é ü.jpg", 20, 10)
    raw = os.fsencode(tmp_path) + b"/train/gr\xc3\xb6\xc3\x9fe 1/\xff.jpg"
    os.link(tmp_path / "train" / "größe 1" / "é ü.jpg", raw)
    os.symlink(".", tmp_path / "train" / "größe 1" / "self")
    index = build_index("folder", tmp_path, "train", tmp_path / "cache")
    assert index.sizes.tolist() == [[10, 20]] * 2


def test_the_fingerprint_changes_with_the_data(tmp_path: Path) -> None:
    small_folder(tmp_path)
    before = build_index("folder", tmp_path, "train", None).fingerprint
    assert build_index("folder", tmp_path, "train", None).fingerprint == before
    os.rename(tmp_path / "train/b/2.JPEG", tmp_path / "train/b/0.JPEG")
    assert build_index("folder", tmp_path, "train", None).fingerprint != before


def tamper(cache: Path, root: Path) -> None:
    """Sizes that are a lie, to see that the cache is read."""
    (stored,) = cache.glob("folder-train-*.arrow")
    index = load_index_file(stored, root)
    save_index(replace(index, sizes=index.sizes + 1), stored, root, read_extra(stored))


def test_the_size_cache_is_used_and_noticed_to_be_old(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    small_folder(root)
    first = build_index("folder", root, "train", cache)
    tamper(cache, root)
    assert (build_index("folder", root, "train", cache).sizes == first.sizes + 1).all()
    picture(root / "train" / "b" / "9.png", 5, 6)
    again = build_index("folder", root, "train", cache)
    assert again.sizes.tolist() == [*first.sizes.tolist(), [6, 5]]
    picture(root / "train" / "b" / "9.png", 7, 8)  # replaced in place
    assert build_index("folder", root, "train", cache).sizes[-1].tolist() == [8, 7]
    for stored in cache.glob("folder-*"):
        stored.write_bytes(b"torn")
    assert build_index("folder", root, "train", cache).sizes[-1].tolist() == [8, 7]


def age(top: Path, seconds: int = 60) -> None:
    """Makes all folders as old as those of a data set that was copied a while ago."""
    for parent, _, _ in os.walk(top):
        os.utime(parent, (time.time() - seconds,) * 2)


def test_a_settled_folder_is_not_walked_again(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    small_folder(root)
    age(root)
    monkeypatch.setattr(files, "CHECKED_FILES", 2)  # as if there were many files
    first = build_index("folder", root, "train", cache)
    monkeypatch.setattr("resnet_dist.data.index.folder.list_folder", None)
    monkeypatch.setattr(files, "displayed_size", None)
    second = build_index("folder", root, "train", cache)
    assert (second.fingerprint, list(second.paths)) == (first.fingerprint, list(first.paths))
    monkeypatch.undo()
    picture(root / "train" / "a" / "deep" / "4.jpg", 9, 9)  # only the inner folder's time changes
    assert len(build_index("folder", root, "train", cache)) == 4


def test_a_mended_image_is_seen_among_many(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    small_folder(tmp_path)
    mended = tmp_path / "train" / "b" / "1.png"
    whole = mended.read_bytes()
    mended.write_bytes(whole[:10])
    age(tmp_path)
    monkeypatch.setattr(files, "CHECKED_FILES", 1)
    cache = tmp_path / "cache"
    assert list(build_index("folder", tmp_path, "train", cache).bad) == [1]
    mended.write_bytes(whole)
    assert build_index("folder", tmp_path, "train", cache).bad == {}


def test_an_image_whose_permissions_are_mended_is_seen() -> None:
    """As nobody where the tests run as root, who may read all."""
    user = os.geteuid()
    with TemporaryDirectory() as name:  # nobody may not enter pytest's own folder
        root, cache = Path(name), Path(name) / "cache"
        small_folder(root)
        (root / "train" / "b" / "1.png").chmod(0)
        age(root)
        root.chmod(0o777)
        try:
            if user == 0:
                os.seteuid(65534)
            for _ in range(2):  # made, and from the cache
                index = build_index("folder", root, "train", cache)
                assert dict(index.bad) == {1: "Permission denied"}
            os.seteuid(user)
            (root / "train" / "b" / "1.png").chmod(0o644)
            if user == 0:
                os.seteuid(65534)
            assert build_index("folder", root, "train", cache).bad == {}
        finally:
            os.seteuid(user)


def test_a_file_added_in_the_same_tick_of_the_clock_is_seen(tmp_path: Path) -> None:
    """The folder's time of change is then what it was when the index was made."""
    root, cache = tmp_path / "data", tmp_path / "cache"
    small_folder(root)
    inner = root / "train" / "b"
    before = inner.stat().st_mtime_ns
    assert len(build_index("folder", root, "train", cache)) == 3
    picture(inner / "9.png", 5, 6)
    os.utime(inner, ns=(before, before))
    assert len(build_index("folder", root, "train", cache)) == 4


def test_a_cache_that_cannot_be_written_costs_only_time(tmp_path: Path) -> None:
    small_folder(tmp_path)
    (tmp_path / "file").write_text("in the way")
    assert len(build_index("folder", tmp_path, "train", tmp_path / "file" / "cache")) == 3


def test_an_unreadable_image_is_known_as_bad(tmp_path: Path) -> None:
    small_folder(tmp_path)
    broken = tmp_path / "train" / "b" / "0.jpg"
    broken.write_bytes(b"<html>404</html>")
    cache = tmp_path / "cache"
    for _ in range(2):  # made, and from the cache
        index = build_index("folder", tmp_path, "train", cache)
        assert index.sizes.tolist() == [[64, 48], [0, 0], [40, 30], [10, 20]]
        assert list(index.bad) == [1]
        assert "not a readable image" in index.bad[1]
        assert str(tmp_path) not in index.bad[1]
        assert index.nbytes is not None
        assert index.nbytes[1] == 16
    picture(broken, 5, 6)  # mended in place
    assert build_index("folder", tmp_path, "train", cache).bad == {}
    broken.unlink()
    os.symlink("nowhere", broken)
    assert "No such file" in build_index("folder", tmp_path, "train", None).bad[1]


def test_an_absurd_size_is_bad(tmp_path: Path) -> None:
    small_folder(tmp_path)
    (tmp_path / "train" / "b" / "0.ppm").write_bytes(b"P6 60000 60000 255\n")
    index = build_index("folder", tmp_path, "train", None)
    assert list(index.bad) == [1]
    assert index.sizes[1].tolist() == [0, 0]


def test_the_quarantine_leaves_numbers_and_fingerprint(tmp_path: Path) -> None:
    small_folder(tmp_path)
    write_quarantine(tmp_path, {"train/b/1.png": "truncated", "val/b/1.png": "of the other split"})
    for cache in (None, tmp_path / "cache"):
        index = build_index("folder", tmp_path, "train", cache)
        bad = set_aside(index, tmp_path, read_quarantine(tmp_path))
        part = without(index, bad)
        assert bad == part.bad == {1: "truncated"}
        assert part.sizes.tolist() == [[64, 48], [0, 0], [10, 20]]
        assert part.fingerprints("training") == index.fingerprints("training")
        assert part.fingerprint == index.fingerprint
        assert index.sizes[1].tolist() == [40, 30]


def test_an_index_file_gives_back_what_it_was_given(tmp_path: Path) -> None:
    small_folder(tmp_path)
    index = replace(build_index("folder", tmp_path, "train", None), bad={2: "ü\ud8ff"})
    path = tmp_path / "kept" / "index.arrow"
    save_index(index, path, tmp_path, {"of": [1, 2]})
    moved = load_index_file(path, Path("/elsewhere"))
    assert list(moved.paths) == [
        "/elsewhere/train/a/deep/3.jpg",
        "/elsewhere/train/b/1.png",
        "/elsewhere/train/b/2.JPEG",
    ]
    assert [moved.paths[-1], *moved.paths[:2]] == [list(moved.paths)[i] for i in (2, 0, 1)]
    assert np.array_equal(moved.labels, index.labels)
    assert np.array_equal(moved.sizes, index.sizes)
    assert np.array_equal(moved.nbytes, index.nbytes)  # type: ignore[arg-type]
    assert (moved.classes, moved.bad) == (index.classes, index.bad)
    assert (moved.fingerprint, moved.shards) == (index.fingerprint, None)
    assert read_extra(path) == {"of": [1, 2]}
    assert not moved.labels.flags.owndata  # a view of the map


def test_a_damaged_index_file_is_one_line(tmp_path: Path) -> None:
    small_folder(tmp_path)
    path = tmp_path / "index.arrow"
    save_index(build_index("folder", tmp_path, "train", None), path, tmp_path)
    whole = path.read_bytes()
    for damaged in (b"", b"torn", whole[:-20], whole[: len(whole) // 2], whole[:8] * 100):
        path.write_bytes(damaged)
        with pytest.raises(UserError, match=r"index\.arrow: not a usable index") as caught:
            load_index_file(path, tmp_path)
        assert "\n" not in str(caught.value)
        assert read_extra(path) is None
    path.unlink()
    with pytest.raises(UserError, match="No such file"):
        load_index_file(path, tmp_path)
    for label in (-1, 2):
        index = build_index("folder", tmp_path, "train", None)
        save_index(replace(index, labels=index.labels * 0 + label), path, tmp_path)
        with pytest.raises(UserError, match="a label without a class"):
            load_index_file(path, tmp_path)


SHARED_KB = """
import sys
from pathlib import Path
from resnet_dist.data.index.index_file import load_index_file

def kilobytes(name):
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return sum(int(line.split()[1]) for line in lines if line.startswith(name))

before = kilobytes("Rss:"), kilobytes("Private_")
index = load_index_file(Path(sys.argv[1]), Path("/data"))
total = int(index.labels.sum() + index.sizes.sum() + index.nbytes.sum())
print(kilobytes("Rss:") - before[0], kilobytes("Private_Dirty") - before[1], flush=True)
sys.stdin.read()
"""


def test_a_large_index_is_mapped_not_copied(tmp_path: Path) -> None:
    count = 400_000
    numbers = np.arange(count)
    index = Index(
        classes=tuple(f"n{label:08}" for label in range(1000)),
        labels=numbers * 1000 // count,
        sizes=np.stack([numbers % 500 + 1, numbers % 300 + 1], axis=1).astype(np.int32),
        paths=[f"/data/train/n{i * 1000 // count:08}/n_{i}.JPEG" for i in range(count)],
        pixels=None,
        fingerprint="f",
        nbytes=numbers + 1,
    )
    path = tmp_path / "index.arrow"
    save_index(index, path, Path("/data"))
    reader = [sys.executable, "-c", SHARED_KB, str(path)]
    with subprocess.Popen(reader, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as process:
        assert process.stdout is not None
        rss_kb, private_kb = map(int, process.stdout.readline().split())
        process.communicate(b"", timeout=HANG_SECONDS)
    file_kb = path.stat().st_size // 1024
    assert file_kb > 20_000
    assert rss_kb < file_kb + 20_000
    assert private_kb < 10_000  # a copy of the numbers alone would be 9.6 MB for each such column


def test_one_line_for_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        build_index("folder", tmp_path / "nowhere", "train", None)
    with pytest.raises(UserError, match="has no folder train/"):
        build_index("folder", tmp_path, "train", None)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        build_index("folder", tmp_path, "train", None)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(UserError, match=r"train/cat: a class without images"):
        build_index("folder", tmp_path, "train", None)


def test_a_part_of_an_index(tiny_folder: Path) -> None:
    index = build_index("folder", tiny_folder, "train", None)
    part = index.take(np.array([20, 3]))
    assert (len(part), part.classes) == (2, index.classes)
    assert list(part.paths) == [index.paths[20], index.paths[3]]
    assert list(part.take(np.array([1])).paths) == part.paths[1:] == [index.paths[3]]
    assert part.labels.tolist() == [index.labels[20], index.labels[3]]
    assert np.array_equal(part.sizes, index.sizes[[20, 3]])
    assert part.fingerprint not in (index.fingerprint, index.take(np.array([3, 20])).fingerprint)
