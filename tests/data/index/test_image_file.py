"""The bytes of an image file, whatever the file system does."""

import os
from pathlib import Path

import pytest

from resnet_dist.data.index import image_file
from resnet_dist.data.index.image_file import UnreadableImage, read_image_file


def test_a_file_that_arrives_in_pieces_is_read_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A file system may return less than what was asked for."""
    content = bytes(range(256)) * 40
    path = tmp_path / "image"
    path.write_bytes(content)
    whole = os.read
    monkeypatch.setattr(os, "read", lambda file, nbytes: whole(file, min(nbytes, 1000)))
    assert read_image_file(str(path)) == content


def test_an_empty_file_has_no_bytes(tmp_path: Path) -> None:
    (tmp_path / "image").touch()
    assert read_image_file(str(tmp_path / "image")) == b""


def test_a_file_is_closed_also_if_it_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(image_file, "MAX_IMAGE_BYTES", 10)
    path = tmp_path / "image"
    path.write_bytes(bytes(11))
    before = os.listdir("/proc/self/fd")
    with pytest.raises(UnreadableImage, match="11 bytes, too large"):
        read_image_file(str(path))
    assert os.listdir("/proc/self/fd") == before
