"""Finds the tar files of a split: our own shards with an index, or other tools' shards."""

import re
from pathlib import Path

from resnet_dist.errors import UserError

SPLIT_WORDS = {"train": {"train"}, "val": {"val", "validation"}}
PREPARED = "prepare.json"  # exists while `resnet-dist prepare` is unfinished


def own_index_file(root: Path, split: str) -> Path:
    """Returns where `resnet-dist prepare` writes the index of a split."""
    return root / split / "index.arrow"


def shard_files(root: Path, split: str) -> list[Path]:
    """Returns the shards of a split: absolute paths, sorted.

    Raises:
        UserError: there are none, or `prepare` has not finished them.
    """
    if not root.is_dir():
        raise UserError(f"data.root={root}: no such folder; it must contain shards (.tar)")
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
            f"data.root={root}: has no {split} shards; expected {split}/*.tar, or *.tar with "
            f"{' or '.join(sorted(SPLIT_WORDS[split]))} in the name"
        )
    return [file.absolute() for file in files]
