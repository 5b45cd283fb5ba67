"""WebDataset shards: ours by their index, the hub's by a scan in place; hostile ones refused."""

import io
import os
import tarfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.data.formats import build_index, survey
from resnet_dist.data.index import shard_files, shards
from resnet_dist.data.index.index import Index
from resnet_dist.data.index.index_file import load_index_file, save_index
from resnet_dist.errors import UserError
from tests.support.shards import hub_sample, jpeg, write_tar


def write_hub(root: Path) -> None:
    write_tar(
        root / "imagenet1k-train-0000.tar",
        hub_sample("n02", 7, 1, jpeg(20, 10)) + hub_sample("n01", 3, 0, jpeg(30, 40)),
    )
    write_tar(root / "imagenet1k-train-0001.tar", hub_sample("n01", 9, 0, jpeg(64, 48, 6)))
    write_tar(
        root / "imagenet1k-validation-00.tar",
        hub_sample("n01", 1, 0, jpeg(5, 6)) + hub_sample("n02", 2, 1, jpeg(7, 8)),
    )


def encoded(index: Index, sample: int) -> bytes:
    assert index.shards is not None
    assert index.nbytes is not None
    with open(index.shards.files[index.shards.shard[sample]], "rb") as file:
        file.seek(index.shards.offset[sample])
        return file.read(index.nbytes[sample])


def test_the_hubs_shards_are_read_in_place(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_hub(root)
    before = sorted(root.iterdir())
    for kept in (None, cache, cache):
        index = build_index("shards", root, "train", kept)
        assert index.classes == ("n01", "n02")
        assert [os.path.relpath(path, root) for path in index.paths] == [
            "imagenet1k-train-0000.tar/n02_7.jpg",
            "imagenet1k-train-0000.tar/n01_3.jpg",
            "imagenet1k-train-0001.tar/n01_9.jpg",
        ]
        assert index.labels.tolist() == [1, 0, 0]
        assert index.sizes.tolist() == [[10, 20], [40, 30], [64, 48]]  # the last turned by EXIF
        expected = [jpeg(20, 10), jpeg(30, 40), jpeg(64, 48, 6)]
        assert [encoded(index, sample) for sample in range(3)] == expected
        val = build_index("shards", root, "val", kept)
        assert (val.classes, len(val)) == (index.classes, 2)
    assert sorted(root.iterdir()) == before
    with pytest.raises(UserError, match=r"train/index\.json: no such file"):
        survey("shards", root, "train")


def blank(shard: Path) -> None:
    """Zeroes a shard, but keeps its size and its time: a scan would no longer find its images."""
    before = shard.stat()
    shard.write_bytes(bytes(before.st_size))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))


def test_the_scan_is_kept_until_a_shard_changes(tmp_path: Path) -> None:
    root, cache = tmp_path / "data", tmp_path / "cache"
    write_hub(root)
    first = build_index("shards", root, "train", cache)
    blank(root / "imagenet1k-train-0001.tar")
    assert build_index("shards", root, "train", cache).fingerprint == first.fingerprint
    write_tar(root / "imagenet1k-train-0001.tar", hub_sample("n02", 9, 1, jpeg(64, 48, 6)))
    second = build_index("shards", root, "train", cache)
    assert second.labels.tolist() == [1, 0, 1]
    assert second.fingerprint != first.fingerprint
    (root / "classes.txt").write_text("cat\ndog\n")
    assert build_index("shards", root, "train", cache).classes == ("cat", "dog")


def test_our_shards_have_their_index_beside_them(tmp_path: Path) -> None:
    first = tmp_path / "first"
    for split in ("train", "val"):
        write_tar(first / split / "000000.tar", hub_sample("n01", 3, 0, jpeg(30, 40)))
        write_tar(first / split / "000001.tar", hub_sample("n02", 7, 1, jpeg(20, 10)))
        made = build_index("shards", first, split, None)
        save_index(made, first / split / "index.arrow", first)
    root = first.rename(tmp_path / "moved")
    blank(root / "train" / "000000.tar")
    index = build_index("shards", root, "train", None)
    assert [os.path.relpath(path, root) for path in index.paths] == [
        "train/000000.tar/n01_3.jpg",
        "train/000001.tar/n02_7.jpg",
    ]
    assert encoded(index, 1) == jpeg(20, 10)
    assert survey("shards", root, "val").images == len(index) == 2
    shard = root / "train" / "000001.tar"
    whole = shard.read_bytes()
    shard.write_bytes(whole[:-1])
    with pytest.raises(UserError, match=rf"000001\.tar: {len(whole) - 1} bytes, but {len(whole)}"):
        build_index("shards", root, "train", None)
    shard.unlink()
    with pytest.raises(UserError, match=r"000001\.tar: No such file"):
        build_index("shards", root, "train", None)


