"""What is packed for an offline machine is smaller and still works, at toy size."""

import importlib.util
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from benchmarks.offline_pack import compress, fat_binaries, keep_architecture, stub
from tests.support.paths import REPO

needs_gcc = pytest.mark.skipif(
    not all(shutil.which(tool) for tool in ("gcc", "nm", "readelf")),
    reason="needs gcc, nm and readelf",
)

# Two fat binaries in a row: kind 2 is machine code, kind 1 PTX; (kind, architecture, bytes).
FATBIN = """
.section .nv_fatbin, "a"
.balign 8
{}
"""
BINARIES = (((2, 80, 24), (2, 90, 40), (1, 90, 16)), ((2, 80, 8),))


def fat_binary(images: tuple[tuple[int, int, int], ...]) -> str:
    text = ""
    for kind, arch, size in images:
        # Header of 64 bytes: kind, version, its size, the payload's; the architecture at 28.
        text += f".short {kind}, 0\n.long 64\n.quad {size}\n.fill 12, 1, 0\n.long {arch}\n"
        text += f".fill 32, 1, 0\n.fill {size}, 1, {arch + kind}\n"
    nbytes = sum(64 + size for _, _, size in images)
    return f".long 0xba55ed50\n.short 1, 16\n.quad {nbytes}\n{text}"


def build(path: Path, source: str, language: str, *options: str) -> Path:
    command = ["gcc", "-shared", "-fPIC", *options, "-x", language, "-", "-o", str(path)]
    subprocess.run(command, input=source, text=True, check=True)
    return path


@needs_gcc
def test_code_for_other_architectures_becomes_zeros(tmp_path: Path) -> None:
    source = FATBIN.format("".join(map(fat_binary, BINARIES)))
    library = build(tmp_path / "lib.so", source, "assembler", "-nostdlib")
    before = library.read_bytes()
    found = fat_binaries(before)
    assert [[(kind, arch, size) for kind, arch, _, size in one] for one in found] == [
        list(one) for one in BINARIES
    ]
    keep_architecture(library, 90)
    after = library.read_bytes()
    assert len(after) == len(before)
    assert fat_binaries(after) == found  # headers stay
    kept = [
        after[offset : offset + size] == before[offset : offset + size]
        for one in found
        for _, _, offset, size in one
    ]
    # Where nothing is for this architecture all stays.
    assert kept == [False, True, False, True]
    changed = sum(a != b for a, b in zip(after, before, strict=True))
    assert changed == 24 + 16


@needs_gcc
def test_a_stub_is_loaded_in_place_of_the_library(tmp_path: Path) -> None:
    unused = "int used_by_none(void) { return 1; } int called(void) { return 7; }"
    big = "char large[100000] = {1}; int value = 5;" + unused
    build(tmp_path / "libbig.so", big, "c", "-Wl,-soname,libbig.so")
    user = "int called(void); extern int value; int ours(void) { return 100 + called() + value; }"
    options = (f"-L{tmp_path}", "-Wl,-rpath,$ORIGIN", "-Wl,--no-as-needed", "-lbig")
    command = ["gcc", "-shared", "-fPIC", "-x", "c", "-", "-o", str(tmp_path / "libours.so")]
    subprocess.run([*command, *options], input=user, text=True, check=True)
    call = f"import ctypes; print(ctypes.CDLL('{tmp_path}/libours.so').ours())"

    def answer() -> str:
        return subprocess.run(
            [sys.executable, "-c", call], capture_output=True, text=True, check=True
        ).stdout.strip()

    assert answer() == "112"
    size = (tmp_path / "libbig.so").stat().st_size
    stub(tmp_path, ("libbig*",))
    assert answer() == "100"
    assert (tmp_path / "libbig.so").stat().st_size < size / 5


def unpack(folder: Path, site: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "benchmarks/offline_unpack.py", str(folder), str(site)]
    return subprocess.run(command, cwd=REPO, capture_output=True, text=True)


def test_only_what_is_missing_is_unpacked(tmp_path: Path) -> None:
    folder, site = tmp_path / "folder", tmp_path / "site"
    folder.mkdir()
    for module in ("json", "not_here_at_all", "not_here.inside"):
        package = tmp_path / module / module.replace(".", "/")
        package.mkdir(parents=True)
        (package / "__init__.py").write_text("answer = 42\n")
        compress(tmp_path / module, folder / f"{module}.tar.xz")
    done = unpack(folder, site)
    assert done.returncode == 0, done.stderr
    assert done.stdout == "unpacked: not_here.inside, not_here_at_all; here already: json\n"
    assert sorted(os.listdir(site)) == ["not_here", "not_here_at_all"]
    assert importlib.util.find_spec("not_here_at_all") is None

    archive = folder / "not_here_at_all.tar.xz"
    archive.write_bytes(archive.read_bytes()[:-20])
    damaged = unpack(folder, tmp_path / "other")
    assert damaged.returncode == 1
    assert f"{archive}: damaged" in damaged.stderr
    assert "Traceback" not in damaged.stderr


def test_a_folder_without_archives_is_one_line(tmp_path: Path) -> None:
    done = unpack(tmp_path, tmp_path / "site")
    assert done.returncode == 1
    assert done.stderr == (
        f"{tmp_path}: no archives found; make them with benchmarks/offline_pack.py\n"
    )
