"""Draws belong to their purpose and numbers; those of runs under way keep their bits."""

import ast
import hashlib
import json
from collections import defaultdict
from dataclasses import replace
from itertools import combinations
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from resnet_dist.config import Config, DataConfig
from resnet_dist.data.index.index import Index
from resnet_dist.data.view.augment import train_windows
from resnet_dist.data.view.order import block_order, epoch_order, holdout
from resnet_dist.data.view.requests import train_request
from resnet_dist.draws import WITHOUT_WORD, bits, generator, keys, uniforms
from resnet_dist.models.dropout import KeyedDropout, set_dropout_keys
from tests.support.paths import GOLDEN, REPO

# Written by the code of commit e63cd7d, before purposes had words.
RECORDED = json.loads((GOLDEN / "draws.json").read_text())
SIZES = np.array([[375, 500], [500, 333], [64, 64]], np.int32)
CROPS = {
    "scale": (DataConfig(pca_color_std=0.1), SIZES),
    "random_resized": (DataConfig(train_crop="random_resized", pca_color_std=0.1), SIZES),
    "pad": (
        DataConfig(format="cifar10", train_crop="pad", crop_px=32),
        np.full((3, 2), 32, np.int32),
    ),
}


def recorded(what: str) -> list[tuple[list[Any], Any]]:
    """(numbers of the key, value) of each that was recorded."""
    return [
        ([int(part) if part.isdigit() else part for part in key.split(",")], value)
        for key, value in RECORDED[what].items()
    ]


def test_orders_are_those_recorded() -> None:
    for (seed, epoch), order in recorded("order"):
        assert epoch_order(seed, epoch, 12).tolist() == order
    for (seed, epoch), order in recorded("blocks"):
        assert block_order(seed, epoch, 50, 4).tolist() == order


def test_the_held_out_images_are_those_recorded() -> None:
    """Others would be images that a run under way has trained on."""
    assert [part.tolist() for part in holdout(20, 6)] == RECORDED["holdout"]


def test_windows_are_those_recorded() -> None:
    for (crop, seed, epoch), (roi, flip, color_shift) in recorded("windows"):
        data, sizes = CROPS[crop]
        windows = train_windows(data, seed, epoch, np.array([0, 5, 1281166]), sizes)
        assert windows.roi.tolist() == roi
        assert windows.flip.tolist() == flip
        assert windows.color_shift == pytest.approx(np.array(color_shift), abs=1e-15)


def test_stand_ins_are_those_recorded() -> None:
    zeros, sizes = np.zeros(20, np.int64), np.full((20, 2), 300, np.int32)
    index = Index(("a",), zeros, sizes, (), None, "")
    for (seed, epoch), others in recorded("stand_in"):
        request = train_request(replace(Config(), seed=seed), index, epoch, np.array([0]))
        assert request.stand_in is not None
        found = [request.stand_in(sample, n)[0] for sample in (0, 19) for n in range(4)]
        assert found == others


def test_dropout_masks_are_those_recorded() -> None:
    for (seed, step), rows in recorded("dropout"):
        layer = KeyedDropout(2, 0.5)
        set_dropout_keys([layer], seed, step, range(3, 6), torch.device("cpu"))
        mask = layer(torch.ones(3, 24)) > 0
        assert ["".join(str(int(kept)) for kept in row) for row in mask.tolist()] == rows


def reference(purpose_word: list[int], seed: int, number: int, item: int, draw: int) -> float:
    """SplitMix64 in Python's integers."""
    key = 0
    for word in (*purpose_word, seed, number, item):
        key = mixed(key ^ word)
    return (mixed((key + draw * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53


def mixed(z: int) -> int:
    z = (z + 0x9E3779B97F4A7C15) % 2**64
    z = ((z ^ (z >> 30)) * 0xBF58476D1CE4E5B9) % 2**64
    z = ((z ^ (z >> 27)) * 0x94D049BB133111EB) % 2**64
    return z ^ (z >> 31)


def test_the_generator_is_splitmix64() -> None:
    items = np.array([0, 1, 2**62])
    drawn = uniforms("window", 2**63 - 1, 5, items, 3)
    for row, item in zip(drawn.tolist(), items.tolist(), strict=True):
        assert row == [reference([], 2**63 - 1, 5, item, draw) for draw in (1, 2, 3)]


@pytest.mark.parametrize("purpose", ["dropout", "a new one"])
def test_a_device_draws_from_the_same_keys(purpose: str) -> None:
    """A stream of `bits` is one more word of the key; the largest seed wraps."""
    seed, step, positions, stream = 2**63 - 1, 7, torch.arange(5), 3
    ours = bits(keys(purpose, seed, step, positions), stream, 100).double() * 2.0**-53
    theirs = splitmix_of(purpose, seed, step, positions, stream, 100)
    assert torch.equal(ours, theirs)


def splitmix_of(
    purpose: str, seed: int, step: int, positions: Tensor, stream: int, draws: int
) -> Tensor:
    """From the draws of `uniforms`, which shows the word of the purpose."""
    word = [] if purpose in WITHOUT_WORD else [
        int.from_bytes(hashlib.sha256(purpose.encode()).digest()[:8], "little")
    ]  # fmt: skip
    rows = []
    for position in positions.tolist():
        key = 0
        for one in (*word, seed, step, position, stream):
            key = mixed(key ^ one)
        rows.append([
            (mixed((key + draw * 0x9E3779B97F4A7C15) % 2**64) >> 11) * 2.0**-53
            for draw in range(1, draws + 1)
        ])  # fmt: skip
    return torch.tensor(rows, dtype=torch.float64)


def test_new_purposes_share_no_stream() -> None:
    """Not with each other, nor with those that have no word."""
    items = np.arange(1000)
    drawn = [uniforms(purpose, 1, 2, items, 3) for purpose in ("mixup", "cutmix", "window")]
    for one, other in combinations(drawn, 2):
        assert not np.isin(one, other).any()
    orders = [generator(purpose, 0, 0).permutation(50) for purpose in ("a", "b", "order")]
    for one, other in combinations(orders, 2):
        assert not np.array_equal(one, other)


def test_a_word_is_used_by_one_module() -> None:
    """Two modules with one word would draw the same numbers for two purposes."""
    users = defaultdict(set)
    for path in (REPO / "resnet_dist").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if not isinstance(node, ast.Call):
                continue
            called = node.func.attr if isinstance(node.func, ast.Attribute) else None
            called = node.func.id if isinstance(node.func, ast.Name) else called
            if called in ("generator", "uniforms", "keys") and node.args:
                word = node.args[0]
                assert isinstance(word, ast.Constant), f"{path}:{node.lineno}: no literal word"
                users[word.value].add(path.relative_to(REPO))
    assert {word: len(modules) for word, modules in users.items()} == dict.fromkeys(users, 1)
    assert set(users) | {"weights"} >= set(WITHOUT_WORD)
