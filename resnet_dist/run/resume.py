"""Checks that a resumed run is the same run: what is compared, and what is reported."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path

import PIL
import torch

from resnet_dist.checkpoints import folders
from resnet_dist.checkpoints.content import Checkpoint, Facts
from resnet_dist.config import Config
from resnet_dist.config_file import config_from_dict
from resnet_dist.data.index.index import IN_BYTES
from resnet_dist.data.load.dali import DALI_VERSION
from resnet_dist.distributed import World
from resnet_dist.plan import Plan
from resnet_dist.run.folder import check_run_folder, differing_settings, refusal
from resnet_dist.state import TrainState


@dataclass(frozen=True)
class Previous:
    """What a run resumes from."""

    path: Path | None  # the newest checkpoint; None: the run is new
    checkpoint: Checkpoint | None  # its content
    changes: tuple[str, ...]  # what has changed since, accepted by --resume-anyway
    warnings: tuple[str, ...]  # about damaged checkpoints, and about values that are not finite


def find_previous(config: Config, world: World) -> Previous:
    """Reads the newest checkpoint on every rank; `with_changes` adds what has changed since.

    A collective.
    """
    warnings = world.on_main(lambda: folders.prepare_to_resume(config.run_dir))
    path = world.on_main(lambda: folders.latest(config.run_dir))
    checkpoint = None if path is None else world.on_all(lambda: Checkpoint.load(path))
    return Previous(path, checkpoint, (), tuple(warnings))


def with_changes(
    previous: Previous, config: Config, facts: Facts, world: World, anyway: bool
) -> Previous:
    """Returns `previous` with the changes since it was saved. A collective.

    Raises what `changes_since` raises.
    """
    saved = previous.checkpoint
    changes = world.on_main(lambda: changes_since(config, saved, facts, anyway))
    return replace(previous, changes=tuple(changes))


def changes_since(
    config: Config, saved: Checkpoint | None, facts: Facts, anyway: bool
) -> list[str]:
    """Lists what has changed since the newest checkpoint, or since RUN/config.yaml without one.

    facts: of the present start. anyway: accept the changes (--resume-anyway).

    Raises:
        UserError: something has changed and `anyway` is False, or the saved weights do not fit the
            network.
    """
    if saved is None:
        return check_run_folder(config, anyway)
    before = config_from_dict(saved.config, f"{config.run_dir}/checkpoints")
    differing = differing_settings(before, config)
    differing += _differing_data(saved.fingerprints, facts.fingerprints, before, config)
    classes_before, classes = len(saved.classes), len(facts.classes)
    if classes_before != classes:
        differing.append(f"classes {classes_before} -> {classes}")
    if saved.decoder not in (None, facts.decoder):  # None: saved by an older version
        differing.append(f"decoder {saved.decoder} -> {facts.decoder}")
    fits = before.model.name == config.model.name and classes_before == classes
    if differing and not (anyway and fits):
        raise refusal(config, saved.step, differing, can_resume_anyway=fits)
    return differing


def _differing_data(
    old: Mapping[str, str], new: Mapping[str, str], before: Config, config: Config
) -> list[str]:
    """Lists which data differ. old, new: Index.fingerprints.

    What an older version did not record is not compared. If the images differ, their sizes in bytes
    differ too, and are not listed separately.
    """
    differing = [what for what in new if what in old and old[what] != new[what]]
    return [
        f"data: different {what} ({before.data.root} {old[what][:12]} -> {config.data.root} "
        f"{new[what][:12]})"
        for what in differing
        if what.removesuffix(IN_BYTES) == what or what.removesuffix(IN_BYTES) not in differing
    ]


def adapt_checkpoint(
    saved: Checkpoint, config: Config, state: TrainState
) -> tuple[Checkpoint, list[str]]:
    """Returns `saved`, adapted to a state whose config has changed, and lines of warning."""
    warnings = []
    momentum = saved.optimizer["state"]
    if saved.config["optim"].get("lr_scales", {}) != config.optim.lr_scales:
        # Momentum is saved by parameter number, which depends on the groups that lr_scales makes.
        momentum = {}
        warnings = ["warning: optim.lr_scales has changed: momentum starts from zero"]
    # The momentum factor and weight decay come from the config; torch would restore the saved ones.
    groups = state.optimizer.state_dict()["param_groups"]
    fitting = replace(
        saved,
        optimizer={"state": momentum, "param_groups": groups},
        scaler=saved.scaler or state.scaler.state_dict(),  # saved empty if the run was not in fp16
    )
    return fitting, warnings


def made_with(world: World) -> dict[str, str]:
    """Returns what the bits of a run depend on besides its config and data, on this rank."""
    facts = {
        "torch": str(torch.__version__),  # a subclass of str, which checkpoints do not take
        "dali": DALI_VERSION,
        "pillow": PIL.__version__,  # decodes what DALI does not, see data/index/plain.py
        "world_size": str(world.size),
    }
    if world.device.type == "cuda":
        facts["device"] = torch.cuda.get_device_name(world.device)
        facts["cudnn"] = str(torch.backends.cudnn.version())
    else:
        facts["device"] = (
            f"cpu with {torch.backends.cpu.get_cpu_capability()}"  # it decides which kernels run
        )
        facts["threads"] = str(torch.get_num_threads())  # a sum on a CPU is split over threads
    return facts


def environment_warning(before: Mapping[str, str], now: Mapping[str, str]) -> list[str]:
    """Returns a line of warning if two results of `made_with` differ in a key that both have."""
    both = [key for key in before if key in now]  # older versions recorded less
    differing = [f"{key} {before[key]} -> {now[key]}" for key in both if before[key] != now[key]]
    return [f"warning: not bit-exact from here on: {', '.join(differing)}"] if differing else []


def bn_batch_warning(before: int, plan: Plan) -> list[str]:
    """Returns a line of warning if BN now averages over a different number of images."""
    if before == plan.bn_batch_size:
        return []
    line = (
        f"warning: BN now normalizes {plan.bn_batch_size} images together instead of {before}: the "
        "number of ranks or train.max_local_batch_size has changed"
    )
    local = plan.max_local_batch_size_for(before)
    if local is not None:
        line += f"; train.max_local_batch_size={local} keeps it, if that fits in memory"
    return [line]


def describe_resume(path: Path, saved: Checkpoint, plan: Plan, is_finished: bool = False) -> str:
    """Returns the line that says from where a run resumes, or that no step is left to do."""
    what = "already finished" if is_finished else "resumes"
    text = f"{what} at step {saved.step} (epoch {plan.epoch_at(saved.step):.2f}) from {path}"
    if saved.made_with:  # empty if an older version wrote it
        ranks = saved.made_with["world_size"]
        text += f", saved {saved.saved_at} by {ranks} rank{'s' if ranks != '1' else ''}"
    return text
