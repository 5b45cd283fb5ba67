"""The photos that loaders are measured on: an image folder of links to some of a data set's."""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from resnet_dist.bench.results import cores
from resnet_dist.data.formats import build_index
from resnet_dist.data.index.listing import images_below
from resnet_dist.data.prepare.write_shards import Settings, prepare_shards
from resnet_dist.errors import UserError

IMAGES_PER_SHARD = 1000


@contextmanager
def photo_folder(data: Path, most: int) -> Iterator[Path]:
    """A temporary image folder whose train/ has at most `most` readable photos of `data`, evenly
    chosen. data: any folder with photos in it; of an image folder, train/ is taken.

    Raises:
        UserError: there are none.
    """
    top = data / "train" if (data / "train").is_dir() else data
    found = sorted(images_below(top, "")) if top.is_dir() else []
    if not found:
        raise UserError(f"{data}: no photos in it; give a folder of images, such as data.root")
    with TemporaryDirectory(prefix="resnet-dist-bench-") as name:
        root = Path(name)
        for number in range(min(most, len(found))):
            path = Path(found[number * len(found) // min(most, len(found))])
            # Their own class, so that labels cost what they cost.
            link = root / "train" / (path.parent.name or "photos") / f"{number:08}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to((top / path).absolute())
            val = root / "val" / link.parent.name
            if not val.exists():  # no data set is without
                val.mkdir(parents=True)
                (val / link.name).symlink_to((top / path).absolute())
        index = build_index("folder", root, "train", None)
        for sample in index.bad:
            os.unlink(index.paths[sample])
        if len(index.bad) == len(index):
            raise UserError(f"{data}: none of its photos can be read; see `resnet-dist verify`")
        yield root


def as_shards(folder: Path) -> Path:
    """The same photos as shards, beside `folder`'s train/."""
    dest = Path(f"{folder}-shards")
    prepare_shards(folder, dest, Settings(IMAGES_PER_SHARD, limit=None), cores())
    return dest
