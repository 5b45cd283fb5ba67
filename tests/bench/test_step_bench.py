"""`bench step`, `e2e`, `peers`, `allreduce`, `loop` and `start` run, and count what they say."""

import json
import subprocess
import sys
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn

from resnet_dist.bench.end_to_end import ALONE, BOTH, LOADER, SYNTHETIC, judge
from resnet_dist.bench.machine_floor import Rates, Work, work_of_a_step
from resnet_dist.bench.peers import trainers
from resnet_dist.bench.peers.trainers import Training
from resnet_dist.bench.photos import photo_folder
from resnet_dist.cli import main
from resnet_dist.config import DataConfig
from resnet_dist.models.build import build_model
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS


def figures(tmp_path: Path, *arguments: str) -> dict[str, Any]:
    path = tmp_path / "figures.json"
    main(["bench", *arguments, "--no-wait", "--output", str(path)])
    written = json.loads(path.read_text())
    assert written["benchmark"] == arguments[0]
    return written


def test_flops_are_those_of_the_paper() -> None:
    """A training step has three times the FLOPs of a forward pass, but the images need no
    gradient. ResNet-50 has 4.09 G multiply-adds (torchvision's form), the first layer 0.118 G."""
    with torch.device("meta"):
        model = build_model("resnet50", 1000, zero_init_last_gamma=False)
    work = work_of_a_step(model, 2, 224, torch.bfloat16)
    expected = 2 * 2 * (3 * 4_089_184_256 - 118_013_952)
    assert work.flops == pytest.approx(expected, rel=1e-6)


def test_bytes_are_those_that_each_operation_moves() -> None:
    """A linear layer of 4 to 2 features on 3 images of float32, by hand."""
    with torch.device("meta"):
        model = nn.Sequential(nn.AdaptiveAvgPool2d(1), nn.Flatten(), nn.Linear(3, 2, bias=False))
    work = work_of_a_step(model, 5, 8, torch.float32)
    products = [nbytes for flops, nbytes in work.operations if flops]
    images, weights, out = 5 * 3 * 4, 3 * 2 * 4, 5 * 2 * 4
    # Forward, the gradient of the weights, and of the input is not asked for.
    assert products == [images + weights + out, out + images + weights]


def test_the_floor_is_the_longer_of_the_two_for_each_operation() -> None:
    rates = Rates(bytes_per_sec=10, flops_per_sec=100)
    assert rates.seconds(Work([(100, 1), (0, 20)])) == pytest.approx(1 + 2)


@pytest.mark.parametrize(
    ("speeds", "bound", "overlap"),
    [
        ({SYNTHETIC: 100, LOADER: 300, BOTH: 99}, "compute", 0.99),
        ({SYNTHETIC: 100, LOADER: 50, BOTH: 45}, "data", 0.9),
        ({SYNTHETIC: 100, LOADER: 300, BOTH: 99, ALONE: 105}, "compute", 0.99),
        ({SYNTHETIC: 100, LOADER: 300, BOTH: 99, ALONE: 150}, "network", 0.99),
        ({SYNTHETIC: 100, LOADER: 90, BOTH: 90, ALONE: 150}, "data", 1.0),
    ],
)
def test_the_verdict(speeds: dict[str, float], bound: str, overlap: float) -> None:
    verdict = judge(speeds, on_cpu=False)
    assert verdict.bound == bound
    assert verdict.text.startswith(f"{bound}-bound: ")
    assert "; try " in verdict.text
    assert verdict.overlap == pytest.approx(overlap)
    assert "share the cores" in judge(speeds, on_cpu=True).text


TWO_RANKS = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node=2"]


def run_apart(tmp_path: Path, launcher: list[str], *arguments: str) -> dict[str, Any]:
    """Runs a benchmark that makes process groups in a process of its own."""
    path = tmp_path / "figures.json"
    command = [sys.executable, *launcher, "-m", "resnet_dist", "bench", *arguments]
    done = subprocess.run(
        [*command, "--no-wait", "--output", str(path)],
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return json.loads(path.read_text())


SMALL = ["--model", "resnet20", "--px", "32", "--batch-size", "4", "--runs", "1"]


@pytest.mark.slow
def test_the_step_and_its_parts(tmp_path: Path) -> None:
    written = run_apart(tmp_path, [], "step", *SMALL, "--profile")
    assert [row["part"] for row in written["parts"]] == [
        *("step", "forward", "forward and backward", "backward", "optimizer"),
        *("step, synchronized BN", "step, DDP"),
    ]
    assert all(row["ms"]["median"] > 0 for row in written["parts"])
    assert 0 < written["floor"]["mfu"] <= written["floor"]["fraction_reached"] < 1.5
    assert len(written["profile"]["top_kernels"]) == 10
    assert written["peak_rss_gib"] > 0


@pytest.mark.slow
def test_the_step_of_two_ranks(tmp_path: Path) -> None:
    written = run_apart(tmp_path, TWO_RANKS, "step", *SMALL)
    assert written["ranks"] == 2
    assert written["parts"][-1]["part"] == "step, both, as in training"


@pytest.mark.slow
def test_sums_over_two_ranks(tmp_path: Path) -> None:
    written = run_apart(tmp_path, TWO_RANKS, "allreduce", "--runs", "1")
    assert written["ranks"] == 2
    sizes = written["gloo"]["sizes"]
    assert [row["bytes"] for row in sizes] == [4**n for n in range(5, 14)]
    largest = sizes[-1]
    # With two ranks the bus carries as many bytes as there are in the tensor.
    gb_per_sec = largest["bytes"] / largest["microseconds"]["median"] / 1000
    assert largest["bus_gb_per_sec"] == pytest.approx(gb_per_sec, rel=0.01)
    wire = written["gloo"]["wire_gb_per_sec"]
    assert largest["of_the_wire"] == pytest.approx(gb_per_sec / wire, rel=0.01)


def test_sums_over_one_rank_are_refused(tmp_path: Path) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["bench", "allreduce", "--no-wait"])
    assert ended.value.code == 2


