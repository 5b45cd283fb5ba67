"""The exponential moving average of a network's weights over the steps (Polyak averaging).

torch.optim.swa_utils.AveragedModel is not used: it copies the network including its process groups,
which cannot be copied, and reads its update count from the device in every step.
"""

import torch
from torch import nn


class AveragedNetwork:
    """A network for evaluation whose floating-point tensors follow those of the trained network.

    BN's running statistics are averaged too, so that they match the averaged weights; integers
    (BN's counters) are copied. The average depends only on the trained network's tensors after each
    step and on the step number, so a checkpoint needs the state dict but no update count.
    """

    def __init__(self, trained: nn.Module, network: nn.Module, decay: float):
        """trained: already on its final device. network: has the same state dict keys; its tensors
        may be anywhere (for example on "meta"), and are replaced by copies of the trained ones."""
        self.decay = decay
        source = trained.state_dict()
        network.load_state_dict({key: t.clone() for key, t in source.items()}, assign=True)
        self.network = network.requires_grad_(False).eval()
        pairs = [(average, source[key]) for key, average in network.state_dict().items()]
        self.averages = [average for average, _ in pairs if average.is_floating_point()]
        self.sources = [source for _, source in pairs if source.is_floating_point()]
        self.counts = [average for average, _ in pairs if not average.is_floating_point()]
        self.trained_counts = [source for _, source in pairs if not source.is_floating_point()]

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Sets average = d * average + (1 - d) * trained. No CPU-GPU sync.

        Call it after each optimizer step. d = min(decay, (1 + t) / (10 + t)) after t steps: it
        starts low, so that the meaningless first weights are soon forgotten. This is what
        TensorFlow's tf.train.ExponentialMovingAverage does with num_updates.

        A step that fp16 skips counts like any other (the average moves on towards the unchanged
        weights), because the host would have to wait for the device to learn that it was skipped.
        """
        decay = min(self.decay, (1 + steps_done) / (10 + steps_done))
        # lerp: average + (1 - d) * (trained - average)
        torch._foreach_lerp_(self.averages, self.sources, 1 - decay)
        if self.counts:
            torch._foreach_copy_(self.counts, self.trained_counts)
