"""Which tar files a split has: ours, with an index beside them, or anybody's."""

import re
from pathlib import Path

from resnet_dist.errors import UserError

SPLIT_WORDS = {"train": {"train"}, "val": {"val", "validation"}}
PREPARED = "prepare.json"  # what `resnet-dist prepare` leaves before its first shard


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
