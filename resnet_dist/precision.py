"""What `train.precision` means to torch."""

import torch

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Weights and BN statistics stay float32; convolutions run in `precision`.

    float32 is IEEE's, but for "tf32": there a GPU rounds the factors of products to TF32's ten bits
    of mantissa. (cuDNN does so by default, and cuBLAS does not.) That is a switch of the process,
    not of the context that is returned: the backward pass comes after it.
    """
    is_tf32 = precision == "tf32"
    # Not the newer `fp32_precision` of each part: torch.export and torch.compile ask by these names
    # (torch 2.14), and end in an error where the two are of different minds.
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    return torch.autocast(device.type, DTYPES[precision], enabled=precision in ("bf16", "fp16"))


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Only fp16's range needs the loss to be scaled; elsewhere it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
