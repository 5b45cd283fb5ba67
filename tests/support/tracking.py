"""Starts a tracker by itself, and reads what it has written."""

import json
from pathlib import Path

from resnet_dist.config import Config, to_yaml
from resnet_dist.tracking.journal import Tracker

TAGS = {"git.commit": "abc", "world_size": "2", "precision": "fp32", "recipe": "tiny"}


def start(config: Config, warnings: list[str] | None = None) -> Tracker:
    config.run_dir.mkdir(parents=True, exist_ok=True)
    (config.run_dir / "config.yaml").write_text(to_yaml(config))
    said = [] if warnings is None else warnings
    return Tracker(config, TAGS, records=True, warn=said.append)


def losses(journal: Path) -> list[tuple[int, float]]:
    records = [json.loads(line) for line in journal.read_text().splitlines()]
    return [
        (r["step"], r["metrics"]["train/loss"]) for r in records if "train/loss" in r["metrics"]
    ]
