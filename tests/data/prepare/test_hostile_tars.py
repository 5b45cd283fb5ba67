"""Tars that lead outside, lie about their sizes or hold special files are refused by name."""

import tarfile
from pathlib import Path

import pytest

from resnet_dist.data.prepare.write_shards import Settings, prepare_shards
from resnet_dist.errors import UserError
from tests.support.sources import (
    SPLITS,
    Photos,
    digests,
    list_train_here,
    make_ilsvrc,
    make_tar,
    photo,
)


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
        prepare_shards(source, dest, Settings(4, None), workers=1)
    assert digests(tmp_path) == before
    assert not dest.exists()
