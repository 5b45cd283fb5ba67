"""`predict`: the network's own answers, a row per image, whatever lies among the images."""

import csv
import io
import os
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist import cli, distributed
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.data.load.batch import Batch
from resnet_dist.data.view.augment import Request, center_windows
from resnet_dist.job import Job, build, save
from resnet_dist.models.build import build_model
from resnet_dist.run.meter import Meter
from resnet_dist.verbs.predict import classify, find_images
from resnet_dist.verbs.trained import load_trained
from tests.support.multirank import run_ranks
from tests.support.paths import REPO

Rows = list[list[str]]


@pytest.fixture
def config(request: pytest.FixtureRequest, tiny_config: Callable[..., Config]) -> Config:
    """Batches of 4, and values that are not the defaults."""
    seen = ("data.eval_resize_px=40", "data.mean=[0.2, 0.3, 0.4]", "train.max_local_batch_size=4")
    return tiny_config(*seen, *getattr(request, "param", ()))


@pytest.fixture
def run(config: Config) -> Path:
    """The run folder of a network with random weights, whose answers differ from image to image."""
    job = build(config, distributed.start())
    model, images = job.state.model, torch.cat([b.images for b in val_batches(job)])
    for bn in (layer for layer in model.modules() if isinstance(layer, torch.nn.BatchNorm2d)):
        bn.momentum = 1.0
    with torch.no_grad():
        torch.nn.init.normal_(model.fc.weight)  # type: ignore[union-attr, arg-type]
        model.fc.bias -= model(images).mean(dim=0)  # type: ignore[union-attr, operator]
    save(job, Meter(job.world))
    job.saver.finish()
    return config.run_dir


def predict(capsys: pytest.CaptureFixture[str], *arguments: object) -> tuple[Rows, list[str], int]:
    """Rows of `predict --csv`, lines of stderr, exit code."""
    code = 0
    try:
        cli.main(["predict", *map(str, arguments), "--csv"])
    except SystemExit as end:
        code = int(end.code or 0)
    out, err = capsys.readouterr()
    return list(csv.reader(io.StringIO(out))), err.splitlines(), code


def val_batches(job: Job) -> Iterator[Batch]:
    sizes = job.val_index.sizes
    parts = np.split(np.arange(17), [3, 6, 10, 14])
    requests = (Request(part, center_windows(sizes[part], 40, 32)) for part in parts)
    return job.val_loader.batches(requests)


def by_hand(config: Config) -> torch.Tensor:
    """float32 [17, 3]: the probabilities of the val images, in the order of their paths."""
    images = torch.cat([batch.images for batch in val_batches(build(config, distributed.start()))])
    saved = Checkpoint.load(config.run_dir)
    model = build_model("resnet20", 3).eval()
    model.load_state_dict(saved.model)
    with torch.no_grad():
        return model(images).softmax(dim=1)


