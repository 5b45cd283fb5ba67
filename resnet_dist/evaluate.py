"""Exact evaluation: each image counts once, on any number of ranks.

Correct answers, losses and images are summed on the device and over the ranks, and divided once at
the end; averages of per-rank averages would weight images unequally.
"""

import math
from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from resnet_dist.data.load.batch import BLANK_LABEL, Batch
from resnet_dist.data.view.protocol import CENTER_CROP, Protocol
from resnet_dist.distributed import World
from resnet_dist.models.vgg import Vgg
from resnet_dist.precision import autocast
from resnet_dist.tracking.metrics import VAL_ACC1, VAL_ACC5, VAL_LOSS


@dataclass(frozen=True)
class Score:
    """Sums over the evaluated images; accuracies, in percent, and the mean loss are properties."""

    correct1: int
    correct5: int
    loss_sum: float
    images: int

    @property
    def acc1(self) -> float:
        return 100 * self.correct1 / self.images

    @property
    def acc5(self) -> float:
        return 100 * self.correct5 / self.images

    @property
    def loss(self) -> float:
        return self.loss_sum / self.images

    def metrics(self) -> dict[str, float]:
        return {
            VAL_LOSS: self.loss,
            VAL_ACC1: self.acc1,
            VAL_ACC5: self.acc5,
        }

    def __str__(self) -> str:
        return (
            f"acc1 {self.acc1:.2f} %  acc5 {self.acc5:.2f} %  loss {self.loss:.4f}  "
            f"({self.correct1:,} of {self.images:,} correct)"
        )


@torch.inference_mode()
def evaluate(
    model: nn.Module,
    batches: Iterable[Batch],
    world: World,
    precision: str,
    protocol: Protocol = CENTER_CROP,
) -> Score:
    """Evaluates the network on this rank's batches and sums over the ranks. Every rank calls it.

    The prediction for an image is the mean of the softmax probabilities over its views (Krizhevsky
    et al. 2012, section 4.1); where a view is the whole image, the logits are first averaged over
    all spatial positions. The loss is -log of the mean probability of the right class.

    batches: loaded for the `eval_requests` of the protocol. Ranks may have different numbers of
    batches, even none, as they communicate only at the end. With fewer than five classes acc5 is
    100 %. An image that cannot be read counts as wrong.
    """
    was_training = model.training
    model.eval()
    # If loading fails on one rank, `on_all` tells the others, which would wait for its sums.
    sums = world.on_all(lambda: _sums(model, batches, world.device, precision, protocol))
    model.train(was_training)
    correct1, correct5, total_loss, count = world.sum(sums).tolist()  # CPU-GPU sync point
    return Score(int(correct1), int(correct5), total_loss, int(count))


def _sums(
    model: nn.Module,
    batches: Iterable[Batch],
    device: torch.device,
    precision: str,
    protocol: Protocol,
) -> Tensor:
    """Returns this rank's sums: correct in top 1, correct in top 5, loss, images. float64 [4]."""
    # On a whole image the network is applied at every position, and the results are averaged. A
    # ResNet does that as it is, because its average pooling and the linear layer after it commute.
    # VGG's head does not, so it has a separate, fully convolutional forward pass.
    network = model.dense if protocol.scales_px and isinstance(model, Vgg) else model
    sums = torch.zeros(4, dtype=torch.float64, device=device)
    log_p: list[Tensor] = []  # of this batch's views so far: [B, classes]
    labels: list[Tensor] = []  # equal in all views, except -1 in a view that could not be read
    for batch in batches:
        mirror = [batch.images.flip(3)] if protocol.mirrored else []
        for view in [batch.images, *mirror]:
            with autocast(device, precision):
                logits = network(view)
            log_p.append(logits.double().log_softmax(dim=1))
            labels.append(batch.labels)
        if len(log_p) < protocol.views:
            continue
        # log(1/V * sum of p_v) = logsumexp of log p_v - log V, without leaving log space.
        mean = torch.stack(log_p).logsumexp(dim=0) - math.log(protocol.views)
        label = torch.stack(labels).amin(dim=0)
        log_p, labels = [], []
        # An unreadable image counts as wrong, with the loss of a uniform guess: log(classes).
        right = mean.topk(min(5, mean.shape[1])).indices == label[:, None]  # [B, 5]
        loss_sum = F.nll_loss(mean, label, reduction="sum", ignore_index=BLANK_LABEL)
        loss_sum += (label == BLANK_LABEL).sum() * math.log(mean.shape[1])
        images = torch.full_like(loss_sum, len(label))
        sums += torch.stack([right[:, 0].sum(), right.sum(), loss_sum, images])
    return sums