def test_an_index_from_elsewhere_cannot_lead_out_of_the_shards(tmp_path: Path) -> None:
    root, path = tmp_path / "data", tmp_path / "data" / "train" / "index.arrow"
    write_tar(root / "train" / "0.tar", hub_sample("n01", 3, 0, jpeg(30, 40)))
    write_tar(tmp_path / "other" / "0.tar", hub_sample("n01", 3, 0, jpeg(30, 40)))
    index = build_index("shards", root, "train", None)
    assert index.shards is not None
    for change, why in (
        ({"offset": index.shards.offset + 100_000}, "past the end"),
        ({"offset": index.shards.offset * 0 - 1}, "past the end"),
        ({"shard": index.shards.shard + 1}, "not listed"),
        ({"files": (str(root / ".." / "other" / "0.tar"),)}, "outside the data"),
    ):
        parts = dict(vars(index.shards), **change)
        changed = Index(**dict(vars(index), shards=type(index.shards)(**parts)))
        save_index(changed, path, root)
        with pytest.raises(UserError, match=rf"index\.arrow: not a usable index \(.*{why}"):
            load_index_file(path, root)


def test_labels_and_class_names(tmp_path: Path) -> None:
    image = jpeg(3, 4)
    by_json = [("a/x.jpeg", image), ("a/x.json", b'{"label": 2}'), ("README", b"no sample")]
    write_tar(tmp_path / "train" / "0.tar", [*by_json, ("./b/x.PNG", image), ("./b/x.cls", b"0\n")])
    index = build_index("shards", tmp_path, "train", None)
    assert index.labels.tolist() == [2, 0]
    assert index.classes == ("0000", "0001", "0002")
    assert [path[-8:] for path in index.paths] == ["a/x.jpeg", "/b/x.PNG"]
    (tmp_path / "classes.txt").write_text("cat\ndog\nowl\neel\n")
    assert build_index("shards", tmp_path, "train", None).classes == ("cat", "dog", "owl", "eel")
    for text, why in (
        ("cat\ndog\n", r"0\.tar: has a label 2, but there are 2 classes in .*classes\.txt"),
        ("cat\n\ncat\n", r"classes\.txt: has an empty line or a duplicate"),
    ):
        (tmp_path / "classes.txt").write_text(text)
        with pytest.raises(UserError, match=why):
            build_index("shards", tmp_path, "train", None)


def test_classes_are_numbers_where_folders_are_not_one_to_one(tmp_path: Path) -> None:
    image = jpeg(3, 4)
    mixed = hub_sample("n01", 1, 0, image) + hub_sample("n02", 2, 0, image)
    same = hub_sample("n01", 1, 0, image) + hub_sample("n01", 2, 1, image)
    for members, classes in ((mixed, ("0000",)), (same, ("0000", "0001"))):
        write_tar(tmp_path / "train" / "0.tar", members)
        assert build_index("shards", tmp_path, "train", None).classes == classes


@pytest.mark.parametrize("form", [tarfile.GNU_FORMAT, tarfile.PAX_FORMAT])
def test_long_and_odd_names(tmp_path: Path, form: int) -> None:
    keys = ["d" * 90 + "/" + "k" * 150, "größe/é ü", "n" * 300]
    sizes = [(3, 4), (5, 6), (7, 8)]
    members = []
    for key, size in zip(keys, sizes, strict=True):
        members += [(f"{key}.jpg", jpeg(*size)), (f"{key}.cls", b"0")]
    write_tar(tmp_path / "train" / "0.tar", members, form)
    index = build_index("shards", tmp_path, "train", tmp_path / "cache")
    top = tmp_path / "train" / "0.tar"
    assert [os.path.relpath(path, top) for path in index.paths] == [f"{key}.jpg" for key in keys]
    assert [encoded(index, i) for i in range(3)] == [jpeg(*size) for size in sizes]


