"""Deterministic mode: the same command on the same machines gives the same bits.

Three things may change them from run to run: kernels that add in whatever order their threads
come, autotuning that picks another kernel, and sums over the ranks. Here the first two are fixed.
The third reads torch.are_deterministic_algorithms_enabled(), the one switch, where it adds:
distributed.sum_over_ranks, job.distribute and agree_after_step.
"""

import os

import torch
from torch import Tensor, nn
from torch.distributed import GradBucket, ProcessGroup

from resnet_dist.config import Config
from resnet_dist.distributed import World, sum_in_rank_order
from resnet_dist.models.depths import DEPTHS
from resnet_dist.models.sync_batchnorm import average_running_stats
from resnet_dist.models.vgg import MAP_PX


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


def check_deterministic_form(config: Config, device: torch.device) -> None:
    """Raises UserError where training would end in its first step, as a layer has none.

    On a GPU that is VGG's average pooling, but at a size where it changes nothing (models/vgg.py).
    """
    pools = DEPTHS[config.model.name].form == "vgg" and config.data.crop_px // 2**5 != MAP_PX
    if config.train.deterministic and device.type == "cuda" and pools:
        why = f"{config.model.name} has a deterministic form on a GPU at data.crop_px=224 only"
        raise config.invalid("train.deterministic", why, False)


def reduce_gradients_in_rank_order(model: nn.parallel.DistributedDataParallel) -> None:
    """DDP's mean over the ranks, the same wherever a gradient stands in a bucket.

    DDP makes its buckets anew after the first step, in the order in which gradients came. An
    all-reduce adds in an order that depends on the place in the buffer. So the first step after a
    resume would differ in the last bit from the same step of a run that was not stopped: with
    three ranks or more, since a sum of two has one order.
    """
    model.register_comm_hook(model.process_group, _mean_in_rank_order)


def agree_after_step(network: nn.Module, world: World) -> None:
    """In deterministic mode, averages BN statistics that are local to ranks or nodes.

    Otherwise that happens where they are used (job.save, job.evaluate_now). But an average is
    rounded: a run that was saved at a stop would differ in the last bit from one that was not.
    """
    if torch.are_deterministic_algorithms_enabled():
        average_running_stats(network, world.group)


def _mean_in_rank_order(group: ProcessGroup, bucket: GradBucket) -> torch.futures.Future[Tensor]:
    mean = sum_in_rank_order(bucket.buffer(), group).div_(group.size())
    # The GPU's stream orders what follows; the future only has to say which device that is.
    done: torch.futures.Future[Tensor] = torch.futures.Future(
        devices=[mean.device] if mean.is_cuda else None
    )
    done.set_result(mean)
    return done
