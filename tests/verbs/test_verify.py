"""`verify` finds what cannot train and says how the rest does; what it passes, training decodes."""

import io
import os
import random
import shutil
import struct
import tarfile
import zlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist import cli, distributed
from resnet_dist.config import Config, DataConfig
from resnet_dist.data.formats import build_index
from resnet_dist.data.index.cifar_files import CIFAR_PIXEL_BYTES
from resnet_dist.data.index.quarantine import QUARANTINE, read_quarantine
from resnet_dist.data.load.build import load_index
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.decoding import Decoding
from resnet_dist.data.view.augment import Request, eval_windows, train_windows
from tests.support.shards import write_tar

HEIGHT, WIDTH = 60, 80


def picture(seed: int = 0) -> Image.Image:
    pixels = np.random.default_rng(seed).integers(0, 256, (HEIGHT, WIDTH, 3))
    return Image.fromarray(pixels.astype(np.uint8))


def encoded(image: Image.Image, form: str = "JPEG", orientation: int = 1, **options: Any) -> bytes:
    exif = Image.Exif()
    exif[0x0112] = orientation
    file = io.BytesIO()
    image.save(file, form, exif=exif if orientation > 1 else b"", **options)
    return file.getvalue()


def png_16_bit() -> bytes:
    """RGB; Pillow cannot write it."""
    rows = np.random.default_rng(0).integers(0, 1 << 16, (HEIGHT, 3 * WIDTH)).astype(">u2")
    data = b"".join(b"\0" + row.tobytes() for row in rows)
    header = struct.pack(">IIBBBBB", WIDTH, HEIGHT, 16, 2, 0, 0, 0)
    chunks = [(b"IHDR", header), (b"IDAT", zlib.compress(data)), (b"IEND", b"")]
    return b"\x89PNG\r\n\x1a\n" + b"".join(
        struct.pack(">I", len(body)) + kind + body + struct.pack(">I", zlib.crc32(kind + body))
        for kind, body in chunks
    )


def of_size(jpeg: bytes, height: int, width: int) -> bytes:
    """The JPEG with another size in its frame header."""
    at = jpeg.index(b"\xff\xc0") + 5
    return jpeg[:at] + struct.pack(">HH", height, width) + jpeg[at + 4 :]


def ycck(cmyk: bytes) -> bytes:
    at = cmyk.index(b"Adobe") + 11  # the color transform
    return cmyk[:at] + b"\x02" + cmyk[at + 1 :]


JPEG, PROGRESSIVE = encoded(picture(1)), encoded(picture(2), progressive=True)
PNG, CMYK = encoded(picture(3), "PNG"), encoded(picture(4).convert("CMYK"))
SCAN = JPEG.index(b"\xff\xda")

