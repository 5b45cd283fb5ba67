"""Who sees the GPUs; a tiny image folder and configs over it; the final table of equalities."""

import os
import shutil
import subprocess
from collections.abc import Callable, Iterator
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist.config import Config
from resnet_dist.config_file import load_config

TINY_CONFIG = """
name: tiny
model: {name: resnet20}
data:
  train_crop: scale
  scale_px: [32, 40]
  crop_px: 32
  eval_resize_px: 32
  eval_crop_px: 32
  decode_threads: 1
optim: {base_lr: 0.4, schedule: cosine, warmup_epochs: 0.5}
train: {epochs: 2, global_batch_size: 8, max_local_batch_size: 8, log_every_steps: 1}
tracking: {mlflow: false}
"""


def is_for_gpu(item: pytest.Item) -> bool:
    return item.get_closest_marker("gpu") is not None


def pytest_collection_finish(session: pytest.Session) -> None:
    """GPU tests run where nothing else was selected, such as by `-m gpu`, and there is a GPU.

    Otherwise `no_gpus` hides the GPUs from all tests: CUDA reads CUDA_VISIBLE_DEVICES once in a
    process, so no process can have tests of both kinds.
    """
    for_gpu = [item for item in session.items if is_for_gpu(item)]
    reason = ""
    if len(for_gpu) < len(session.items):
        reason = "GPU tests have a run of their own: pytest -m gpu"
    elif for_gpu and not session.config.option.collectonly:
        import torch

        if not torch.cuda.is_available():
            reason = "needs a CUDA device"
    if reason:
        for item in for_gpu:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session", autouse=True)
def no_gpus(request: pytest.FixtureRequest) -> Iterator[None]:
    """Hides the GPUs from this process and its children, where a test is not marked `gpu`.

    Importing torch, DALI or this package does not initialize CUDA, so it is early enough here.
    """
    with pytest.MonkeyPatch.context() as patch:
        if not all(is_for_gpu(item) for item in request.session.items):
            patch.setenv("CUDA_VISIBLE_DEVICES", "")
        yield


@pytest.fixture(scope="session")
def tiny_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """3 classes, 30 train and 17 val JPEGs of different sizes; the colour tells the class."""
    root = tmp_path_factory.mktemp("tiny")
    rng = np.random.default_rng(0)
    for split, counts in {"train": (12, 10, 8), "val": (6, 6, 5)}.items():
        for label, count in enumerate(counts):
            folder = root / split / f"class{label}"
            folder.mkdir(parents=True)
            for number in range(count):
                height, width = rng.integers(33, 60, 2)
                pixels = rng.integers(0, 160, (height, width, 3))
                pixels[..., label] += 90
                Image.fromarray(pixels.astype(np.uint8)).save(folder / f"{number}.jpg", quality=90)
    return root


@pytest.fixture(scope="session")
def decoding_reports(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder with what the probe of this GPU's decoders saw.

    $DECODING_REPORTS names one that is there already: each test may be a process of its own.
    """
    if "DECODING_REPORTS" in os.environ:
        return Path(os.environ["DECODING_REPORTS"])
    import torch  # not all tests need it

    from resnet_dist.data.load.probe import report_of

    folder = tmp_path_factory.mktemp("decoding")
    report_of(torch.device("cuda", 0), folder, print)
    return folder


@pytest.fixture
def run_root(request: pytest.FixtureRequest, tmp_path: Path) -> Path:
    """For runs. A GPU is not probed again for each test: that takes a minute."""
    root = tmp_path / "runs"
    if is_for_gpu(request.node):
        kept = root / ".index"
        kept.mkdir(parents=True)
        for path in request.getfixturevalue("decoding_reports").glob("decoding-*.json"):
            shutil.copy(path, kept)
    return root


@pytest.fixture
def tiny_yaml(tiny_folder: Path, tmp_path: Path, run_root: Path) -> Path:
    path = tmp_path / "tiny.yaml"
    path.write_text(f"{TINY_CONFIG}data.root: {tiny_folder}\ntracking.run_root: {run_root}\n")
    return path


@pytest.fixture
def tiny_config(tiny_yaml: Path) -> Callable[..., Config]:
    """tiny_config("optim.base_lr=0.2", ...)"""
    return lambda *overrides: load_config(tiny_yaml, overrides)


@pytest.fixture
def trained(tiny_config: Callable[..., Config]) -> Callable[..., Config]:
    """tiny_config, in whose run folder three steps have been done."""
    from resnet_dist.run.interrupt import Interrupt
    from resnet_dist.train import train
    from tests.support.resuming import ONE_EPOCH  # it imports torch, which not all tests need

    train(tiny_config(*ONE_EPOCH), "test", Interrupt())
    return lambda *overrides: tiny_config(*ONE_EPOCH, *overrides)


@pytest.fixture
def other_data(tiny_folder: Path, tmp_path: Path) -> Path:
    """Of the same names and classes; one image has another size."""
    root = tmp_path / "other"
    shutil.copytree(tiny_folder, root)
    Image.new("RGB", (90, 90)).save(root / "train/class0/0.jpg")
    return root


@pytest.fixture
def disk(tmp_path: Path) -> Iterator[Path]:
    """24 MB of a real file system."""
    path = tmp_path / "disk"
    path.mkdir()
    mount = ["mount", "-t", "tmpfs", "-o", "size=24m", "none", str(path)]
    if subprocess.run(mount, capture_output=True).returncode != 0:
        pytest.skip("mounting a tmpfs is not allowed here")
    yield path
    subprocess.run(["umount", "--lazy", str(path)], check=True)  # an index may still be mapped


LARGEST_DIFFERENCE = "largest_difference: "


@pytest.fixture
def record_difference(
    record_property: Callable[[str, object], None],
) -> Callable[[str, float], None]:
    """record_difference(what, difference): a row for the table of equalities at the end."""
    # A plain float, as it may be sent from one process to another.
    return lambda what, difference: record_property(LARGEST_DIFFERENCE + what, float(difference))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """Prints the table of equalities: the largest value that `record_difference` got for each."""
    largest: dict[str, float] = {}
    for report in terminalreporter.getreports("passed"):
        for name, value in report.user_properties if report.when == "call" else ():
            if name.startswith(LARGEST_DIFFERENCE):
                what = name.removeprefix(LARGEST_DIFFERENCE)
                largest[what] = max(value, largest.get(what, 0.0))
    if largest:
        terminalreporter.section("equalities: the largest difference seen")
    for what, value in sorted(largest.items()):
        terminalreporter.line(f"{'bit-exact' if value == 0 else f'{value:.1e}':>11}  {what}")
