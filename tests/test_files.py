"""Files, folders and links are there whole or not at all, and their names reach the disk."""

import errno
import os
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from resnet_dist import files
from resnet_dist.files import (
    flush_file,
    new_folder,
    regular,
    replace_file,
    replace_link,
    replacing,
)


@pytest.fixture
def calls(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> list[str]:
    """What is flushed and renamed, in order, by the names that count."""
    done: list[str] = []
    fsync, replace, rename = os.fsync, os.replace, os.rename

    def watched_fsync(descriptor: int) -> None:
        path = Path(os.readlink(f"/proc/self/fd/{descriptor}"))
        done.append(f"flush {'folder' if path == tmp_path else 'content'}")
        fsync(descriptor)

    def watched(function: Callable[..., None]) -> Callable[..., None]:
        def call(source: Any, target: Any) -> None:
            function(source, target)
            done.append(f"name {Path(target).name}")

        return call

    monkeypatch.setattr(os, "fsync", watched_fsync)
    monkeypatch.setattr(os, "replace", watched(replace))
    monkeypatch.setattr(os, "rename", watched(rename))
    return done


def test_the_content_comes_before_the_name_and_the_name_is_flushed(
    tmp_path: Path, calls: list[str]
) -> None:
    replace_file(tmp_path / "a", "text")
    assert calls == ["flush content", "name a", "flush folder"]
    calls.clear()
    with new_folder(tmp_path / "b") as folder:
        (folder / "inner").write_text("x")
        flush_file(folder / "inner")
    assert calls == ["flush content", "flush content", "name b", "flush folder"]
    calls.clear()
    replace_link(tmp_path / "c", "b")
    assert calls == ["name c", "flush folder"]
    assert (tmp_path / "c" / "inner").read_text() == "x"


@pytest.mark.parametrize("call", ["fsync", "replace"])
def test_what_fails_leaves_the_old_one_and_nothing_else(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, call: str
) -> None:
    replace_file(tmp_path / "a", "old")

    def full(*_: Any) -> None:
        raise OSError(errno.ENOSPC, "No space left on device")

    monkeypatch.setattr(os, call, full)
    with pytest.raises(OSError, match="No space"):
        replace_file(tmp_path / "a", b"new")
    with pytest.raises(OSError, match="No space"):
        replace_link(tmp_path / "a", "elsewhere") if call == "replace" else full()
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    assert (tmp_path / "a").read_text() == "old"


def test_an_error_in_the_block_is_not_hidden(tmp_path: Path) -> None:
    with pytest.raises(ZeroDivisionError), replacing(tmp_path / "new" / "a") as file:
        file.write(b"x" * (1 // 0))
    with pytest.raises(ZeroDivisionError), new_folder(tmp_path / "new" / "b") as folder:
        (folder / "inner").write_text("x" * (1 // 0))
    assert list((tmp_path / "new").iterdir()) == []


def test_nothing_else_renames_a_file_into_place() -> None:
    """A second way to write a file whole would be one that forgets a flush."""
    package = Path(files.__file__).parent
    users = [
        path.relative_to(package)
        for path in package.rglob("*.py")
        if re.search(r"os\.replace|NamedTemporaryFile", path.read_text())
    ]
    assert users == [Path("files.py")]


def test_the_umask_says_who_may_read(tmp_path: Path) -> None:
    before = os.umask(0o027)
    try:
        replace_file(tmp_path / "a", "x")
    finally:
        os.umask(before)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o640


FILE_SERVER = """
import fcntl, os, signal, sys
lease = os.open(sys.argv[1], os.O_RDONLY)
signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGIO])
fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_WRLCK)
print("leased", flush=True)
signal.sigwait([signal.SIGIO])
fcntl.fcntl(lease, fcntl.F_SETLEASE, fcntl.F_UNLCK)
"""


def test_a_file_that_is_leased_is_waited_for(tmp_path: Path) -> None:
    """A file server gives up its lease once somebody else opens the file."""
    path = tmp_path / "photo.jpg"
    path.write_bytes(b"pixels")
    command = [sys.executable, "-c", FILE_SERVER, str(path)]
    with subprocess.Popen(command, stdout=subprocess.PIPE) as server:
        assert server.stdout is not None
        if server.stdout.readline() != b"leased\n":
            pytest.skip("no leases on this file system")
        with open(path, "rb", opener=regular) as file:
            assert file.read() == b"pixels"
            assert os.get_blocking(file.fileno())
    assert server.returncode == 0
