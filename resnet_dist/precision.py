"""What `train.precision` means in torch."""

import torch

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns a context in which convolutions run in `precision`.

    Weights and BN statistics stay float32. float32 means IEEE float32, except with "tf32": there, a
    GPU rounds the factors of products to TF32's ten bits of mantissa. (cuDNN does so by default,
    and cuBLAS does not.) TF32 is switched for the whole process, not for the returned context,
    because the backward pass runs after the context has ended.
    """
    is_tf32 = precision == "tf32"
    # Not the newer `fp32_precision` settings of each backend: torch.export and torch.compile read
    # these older ones (torch 2.14), and raise an error if old and new settings disagree.
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    return torch.autocast(device.type, DTYPES[precision], enabled=precision in ("bf16", "fp16"))


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Returns a loss scaler. It does nothing except for fp16, whose range is small."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
