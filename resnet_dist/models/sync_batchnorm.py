"""Batch normalisation over the joined batch of several ranks, in plain torch operations.

`torch.nn.SyncBatchNorm` refuses CPU tensors; this layer has one code path for CPU and GPU, so
what the tests prove with gloo on a CPU is what trains with NCCL on GPUs. It costs one packed
all-reduce per layer and direction; in deterministic mode the backward one is a sum in rank order.

Sources:
    Ioffe & Szegedy 2015, "Batch Normalization: Accelerating Deep Network Training by Reducing
        Internal Covariate Shift": the layer and its gradient.
    Chan, Golub & LeVeque 1979, "Updating Formulae and a Pairwise Algorithm for Computing Sample
        Variances": joining means and centred sums of squares.
"""

from __future__ import annotations

from typing import Any, cast

import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor, nn
from torch.autograd.function import once_differentiable

from resnet_dist.distributed import sum_over_ranks
from resnet_dist.models.parts import FrozenBatchNorm2d

_REDUCED = (0, 2, 3)  # batch, height, width: every dimension but the channels


def _per_channel(values: Tensor) -> Tensor:
    """View [C] as [1, C, 1, 1]."""
    return values.view(1, -1, 1, 1)


@torch.no_grad()
def _group_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Mean [C], biased variance [C] and count [] per channel of all ranks' x [N, C, H, W].

    The local part is computed in x's dtype but at least float32, the joined part in float64.
    """
    channels, local_count = x.shape[1], x.numel() // x.shape[1]
    # One row (count, mean, M2) per rank, zero but for our own: a sum over ranks then only adds
    # zeros, which is exact. Every rank so holds the same bits whatever the reduction's algorithm
    # or topology, and counts may differ. The price is a volume of W * (2C + 1) numbers for W
    # ranks: in a big world, limit the process group (for example to a node).
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.new_zeros(dist.get_world_size(group), 2 * channels + 1, dtype=dtype)
    if local_count > 0:  # an empty local batch keeps its zero row; its mean would be NaN
        var, mean = torch.var_mean(x.to(dtype), dim=_REDUCED, correction=0)
        own = rows[dist.get_rank(group)]
        own[0].fill_(local_count)  # an assignment might copy the number from the host
        own[1 : channels + 1] = mean
        own[channels + 1 :] = var * local_count
    dist.all_reduce(rows, group=group)

    # Chan et al. for any number of parts. E[x^2] - E[x]^2 would cancel where mean >> spread.
    sizes = [1, channels, channels]
    counts, means, centred_squares = torch.split_with_sizes(rows.double(), sizes, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (centred_squares + counts * (means - mean).square()).sum(0) / count
    # Only a rank with at most one value can be part of a total of one, so the others need not
    # wait for the device to read it; and where it is one, every rank raises.
    if local_count <= 1 and count.item() <= 1:
        raise ValueError(
            "Expected more than 1 value per channel when training, got "
            f"{int(count.item())} over {len(rows)} ranks (local input size {tuple(x.shape)})"
        )
    return mean, var, count


class _Normalise(torch.autograd.Function):
    """y = (x - mean) / sqrt(var + eps) * weight + bias, where mean and var depend on every x."""

    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,
        weight: Tensor | None,
        bias: Tensor | None,
        mean: Tensor,
        var: Tensor,
        count: Tensor,
        eps: float,
        group: dist.ProcessGroup | None,
    ) -> Tensor:
        """x [N, C, H, W] of any float dtype; weight, bias [C]; mean, var [C], count [] float64."""
        dtype = torch.promote_types(x.dtype, torch.float32)
        mean, invstd = mean.to(dtype), (var + eps).rsqrt().to(dtype)
        weight = None if weight is None else weight.to(dtype)
        bias = None if bias is None else bias.to(dtype)
        ctx.group = group
        # x in its own dtype: under autocast that halves what the layer keeps for backward.
        ctx.save_for_backward(x, weight, mean, invstd, count)
        # The fused kernel takes a low-precision x with float32 statistics, keeps channels_last,
        # and for mean >> spread is as exact as nn.BatchNorm2d: the mean's own rounding dominates.
        return F.batch_norm(x, mean, var.to(dtype), weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dx = weight * invstd * (dy - sum(dy)/N - (x - mean) * invstd^2 * sum(dy*(x - mean))/N).

        The sums run over the group. The gradients of weight and bias stay local sums, as those
        of any other parameter: DistributedDataParallel reduces them afterwards.
        """
        x, weight, mean, invstd, count = ctx.saved_tensors
        dy = grad_outputs[0].to(mean.dtype)
        centred = x.to(mean.dtype) - _per_channel(mean)
        sum_dy = dy.sum(_REDUCED)
        sum_dy_centred = (dy * centred).sum(_REDUCED)
        grad_x = None
        if ctx.needs_input_grad[0]:
            sums = torch.cat([sum_dy, sum_dy_centred])
            sum_over_ranks(sums, ctx.group)
            mean_dy, mean_dy_centred = (sums / count).chunk(2)
            scale = invstd if weight is None else invstd * weight
            # In place: this buffer is the layer's largest temporary.
            centred.mul_(_per_channel(-invstd.square() * mean_dy_centred))
            centred.add_(dy).sub_(_per_channel(mean_dy)).mul_(_per_channel(scale))
            grad_x = centred.to(x.dtype)
        grad_weight = sum_dy_centred * invstd if ctx.needs_input_grad[1] else None
        grad_bias = sum_dy if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the process group's joined batch.

    Input and output [N, C, H, W]; N, H and W may differ between ranks. Parameters, buffers and
    state_dict keys are nn.BatchNorm2d's. Without a second rank, and in eval mode, it is
    nn.BatchNorm2d. `process_group` None means the whole world.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalise input [N, C, H, W]; the result has its dtype and memory format."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        if dist.get_rank(self.process_group) < 0:
            raise ValueError("SyncBatchNorm2d: this rank is not a member of its process group")
        if dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        return self.forward_joined(input)

    def forward_joined(self, input: Tensor) -> Tensor:
        """As in training with a second rank, also where there is none. A collective."""
        self._check_input_dim(input)
        mean, var, count = _group_statistics(input, self.process_group)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = self.momentum
            if factor is None:  # asks for the cumulative average over all batches so far
                factor = 1 / float(self.num_batches_tracked)
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            unbiased = var * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        args = (input, self.weight, self.bias, mean, var, count, self.eps, self.process_group)
        return cast(Tensor, _Normalise.apply(*args))


