"""Makes the temporary image folder, and the shards, that the loader benchmarks read."""

import io
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from resnet_dist.bench.results import cores
from resnet_dist.data.index.image_file import UnreadableImage, read_image_file
from resnet_dist.data.index.listing import images_below
from resnet_dist.data.index.pillow import displayed_size, upright
from resnet_dist.data.index.plain import why_not_plain
from resnet_dist.data.prepare.write_shards import Settings, prepare_shards
from resnet_dist.errors import UserError

IMAGES_PER_SHARD = 1000


@contextmanager
def photo_folder(data: Path, most: int) -> Iterator[Path]:
    """Yields a temporary image folder whose train/ links to at most `most` photos of `data`.

    The photos are evenly spaced over all that were found. Those that are left out are unreadable,
    or of a kind that DALI alone does not decode. data: any folder with photos; if it has a folder
    train/, only photos in there are used.

    Raises:
        UserError: there are no photos, or none of those chosen is readable.
    """
    top = data / "train" if (data / "train").is_dir() else data
    found = sorted(images_below(top, "")) if top.is_dir() else []
    if not found:
        raise UserError(f"{data}: no photos found; give a folder of images, such as data.root")
    most = min(most, len(found))
    chosen = [top / found[number * len(found) // most] for number in range(most)]
    with ThreadPoolExecutor(cores()) as pool:
        photos = [
            path for path, is_one in zip(chosen, pool.map(_is_photo, chosen), strict=True) if is_one
        ]
    if not photos:
        raise UserError(
            f"{data}: none of its photos can be read; run `resnet-dist verify` to see why"
        )
    classes = {folder: f"{n:05}" for n, folder in enumerate(sorted({p.parent for p in photos}))}
    with TemporaryDirectory(prefix="resnet-dist-bench-") as name:
        root = Path(name)
        for number, path in enumerate(photos):
            # Keeps the class of each photo, so that loading the labels costs as much as usual, but
            # under a name of our own, as a folder's may be hidden, or "..".
            link = root / "train" / classes[path.parent] / f"{number:08}{path.suffix}"
            link.parent.mkdir(parents=True, exist_ok=True)
            link.symlink_to(path.absolute())
            val = root / "val" / link.parent.name
            if not val.exists():  # every data set needs a val/
                val.mkdir(parents=True)
                (val / link.name).symlink_to(path.absolute())
        yield root


def _is_photo(path: Path) -> bool:
    try:
        data = read_image_file(str(path))
        size = displayed_size(io.BytesIO(data))
        upright(data, size)
        return why_not_plain(data, size) is None
    except (OSError, UnreadableImage):
        return False


def as_shards(folder: Path) -> Path:
    """Writes the photos of `folder` as shards to the folder `folder`-shards, and returns its
    path."""
    dest = Path(f"{folder}-shards")
    prepare_shards(
        folder, dest, Settings(IMAGES_PER_SHARD, limit=None), cores(), "folder", lambda _: None
    )
    return dest
