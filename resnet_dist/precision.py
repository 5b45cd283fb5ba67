"""What `train.precision` means to torch."""

import torch

DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


def autocast(device: torch.device, precision: str) -> torch.autocast:
    """Weights and BN statistics stay fp32; convolutions run in `precision`."""
    return torch.autocast(device.type, DTYPES[precision], enabled=precision != "fp32")


def grad_scaler(device: torch.device, precision: str) -> torch.amp.GradScaler:
    """Only fp16's range needs the loss to be scaled; elsewhere it does nothing."""
    return torch.amp.GradScaler(device.type, enabled=precision == "fp16")
