"""Tests DDP and synchronized BN over NCCL on a single GPU, in a group of one rank.

    python benchmarks/gpu_one_rank.py [--small] [--output FILE.json]

Training skips both if there is only one rank; here they are forced. Three steps with and without
them must have the same losses, within rounding. With train.deterministic, which sums in the order
of the ranks, two runs must have the same weights, bit for bit. Without a GPU, uses gloo.
"""

import argparse
import json
import sys
from dataclasses import replace
from pathlib import Path

import torch
import torch.distributed as dist
from noise_job import noise_job

from resnet_dist import distributed
from resnet_dist.bench.noise_job import force_synchronized_batchnorm
from resnet_dist.distributed import World
from resnet_dist.process import set_up_process

STEPS = 3
LARGEST_DIFFERENCE = 1e-2  # of the loss, relative; different kernels sum in a different order


def main() -> None:
    set_up_process()
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0], allow_abbrev=False)
    parser.add_argument("--small", action="store_true", help="ResNet-18 at 64 px")
    parser.add_argument("--output", type=Path, metavar="FILE.json")
    given = parser.parse_args()
    alone = distributed.start()
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    group = dist.new_group(backend="nccl") if alone.device.type == "cuda" else None
    # Claims a world size of two, so that nothing is skipped. All collectives use the group, which
    # has only one rank.
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
    print(f"{figures['backend']}: loss {text}; two runs have the same bits: {same_bits}")
    if not (figures["largest_difference"] < LARGEST_DIFFERENCE and same_bits and first == again):
        sys.exit("the losses differ, or two deterministic runs are not bit for bit the same")


def train(
    world: World, small: bool, *, deterministic: bool
) -> tuple[float, dict[str, torch.Tensor]]:
    """Trains for STEPS steps. Returns their mean loss and the final weights."""
    overrides = ["train.precision=fp32", f"train.deterministic={str(deterministic).lower()}"]
    job = noise_job(world, 8 if small else 64, overrides, small=small)
    if world.size > 1:
        force_synchronized_batchnorm(job.state.model)
    for _ in range(STEPS):
        job.step()
    return job.mean_loss(), job.state.model.state_dict()


if __name__ == "__main__":
    main()
