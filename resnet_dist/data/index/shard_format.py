"""data.format=shards: WebDataset tar files, our own with an index or other tools'."""

import json
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.format import Format
from resnet_dist.data.index.shard_files import own_index_file
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index


class ShardFiles(Format):
    name = "shards"

    def is_in(self, root: Path) -> bool:
        return any(root.glob("*.tar")) or any(root.glob("train/*.tar"))

    def count(self, root: Path, split: str) -> int:
        summary = root / split / "index.json"
        try:
            return int(json.loads(summary.read_bytes())["images"])
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
