"""What there is: folders, CIFAR files, sizes after EXIF, and one line for what is wrong."""

import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.data.headers import displayed_size
from resnet_dist.data.index import build_index
from resnet_dist.data.listing import CIFAR10_RECORD_BYTES, count_images
from resnet_dist.errors import UserError


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
    assert count_images("folder", tmp_path, "train") == len(index) == 3


@pytest.mark.parametrize("orientation", range(1, 9))
def test_sizes_are_what_a_viewer_shows(tmp_path: Path, orientation: int) -> None:
    picture(tmp_path / "x.jpg", 64, 48, orientation)
    expected = (48, 64) if orientation < 5 else (64, 48)
    assert displayed_size(str(tmp_path / "x.jpg")) == expected


def test_a_tiff_is_turned_once(tmp_path: Path) -> None:
    """Pillow turns a TIFF's size by itself."""
    picture(tmp_path / "x.tif", 64, 48, orientation=6)
    with Image.open(tmp_path / "x.tif") as image:
        image.load()
        assert displayed_size(str(tmp_path / "x.tif")) == (image.height, image.width) == (64, 48)


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


def test_the_size_cache_is_used_and_noticed_to_be_old(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    small_folder(root)
    first = build_index("folder", root, "train", cache)
    (stored,) = cache.glob("sizes-*.npy")
    np.save(stored, np.load(stored) + 1)  # a lie, to see that the cache is read
    assert (build_index("folder", root, "train", cache).sizes == first.sizes + 1).all()
    picture(root / "train" / "b" / "9.png", 5, 6)
    again = build_index("folder", root, "train", cache)
    assert again.sizes.tolist() == [*first.sizes.tolist(), [6, 5]]
    picture(root / "train" / "b" / "9.png", 7, 8)  # replaced in place
    assert build_index("folder", root, "train", cache).sizes[-1].tolist() == [8, 7]
    for stored in cache.glob("sizes-*.npy"):
        stored.write_bytes(b"torn")
    assert build_index("folder", root, "train", cache).sizes[-1].tolist() == [8, 7]


def test_cifar10_binary(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    planes = rng.integers(0, 256, (6, 3, 32, 32), np.uint8)
    labels = np.array([3, 9, 0, 1, 2, 5], np.uint8)
    records = np.concatenate([labels[:, None], planes.reshape(6, -1)], axis=1)
    folder = tmp_path / "cifar-10-batches-bin"
    folder.mkdir()
    for number in range(1, 6):
        records[number - 1 : number].tofile(folder / f"data_batch_{number}.bin")
    records[5:].tofile(folder / "test_batch.bin")
    for root in (tmp_path, folder):
        index = build_index("cifar10", root, "train", None)
        assert index.labels.tolist() == [3, 9, 0, 1, 2]
        assert index.pixels is not None
        assert np.array_equal(index.pixels, planes[:5].transpose(0, 2, 3, 1))
        assert build_index("cifar10", root, "val", None).labels.tolist() == [5]
        assert (count_images("cifar10", root, "train"), len(index)) == (5, 5)
    (folder / "test_batch.bin").write_bytes(b"x" * (CIFAR10_RECORD_BYTES - 1))
    with pytest.raises(UserError, match=r"test_batch\.bin: not made of 3073-byte records"):
        build_index("cifar10", tmp_path, "val", None)
    (folder / "test_batch.bin").unlink()
    with pytest.raises(UserError, match=r"no test_batch\.bin"):
        build_index("cifar10", tmp_path, "val", None)


def test_one_line_for_what_is_wrong(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        build_index("folder", tmp_path / "nowhere", "train", None)
    with pytest.raises(UserError, match="no folder train/"):
        build_index("folder", tmp_path, "train", None)
    (tmp_path / "train").mkdir()
    with pytest.raises(UserError, match="no class folders"):
        build_index("folder", tmp_path, "train", None)
    (tmp_path / "train" / "cat").mkdir()
    with pytest.raises(UserError, match=r"train/cat: a class without images"):
        build_index("folder", tmp_path, "train", None)
    (tmp_path / "train" / "cat" / "x.jpg").write_bytes(b"<html>404</html>")
    with pytest.raises(UserError, match=r"train/cat/x\.jpg: not a readable image") as caught:
        build_index("folder", tmp_path, "train", None)
    assert "\n" not in str(caught.value)


def test_a_part_of_an_index(tiny_folder: Path) -> None:
    index = build_index("folder", tiny_folder, "train", None)
    part = index.take(np.array([20, 3]))
    assert (len(part), part.classes) == (2, index.classes)
    assert part.paths == (index.paths[20], index.paths[3])
    assert part.labels.tolist() == [index.labels[20], index.labels[3]]
    assert np.array_equal(part.sizes, index.sizes[[20, 3]])
    assert part.fingerprint not in (index.fingerprint, index.take(np.array([3, 20])).fingerprint)