def test_images_with_long_headers_and_without_any(tmp_path: Path) -> None:
    long = jpeg(30, 20, 6, exif_bytes=60_000)
    long = long[:2] + b"\xff\xfe\xff\xff" + bytes(65_533) + long[2:]  # a comment before the EXIF
    png = io.BytesIO()
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (200, 300, 3), np.uint8)).save(
        png, "PNG"
    )
    bomb = b"P6 60000 60000 255\n"
    images = [long, b"", png.getvalue(), b"<html>404</html>", bomb, jpeg(8, 9)[:30]]
    assert len(images[2]) > shards.PREFIX_BYTES
    members = []
    for number, image in enumerate(images):
        members += [(f"{number}.jpg", image), (f"{number}.cls", b"0")]
    write_tar(tmp_path / "train" / "0.tar", members)
    for cache in (None, tmp_path / "cache"):
        index = build_index("shards", tmp_path, "train", cache)
        assert index.sizes.tolist() == [[30, 20], [0, 0], [200, 300], [0, 0], [0, 0], [0, 0]]
        assert sorted(index.bad) == [1, 3, 4, 5]
        assert all("not a readable image" in why for why in index.bad.values())


def special(kind: bytes, name: str = "1.jpg") -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tar(path, hub_sample("n01", 3, 0, jpeg(3, 4)))
        with tarfile.open(path, "a") as tar:
            info = tarfile.TarInfo(name)
            info.type, info.linkname = kind, "/etc/passwd"
            tar.addfile(info)

    return write


def of(*members: tuple[str, bytes]) -> Callable[[Path], None]:
    return lambda path: write_tar(path, members)


def changed(change: Callable[[bytes], bytes]) -> Callable[[Path], None]:
    def write(path: Path) -> None:
        write_tar(path, hub_sample("n01", 3, 0, jpeg(3, 4)) + hub_sample("n01", 4, 0, jpeg(3, 4)))
        path.write_bytes(change(path.read_bytes()))

    return write


def with_size(size: bytes, kind: bytes = tarfile.REGTYPE) -> Callable[[Path], None]:
    """A member whose header states a size, in 12 bytes, that is not so."""

    def write(path: Path) -> None:
        header = bytearray(tarfile.TarInfo("1.jpg").tobuf(tarfile.GNU_FORMAT))
        header[124:136], header[156:157] = size, kind
        header[148:156] = b" " * 8
        header[148:156] = b"%06o\0 " % sum(header)
        write_tar(path, hub_sample("n01", 3, 0, jpeg(3, 4)))
        whole = path.read_bytes().rstrip(b"\0")
        whole += bytes(-len(whole) % tarfile.BLOCKSIZE)
        path.write_bytes(whole + header + bytes(10_240))

    return write


