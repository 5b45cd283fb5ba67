"""What `train.precision` means: the dtype of convolutions, and how a GPU multiplies float32."""

from collections.abc import Callable, Iterator

import pytest
import torch

from resnet_dist.config import Config
from resnet_dist.evaluate import evaluate_checkpoint
from resnet_dist.interrupt import Interrupt
from resnet_dist.precision import autocast
from resnet_dist.train import train

CPU = torch.device("cpu")


def products() -> set[str]:
    """Of cuBLAS and cuDNN; torch holds these switches where there is no GPU, too."""
    allowed = {torch.backends.cuda.matmul.allow_tf32, torch.backends.cudnn.allow_tf32}
    return {"tf32" if is_allowed else "ieee" for is_allowed in allowed}


@pytest.fixture(autouse=True)
def ieee_afterwards() -> Iterator[None]:
    yield
    autocast(CPU, "fp32")


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


@pytest.mark.parametrize(("precision", "expected"), [("fp32", "ieee"), ("tf32", "tf32")])
def test_training_and_evaluation_set_it(
    tiny_config: Callable[..., Config], precision: str, expected: str
) -> None:
    other = "fp32" if precision == "tf32" else "tf32"
    config = tiny_config(f"train.precision={precision}", "train.epochs=1")
    autocast(CPU, other)
    train(config, "test", Interrupt())
    assert products() == {expected}
    autocast(CPU, other)
    evaluate_checkpoint(config.run_dir, [])
    assert products() == {expected}
