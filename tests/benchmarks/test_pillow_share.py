"""benchmarks/pillow_share.py, in small."""

from pathlib import Path

import pytest
from PIL import Image

from benchmarks.pillow_share import SHARES_PCT, measure, write_photos
from resnet_dist.bench import quiet
from resnet_dist.bench.streams import Settings
from resnet_dist.data.index.plain import why_not_plain


@pytest.mark.parametrize("share_pct", [0, 10, 100])
def test_the_share_of_odd_photos(tiny_folder: Path, tmp_path: Path, share_pct: int) -> None:
    write_photos(tiny_folder, tmp_path, share_pct)
    photos = sorted((tmp_path / "train/a").iterdir())
    odd = 0
    for photo in photos:
        with Image.open(photo) as image:
            odd += why_not_plain(photo.read_bytes(), image.size[::-1]) is not None
    assert len(photos) == 47
    assert odd == -(-len(photos) * share_pct // 100)


@pytest.mark.slow
def test_the_figures_of_each_share(tiny_folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quiet, "at_once", True)
    rows = measure(tiny_folder, Settings(batch_size=4, threads=1, images=8, runs=1))
    assert [row["share_pct"] for row in rows] == list(SHARES_PCT)
    assert rows[0]["ours_is_times_as_fast"] == 1
    for row in rows:
        assert row["cpu_ms_per_image"] > 0
        assert {"steal_pct", "others_pct", "repeats"} <= row["runs"][0].keys()
