"""DDP and synchronized BN over NCCL, in a group of one rank: what a single GPU can try of them.

    python benchmarks/gpu_one_rank.py [--small] [--output FILE.json]

The product leaves both out where a rank is alone; here they are forced. Three steps with and
without them must have the same losses, within rounding; with train.deterministic (the exchange in
the order of the ranks) twice the same weights, bit for bit. Without a GPU: over gloo.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from noise_job import NoiseJob, force_synchronized_batchnorm

from resnet_dist import distributed
from resnet_dist.distributed import World
from resnet_dist.process import set_up_process

STEPS = 3
LARGEST_DIFFERENCE = 1e-2  # of the loss, relative; other kernels add in another order


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--small", action="store_true", help="ResNet-18 at 64 px")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    alone = distributed.start()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend="nccl") if alone.device.type == "cuda" else None
    # It says two, so that nothing is left out; every collective is over the group, which has one.
    forced = replace(alone, size=2, local_size=2, group=group)

    first, weights = train(forced, given.small, deterministic=True)
    again, same_weights = train(forced, given.small, deterministic=True)
    same_bits = all(torch.equal(weights[name], same_weights[name]) for name in weights)
    figures = {
        "backend": dist.get_backend(group),
        "loss": {
            "plain": train(alone, given.small, deterministic=False)[0],
            "forced": train(forced, given.small, deterministic=False)[0],
            "forced, deterministic": first,
        },
        "deterministic_twice_the_same_bits": same_bits and first == again,
    }
    plain, *others = figures["loss"].values()
    figures["largest_difference"] = max(abs(other - plain) / plain for other in others)
    if given.output is not None:
        given.output.write_text(json.dumps(figures, indent=1) + "\n")
    text = ", ".join(f"{name} {loss:.5f}" for name, loss in figures["loss"].items())
    print(f"{figures['backend']}: loss {text}; the same bits twice: {same_bits}")
    if not (figures["largest_difference"] < LARGEST_DIFFERENCE and same_bits and first == again):
        sys.exit("the losses differ, or the bits of two deterministic runs")


def train(
    world: World, small: bool, *, deterministic: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """The mean loss of the steps, and the weights after them."""
    overrides = ["train.precision=fp32", f"train.deterministic={str(deterministic).lower()}"]
    job = NoiseJob(world, 8 if small else 64, overrides, small=small)
    if world.size > 1:
        force_synchronized_batchnorm(job.state.model)
    for _ in range(STEPS):
        job.step()
    return job.mean_loss(), job.state.model.state_dict()


if __name__ == "__main__":
    main()
