"""data.format=shards: WebDataset's tar files, ours with an index beside them or anybody's."""

import json
import re
from pathlib import Path
from typing import TYPE_CHECKING

from resnet_dist.data.index.format import Format
from resnet_dist.errors import UserError

if TYPE_CHECKING:
    from resnet_dist.data.index.index import Index

SPLIT_WORDS = {"train": {"train"}, "val": {"val", "validation"}}
PREPARED = "prepare.json"  # what `resnet-dist prepare` leaves before its first shard


class ShardFiles(Format):
    name = "shards"

    def is_in(self, root: Path) -> bool:
        return any(root.glob("*.tar")) or any(root.glob("train/*.tar"))

    def count(self, root: Path, split: str) -> int:
        note = root / split / "index.json"
        try:
            return int(json.loads(note.read_bytes())["images"])
        except FileNotFoundError:
            raise UserError(
                f"{note}: no such file; shards without an index cannot be counted at once"
            ) from None
        except (OSError, ValueError, KeyError, TypeError):
            raise UserError(
                f"{note}: not an index; make it again with `resnet-dist prepare`"
            ) from None

    def index(self, root: Path, split: str, kept: Path | None) -> "Index":
        from resnet_dist.data.index.shards import shard_index

        return shard_index(root, split, kept)

    def own_index(self, root: Path, split: str) -> Path | None:
        return own_index_file(root, split)


def own_index_file(root: Path, split: str) -> Path:
    """Where `resnet-dist prepare` writes the index of a split."""
    return root / split / "index.arrow"


def shard_files(root: Path, split: str) -> list[Path]:
    """Absolute, sorted. Raises UserError: none, or `prepare` is not done with them."""
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; it must hold shards (.tar)")
    if (root / PREPARED).is_file():
        raise UserError(
            f"{own_index_file(root, split)}: no such file: `resnet-dist prepare` has not finished; "
            "run it again"
        )
    files = sorted((root / split).glob("*.tar"))
    if not files:
        words = SPLIT_WORDS[split]
        files = sorted(
            f for f in root.glob("*.tar") if words & set(re.split("[^a-z]+", f.stem.lower()))
        )
    if not files:
        raise UserError(
            f"data.root={root}: no shards of {split}; expected {split}/*.tar, or *.tar with "
            f"{' or '.join(sorted(SPLIT_WORDS[split]))} in their name"
        )
    return [file.absolute() for file in files]
