"""A package that is not there is one line, on each node; a bug of ours is not passed off as one."""

import os
import subprocess
import sys

import pytest

from resnet_dist.errors import not_installed
from tests.support.paths import REPO
from tests.support.slow import slow
from tests.support.waiting import HANG_SECONDS

WITHOUT_TORCH = """
import sys
sys.modules["torch"] = None  # Python's own way to forbid an import
from resnet_dist import cli
cli.main(["train", "configs/quickstart.yaml", "name=of-a-test"])
"""


def why(statement: str) -> ModuleNotFoundError:
    with pytest.raises(ModuleNotFoundError) as error:
        exec(statement)
    return error.value


@pytest.mark.parametrize(
    ("statement", "package"),
    [
        ("import no_such_package.part", "no_such_package"),
        ("import nvidia.dali", "nvidia-dali-cuda130 (for CUDA 12 as README.md says)"),
        ("import yaml", "pyyaml"),
    ],
)
def test_the_package_is_named(
    statement: str, package: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    for name in ("nvidia.dali", "yaml"):
        monkeypatch.setitem(sys.modules, name, None)
    assert str(not_installed(why(statement))).endswith(f"not installed; pip install {package}")


@pytest.mark.parametrize("module", ["torch.no_such_part", "resnet_dist.no_such_part"])
def test_a_part_that_is_missing_is_not_a_package(module: str) -> None:
    error = why(f"import {module}")
    with pytest.raises(ModuleNotFoundError) as raised:
        not_installed(error)
    assert raised.value is error


@pytest.mark.parametrize(("rank", "local_rank", "lines"), [(0, 0, 1), slow(9, 1, 0), (8, 0, 1)])
def test_one_rank_of_each_node_says_so(rank: int, local_rank: int, lines: int) -> None:
    """A package may be missing on one node."""
    ranks = {"RANK": str(rank), "LOCAL_RANK": str(local_rank), "WORLD_SIZE": "16"}
    done = subprocess.run(
        [sys.executable, "-c", WITHOUT_TORCH],
        cwd=REPO,
        env=os.environ | ranks | {"MASTER_ADDR": "localhost", "MASTER_PORT": "1"},
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
        check=False,
    )
    assert done.returncode == 2
    said = "resnet-dist: Python package torch: not installed; pip install torch"
    assert done.stderr.splitlines() == [said] * lines