# What is in the file -> name, kinds of its findings.
TRAIN_AS: dict[str, tuple[bytes, set[str]]] = {
    "plain.jpg": (JPEG, set()),
    "flat.png": (PNG, set()),
    "trailing.jpg": (JPEG + bytes(100), set()),
    "cmyk.jpg": (CMYK, {"CMYK", "by Pillow"}),
    "ycck.jpg": (ycck(CMYK), {"YCCK", "by Pillow"}),
    "gray.jpg": (encoded(picture(5).convert("L")), {"grayscale"}),
    "gray_alpha.png": (encoded(picture(6).convert("LA"), "PNG"), {"grayscale", "transparent"}),
    "rgba.png": (encoded(picture(7).convert("RGBA"), "PNG"), {"transparent"}),
    "one_bit.png": (encoded(picture(8).convert("1"), "PNG"), {"grayscale"}),
    "palette.png": (encoded(picture(9).convert("P"), "PNG"), {"palette"}),
    "clear_palette.png": (
        encoded(picture(10).convert("P"), "PNG", transparency=3),
        {"palette", "transparent"},
    ),
    "rgb16.png": (png_16_bit(), {"16-bit"}),
    "gray16.png": (
        encoded(Image.fromarray(np.arange(4800, dtype=np.uint16).reshape(60, 80)), "PNG"),
        {"16-bit", "grayscale"},
    ),
    "progressive.jpg": (PROGRESSIVE, {"progressive"}),
    "png.JPEG": (encoded(picture(11), "PNG"), {"other format"}),
    "bmp.jpg": (encoded(picture(12), "BMP"), {"other format", "by Pillow"}),
    "gif.jpg": (encoded(picture(13), "GIF"), {"other format", "palette", "by Pillow"}),
    **{
        f"turned{n}.jpg": (encoded(picture(20 + n), orientation=n), {"EXIF"} if n > 1 else set())
        for n in range(1, 9)
    },
    "flipped_bytes.jpg": (JPEG[: SCAN + 400] + b"\x55" * 20 + JPEG[SCAN + 420 :], set()),
}
CANNOT_TRAIN = {
    "empty.jpg": (b"", {"empty"}),
    "html.jpg": (b"<html><body>404</body></html>", {"corrupt"}),
    "cut_in_header.jpg": (JPEG[:100], {"truncated"}),
    "cut_before_scan.jpg": (JPEG[:SCAN], {"truncated"}),
    "cut_in_the_middle.jpg": (JPEG[: len(JPEG) // 2], {"truncated"}),
    "no_end_mark.jpg": (JPEG[:-2], {"truncated"}),
    "no_last_byte.jpg": (JPEG[:-1], {"truncated"}),
    "cut_progressive.jpg": (PROGRESSIVE[: len(PROGRESSIVE) // 2], {"truncated"}),
    "cut.png": (PNG[: len(PNG) // 2], {"truncated"}),
    "huge.jpg": (of_size(JPEG, 65500, 65500), {"corrupt"}),
    "zero.jpg": (of_size(JPEG, 0, WIDTH), {"corrupt"}),
    "damaged.png": (PNG[:5000] + bytes(50) + PNG[5050:], {"corrupt"}),
}


def write(root: Path, files: dict[str, bytes]) -> None:
    for name, data in files.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)


def unique(number: int) -> bytes:
    return encoded(picture(1000 + number))


Ran = tuple[dict[str, set[str]], str, int]


@pytest.fixture
def verify(capfd: pytest.CaptureFixture[str], tmp_path: Path) -> Callable[..., Ran]:
    """verify(root, ...): kinds by name, the list and all of stdout, exit code."""

    def run(*arguments: object) -> Ran:
        code = 0
        try:
            given = ["verify", *map(str, arguments), "--threads", "2"]
            cli.main([*given, "--list", str(tmp_path / "list.tsv")])
        except SystemExit as end:
            code = int(end.code or 0)
        out, err = capfd.readouterr()
        assert "Traceback" not in err
        found: dict[str, set[str]] = {}
        if code == 2:
            return found, err, code
        list_file = tmp_path / "list.tsv"
        listed = list_file.read_text(errors="surrogateescape") if list_file.exists() else ""
        for line in listed.splitlines():
            name, kind, _ = line.split("\t")
            found.setdefault(name, set()).add(kind)
        return found, listed.replace("\t", ": ") + out, code

    return run


@pytest.fixture
def awkward(tmp_path: Path) -> Path:
    root = tmp_path / "data"
    for split, kinds in (("train", TRAIN_AS | CANNOT_TRAIN), ("val", CANNOT_TRAIN)):
        write(root, {f"{split}/a/{name}": data for name, (data, _) in kinds.items()})
        write(root, {f"{split}/b/{n}.jpg": unique(n + len(split)) for n in range(2)})
    return root


def expected() -> dict[str, set[str]]:
    named = {f"train/a/{name}": kinds for name, (_, kinds) in (TRAIN_AS | CANNOT_TRAIN).items()}
    named |= {f"val/a/{name}": kinds for name, (_, kinds) in CANNOT_TRAIN.items()}
    return {name: kinds for name, kinds in named.items() if kinds}


def bad_names() -> set[str]:
    return {f"{split}/a/{name}" for split in ("train", "val") for name in CANNOT_TRAIN}


def test_each_kind_is_found(awkward: Path, verify: Callable[..., Ran]) -> None:
    found, out, code = verify(awkward)
    assert found == expected()
    assert code == 1
    assert "train/a/turned6.jpg: EXIF: rotated by its EXIF orientation 6" in out
    assert (
        "train/a/png.JPEG: other format: is a PNG with the suffix of a JPEG; decoded as PNG" in out
    )
    assert "train/a/empty.jpg: empty: an empty file; replaced by a stand-in" in out
    assert "val/a/no_end_mark.jpg: truncated: not a readable image (image file is truncated" in out
    assert "); counts as wrong" in out
    counts = {line.rsplit(maxsplit=3)[0]: line.split()[-3:] for line in out.splitlines() if line}
    assert counts["truncated"] == ["7", "7", "cannot"]
    assert counts["EXIF"] == ["7", "0", "trains"]
    ok = len(TRAIN_AS) + 4
    assert (
        f"{ok} of {ok + 2 * len(CANNOT_TRAIN)} images can be trained on; {2 * len(CANNOT_TRAIN)} c"
        in out
    )


def test_a_run_sets_aside_what_was_found(
    awkward: Path, verify: Callable[..., Ran], tiny_config: Callable[..., Config]
) -> None:
    config = tiny_config(f"data.root={awkward}")
    before = load_index(config, "train", distributed.start())
    verify(awkward)
    assert set(read_quarantine(awkward)) == bad_names()
    after = load_index(config, "train", distributed.start())
    names = {os.path.relpath(after.paths[sample], awkward) for sample in after.bad}
    assert names == {name for name in bad_names() if name.startswith("train")}
    assert len(before.bad) < len(after.bad)
    assert (after.sizes[list(after.bad)] == 0).all()
    assert after.fingerprint == before.fingerprint


def test_a_repaired_file_is_set_aside_no_longer(tmp_path: Path, verify: Callable[..., Ran]) -> None:
    for split in ("train", "val"):
        write(tmp_path, {f"{split}/a/{n}.jpg": unique(n + len(split)) for n in range(2)})
    write(tmp_path, {"train/a/x.jpg": JPEG[:-50], "train/a/y.jpg": JPEG[:-60]})
    assert verify(tmp_path, "--dry-run")[2] == 1
    assert not (tmp_path / QUARANTINE).exists()
    assert verify(tmp_path)[2] == 1
    assert set(read_quarantine(tmp_path)) == {"train/a/x.jpg", "train/a/y.jpg"}
    write(tmp_path, {"train/a/x.jpg": unique(20)})
    _, out, code = verify(tmp_path)
    assert "train/a/x.jpg: removed from" in out
    assert (set(read_quarantine(tmp_path)), code) == ({"train/a/y.jpg"}, 1)
    (tmp_path / "train/a/y.jpg").unlink()
    found, out, code = verify(tmp_path)
    assert (found, code) == ({}, 0)
    assert f"train/a/y.jpg: removed from {tmp_path / QUARANTINE}" in out
    assert "all 5 images can be trained on" in out
    assert not (tmp_path / QUARANTINE).exists()


def test_twins_labels_and_classes(tmp_path: Path, verify: Callable[..., Ran]) -> None:
    a, b, c = "n01440764", "n01443537", "n01484850"
    one, two, three = unique(1), unique(2), unique(3)
    write(tmp_path, {
        f"train/{a}/{a}_1.JPEG": one,
        f"train/{a}/{b}_2.JPEG": two,
        f"train/{a}/ILSVRC2012_val_00000003_{a}.JPEG": unique(4),
        f"train/{a}/{a}_4_{b}.JPEG": unique(5),
        f"train/{b}/5.jpg": one,
        f"train/{b}/6.jpg": three,
        f"train/{b}/7.jpg": three,
        f"val/{a}/8.jpg": two,
        f"val/{a}/ILSVRC2012_val_00000003_{c}.JPEG": unique(6),
        f"val/{b}/9.jpg": two,
        f"val/{c}/10.jpg": unique(7),
    })  # fmt: skip
    found, out, code = verify(tmp_path)
    assert found == {
        f"train/{a}/{b}_2.JPEG": {"other class"},
        f"val/{a}/ILSVRC2012_val_00000003_{c}.JPEG": {"other class"},
        f"train/{b}/5.jpg": {"two classes"},
        f"val/{a}/8.jpg": {"in both splits"},
        f"val/{b}/9.jpg": {"in both splits", "two classes"},
        f"val/{c}": {"class in one split"},
    }
    assert f"train/{a}/{b}_2.JPEG: other class: named after {b}; trains as {a}" in out
    assert f"train/{b}/5.jpg: two classes: same bytes as train/{a}/{a}_1.JPEG; has both" in out
    assert f"val/{a}/8.jpg: in both splits: same bytes as train/{a}/{b}_2.JPEG;" in out
    assert f"as train/{a}/{b}_2.JPEG (in a different class); training sees it" in out
    assert "but first, train and val must have the same classes" in out
    assert code == 1


def test_shards_are_looked_at_in_place(awkward: Path, verify: Callable[..., Ran]) -> None:
    root = awkward.parent / "shards"
    write(root, {"classes.txt": b"a\nb\n"})
    for split in ("train", "val"):
        (root / split).mkdir()
        with tarfile.open(root / split / "000000.tar", "w") as tar:
            for label, name in enumerate("ab"):
                for file in sorted((awkward / split / name).iterdir()):
                    parts = {file.name: file.read_bytes(), f"{file.stem}.cls": b"%d" % label}
                    for member, data in parts.items():
                        info = tarfile.TarInfo(f"{name}_{member}")
                        info.size = len(data)
                        tar.addfile(info, io.BytesIO(data))
    found, _, code = verify(root)
    in_tar = {name.replace("/a/", "/000000.tar/a_"): kinds for name, kinds in expected().items()}
    assert (found, code) == (in_tar, 1)
    assert set(read_quarantine(root)) == {n.replace("/a/", "/000000.tar/a_") for n in bad_names()}


def test_odd_names_and_an_unwritable_folder(
    tmp_path: Path, verify: Callable[..., Ran], monkeypatch: pytest.MonkeyPatch
) -> None:
    odd = os.fsdecode(b"train/a/\xff\tb\nc.jpg")
    write(tmp_path, {"train/a/1.jpg": unique(1), "val/a/1.jpg": unique(2), odd: b""})
    (tmp_path / "val/a/gone.jpg").symlink_to("nowhere")
    found, out, code = verify(tmp_path)
    assert found["val/a/gone.jpg"] == {"unreadable"}
    assert set(read_quarantine(tmp_path)) == {odd, "val/a/gone.jpg"}
    assert "\\tb\\nc.jpg: empty: an empty file" in out
    (tmp_path / QUARANTINE).unlink()

    def read_only(*_: Any, **__: Any) -> None:
        raise OSError(30, "Read-only file system")

    monkeypatch.setattr(os, "replace", read_only)
    _, out, code = verify(tmp_path)
    assert f"{tmp_path / QUARANTINE}: cannot be written: Read-only file system; run" in out
    assert code == 1


def test_exit_codes(tiny_folder: Path, tmp_path: Path, verify: Callable[..., Ran]) -> None:
    found, out, code = verify(tiny_folder)
    assert (found, code) == ({}, 0)
    assert "all 47 images can be trained on" in out
    _, err, code = verify(tmp_path / "nowhere")
    assert code == 2
    assert err.count("\n") == 1
    assert "nowhere: no such folder" in err
    shutil.copytree(tiny_folder, tmp_path / "half")
    shutil.rmtree(tmp_path / "half" / "val")  # with data.holdout_images there need be none
    assert verify(tmp_path / "half")[2] == 0
    (tmp_path / "half" / "train").rename(tmp_path / "half" / "val")
    assert verify(tmp_path / "half")[2] == 2


@pytest.mark.parametrize("form", ["cifar10", "cifar100"])
def test_cifar(tmp_path: Path, form: str, verify: Callable[..., Ran]) -> None:
    labels = 1 if form == "cifar10" else 2
    train = [f"data_batch_{n}.bin" for n in range(1, 6)] if labels == 1 else ["train.bin"]
    test = "test_batch.bin" if labels == 1 else "test.bin"
    write(tmp_path, dict.fromkeys([*train, test], bytes(labels + CIFAR_PIXEL_BYTES)))
    _, out, code = verify(tmp_path)
    assert code == 0
    assert f"all {len(train) + 1} images of {form} can be trained on" in out
    write(tmp_path, {test: b"\xff" * (labels + CIFAR_PIXEL_BYTES)})
    assert verify(tmp_path)[2] == 2
    write(tmp_path, {test: bytes(CIFAR_PIXEL_BYTES)})
    assert verify(tmp_path)[2] == 2


def damaged(original: bytes, rng: random.Random) -> bytes:
    """Cut somewhere, or with other bytes in its header or anywhere."""
    kind = rng.randrange(3)
    if kind == 0:
        return original[: rng.randrange(1, len(original))]
    data = bytearray(original)
    for _ in range(rng.choice((1, 3, 30))):
        data[rng.randrange(len(data) if kind == 1 else 700)] = rng.randrange(256)
    return bytes(data)


@pytest.mark.parametrize("decode", ["window", "image"])
def test_what_passes_decodes_in_training(
    tmp_path: Path, decode: Any, verify: Callable[..., Ran]
) -> None:
    """Through any window. And what fails there was found: the damage below a window, too."""
    rng, kinds = random.Random(0), {"jpg": (JPEG, PROGRESSIVE, CMYK), "png": (PNG,)}
    for suffix, originals in kinds.items():
        for n in range(40):
            data = damaged(originals[n % len(originals)], rng)
            write(tmp_path, {f"train/a/{n}.{suffix}": data})
    write(tmp_path, {"val/a/1.jpg": JPEG})
    verify(tmp_path)
    passed = set(range(80)) - {
        sample
        for sample, path in enumerate(build_index("folder", tmp_path, "train", None).paths)
        if os.path.relpath(path, tmp_path) in read_quarantine(tmp_path)
    }
    assert 15 < len(passed) < 65
    failed: set[int] = set()
    for crop in ("scale", "random_resized"):
        data = DataConfig(
            train_crop=crop,  # type: ignore[arg-type]
            crop_px=16,
            scale_px=(32, 64),
            eval_resize_px=32,
            eval_crop_px=16,
            max_bad_samples=80,
        )
        index = build_index("folder", tmp_path, "train", None)
        loader = Loader(
            index,
            data,
            device=torch.device("cpu"),
            dtype=torch.float32,
            max_batch_size=20,
            decoding=Decoding(decode),
        )
        requests = []
        for epoch in range(2):
            for part in np.split(np.arange(80), 4):
                sizes = index.sizes[part]
                requests.append(Request(part, train_windows(data, 0, epoch, part, sizes)))
                requests.append(Request(part, eval_windows(data, sizes)))
        for split in (requests[::2], requests[1::2]):
            assert len(list(loader.batches(split))) == 8
        failed |= loader.bad.keys()
    assert not failed & passed
    assert failed  # or this test shows nothing


def test_kinds_are_grouped_and_what_matters_is_named(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    gray = {f"train/a/gray{n}.jpg": encoded(picture(n).convert("L")) for n in range(30)}
    cut = {f"train/b/cut{n:02}.jpg": unique(n)[:-60] for n in range(12)}
    write(tmp_path, {**gray, **cut, "val/a/0.jpg": unique(90), "val/b/0.jpg": unique(91)})
    with pytest.raises(SystemExit):
        cli.main(["verify", str(tmp_path), "--dry-run", "--list", str(tmp_path / "list.tsv")])
    out = capsys.readouterr().out.splitlines()
    assert out[0] == f"{tmp_path}: folder, classes: 2 (a, b)"
    (line,) = (line for line in out if "grayscale, such" in line)
    assert line.startswith("train: 30 grayscale, such as train/a/gray0.jpg: its gray is used")
    assert len([line for line in out if line.startswith("train/b/cut")]) == 10
    assert "train: truncated: and 2 more; --list FILE names them" in out
    listed = (tmp_path / "list.tsv").read_text().splitlines()
    assert len(listed) == 42
    assert listed[-1].split("\t")[:2] == ["train/b/cut11.jpg", "truncated"]


def test_shards_without_val_are_verified_alone(tmp_path: Path, verify: Callable[..., Ran]) -> None:
    members = [
        (f"{n}.{kind}", data)
        for n in range(4)
        for kind, data in (("jpg", unique(n)), ("cls", b"%d" % (1 + n % 2)))
    ]
    write_tar(tmp_path / "data/train/0.tar", members)
    _, out, code = verify(tmp_path / "data")
    assert code == 0
    assert "note: train: 1 of 3 classes have no image: 0000 (labels count from 0)" in out
    assert "all 4 images can be trained on" in out
