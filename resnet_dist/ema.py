"""An exponential moving average of a network's weights over the steps (Polyak averaging).

torch.optim.swa_utils.AveragedModel is not used, because it deep-copies the network including its
process groups, which cannot be copied, and reads a counter from the device in every step.
"""

import torch
from torch import nn


class AveragedNetwork:
    """A network for evaluation whose floating-point tensors are averages of the trained network's.

    BN's running statistics are averaged too, so that they fit the averaged weights; integers (BN's
    counters) are copied. The averages depend only on the trained tensors after each step and on the
    step, so a checkpoint needs the state dict and no counter.
    """

    def __init__(self, trained: nn.Module, network: nn.Module, decay: float):
        """trained: the network in training, on its device. network: one with the same state dict
        keys, on any device ("meta", for example); it is given copies of the trained tensors.
        """
        self.decay = decay
        state = trained.state_dict()
        network.load_state_dict({key: t.clone() for key, t in state.items()}, assign=True)
        self.network = network.requires_grad_(False).eval()
        pairs = [(average, state[key]) for key, average in network.state_dict().items()]
        self.averages = [average for average, _ in pairs if average.is_floating_point()]
        self.trained = [tensor for _, tensor in pairs if tensor.is_floating_point()]
        self.counts = [average for average, _ in pairs if not average.is_floating_point()]
        self.trained_counts = [tensor for _, tensor in pairs if not tensor.is_floating_point()]

    @torch.no_grad()
    def update(self, steps_done: int) -> None:
        """Updates the averages after an optimizer step. No CPU-GPU sync.

        average = d * average + (1 - d) * trained, where d = min(decay, (1 + t) / (10 + t)) after t
        steps. The second term forgets the first, meaningless weights quickly, like num_updates in
        TensorFlow's tf.train.ExponentialMovingAverage. A step that fp16 has skipped is counted like
        any other, since the host would have to wait for the device to know about it.
        """
        decay = min(self.decay, (1 + steps_done) / (10 + steps_done))
        torch._foreach_lerp_(self.averages, self.trained, 1 - decay)
        if self.counts:
            torch._foreach_copy_(self.counts, self.trained_counts)
