"""Initial weights for fine-tuning: from one of our checkpoints, or from a torchvision file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.distributed import World
from resnet_dist.models.parts import head_name
from resnet_dist.run.preflight import (
    TORCHVISION,
    check_init_from,
    check_network,
    torchvision_file,
    wrong_weights,
)


def load_initial_weights(
    network: nn.Module, config: Config, classes: tuple[str, ...], world: World
) -> str:
    """Loads the weights given by model.init_from into `network`. A collective.

    The head (the last linear layer) stays freshly initialized, unless the file's head has the same
    shape and, in a checkpoint, the same classes.

    Returns a line to print.

    Raises:
        UserError: there is no such file, or it has the weights of a different network.
    """
    # Rank 0 reads and sends: only its node needs the file, and all ranks get the same weights.
    weights = world.on_main(lambda: _read(network, config, classes))
    network.load_state_dict(weights, strict=False)
    kept = f"{head_name(network)}.weight" in weights
    about_head = "the head too" if kept else f"new head for {len(classes)} classes"
    return f"initialized from {config.model.init_from}: {len(weights)} tensors; {about_head}"


def _read(network: nn.Module, config: Config, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """Returns the tensors to load, with or without those of the head."""
    origin, name = str(config.model.init_from), config.model.name
    check_init_from(config)
    if origin.startswith(TORCHVISION):
        found = _read_torchvision(config)
        same_classes = True  # the file does not list its classes, so the shape decides
    else:
        saved = Checkpoint.load(Path(origin))
        check_network(config, saved.config)
        found, same_classes = saved.weights, saved.classes == classes

    # BN's batch counters, the only integers, are missing in old files, and nothing uses them.
    found = {key: tensor for key, tensor in found.items() if tensor.is_floating_point()}
    wanted = {k: t for k, t in network.state_dict().items() if t.is_floating_point()}
    head = [key for key in wanted if key.startswith(f"{head_name(network)}.")]
    way_out = f"give the weights of a {name}, or set model.name to the network that they belong to"
    for key in dict.fromkeys([*wanted, *found]):
        if key in head:
            continue
        if key not in found:
            raise wrong_weights(config, f"has no {key}, which {name} has", way_out)
        if key not in wanted:
            raise wrong_weights(config, f"has {key}, which {name} does not have", way_out)
        if found[key].shape != wanted[key].shape:
            shapes = f"{list(found[key].shape)}, in {name} {list(wanted[key].shape)}"
            raise wrong_weights(config, f"{key} is {shapes}", way_out)
    if not same_classes or any(
        key not in found or found[key].shape != wanted[key].shape for key in head
    ):
        found = {key: tensor for key, tensor in found.items() if key not in head}
    return found


def _read_torchvision(config: Config) -> dict[str, Tensor]:
    try:
        state: Any = torch.load(torchvision_file(config), map_location="cpu", weights_only=True)
    except Exception:  # anything that the unpickler may raise
        raise wrong_weights(config, "is not a file of weights", "download it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        why = "is not a state dict (tensors by name, as in torchvision's .pth files)"
        raise wrong_weights(config, why, "save model.state_dict() alone")
    return state