IMAGE = jpeg(3, 4)
HOSTILE: dict[str, tuple[Callable[[Path], None], str]] = {
    "symbolic link": (special(tarfile.SYMTYPE), "'1.jpg': a link"),
    "hard link": (special(tarfile.LNKTYPE), "'1.jpg': a link"),
    "device": (special(tarfile.CHRTYPE), "'1.jpg': a link, a device"),
    "fifo": (special(tarfile.FIFOTYPE), "'1.jpg': a link, a device"),
    "absolute": (of(("/etc/1.jpg", IMAGE)), "'/etc/1.jpg': a path that leads outside"),
    "traversal": (of(("a/../../1.jpg", IMAGE)), "'a/../../1.jpg': a path that leads outside"),
    "past the end": (with_size(b"77777777777\0"), "'1.jpg': 8589934591 bytes, past the end"),
    "2**80 bytes": (with_size(b"\x80\0" + b"\x01" + bytes(9)), "past the end"),
    "negative": (with_size(b"\xff" * 12), "'1.jpg': -1 bytes, past the end"),
    "long name": (with_size(b"77777777777\0", tarfile.GNUTYPE_LONGNAME), "a header of 8589934592"),
    "pax header": (with_size(b"77777777777\0", tarfile.XHDTYPE), "a header of 8589934592"),
    "negative name": (
        with_size(b"\xff\xff" * 6, tarfile.GNUTYPE_LONGNAME),
        "a header of|not a readable tar",
    ),
    "key twice": (
        of(("1.jpg", IMAGE), ("1.cls", b"0"), ("2.jpg", IMAGE), ("2.cls", b"0"), ("1.txt", b"")),
        "1.txt: members with this key are not consecutive",
    ),
    "member twice": (of(("1.jpg", IMAGE), ("1.jpg", IMAGE)), "1.jpg: is there twice"),
    "two images": (of(("1.jpg", IMAGE), ("1.png", IMAGE)), r"1: two images \(jpg, png\)"),
    "no label": (of(("1.jpg", IMAGE), ("1.txt", b"0")), "1.jpg: an image without a label"),
    "no image": (of(("1.cls", b"0")), "1.cls: a label without an image such as 1.jpg"),
    "dots": (
        of(("2023.01.7-a.jpg", jpeg(9, 9)), ("2023.01.7-a.cls", b"0")),
        "2023.01.7-a.jpg: only what comes before the first dot tells samples apart; rename the "
        "members, such as 2023-01-7-a.jpg",
    ),
    "two dots": (of(("1.2.jpg", IMAGE), ("1.2.cls", b"0")), "1.2.jpg: only what comes before"),
    "word as label": (of(("1.jpg", IMAGE), ("1.cls", b"cat")), "1.cls: 'cat' is not a label"),
    "negative label": (of(("1.jpg", IMAGE), ("1.cls", b"-1")), "1.cls: '-1' is not a label"),
    "huge label": (of(("1.jpg", IMAGE), ("1.cls", b"9" * 7)), "1.cls: '9999999' is not a label"),
    "label in words": (of(("1.jpg", IMAGE), ("1.json", b'{"label": "cat"}')), "1.json: 'cat' is"),
    "json list": (of(("1.jpg", IMAGE), ("1.json", b"[1]")), "1.jpg: an image without a label"),
    "deep json": (of(("1.jpg", IMAGE), ("1.json", b"[" * 100_000)), "1.jpg: an image without"),
    "large cls": (of(("1.jpg", IMAGE), ("1.cls", b"1" * 2**21)), "1.cls: 2097152 bytes for a lab"),
    "empty file": (changed(lambda whole: b""), "not a readable tar"),
    "no tar": (changed(lambda whole: b"<html>404</html>" * 100), "not a readable tar"),
    "cut in a member": (
        changed(lambda whole: whole[: 3 * 512 + 100]),
        "n01_3.jpg': .* past the end",
    ),
    "cut in a header": (changed(lambda whole: whole[: 7 * 512 + 100]), "truncated at byte 3584"),
    "cut between members": (changed(lambda whole: whole[: 7 * 512]), "truncated at byte 3584"),
    "a hole": (
        changed(lambda whole: whole[: 7 * 512] + b"\xaa" * 512 + whole[8 * 512 :]),
        "truncated at byte 3584",
    ),
    "a tar behind it": (changed(lambda whole: whole + whole), "damaged or truncated"),
}


@pytest.mark.parametrize("case", HOSTILE)
def test_a_hostile_or_broken_shard_is_refused(tmp_path: Path, case: str) -> None:
    write, why = HOSTILE[case]
    write(tmp_path / "train" / "0.tar")
    with pytest.raises(UserError, match=rf"train/0\.tar: .*({why})") as caught:
        build_index("shards", tmp_path, "train", tmp_path / "cache")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "cache").exists()


def test_what_prepare_has_not_finished_is_not_taken_for_all(tmp_path: Path) -> None:
    write_tar(tmp_path / "train" / "0.tar", hub_sample("n01", 3, 0, jpeg(3, 4)))
    (tmp_path / shard_files.PREPARED).write_text("{}")
    with pytest.raises(UserError, match=r"train/index\.arrow: no such file: .* not finished"):
        build_index("shards", tmp_path, "train", None)


def test_one_line_where_there_are_no_shards(tmp_path: Path) -> None:
    with pytest.raises(UserError, match=r"data\.root=.*nowhere: no such folder"):
        build_index("shards", tmp_path / "nowhere", "train", None)
    write_tar(tmp_path / "strained-0.tar", [])
    with pytest.raises(UserError, match=r"has no train shards; expected train/\*\.tar"):
        build_index("shards", tmp_path, "train", None)
    write_tar(tmp_path / "x-val-0.tar", [("README", b"")])
    with pytest.raises(UserError, match=r"x-val-0\.tar: no images in this shard"):
        build_index("shards", tmp_path, "val", None)
