"""The benchmarks run, at toy size, and what they call the same is the same. No timing."""

import json
import shutil
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from resnet_dist.bench.memory import growth_of
from resnet_dist.bench.order import class_entropy, reads_of
from resnet_dist.bench.peers import loaders as peers
from resnet_dist.bench.peers.loaders import Work
from resnet_dist.bench.photos import as_shards, photo_folder
from resnet_dist.bench.results import versions
from resnet_dist.cli import main
from resnet_dist.config import DataConfig
from resnet_dist.config_file import load_config
from resnet_dist.data.view.order import BLOCK_IMAGES, block_order, epoch_order
from resnet_dist.errors import UserError

LEVELS = 255 * torch.tensor([0.229, 0.224, 0.225]).view(3, 1, 1)  # from normalised to 0..255


@pytest.fixture(scope="module")
def folder(tiny_folder: Path) -> Iterator[Path]:
    with photo_folder(tiny_folder, most=20) as root:
        yield root


def work(folder: Path, crop: Any = "random_resized") -> Work:
    """Seven batches of 8: the 20 photos are listed as an epoch of 24."""
    data = DataConfig(
        root=str(folder), train_crop=crop, scale_px=(32, 40), crop_px=32, decode_threads=1
    )
    return Work(data, images=24, batch_size=8, batches=7, device="cpu", run_root=str(folder))


@pytest.mark.parametrize("crop", ["random_resized", "scale"])
def test_torchvision_sees_the_windows_that_we_see(folder: Path, crop: str) -> None:
    """Over more than two epochs. Pillow rounds to whole grey levels, and treats the border of an
    image otherwise: measured 0.4 of a level. Other windows, or no flip, differ by 40."""
    one = work(folder, crop)
    pairs = zip(peers.ours(one), peers.torchvision_same_windows(one), strict=True)
    for number, (ours, theirs) in enumerate(pairs):
        assert ours.shape == theirs.shape == (8, 3, 32, 32)
        assert ((ours - theirs).abs() * LEVELS).mean() < 1.0, number


@pytest.mark.parametrize("crop", ["random_resized", "scale"])
def test_plain_c_does_the_same_work(folder: Path, crop: str) -> None:
    """Measured 0.004 of a level on photos, and 0.12 on this noise: the first column of a window
    differs, where libjpeg interpolates chroma without its neighbour."""
    try:
        peers.plain_c()
    except UserError as error:
        pytest.skip(str(error))
    one = work(folder, crop)
    for ours, theirs in zip(peers.ours(one), peers.plain_c_loader(one), strict=True):
        assert ours.shape == theirs.shape == (8, 3, 32, 32)
        assert ((ours - theirs).abs() * LEVELS).mean() < 0.3


def test_shards_are_the_same_photos(folder: Path) -> None:
    files = work(folder)
    shards = replace(files, data=replace(files.data, format="shards", root=str(as_shards(folder))))
    index, other = peers.index_of(files), peers.index_of(shards)
    assert other.labels.tolist() == index.labels.tolist()
    assert other.sizes.tolist() == index.sizes.tolist()
    assert other.nbytes is not None
    sizes_in_files = [Path(path).stat().st_size for path in index.paths]
    assert other.nbytes.tolist() == sizes_in_files


def test_photos_are_chosen_from_any_folder(tiny_folder: Path, tmp_path: Path) -> None:
    (tmp_path / "broken.jpg").write_bytes(b"no picture")
    with pytest.raises(UserError, match="none of its photos"), photo_folder(tmp_path, most=5):
        pass
    (tmp_path / "b.jpg").symlink_to(next(tiny_folder.rglob("*.jpg")))
    with photo_folder(tmp_path, most=5) as root:
        assert len(list((root / "train").rglob("*.jpg"))) == 1  # without the broken one
    with pytest.raises(UserError, match="no photos found"), photo_folder(tmp_path / "x", most=5):
        pass


