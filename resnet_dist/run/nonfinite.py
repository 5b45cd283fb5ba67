"""What happens when the loss becomes NaN or infinite: it is reported, and soon ends the run."""

from collections.abc import Callable
from pathlib import Path

import torch
from torch import nn

from resnet_dist.checkpoints import folders
from resnet_dist.distributed import World
from resnet_dist.errors import Diverged, some_of


class NonfiniteLoss:
    """Counts the log lines in a row whose loss is not finite, and ends the run after too many."""

    def __init__(self, max_logs: int, run_dir: Path, world: World, say: Callable[[str], None]):
        """max_logs: train.max_nonfinite_logs. say: prints a line on rank 0."""
        self._max_logs = max_logs
        self._run_dir = run_dir
        self._world = world
        self._say = say
        self._logs = 0
        self._began = ""  # at which step, and at which lr

    def check(self, first_step: int | None, lr: float, network: nn.Module) -> None:
        """Reports a log line whose loss is not finite. A collective.

        first_step: the first step since the previous log line whose loss is not finite, counted
        from 1; None if all are finite. lr: the learning rate of that step.

        Raises:
            Diverged: this is log line number train.max_nonfinite_logs in a row.
        """
        if first_step is None:
            self._logs = 0
            return
        if self._logs == 0:
            self._began = f"step {first_step} at lr {lr:.4g}"
        self._logs += 1
        line = f"loss not finite from {self._began} on, in {self._logs} log lines in a row"
        self._say(f"warning: {line}; {_describe(nonfinite_tensors(network))}")
        if self._logs < self._max_logs:
            return
        sound = self._world.on_main(lambda: folders.newest_sound(self._run_dir))
        last = "no checkpoint is sound" if sound is None else f"the last sound one is {sound.name}"
        raise Diverged(
            f"{line}: stopped without saving a checkpoint; {last}; lower optim.base_lr, or "
            "lengthen the warm-up"
        )


def nonfinite_tensors(network: nn.Module) -> list[str]:
    """Returns the names of the parameters and buffers with a NaN or an infinity in them."""
    tensors = {name: t for name, t in network.state_dict().items() if t.is_floating_point()}
    # CPU-GPU sync point, in a run whose loss is not finite
    finite = torch.stack([tensor.isfinite().all() for tensor in tensors.values()]).tolist()
    return [name for name, is_finite in zip(tensors, finite, strict=True) if not is_finite]


def _describe(names: list[str]) -> str:
    if not names:
        return "all parameters are finite so far"
    return f"not finite by now: {some_of(names)}"
