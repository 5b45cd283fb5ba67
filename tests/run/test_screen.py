"""What reaches the user's screen: names of any kind, and no lines of the image libraries."""

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from resnet_dist.errors import MAX_LINE, UserError, shortened, some_of
from tests.support.images import encoded
from tests.support.slow import slow
from tests.support.waiting import HANG_SECONDS

LATIN1 = b"caf\xe9"
SCREENS = {
    "utf-8": {"PYTHONIOENCODING": "utf-8"},
    "ascii": {"PYTHONIOENCODING": "ascii"},
    "C": {"LC_ALL": "C", "PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0"},
}


def run(*arguments: object, **environment: str) -> subprocess.CompletedProcess[bytes]:
    command = [sys.executable, "-m", "resnet_dist", *map(str, arguments)]
    return subprocess.run(
        command, capture_output=True, env=os.environ | environment, timeout=HANG_SECONDS
    )


@pytest.fixture
def odd_names(tiny_folder: Path, tmp_path: Path) -> Path:
    """A class and bad images whose names are not UTF-8, or not ASCII."""
    root = os.fsencode(tmp_path / "data")
    shutil.copytree(os.fsencode(tiny_folder), root)
    for split in (b"train", b"val"):
        os.rename(os.path.join(root, split, b"class0"), os.path.join(root, split, LATIN1))
        os.rename(os.path.join(root, split, b"class1"), os.path.join(root, split, "Größe".encode()))
    for name in (LATIN1 + b".jpg", "猫.jpg".encode()):
        with open(os.path.join(root, b"train", LATIN1, name), "wb") as file:
            file.write(b"no image")
    return tmp_path / "data"


@pytest.mark.parametrize("screen", [*SCREENS])
def test_verify_prints_names_that_the_screen_lacks(odd_names: Path, screen: str) -> None:
    done = run("verify", odd_names, "--dry-run", **SCREENS[screen])
    assert done.returncode == 1, done.stderr
    lines = done.stdout.splitlines()
    assert any(line.startswith(b"train/" + LATIN1 + b"/" + LATIN1 + b".jpg: ") for line in lines)
    cat = "猫" if screen != "ascii" else r"\u732b"
    assert any(f"/{cat}.jpg: corrupt".encode() in line for line in lines)


@pytest.mark.parametrize("screen", [slow("utf-8"), "ascii", slow("C")])
def test_names_that_the_screen_lacks_end_no_run(
    odd_names: Path, tiny_yaml: Path, screen: str
) -> None:
    training = ("train", tiny_yaml, f"data.root={odd_names}", "train.epochs=1", "name=odd")
    done = run(*training, **SCREENS[screen])
    assert done.returncode == 0, done.stderr
    assert b"finished at step" in done.stdout
    assert LATIN1 + b".jpg: not a readable image" in done.stdout
    assert b"classes          3 (Gr" in done.stdout


def test_lines_of_image_libraries_do_not_reach_the_screen(tmp_path: Path) -> None:
    """Several kinds of damage, of which nvImageCodec and libjpeg speak, without a file's name."""
    for split in ("train", "val"):
        (tmp_path / split / "a").mkdir(parents=True)
    whole = encoded(Image.effect_noise((320, 240), 90).convert("RGB"), "JPEG")
    scan = whole.index(b"\xff\xda") + 200
    damaged = {
        "cut": whole[: len(whole) // 3],
        "cut-in-scan": whole[: len(whole) // 2] + b"\xff\xd9",
        "flipped": whole[:scan] + bytes(60) + whole[scan + 60 :],
        "marker": whole[:scan] + b"\xff\xd3\xff\xc0" * 20 + whole[scan:],
        "table": whole.replace(b"\xff\xc4", b"\xff\xef", 1),
    }
    for number, (name, data) in enumerate(damaged.items()):
        (tmp_path / f"train/a/{name}.jpg").write_bytes(data)
        (tmp_path / f"val/a/{number}.jpg").write_bytes(whole)
    done = run("verify", tmp_path, "--dry-run")
    (line,) = done.stderr.decode().splitlines()
    assert re.fullmatch(r"10 images in \d+:\d\d, [\d,]+ img/s", line)
    assert b"train/a/cut.jpg: truncated" in done.stdout


def test_what_a_crash_says_passes_the_filter() -> None:
    program = (
        "import os, sys; from resnet_dist.process import set_up_process;"
        "from resnet_dist.run.stderr_filter import filter_stderr;"
        "set_up_process(); filter_stderr(); print('python', file=sys.stderr);"
        r"os.write(2, b'\x1b[0;31m[ERROR] \x1b[0m[libjpeg_turbo_decoder] Could not decode\n');"
        r"os.write(2, b'Corrupt JPEG data: premature end of data segment\n');"
        r"os.write(2, b'terminate called after throwing\n  what(): lost'); os.abort()"
    )
    done = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, timeout=HANG_SECONDS
    )
    assert done.returncode < 0
    assert sorted(done.stderr.splitlines()) == [
        b"  what(): lost",
        b"python",
        b"terminate called after throwing",
    ]


def test_no_line_is_too_long() -> None:
    long = UserError(f"x: {', '.join(map(str, range(9999)))}; remove it")
    line = shortened(f"resnet-dist: {long}")
    assert len(line) == MAX_LINE
    assert line.startswith("resnet-dist: x: 0, 1")
    assert line.endswith("; remove it")
    assert shortened("short") == "short"
    assert some_of(list("abcdef")) == "a, b, c, d, e and 1 more"
    assert some_of(list("ab")) == "a, b"
