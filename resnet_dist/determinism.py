"""Deterministic mode: the same command on the same machines gives the same bits.

Three things may change them from run to run: kernels that add in whatever order their threads
come, autotuning that picks another kernel, and sums over the ranks. `fix_algorithms` settles the
first two. Whoever adds over the ranks, or averages what ranks hold, asks `is_deterministic`.
"""

import os

import torch


def fix_algorithms(deterministic: bool) -> None:
    """Fixes the algorithms of this process, or lets torch choose the fastest.

    Call it before the first matrix product on a GPU. An operation that has no deterministic form
    raises RuntimeError from then on.
    """
    if deterministic:
        # cuBLAS wants it, read once: its workspace otherwise depends on the streams that are busy.
        # docs.nvidia.com/cuda/cublas, "Results reproducibility". A user's own choice stays.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    # Autotuning: images have one size in training, so each shape is tried once.
    torch.backends.cudnn.benchmark = not deterministic
    # torch would also write NaN into each new tensor, activations too, so that reading what nobody
    # wrote gives the same: a pass over memory per layer, for a mistake that no layer here makes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_deterministic() -> bool:
    """Whether this process is in deterministic mode. torch keeps the switch, and its operators
    look at it too; nobody else in this package does."""
    return torch.are_deterministic_algorithms_enabled()