@pytest.mark.parametrize("config", [(), ("data.per_pixel_mean=true",)], indirect=True)
def test_answers_are_the_networks(
    config: Config, run: Path, tiny_folder: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    expected = by_hand(config).sort(dim=1, descending=True)
    paths = [str(path) for path in sorted((tiny_folder / "val").rglob("*.jpg"))]
    rows, err, code = predict(capsys, run, tiny_folder / "val")
    assert rows[0] == ["path", "class", "probability"]
    assert [row[0] for row in rows[1:]] == paths
    assert [row[1] for row in rows[1:]] == [f"class{n}" for n in expected.indices[:, 0]]
    assert [float(row[2]) for row in rows[1:]] == pytest.approx(
        expected.values[:, 0].tolist(), abs=2e-6
    )
    assert len({row[1] for row in rows[1:]}) > 1  # or the test could not see a wrong order
    assert (err, code) == ([], 0)

    rows, _, _ = predict(capsys, run / "checkpoints/latest", "--top", 3, *paths[:5])
    header = "path class1 probability1 class2 probability2 class3 probability3"
    assert rows[0] == header.split()
    for row, numbers, values in zip(rows[1:], expected.indices, expected.values, strict=False):
        assert row[1::2] == [f"class{n}" for n in numbers]
        assert [float(text) for text in row[2::2]] == pytest.approx(values.tolist(), abs=2e-6)


def test_unreadable_images_do_not_stop_the_others(
    run: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Bad in their header, or only in their pixels, in the midst of a batch of good ones."""
    folder = tmp_path / "photos"
    (folder / "inner").mkdir(parents=True)
    photos = sorted((tiny_folder / "val").rglob("*.jpg"))[:9]
    for number, photo in enumerate(photos):
        (folder / f"inner/{number}.jpg").symlink_to(photo)
    alone, _, _ = predict(capsys, run, folder)
    (folder / "inner/2b.jpg").write_text("no image")
    pixels = np.random.default_rng(0).integers(0, 256, (50, 50, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(folder / "inner/5b.png")
    whole = (folder / "inner/5b.png").read_bytes()
    (folder / "inner/5b.png").write_bytes(whole[: len(whole) // 2])  # the header is sound
    (folder / "inner/.hidden.jpg").write_text("not looked at")
    (folder / "inner/notes.txt").write_text("not looked at")
    os.mkfifo(folder / "inner/pipe.jpg")
    missing = tmp_path / "missing.jpg"
    rows, err, code = predict(capsys, run, folder, missing)
    assert rows == alone
    assert len(rows) == 10
    assert code == 1
    named = {line.partition(": ")[0] for line in err}
    inner = {f"{folder}/inner/{name}" for name in ("2b.jpg", "5b.png", "pipe.jpg")}
    assert named == {*inner, str(missing)}
    assert len(err) == 4
    # None at all is readable: as many lines.
    rows, err, code = predict(capsys, run, missing, folder / "inner/5b.png")
    assert (len(rows), len(err), code) == (1, 2, 1)


def test_odd_images_are_predicted(
    run: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """What shows the same picture has the same answer, within the rounding of JPEG."""
    ramp = np.linspace(0, 255, 60)
    picture = np.stack(np.broadcast_arrays(ramp[:48, None], ramp, 128), axis=2).astype(np.uint8)
    image = Image.fromarray(picture)
    turned = Image.Exif()
    turned[0x0112] = 6  # to be turned by 90 degrees clockwise
    odd = {"upright": (image, b""), "damaged": (image, b"Exif\0\0II*\0")}
    odd["turned"] = image.transpose(Image.Transpose.ROTATE_90), turned.tobytes()
    odd["cmyk"] = image.convert("CMYK"), b""
    odd["grey"] = image.convert("L"), b""
    odd["pixel"] = Image.new("RGB", (1, 1)), b""
    for name, (content, exif) in odd.items():
        content.save(tmp_path / f"{name}.jpg", quality=100, subsampling=0, exif=exif)
    rows, err, code = predict(capsys, run, *(tmp_path / f"{name}.jpg" for name in odd))
    assert (err, code) == ([], 0)
    upright, damaged, turned_row, cmyk, *_ = rows[1:]
    for row in (damaged, turned_row, cmyk):
        assert row[1] == upright[1]
        assert float(row[2]) == pytest.approx(float(upright[2]), abs=0.05)
    assert len(rows) == 7


def answers(rank: int, world_size: int, run: Path, folder: Path) -> list[bool]:
    """Of each image, whether it was predicted."""
    world = distributed.start()
    found = classify(load_trained(run, [], world), find_images([str(folder)]), world)
    return [not isinstance(answer, str) for _, answer in found]


@pytest.mark.parametrize("config", [("train.max_local_batch_size=64",)], indirect=True)
def test_bad_headers_do_not_end_the_process(run: Path, tiny_folder: Path, tmp_path: Path) -> None:
    """DALI 2.4 lets them, in a large batch: see classify. Two of 64 end where their pixels should
    start; in a process of its own."""
    photo = (tiny_folder / "val/class0/0.jpg").read_bytes()
    (tmp_path / "photos").mkdir()
    for number in range(64):
        content = photo[: photo.index(b"\xff\xda")] if number in (32, 33) else photo
        (tmp_path / f"photos/{number:02}.jpg").write_bytes(content)
    (found,) = run_ranks(answers, 1, run, tmp_path / "photos", init_process_group=False)
    assert found == [number not in (32, 33) for number in range(64)]


def test_any_file_name_is_a_row(
    run: Path, tiny_folder: Path, tmp_path: Path, capsysbinary: pytest.CaptureFixture[bytes]
) -> None:
    photo = tiny_folder / "val/class0/0.jpg"
    for name in (b'a, "b"\n.jpg', b"\xe9t\xe9.jpg"):  # the second is no UTF-8
        os.symlink(photo, os.path.join(os.fsencode(tmp_path), name))
    cli.main(["predict", str(run), str(tmp_path), "--csv"])
    text = capsysbinary.readouterr().out.decode(errors="surrogateescape")
    rows = list(csv.reader(io.StringIO(text)))
    assert [os.fsencode(row[0]) for row in rows[1:]] == [
        os.path.join(os.fsencode(tmp_path), name) for name in (b'a, "b"\n.jpg', b"\xe9t\xe9.jpg")
    ]


def test_the_table_is_aligned(
    run: Path,
    tiny_folder: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tiny_folder)
    cli.main(["predict", str(run), "./val/class1", "val/class0/0.jpg", "--top", "2"])
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 8
    assert [line.split()[0] for line in lines[1:]] == [
        *(f"./val/class1/{number}.jpg" for number in range(6)),
        "val/class0/0.jpg",
    ]
    for column in ("class1", "class2"):
        assert {line[lines[0].index(column) :][:5] for line in lines[1:]} == {"class"}


def test_what_cannot_be_predicted_is_one_line(
    run: Path, tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "empty").mkdir()
    for arguments, line in [
        ((run, tmp_path / "empty"), "empty: no image files found (.jpg, "),
        ((run, tiny_folder, "--top", 4), f"--top 4: {run} has 3 classes; give at most that many"),
        ((tmp_path, tiny_folder), f"{tmp_path}: no checkpoint"),
    ]:
        rows, err, code = predict(capsys, *arguments)
        assert (rows, code, len(err)) == ([], 2, 1)
        assert line in err[0]


def test_a_reader_may_leave(run: Path, tiny_folder: Path) -> None:
    """As `head` does."""
    command = [sys.executable, "-m", "resnet_dist", "predict", str(run), str(tiny_folder)]
    with subprocess.Popen(
        command, cwd=REPO, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        assert process.stderr is not None
        process.stdout.close()
        assert process.stderr.read() == ""
    assert process.returncode == 141
