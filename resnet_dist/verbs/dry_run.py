"""`train --dry-run`, and what launchers ask before they queue a job: config and plan, as text.

No torch here: it works on a login node.
"""

from pathlib import Path

from resnet_dist.config import Config, to_yaml
from resnet_dist.data.formats import count_images
from resnet_dist.errors import UserError
from resnet_dist.plan import Plan
from resnet_dist.run.folder import check_run_folder
from resnet_dist.run.plan_text import describe_plan


def dry_run(
    config: Config, world_size: int, local_world_size: int, train_images: int | None
) -> str:
    """The merged config and the plan, as text. Counts the images unless `train_images` is given.

    local_world_size: ranks per node.
    """
    data = config.data
    val_images = data.holdout_images or None
    if train_images is None:
        try:
            train_images = count_images(data.format, Path(data.root), "train")
            val_images = val_images or count_images(data.format, Path(data.root), "val")
        except UserError as error:
            raise UserError(f"{error} (--train-images N plans without the data)") from None
    train_images -= config.holdout_images_of(train_images)
    plan = Plan.of(config, world_size, train_images, val_images, local_world_size)
    text = to_yaml(config) + "\n" + describe_plan(plan)
    differing = check_run_folder(config, anyway=True)  # the plan is worth reading all the same
    if differing:
        text += "\n\nto be trained under another name=, or with --resume-anyway: not as "
        text += f"{config.run_dir} has it: {'; '.join(differing)}"
    return text
