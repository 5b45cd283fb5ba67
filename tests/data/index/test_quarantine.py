"""bad_samples.tsv: what is written is what is read, whatever a file system allows as a name."""

import os
from pathlib import Path

import pytest

from resnet_dist.data.index.quarantine import QUARANTINE, read_quarantine, write_quarantine
from resnet_dist.errors import UserError

ODD_NAMES = [
    os.fsdecode(b"train/\xff\xfe.jpg"),  # no UTF-8
    "train/größe 1/é\u2028ü\x85.jpg",  # line ends to Python, not to a file system
    "train/a\tb\nc\rd.jpg",
    "train/\\t.jpg",
    "train/ends in \\",
    "val/000000.tar/ x .jpg",
    "\r",
]


def test_any_name_comes_back(tmp_path: Path) -> None:
    bad = {name: f"truncated\t({number})\r\n" for number, name in enumerate(ODD_NAMES)}
    write_quarantine(tmp_path, bad)
    assert read_quarantine(tmp_path) == bad
    assert os.listdir(tmp_path) == [QUARANTINE]
    lines = (tmp_path / QUARANTINE).read_bytes().split(b"\n")
    assert lines.pop() == b""
    assert len(lines) == len(bad)
    assert all(line.count(b"\t") == 1 for line in lines)


def test_sorted_whatever_the_order_it_was_found_in(tmp_path: Path) -> None:
    write_quarantine(tmp_path, {"val/b": "2", "train/a": "1"})
    assert (tmp_path / QUARANTINE).read_text() == "train/a\t1\nval/b\t2\n"
    write_quarantine(tmp_path, {"train/c": "3"})  # in place of the old one
    assert read_quarantine(tmp_path) == {"train/c": "3"}
    write_quarantine(tmp_path, {})
    assert os.listdir(tmp_path) == []
    assert read_quarantine(tmp_path) == {}


def test_a_failed_write_keeps_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    write_quarantine(tmp_path, {"train/a": "1"})

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(OSError, match="No space left"):
        write_quarantine(tmp_path, {"train/b": "2"})
    assert read_quarantine(tmp_path) == {"train/a": "1"}
    assert os.listdir(tmp_path) == [QUARANTINE]


def test_edited_by_hand(tmp_path: Path) -> None:
    """Windows' line ends and empty lines do no harm; a line without a reason is told."""
    (tmp_path / QUARANTINE).write_bytes(b"train/a\tblurred\r\n\r\n\ntrain/b\tmine\\no\n")
    assert read_quarantine(tmp_path) == {"train/a": "blurred", "train/b": "mine\no"}
    (tmp_path / QUARANTINE).write_bytes(b"train/a\tblurred\n\ntrain/b blurred\n")
    with pytest.raises(UserError, match=r"bad_samples\.tsv:3: has no tab") as caught:
        read_quarantine(tmp_path)
    assert "\n" not in str(caught.value)
    (tmp_path / QUARANTINE).unlink()
    (tmp_path / QUARANTINE).mkdir()
    with pytest.raises(UserError, match=r"bad_samples\.tsv: not a regular file"):
        read_quarantine(tmp_path)
