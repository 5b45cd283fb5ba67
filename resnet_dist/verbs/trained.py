"""Loads a trained network from a checkpoint onto its device."""

from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from torch import nn

from resnet_dist.checkpoints import writer
from resnet_dist.checkpoints.content import Checkpoint
from resnet_dist.config import Config
from resnet_dist.config_file import config_from_dict
from resnet_dist.data.load.build import agreed_decoding
from resnet_dist.data.load.decoding import Decoding
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.models.build import build_model


@dataclass(frozen=True)
class Trained:
    """A trained network (the averaged one, with train.ema_decay), and what is needed to use it and
    to write it."""

    config: Config  # the config of its training, with the overrides applied
    network: nn.Module  # in evaluation mode, on the world's device, channels_last, float32
    classes: tuple[str, ...]
    mean_image: np.ndarray | None  # float32 [H, W, 3] on the 0..1 scale; None: config.data.mean
    saved: Checkpoint

    def decoding(self, world: World) -> Decoding:
        """Returns the way in which its training images were decoded, or a different way if that is
        broken on this machine. A collective. Raises what agreed_decoding raises."""
        return agreed_decoding(self.config, world, self.saved.decoder)[0]

    def write(self, folder: Path) -> None:
        """Writes the checkpoint with the network's current weights to a new folder. One rank only.

        Raises:
            UserError: the folder cannot be written.
        """
        try:
            writer.write(folder, self.saved.with_weights(self.network.state_dict()))
        except OSError as error:
            raise UserError(f"{folder}: not written: {error.strerror or error}") from None


def load_trained(path: Path, overrides: list[str], world: World) -> Trained:
    """Reads a checkpoint, or the best checkpoint of a run folder. A collective.

    Raises:
        UserError: there is no such checkpoint, or the overrides do not fit it.
    """
    saved = world.on_all(lambda: Checkpoint.load(path))
    config = config_from_dict(saved.config, str(path), overrides)
    # Filling a cache is not worth it for a few batches.
    root = _root_from(path, config)
    config = replace(config, data=replace(config.data, root=root, cache="none"))
    name = saved.config["model"]["name"]
    if config.model.name != name:
        raise config.invalid("model.name", f"{path} is a {name}", name)
    per_pixel_mean = saved.mean_image is not None
    if config.data.per_pixel_mean != per_pixel_mean:
        why = f"{path} was trained {'with' if per_pixel_mean else 'without'} a mean image"
        raise config.invalid("data.per_pixel_mean", why, per_pixel_mean)
    mean_image = None if saved.mean_image is None else saved.mean_image.numpy()
    if mean_image is not None and len(mean_image) != config.data.eval_crop_px:
        why = f"the mean image of {path} has a different size"
        raise config.invalid("data.eval_crop_px", why, len(mean_image))
    network = build_model(name, len(saved.classes))
    network.load_state_dict(saved.weights)
    network.to(world.device, memory_format=torch.channels_last)  # type: ignore[call-overload]
    return Trained(config, network.eval(), saved.classes, mean_image, saved)


def _root_from(path: Path, config: Config) -> str:
    """Returns data.root; if it is relative and not here, relative to where training was started.

    That is the folder below which tracking.run_root is a part of the checkpoint's path.
    """
    root, run_root = Path(config.data.root), Path(config.tracking.run_root)
    if root.is_absolute() or root.exists() or run_root.is_absolute():
        return config.data.root
    for folder in path.resolve().parents:
        if folder.parts[-len(run_root.parts) :] == run_root.parts:
            there = folder.parents[len(run_root.parts) - 1] / root
            return str(there) if there.exists() else config.data.root
    return config.data.root
