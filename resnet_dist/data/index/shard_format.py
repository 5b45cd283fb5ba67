"""data.format=shards: WebDataset tar files, our own with an index or other tools'."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.folder import has_class_images
from resnet_dist.data.index.format import Format
from resnet_dist.data.index.shard_files import PREPARED, own_index_file, shard_files
from resnet_dist.data.index.survey import Survey
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index


class ShardFiles(Format):
    name = "shards"

    def is_in(self, root: Path) -> bool:
        if own_index_file(root, "train").is_file() or (root / PREPARED).is_file():
            return True
        # A tar that is left next to the folders that it was unpacked to is no shard.
        has_tars = any(root.glob("*.tar")) or any(root.glob("train/*.tar"))
        return has_tars and not has_class_images(root / "train")

    def has_split(self, root: Path, split: str) -> bool:
        try:
            return own_index_file(root, split).is_file() or bool(shard_files(root, split))
        except UserError:
            return False

    def survey(self, root: Path, split: str) -> Survey:
        summary = root / split / "index.json"
        try:
            content = json.loads(summary.read_bytes())
            return Survey(int(content["images"]), f"{int(content['classes']):,}")
        except FileNotFoundError:
            raise UserError(
                f"{summary}: no such file; shards without an index cannot be counted quickly"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{summary}: not an index; make it again with `resnet-dist prepare`"
            ) from None

    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        from resnet_dist.data.index.shards import shard_index

        return shard_index(root, split, kept)

    def own_index(self, root: Path, split: str) -> Path | None:
        return own_index_file(root, split)
