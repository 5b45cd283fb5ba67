"""What `train.precision` means: the dtype of convolutions, and how a GPU multiplies float32."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import nn
from torch.nn.modules.module import register_module_forward_pre_hook

from resnet_dist import distributed
from resnet_dist.bench import checkpoint as bench_checkpoint
from resnet_dist.bench import deterministic as bench_deterministic
from resnet_dist.config import Config
from resnet_dist.determinism import fix_algorithms
from resnet_dist.precision import autocast
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.train import train
from resnet_dist.verbs.evaluate import evaluate_checkpoint
from resnet_dist.verbs.predict import predict
from resnet_dist.verbs.recalibrate import recalibrate
from resnet_dist.verbs.responses import analyze_responses
from resnet_dist.verbs.trained import load_trained
from tests.support.resuming import ONE_EPOCH

CPU = torch.device("cpu")


def products() -> set[str]:
    """Of cuBLAS and cuDNN; torch holds these switches where there is no GPU, too."""
    allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
    return {"tf32" if is_allowed else "ieee" for is_allowed in allowed}


@pytest.fixture(autouse=True)
def as_before() -> Iterator[None]:
    matmul, cudnn = torch.backends.cuda.matmul, torch.backends.cudnn
    before = matmul.allow_tf32, cudnn.allow_tf32
    yield
    matmul.allow_tf32, cudnn.allow_tf32 = before
    fix_algorithms(False)


@pytest.mark.parametrize(
    ("precision", "expected", "dtype"),
    [
        ("fp32", "ieee", torch.float32),
        ("tf32", "tf32", torch.float32),
        ("bf16", "ieee", torch.bfloat16),
        ("fp16", "ieee", torch.float16),
    ],
)
def test_a_precision(precision: str, expected: str, dtype: torch.dtype) -> None:
    autocast(CPU, "tf32" if expected == "ieee" else "fp32")
    assert products() != {expected}
    conv = torch.nn.Conv2d(3, 4, 3)
    with autocast(CPU, precision):
        assert conv(torch.zeros(1, 3, 5, 5)).dtype == dtype
    assert products() == {expected}  # the backward pass comes after the context


def test_torch_is_of_one_mind_about_it() -> None:
    """It has two sets of names for these switches."""
    cudnn = torch.backends.cudnn
    parts = (torch.backends.cuda.matmul, cudnn.conv, cudnn.rnn)
    autocast(CPU, "tf32")
    assert [part.fp32_precision for part in parts] == ["tf32"] * 3
    autocast(CPU, "fp32")
    assert "tf32" not in [part.fp32_precision for part in parts]


@contextmanager
def convolving() -> Iterator[set[str]]:
    """How float32 is multiplied in the convolutions in here, in their forward and backward pass."""
    seen: set[str] = set()

    def look(module: nn.Module, inputs: Any) -> None:
        if isinstance(module, nn.Conv2d):
            seen.update(products())
            if module.weight.requires_grad and torch.is_grad_enabled():
                module.weight.register_hook(lambda gradient: seen.update(products()))

    hook = register_module_forward_pre_hook(look)
    try:
        yield seen
    finally:
        hook.remove()


def recalibrated(run: Path, photos: Path) -> None:
    world = distributed.start()
    recalibrate(load_trained(run, [], world), 16, world)


VERBS: dict[str, Callable[[Path, Path], Any]] = {
    "evaluate": lambda run, photos: evaluate_checkpoint(run, []),
    "recalibrate": recalibrated,
    "predict": lambda run, photos: predict(run, [str(photos)], 1, True),
    "analyze": lambda run, photos: analyze_responses([run], [], 4),
}


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_every_verb_sets_it(
    tiny_config: Callable[..., Config], tiny_folder: Path, precision: str, expected: str
) -> None:
    """It does not go by what was set before it."""
    other = "fp32" if precision == "tf32" else "tf32"
    config = tiny_config(*ONE_EPOCH, f"train.precision={precision}")
    autocast(CPU, other)
    with convolving() as seen:
        train(config, "test", Interrupt())
    assert seen == {expected}
    for verb, call in VERBS.items():
        autocast(CPU, other)
        with convolving() as seen:
            call(config.run_dir, tiny_folder / "val")
        assert seen == {expected}, verb


def test_benchmarks_of_steps_set_it() -> None:
    autocast(CPU, "tf32")
    with convolving() as seen:
        bench_deterministic.training_step(distributed.start())(False)
    assert seen == {"ieee"}
    autocast(CPU, "tf32")
    with convolving() as seen:
        bench_checkpoint.real_step(bench_checkpoint.trained_state(CPU), CPU, 1)()
    assert seen == {"ieee"}
