"""DALI's graphs for a GPU, up to the point where one is needed: names and types of the arguments,
and which device each output is on. What a GPU then makes of them is shown by tests marked `gpu`."""

from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from nvidia.dali import Pipeline, types
from PIL import Image

from resnet_dist.bench.peers.dali_reader import peer_graph
from resnet_dist.config import DataConfig
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.dali import Loader
from resnet_dist.data.load.dali_graphs import decode_graph, image_graph, raw_graph
from resnet_dist.data.load.decoding import HOST, WAYS, Decoding
from resnet_dist.data.view.augment import Request, eval_windows, train_windows

NO_DEVICE = "trying to create a GPU DALI pipeline while CUDA is not available"
MEANS = [np.zeros(3, np.float32), np.zeros((8, 8, 3), np.float32)]
GPU_WAYS = [*WAYS, HOST, Decoding("image", "host")]


def devices_of(graph: Callable[..., Pipeline], *args: Any, **kwargs: Any) -> list[str]:
    """Where the outputs of a graph are. It is built as far as it can be."""
    pipe = Pipeline(batch_size=4, num_threads=2, device_id=0, prefetch_queue_depth=2)
    with pipe:
        outputs = graph.__wrapped__(*args, **kwargs)  # type: ignore[attr-defined]
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
    pipe.set_outputs(*outputs)
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        pipe.build()
    return [output.device for output in outputs]


def nothing() -> None:
    """In place of what polls the inputs: nothing is run."""


def normalisation(dtype: Any = types.FLOAT16, **more: Any) -> dict[str, Any]:
    return {"std": [60.0, 60.0, 60.0], "dtype": dtype, **more}


@pytest.mark.parametrize("way", GPU_WAYS, ids=str)
@pytest.mark.parametrize("cut", [False, True])
def test_encoded_images(way: Decoding, cut: bool) -> None:
    assert devices_of(decode_graph, nothing, way.extent, cut, way) == ["gpu"]
    for mean, dtype in product(MEANS, (types.FLOAT, types.FLOAT16)):
        devices = devices_of(image_graph, nothing, way.extent, cut, way, mean, normalisation(dtype))
        assert devices == ["gpu", "gpu"]


@pytest.mark.parametrize("mean", MEANS, ids=["colour", "image"])
@pytest.mark.parametrize("dtype", [types.FLOAT, types.FLOAT16], ids=str)
def test_pixels(mean: np.ndarray, dtype: Any) -> None:
    assert devices_of(raw_graph, nothing, mean, normalisation(dtype)) == ["gpu", "gpu"]
    for cut in (False, True):
        options = ("decoded", cut, Decoding("window", "host"), mean, normalisation(dtype))
        assert devices_of(image_graph, nothing, *options) == ["gpu", "gpu"]


def test_the_peer_that_is_measured_against() -> None:
    index = Index(("a",), np.zeros(2), np.ones((2, 2)), ("a.jpg", "b.jpg"), None, "")
    assert devices_of(peer_graph, index, DataConfig()) == ["gpu", "gpu"]


def test_a_wrong_argument_is_seen_without_a_gpu() -> None:
    wrong = normalisation(standard_deviation=3)
    with pytest.raises(KeyError, match='Argument "standard_deviation" is not defined'):
        devices_of(image_graph, nothing, "window", True, WAYS[0], MEANS[0], wrong)


@pytest.mark.parametrize("way", GPU_WAYS, ids=str)
@pytest.mark.parametrize("of", ["train", "eval"])
def test_what_the_loader_asks_of_them(
    way: Decoding, of: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)  # it needs a driver
    Image.new("RGB", (40, 50)).save(tmp_path / "a.jpg")
    sizes = np.array([[50, 40]], np.int32)
    index = Index(("a",), np.zeros(1, np.int64), sizes, (str(tmp_path / "a.jpg"),), None, "")
    data = DataConfig(train_crop="random_resized", crop_px=32, eval_resize_px=36, eval_crop_px=32)
    samples = np.zeros(1, np.int64)
    windows = {
        "train": train_windows(data, 0, 0, samples, sizes),
        "eval": eval_windows(data, sizes),
    }
    options: dict[str, Any] = {
        "device": torch.device("cuda", 0),
        "dtype": torch.bfloat16,
        "max_batch_size": 4,
    }
    encoded = Loader(index, data, **options, decoding=way)
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        next(encoded.batches([Request(samples, windows[of])]))


def test_what_the_loader_asks_for_raw_pixels(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(torch.cuda, "current_stream", lambda device: None)
    sizes, pixels = np.full((1, 2), 32, np.int32), np.zeros((1, 32, 32, 3), np.uint8)
    index = Index(("a",), np.zeros(1, np.int64), sizes, (), pixels, "")
    data = DataConfig(eval_resize_px=32, eval_crop_px=32)
    device = torch.device("cuda", 0)
    raw = Loader(index, data, device=device, dtype=torch.float32, max_batch_size=4)
    with pytest.raises(RuntimeError, match=NO_DEVICE):
        next(raw.batches([Request(np.zeros(1, np.int64), eval_windows(data, sizes))]))