def convert_sync_batchnorm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Make every nn.BatchNorm2d in module (itself included) synchronise over process_group.

    Works in place and returns module. Subclasses of nn.BatchNorm2d have a forward of their own
    and are left alone. Deep-copy or pickle a model before it gets a process group: a group
    can be neither copied nor pickled (None, the whole world, can).
    """
    for layer in module.modules():
        if type(layer) in (nn.BatchNorm2d, SyncBatchNorm2d):
            # The class changes, not the object: parameters, buffers, hooks, the training flag
            # and layers used in several places stay as they are, with nothing to copy or forget.
            layer.__class__ = SyncBatchNorm2d
            layer.process_group = process_group  # type: ignore[assignment]
    return module


@torch.no_grad()
def average_running_stats(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> None:
    """Replace the running statistics of the BatchNorm layers by their average over the ranks.

    Of layers whose statistics differ: not of those synchronised over this very group, nor of
    frozen ones, which are equal already, and whose average would be rounded. Every rank calls
    this before an evaluation or a save, so that all ranks hold, and the saved state has, the same
    statistics. Running statistics do not enter the training forward, and both the average and the
    running update are linear: when and how often it happens changes the final average by its
    rounding alone.
    """
    if not (dist.is_available() and dist.is_initialized()):
        return
    world_size = dist.get_world_size(process_group)
    stats = [
        buffer
        for layer in module.modules()
        if isinstance(layer, nn.modules.batchnorm._BatchNorm)
        and not isinstance(layer, FrozenBatchNorm2d)
        and not (isinstance(layer, SyncBatchNorm2d) and layer.process_group is process_group)
        for buffer in (layer.running_mean, layer.running_var)
        if buffer is not None
    ]
    if world_size <= 1 or not stats:
        return
    packed = torch.cat(stats)
    sum_over_ranks(packed, process_group)
    packed /= world_size
    averages = torch.split_with_sizes(packed, [len(buffer) for buffer in stats])
    for buffer, average in zip(stats, averages, strict=True):
        buffer.copy_(average)
