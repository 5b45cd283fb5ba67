"""Deterministic mode: the same command on the same machines gives the same bits.

Three things can change the bits between runs: kernels that add in the order in which their threads
happen to finish, autotuning that picks a different kernel, and sums over the ranks.
`fix_algorithms` takes care of the first two. Code that sums or averages over the ranks calls
`is_deterministic`.
"""

import os

import torch


def fix_algorithms(deterministic: bool) -> None:
    """Makes this process use deterministic algorithms, or lets torch choose the fastest.

    Call it before the first matrix product on a GPU. In deterministic mode, an operation that has
    no deterministic form raises RuntimeError from then on.
    """
    if deterministic:
        # cuBLAS needs this, and reads it only once: otherwise its workspace depends on which
        # streams are busy. See docs.nvidia.com/cuda/cublas, "Results reproducibility". A value that
        # the user has set is kept.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    torch.use_deterministic_algorithms(deterministic)
    torch.backends.cudnn.deterministic = deterministic
    # Autotuning pays off: all training images have one size, so each shape is timed only once.
    torch.backends.cudnn.benchmark = not deterministic
    # torch would also fill each new tensor with NaN, even activations, so that reading memory that
    # was never written gives the same result. That costs a pass over memory per layer, to guard
    # against a mistake that no layer here makes.
    torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]


def is_deterministic() -> bool:
    """Returns whether this process is in deterministic mode.

    torch stores the switch, and its operators check it too. Code in this package checks it only
    through this function.
    """
    return torch.are_deterministic_algorithms_enabled()
