"""Deterministic mode: the same command on the same machines gives the same bits.

Three things may change bits from run to run: kernels whose threads add in an arbitrary order,
autotuning that chooses different kernels, and sums over the ranks. `fix_algorithms` takes care of
the first two. Code that adds or averages over the ranks asks `is_deterministic`.
"""

import os

import torch


def fix_algorithms(deterministic: bool) -> None:
    """Fixes the algorithms of this process, or lets torch choose the fastest ones.

    Call it before the first matrix product on a GPU. In deterministic mode, an operation without a
    deterministic form raises RuntimeError.
    """
    if deterministic:
        # cuBLAS reads this once. Without it, results may depend on which streams are busy:
        # docs.nvidia.com/cuda/cublas, "Results reproducibility". A user's own setting has priority.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    # Autotuning pays off, since training images all have one size and each shape is tried once.
    torch.backends.cudnn.benchmark = not deterministic
    # torch would also fill every new tensor with NaN, so that reading uninitialized memory is
    # deterministic too. That costs a pass over memory per layer, and no layer here does so.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_deterministic() -> bool:
    """Whether this process is in deterministic mode.

    torch has the switch, and its operators read it too. Other modules call this function.
    """
    return torch.are_deterministic_algorithms_enabled()
