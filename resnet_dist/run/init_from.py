"""Fine-tuning's first weights: those of a checkpoint of ours, or of a torchvision file."""

from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.models.depths import DEPTHS, why_no_counterpart
from resnet_dist.models.parts import head_name

TORCHVISION = "torchvision:"


def load_initial_weights(
    network: nn.Module, config: Config, classes: tuple[str, ...], world: World
) -> str:
    """Puts the weights that model.init_from names into `network`. A collective; rank 0 reads.

    The head, the last linear layer, stays freshly initialized unless the one there has its shape
    and, in a checkpoint, its classes.

    Returns the line to print.

    Raises:
        UserError: no such file, or the weights of another network.
    """
    # Sent to the others, so that all are equal and one node needs the file.
    weights = world.on_main(lambda: _read(network, config, classes))
    network.load_state_dict(weights, strict=False)
    kept = f"{head_name(network)}.weight" in weights
    about_head = "the head too" if kept else f"new head for {len(classes)} classes"
    return f"initialized from {config.model.init_from}: {len(weights)} tensors; {about_head}"


def _read(network: nn.Module, config: Config, classes: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors to load: all but, perhaps, the head's."""
    origin, name = str(config.model.init_from), config.model.name
    if origin.startswith(TORCHVISION):
        why_not = why_no_counterpart(DEPTHS[name])
        if why_not is not None:
            raise _refusal(config, f"torchvision has no {name}: {why_not}", "give a checkpoint")
        found = _read_torchvision(config)
        same_classes = True  # such a file does not name them: the shape decides
    else:
        saved = Checkpoint.load(Path(origin))
        saved_name = saved.config["model"]["name"]
        if saved_name != name:  # resnet50's and resnet50_v1's keys and shapes are the same
            why = f"holds a {saved_name}, this run trains a {name}"
            raise _refusal(config, why, f"give model.name={saved_name}, or another checkpoint")
        found, same_classes = saved.weights, saved.classes == classes

    # BN's counters, the only whole numbers, are not in old files, and nothing reads them.
    found = {key: tensor for key, tensor in found.items() if tensor.is_floating_point()}
    wanted = {k: t for k, t in network.state_dict().items() if t.is_floating_point()}
    head = [key for key in wanted if key.startswith(f"{head_name(network)}.")]
    way_out = f"give the weights of a {name}, or the model.name that they are of"
    for key in dict.fromkeys([*wanted, *found]):
        if key in head:
            continue
        if key not in found:
            raise _refusal(config, f"has no {key}, which {name} has", way_out)
        if key not in wanted:
            raise _refusal(config, f"has {key}, which {name} has not", way_out)
        if found[key].shape != wanted[key].shape:
            shapes = f"{list(found[key].shape)}, in {name} {list(wanted[key].shape)}"
            raise _refusal(config, f"{key} is {shapes}", way_out)
    if not same_classes or any(
        key not in found or found[key].shape != wanted[key].shape for key in head
    ):
        found = {key: tensor for key, tensor in found.items() if key not in head}
    return found


def _read_torchvision(config: Config) -> dict[str, Tensor]:
    path = Path(str(config.model.init_from).removeprefix(TORCHVISION)).expanduser()
    try:
        state: Any = torch.load(path, map_location="cpu", weights_only=True)
    except OSError as error:
        why = f"cannot be read: {error.strerror or error}"
        raise _refusal(config, why, "give torchvision:FILE.pth") from None
    except Exception:  # whatever the unpickler stumbles over
        raise _refusal(config, "is not a file of weights", "download it again") from None
    if not isinstance(state, dict) or not all(isinstance(v, Tensor) for v in state.values()):
        why = "is not a state dict: tensors by their names, such as torchvision's .pth files hold"
        raise _refusal(config, why, "save model.state_dict() alone")
    return state


def _refusal(config: Config, why: str, way_out: str) -> UserError:
    return UserError(f"model.init_from={config.model.init_from}: {why}; {way_out}")
