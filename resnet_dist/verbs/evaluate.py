"""`evaluate`: scores a checkpoint under the evaluation protocol that the user chooses."""

import sys
from pathlib import Path

from resnet_dist import distributed
from resnet_dist.data.index.index import Index
from resnet_dist.data.load.build import load_index, make_loader
from resnet_dist.data.view.protocol import CENTER_CROP, Protocol
from resnet_dist.data.view.requests import eval_requests
from resnet_dist.determinism import fix_algorithms
from resnet_dist.distributed import World
from resnet_dist.errors import UserError
from resnet_dist.evaluate import Score, evaluate
from resnet_dist.models.vgg import MAP_PX, Vgg
from resnet_dist.run.bad_samples import named
from resnet_dist.verbs.recalibrate import recalibrate
from resnet_dist.verbs.trained import Trained, load_trained

MIN_DENSE_PX = 2**5 * MAP_PX  # after five halvings, the map is just as large as VGG's first kernel


def evaluate_checkpoint(
    path: Path,
    overrides: list[str],
    protocol: Protocol = CENTER_CROP,
    bn_images: int | None = None,
    save_to: Path | None = None,
) -> Score:
    """Returns the score of a checkpoint on the validation images of its config. A collective.

    bn_images: if given, first recomputes the BN statistics over this many training images (see
    recalibrate.py). save_to: a new folder for the checkpoint with these statistics.

    Raises:
        UserError: there is no such checkpoint, its classes differ from the data's, the data or the
            network does not support the protocol, the statistics cannot be recomputed, or save_to
            cannot be written.
    """
    world = distributed.start()
    if save_to is not None and world.on_main(save_to.exists):
        raise UserError(f"--save-to {save_to}: already exists; give a new folder")
    trained = load_trained(path, overrides, world)
    config, index = trained.config, val_index(trained, path, world)
    # Otherwise the defaults stay, without autotuning, because the shapes in multi-scale vary.
    if config.train.deterministic:
        fix_algorithms(True)
    check_protocol(protocol, trained, index)
    if bn_images is not None:
        recalibrate(trained, bn_images, world)
    if save_to is not None:
        world.on_main(lambda: trained.write(save_to))
    mean = trained.mean_image
    if mean is not None and protocol.scales_px:
        mean = mean.mean(axis=(0, 1))  # the mean image fits only the crop; uses its channel means
    loader = make_loader(index, config, world, mean, trained.decoding(world))
    requests = eval_requests(config, index, protocol, world.rank, world.size)
    batches = loader.batches(requests)
    score = evaluate(trained.network, batches, world, config.train.precision, protocol)
    for bad in world.gather(named(index, loader.bad, config.data.root)):
        for name, why in bad.items():
            if world.is_main:
                print(f"bad sample: {name}: {why}; it counts as wrong", file=sys.stderr)
    distributed.stop()
    return score


def val_index(trained: Trained, path: Path, world: World) -> Index:
    """Returns the index of the validation images. A collective.

    Raises:
        UserError: their classes are not those that the network was trained on.
    """
    index = load_index(trained.config, "val", world)
    if index.classes != trained.classes:
        raise UserError(
            f"data.root={trained.config.data.root}: its {len(index.classes)} classes differ from "
            f"the {len(trained.classes)} of {path}; give matching data with data.root=..."
        )
    return index


def check_protocol(protocol: Protocol, trained: Trained, index: Index) -> None:
    """Raises UserError if the data or the network does not support the protocol."""
    if index.pixels is not None and protocol != CENTER_CROP:
        raise UserError(
            f"--protocol {protocol.name}: images of data.format={trained.config.data.format} are "
            "used whole, at their own size; use center-crop"
        )
    smallest = min(protocol.scales_px, default=MIN_DENSE_PX)
    if isinstance(trained.network, Vgg) and smallest < MIN_DENSE_PX:
        name = trained.config.model.name
        raise UserError(
            f"--scales: {smallest} px: {name} needs at least {MIN_DENSE_PX} px; give larger scales"
        )