@pytest.mark.slow
def test_what_limits_a_config(
    tiny_yaml: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    written = figures(tmp_path, "e2e", str(tiny_yaml), "--runs", "1")
    speeds = {name: found["median"] for name, found in written["images_per_sec"].items()}
    assert speeds.keys() == {SYNTHETIC, LOADER, BOTH}
    assert min(speeds.values()) > 0
    slower = min(speeds[SYNTHETIC], speeds[LOADER])
    assert written["verdict"]["overlap"] == pytest.approx(speeds[BOTH] / slower, rel=0.01)
    assert written["verdict"]["text"] in capsys.readouterr().out


@pytest.fixture(scope="module")
def training(tiny_folder: Path) -> Iterator[Training]:
    with photo_folder(tiny_folder, most=20) as root:
        yield Training(
            data=DataConfig(root=str(root), crop_px=32, decode_threads=1),
            images=24,
            batch_size=8,
            batches=4,
            device="cpu",
            run_root=str(root),
            model="resnet18",
        )


@pytest.mark.parametrize("name", ["ours", "torchvision_plain"])
def test_each_trainer_trains_on_as_many_images(name: str, training: Training) -> None:
    seen = 0
    for batch in getattr(trainers, name)(training):
        assert batch.shape == (8, 3, 32, 32)
        seen += 1
        if seen == training.batches:
            break
    assert seen == training.batches


def test_sleeping_instead_of_a_step(training: Training) -> None:
    began = time.monotonic()
    assert len(list(trainers.ours(replace(training, sleep_ms=100)))) == 4
    assert time.monotonic() - began >= 0.4


@pytest.mark.slow
def test_trainers_side_by_side(
    tiny_folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    size = ["--model", "resnet18", "--batch-size", "2", "--steps", "1", "--runs", "1"]
    written = figures(tmp_path, "peers", str(tiny_folder), *size)
    names = [one["trainer"] for one in written["trainers"]]
    assert names[:3] == ["resnet-dist", "torchvision, plain loop", "timm"]
    assert written["trainers"][0]["ours_is_times_as_fast"] == 1
    assert all(one["fraction_of_the_floor"] > 0 for one in written["trainers"])
    if written["machine"]["gpu"] is None:
        assert "skipped: NVIDIA's recipe" in capsys.readouterr().out
    run = written["trainers"][0]["runs"][0]
    assert {"steal_pct", "others_pct", "repeats"} <= run.keys()


@pytest.mark.slow
def test_the_loop_next_to_a_bare_one(tmp_path: Path) -> None:
    written = figures(tmp_path, "loop", "--runs", "1", "--steps", "3")
    ms = {name: found["median"] for name, found in written["ms_per_step"].items()}
    step, bare, loop = ms.values()
    added = 1000 * (loop - bare)
    assert written["added_microseconds_per_step"]["median"] == pytest.approx(added, abs=2)
    share = added / step / 10
    assert written["overhead_pct"]["median"] == pytest.approx(share, abs=0.01)


@pytest.mark.slow
def test_the_start_and_its_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(REPO)
    # Without this a start would compile the package, which a user's second start does not.
    compiled = tmp_path / "compiled"
    monkeypatch.setenv("PYTHONDONTWRITEBYTECODE", "1")
    monkeypatch.setenv("PYTHONPYCACHEPREFIX", str(compiled))
    written = figures(tmp_path, "start", "--runs", "1")
    assert any(compiled.rglob("cli/parser.*.pyc"))
    *cpu, first_step = (found["median"] for found in written["seconds"].values())
    assert min(cpu) > 0
    parts = written["first_step_parts_seconds"]
    assert {"imports", "first batch", "first step"} <= parts.keys()
    assert sum(parts.values()) == pytest.approx(first_step, abs=0.05 * len(parts))
