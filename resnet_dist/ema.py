"""The exponential moving average of a network's weights over the steps (Polyak averaging).

torch.optim.swa_utils.AveragedModel is not used: it copies the network, process groups and all,
which cannot be copied, and asks the device for its count of updates in every step.
"""

import torch
from torch import nn


class AveragedNetwork:
    """A network for evaluation whose floating-point tensors follow those of the trained one.

    BN's running statistics are averaged too, so that they belong to the averaged weights; whole
    numbers (BN's counters) are copied. All is a function of the trained network's tensors after
    each step and of the step: what is saved is the state dict, and no count.
    """

    def __init__(self, trained: nn.Module, network: nn.Module, decay: float):
        """trained: on its device, as it stays. network: with the same state dict's keys, its
        tensors anywhere (on "meta", say); it gets copies of the trained one's."""
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
        """After each optimizer step: average = d * average + (1 - d) * trained. No sync.

        d = min(decay, (1 + t) / (10 + t)) after t steps, so that the first weights, which mean
        nothing, are soon forgotten: num_updates of TensorFlow's tf.train.ExponentialMovingAverage.
        A step that fp16 skips counts like any other (the average moves on towards the weights as
        they are): to know of it, the host would have to wait for the device.
        """
        decay = min(self.decay, (1 + steps_done) / (10 + steps_done))
        torch._foreach_lerp_(self.averages, self.sources, 1 - decay)
        if self.counts:
            torch._foreach_copy_(self.counts, self.trained_counts)
