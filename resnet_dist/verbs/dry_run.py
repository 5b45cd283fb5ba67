"""`train --dry-run`, which launchers also run before they queue a job: shows config and plan.

This module must not import torch, because it also runs on login nodes.
"""

from pathlib import Path

from resnet_dist.config import Config, to_yaml
from resnet_dist.data.formats import survey
from resnet_dist.errors import UserError, shortened
from resnet_dist.plan import Plan
from resnet_dist.run.plan_text import describe_plan


def dry_run(
    config: Config, world_size: int, local_world_size: int, train_images: int | None
) -> str:
    """Returns the merged config and the plan as text.

    Counts the images unless `train_images` is given. local_world_size: ranks per node.

    Raises:
        UserError: the images cannot be counted, or the plan is impossible.
    """
    data = config.data
    val_images = data.holdout_images or None
    found = []
    if train_images is None:
        try:
            found = [
                survey(data.format, Path(data.root), split)
                for split in (("train",) if data.holdout_images else ("train", "val"))
            ]
        except UserError as error:
            raise UserError(f"{error} (or plan without the data: --train-images N)") from None
        train_images, val_images = found[0].images, val_images or found[-1].images
    train_images -= config.holdout_images_of(train_images)
    plan = Plan.of(config, world_size, train_images, val_images, local_world_size)
    classes = {"classes": found[0].classes} if found else {}
    text = to_yaml(config) + "\n" + describe_plan(plan, **classes)
    text += "".join(f"\n{shortened(f'note: {note}')}" for split in found for note in split.notes)
    return text
