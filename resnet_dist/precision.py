"""What train.precision means for torch: autocast, TF32 and loss scaling."""

import torch

DTYPES = {
    "fp32": torch.float32,
    "tf32": torch.float32,
    "bf16": torch.bfloat16,
    "fp16": torch.float16,
}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Returns the context for a forward pass. Weights and BN statistics stay float32.

    Convolutions and matrix products run in `precision`. float32 is IEEE float32, except with
    "tf32", where a GPU rounds the factors of products to ten bits of mantissa. (By default, cuDNN
    does that and cuBLAS does not.) TF32 is a switch of the process rather than of the returned
    context, since the backward pass comes after the context.
    """
    is_tf32 = precision == "tf32"
    # Not the newer `fp32_precision` settings: torch.export and torch.compile (torch 2.14) read
    # these older ones, and fail if the two disagree.
    torch.backends.cuda.matmul.allow_tf32 = is_tf32
    torch.backends.cudnn.allow_tf32 = is_tf32
    return torch.autocast(device.type, DTYPES[precision], enabled=precision in ("bf16", "fp16"))


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Returns the loss scaler. Only fp16 needs it; in other precisions it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