@pytest.mark.parametrize("name", [".photos", "lost+found", "two\nlines"])
def test_photos_may_be_in_a_folder_of_any_name(
    name: str, tiny_folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    shutil.copytree(tiny_folder / "train/class0", tmp_path / name)
    (tmp_path / name / "inner").mkdir()
    monkeypatch.chdir(tmp_path / name / "inner")
    for given in (tmp_path / name, Path("..")):
        with photo_folder(given, most=5) as root:
            index = peers.index_of(work(root))
            assert (len(set(index.paths)), len(index.classes)) == (5, 1)


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    """What a benchmark writes."""
    path = tmp_path / "figures.json"
    main(["bench", *arguments, "--no-wait", "--output", str(path)])
    written = json.loads(path.read_text())
    assert written["benchmark"] == arguments[0] or "--tune" in arguments
    assert {"cpu", "cores", "gpu", "torch", "pillow"} <= written["machine"].keys()
    return written


def test_the_versions_are_of_what_is_installed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Also DALI for CUDA 12, in place of the one for CUDA 13."""
    assert "nvidia-dali-cuda120" not in versions()
    about = tmp_path / "nvidia_dali_cuda120-2.4.0.dist-info"
    about.mkdir()
    (about / "METADATA").write_text("Name: nvidia-dali-cuda120\nVersion: 2.4.0\n")
    monkeypatch.syspath_prepend(tmp_path)
    assert versions()["nvidia-dali-cuda120"] == "2.4.0"


TOY = ["--batch-size", "4", "--threads", "1", "--images", "12", "--runs", "1"]


@pytest.mark.slow
def test_loaders_side_by_side(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    loaders = figures(tmp_path, "loader", str(tiny_folder), *TOY)["loaders"]
    names = [one["loader"] for one in loaders if one["train_crop"] == "random_resized"]
    assert [name.partition(",")[0] for name in names if "cache" not in name] == [
        *["ours"] * 2,
        *["torchvision"] * 2,
        "DALI's reader",
        "plain C",
        "libjpeg-turbo",
    ]
    for one in loaders:
        assert len(one["runs"]) == 1
        assert min(run["images_per_sec"] for run in one["runs"]) > 0
        assert one["cpu_ms_per_image"] > 0
    assert loaders[0]["ours_is_times_as_fast"] == 1
    assert "torchvision, same windows" in capsys.readouterr().out


def test_loaders_of_ours_alone(tiny_folder: Path, tmp_path: Path) -> None:
    runs = ["--run-root", str(tmp_path / "runs")]
    loaders = figures(tmp_path, "loader", str(tiny_folder), *TOY, *runs, "--no-peers")["loaders"]
    names = [one["loader"] for one in loaders if "cache" not in one["loader"]]
    assert names == ["ours, files", "ours, shards"] * 2


def test_tuned_settings_are_a_config(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    best = figures(tmp_path, "loader", str(tiny_folder), "--tune", *TOY)["best"]
    printed = capsys.readouterr().out
    text = printed[printed.index("data:\n") : printed.index("\nwritten")]
    path = tmp_path / "tuned.yaml"
    path.write_text(text)
    data = load_config(path).data
    assert {key: getattr(data, key) for key in best} == best
    assert {"decode_threads", "read_threads", "prefetch_batches", "decode"} <= best.keys()


def test_memory_of_each_epoch(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = figures(tmp_path, "memory", str(tiny_yaml), "--epochs", "3")
    assert len(written["rss_mib"]) == 3
    assert written["images"] == {"train": 30, "val": 17}
    assert "FLAT" in capsys.readouterr().out.upper()


def test_growth_is_of_the_last_epochs_against_the_first() -> None:
    assert growth_of([100, 200, 190, 180, 200, 200, 170, 200, 210, 200]) == pytest.approx(0.05)


@pytest.mark.slow
def test_index_is_shared_by_processes(tmp_path: Path) -> None:
    written = figures(tmp_path, "index", "--images", "20000")
    one, four = written["loaded_by"]["1"], written["loaded_by"]["4"]
    assert (len(one), len(four)) == (1, 4)
    assert all(cost["seconds"] > 0 for cost in four)
    # A copy of the index would be 1.4 MiB in each process; what they share is divided by 4.
    assert max(cost["index_pss_mib"] for cost in four) < one[0]["index_pss_mib"]


def test_order_bench(tmp_path: Path) -> None:
    written = figures(tmp_path, "order", "--images", "40000")
    assert len(written["mixing"]) == 4
    assert len(written["reads"]) == 8


def test_class_entropy() -> None:
    labels = np.arange(64) % 4
    assert class_entropy(labels, 16) == 2.0  # four classes, alike
    assert class_entropy(np.sort(labels), 16) == 0.0
    assert class_entropy(np.array([0, 0, 0, 1]), 4) == pytest.approx(0.8113, abs=1e-4)


def test_reads_of_known_orders() -> None:
    """110 kB an image."""
    images, batch = 40 * BLOCK_IMAGES, 2 * BLOCK_IMAGES
    in_turn = np.arange(images)
    whole = reads_of(in_turn, batch, 1, in_blocks=True)
    assert whole == {"kb_per_seek": images * 110, "read_per_used": 1.0, "burst": 1.0}
    # Two ranks read every other block each.
    assert reads_of(in_turn, batch, 2, in_blocks=True)["kb_per_seek"] == BLOCK_IMAGES * 110
    # Of two ranks each reads all blocks, to use the half of them.
    split = np.arange(images).reshape(-1, 2, BLOCK_IMAGES // 2).transpose(0, 2, 1).reshape(-1)
    assert reads_of(split, 2, 2, in_blocks=True)["read_per_used"] == 2.0


@pytest.mark.parametrize(("order", "blocks"), [(block_order, True), (epoch_order, False)])
def test_block_shuffle_reads_blocks(order: Callable[..., np.ndarray], blocks: bool) -> None:
    images, batch = 100 * BLOCK_IMAGES, 64
    numbers = order(0, 0, images, batch) if blocks else order(0, 0, images)
    kb_per_seek = reads_of(numbers, batch, 1, blocks)["kb_per_seek"]
    assert kb_per_seek >= BLOCK_IMAGES * 110 if blocks else kb_per_seek < 120


def test_photos_that_cannot_be_compared_are_left_out(tiny_folder: Path, tmp_path: Path) -> None:
    """Truncated ones, a class of bad ones, and what DALI's own reader does not decode."""
    root = tmp_path / "photos"
    shutil.copytree(tiny_folder, root)
    first = root / "train/class0/0.jpg"
    first.write_bytes(first.read_bytes()[:-100])
    Image.new("RGB", (50, 50)).save(root / "train/class0/1.gif")
    for path in (root / "train/class2").iterdir():
        path.write_bytes(b"junk")
    with photo_folder(root, most=100) as folder:
        links = [path.readlink() for path in (folder / "train").rglob("*.jpg")]
    good = {path.absolute() for path in (root / "train").rglob("*.jpg")} - {first}
    assert set(links) == {path for path in good if path.parent.name != "class2"}
