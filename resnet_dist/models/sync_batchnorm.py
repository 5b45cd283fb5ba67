"""Batch normalisation over the joined batch of several ranks, in plain torch operations.

`torch.nn.SyncBatchNorm` refuses CPU tensors. This layer has one code path for CPU and GPU, so the
code that the tests check with gloo on a CPU is the code that trains with NCCL on GPUs. It costs one
packed all-reduce per layer in each direction; in deterministic mode, the one in the backward pass
is replaced by a sum in rank order.

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
    """Views [C] as [1, C, 1, 1]."""
    return values.view(1, -1, 1, 1)


@torch.no_grad()
def _group_statistics(x: Tensor, group: dist.ProcessGroup | None) -> tuple[Tensor, Tensor, Tensor]:
    """Returns mean [C], biased variance [C] and count [] of each channel over all ranks' x.

    x: [N, C, H, W]. The local statistics are computed in x's dtype but at least in float32, and
    are joined in float64.
    """
    channels, local_count = x.shape[1], x.numel() // x.shape[1]
    # One row (count n, mean, M2) per rank, where M2 is the sum of squared deviations from the mean.
    # All rows except this rank's own are zero, so the sum over ranks only adds zeros, which is
    # exact. Therefore every rank gets the same bits, whatever the reduction's algorithm or
    # topology, and counts may differ. The price is a volume of W * (2C + 1) numbers for W ranks:
    # in a big world, limit the process group (for example to a node).
    dtype = torch.promote_types(x.dtype, torch.float32)
    rows = x.new_zeros(dist.get_world_size(group), 2 * channels + 1, dtype=dtype)
    if local_count > 0:  # an empty local batch keeps its zero row; its mean would be NaN
        var, mean = torch.var_mean(x.to(dtype), dim=_REDUCED, correction=0)
        own = rows[dist.get_rank(group)]
        own[0].fill_(local_count)  # an assignment might copy the number from the host
        own[1 : channels + 1] = mean
        own[channels + 1 :] = var * local_count
    dist.all_reduce(rows, group=group)

    # Chan et al. for any number of ranks r, with N the sum of n_r:
    #     mean = sum(n_r * mean_r) / N,  var = sum(M2_r + n_r * (mean_r - mean)^2) / N
    # E[x^2] - E[x]^2 would lose its digits to cancellation where mean >> spread.
    sizes = [1, channels, channels]
    counts, means, centred_squares = torch.split_with_sizes(rows.double(), sizes, dim=1)
    count = counts.sum()
    mean = (counts * means).sum(0) / count
    var = (centred_squares + counts * (means - mean).square()).sum(0) / count
    # If the total is at most one value, no rank has more than one. So ranks with more need not read
    # the total (CPU-GPU sync point); and if the total is at most one, every rank raises.
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
        # Saving x in its own dtype halves the memory kept for the backward pass under autocast.
        ctx.save_for_backward(x, weight, mean, invstd, count)
        # The fused kernel accepts a low-precision x with float32 statistics and keeps
        # channels_last. For mean >> spread it is as exact as nn.BatchNorm2d, because the rounding
        # of the mean itself dominates.
        return F.batch_norm(x, mean, var.to(dtype), weight, bias, training=False, eps=eps)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grad_outputs: Tensor) -> tuple[Tensor | None, ...]:
        """dx = weight * invstd * (dy - sum(dy)/N - (x - mean) * invstd^2 * sum(dy*(x - mean))/N).

        The sums run over the whole group, and N is its count. The gradients of weight and bias stay
        local sums, like those of any other parameter: DistributedDataParallel reduces them later.
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
            # Computed in place, because this buffer is the layer's largest temporary.
            centred.mul_(_per_channel(-invstd.square() * mean_dy_centred))
            centred.add_(dy).sub_(_per_channel(mean_dy)).mul_(_per_channel(scale))
            grad_x = centred.to(x.dtype)
        grad_weight = sum_dy_centred * invstd if ctx.needs_input_grad[1] else None
        grad_bias = sum_dy if ctx.needs_input_grad[2] else None
        return grad_x, grad_weight, grad_bias, None, None, None, None, None


class SyncBatchNorm2d(nn.BatchNorm2d):
    """nn.BatchNorm2d whose training statistics are those of the process group's joined batch.

    Input and output are [N, C, H, W]; N, H and W may differ between ranks. Parameters, buffers and
    state_dict keys are those of nn.BatchNorm2d. With a single rank, and in eval mode, it behaves
    like nn.BatchNorm2d. `process_group` None means the whole world.
    """

    process_group: dist.ProcessGroup | None = None

    def forward(self, input: Tensor) -> Tensor:
        """Normalises input [N, C, H, W]; the result has the input's dtype and memory format."""
        if not (self.training and dist.is_available() and dist.is_initialized()):
            return super().forward(input)
        if dist.get_rank(self.process_group) < 0:
            raise ValueError("SyncBatchNorm2d: this rank is not a member of its process group")
        if dist.get_world_size(self.process_group) == 1:
            return super().forward(input)
        return self.forward_joined(input)

    def forward_joined(self, input: Tensor) -> Tensor:
        """Normalises as in training with several ranks, even if there is only one. A collective."""
        self._check_input_dim(input)
        mean, var, count = _group_statistics(input, self.process_group)
        if self.running_mean is not None and self.running_var is not None:
            assert self.num_batches_tracked is not None
            self.num_batches_tracked.add_(1)
            factor = self.momentum
            if factor is None:  # means the cumulative average over all batches so far
                factor = 1 / float(self.num_batches_tracked)
            # running = (1 - factor) * running + factor * new, with the unbiased variance.
            self.running_mean.lerp_(mean.to(self.running_mean.dtype), factor)
            unbiased = var * (count / (count - 1))
            self.running_var.lerp_(unbiased.to(self.running_var.dtype), factor)
        args = (input, self.weight, self.bias, mean, var, count, self.eps, self.process_group)
        return cast(Tensor, _Normalise.apply(*args))


def convert_sync_batchnorm(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> nn.Module:
    """Makes every nn.BatchNorm2d in module (itself included) synchronise over process_group.

    Works in place and returns module. Subclasses of nn.BatchNorm2d have their own forward and are
    left alone. Deep-copy or pickle a model before it gets a process group, because a group can be
    neither copied nor pickled (None, the whole world, can).
    """
    for layer in module.modules():
        if type(layer) in (nn.BatchNorm2d, SyncBatchNorm2d):
            # Only the object's class changes. So parameters, buffers, hooks, the training flag and
            # layers used in several places stay as they are, and none can be forgotten in a copy.
            layer.__class__ = SyncBatchNorm2d
            layer.process_group = process_group  # type: ignore[assignment]
    return module


@torch.no_grad()
def average_running_stats(
    module: nn.Module, process_group: dist.ProcessGroup | None = None
) -> None:
    """Replaces the running statistics of the BatchNorm layers by their average over the ranks.

    Layers that are synchronised over this very group, and frozen ones, are left out: their
    statistics are the same on all ranks already, and averaging would only round them. Every rank
    calls this before an evaluation or a save, so that all ranks, and the saved state, have the same
    statistics. Running statistics are not used by the forward pass in training, and both the
    average and the running update are linear. So when and how often this is called changes the
    final average only by rounding.
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
