"""The job of noise that the scripts for a GPU train: ResNet-50 at 224 px, or a rehearsal's."""

from resnet_dist.bench.noise_job import NoiseJob
from resnet_dist.config_file import load_config
from resnet_dist.distributed import World


def noise_job(
    world: World,
    batch_size: int,
    overrides: list[str],
    *,
    small: bool = False,
    channels_last: bool = True,
) -> NoiseJob:
    """batch_size: of this rank. overrides: key=value settings of the config. small: for a
    rehearsal, ResNet-18 at 64 px."""
    path = f"configs/imagenet/{'resnet18' if small else 'resnet50'}.yaml"
    images = {"global": batch_size * world.size, "max_local": batch_size}
    sizes = [f"train.{which}_batch_size={count}" for which, count in images.items()]
    config = load_config(path, [*sizes, *overrides])
    px = 64 if small else config.data.crop_px
    return NoiseJob(world, config, px, channels_last=channels_last)
