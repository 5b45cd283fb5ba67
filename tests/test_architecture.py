"""Imports point one way. The table is the house; docs/DESIGN.md says what each room is for."""

import ast
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS

PACKAGE = REPO / "resnet_dist"
MAX_FILES_AT_THE_TOP = 18  # what a reader of training needs

# A file at the top, a package, or a package of `data`: what it may import.
ARROWS = {
    # Leaves
    "errors": "",
    "files": "",
    "process": "",
    "draws": "",
    "determinism": "",
    "ema": "",
    # What a run is
    "data.index": "errors files process",
    "data.formats": "data.index errors",
    "distributed": "determinism errors",
    "models": "distributed draws",
    "config": "data.formats errors models",
    "config_file": "config errors",
    "plan": "config models",
    # Its parts
    "precision": "",
    "optim": "config models",
    "checkpoints": "errors files plan",
    "state": "checkpoints config ema optim plan",
    "tracking": "config errors files",
    "data.view": "config data.index draws errors plan",
    "data.load": "__init__ config data.formats data.index data.view distributed draws errors files"
    " precision process",
    "evaluate": "data.load data.view distributed models precision tracking",
    "run": "checkpoints config config_file data.index data.load distributed errors evaluate files"
    " models plan process state tracking",
    # Training
    "job": "checkpoints config data.index data.load data.view determinism distributed draws ema"
    " errors models optim plan precision run state tracking",
    "train": "config data.load determinism distributed errors evaluate job models optim precision"
    " run tracking",
    # What else a user may ask for; training imports none of it
    "data.prepare": "data.formats data.index errors files run",
    "verbs": "__init__ checkpoints config config_file data.formats data.index data.load data.view"
    " determinism distributed errors evaluate files models plan precision run tracking",
    "bench": "checkpoints config data.formats data.index data.load data.prepare data.view"
    " determinism distributed ema errors job models optim plan precision process run state tracking"
    " train",
    "cli": "__init__ bench config config_file data.formats data.prepare data.view distributed"
    " errors models process run train verbs",
    "__main__": "cli",
}
# A login node has PyYAML alone.
WITHOUT_TORCH = (
    "resnet_dist.cli",
    "resnet_dist.models.sizes",
    "resnet_dist.run.finished",
    "resnet_dist.run.preflight",
    "resnet_dist.verbs.dry_run",
    "resnet_dist.verbs.given",
    "resnet_dist.verbs.status",
    "resnet_dist.checkpoints.folders",
    "resnet_dist.run.outcome",
    "resnet_dist.tracking.journal",
)


def unit_of(module: str) -> str:
    """resnet_dist.data.index.folder -> data.index; resnet_dist.plan -> plan."""
    parts = module.split(".")[1:]
    if not parts:
        return "__init__"
    return ".".join(parts[:2]) if parts[0] == "data" else parts[0]


def modules() -> dict[str, Path]:
    found = {}
    for path in PACKAGE.rglob("*.py"):
        parts = path.relative_to(REPO).with_suffix("").parts
        found[".".join(parts[:-1] if parts[-1] == "__init__" else parts)] = path
    return found


def imported_by(path: Path, known: dict[str, Path]) -> Iterator[str]:
    """Modules of this package, also those imported inside functions; not those for types alone."""
    tree = ast.parse(path.read_text())
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test) == "TYPE_CHECKING":
            node.body = []
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            yield from (alias.name for alias in node.names if alias.name in known)
        elif isinstance(node, ast.ImportFrom) and (node.module or "").startswith("resnet_dist"):
            for alias in node.names:
                inner = f"{node.module}.{alias.name}"
                yield inner if inner in known else str(node.module)


def test_all_arrows_are_in_the_table() -> None:
    known = modules()
    found: dict[str, set[str]] = {unit_of(module): set() for module in known}
    for module, path in known.items():
        here = unit_of(module)
        found[here] |= {unit_of(other) for other in imported_by(path, known)} - {here}
    del found["__init__"], found["data"]  # a version; nothing
    assert found.keys() == ARROWS.keys()
    beyond = {unit: targets - set(ARROWS[unit].split()) for unit, targets in found.items()}
    assert not any(beyond.values()), beyond


def test_the_table_has_no_circle() -> None:
    """Each row names rows above it alone."""
    above = {"__init__"}
    for unit, targets in ARROWS.items():
        assert set(targets.split()) <= above, unit
        above.add(unit)


def test_no_file_imports_itself_by_a_detour() -> None:
    """Not inside functions either."""
    known = modules()
    found = {module: set(imported_by(path, known)) & known.keys() for module, path in known.items()}
    for module in known:
        seen: set[str] = set()
        todo = [*found[module]]
        while todo:
            other = todo.pop()
            if other not in seen:
                seen.add(other)
                todo += found[other]
        assert module not in seen


def test_launchers_adapt_to_the_library() -> None:
    """They build on what any caller may, not on the command line."""
    known = modules()
    for path in (REPO / "launch").glob("*.py"):
        assert not {"cli", "__main__"} & {unit_of(other) for other in imported_by(path, known)}


def test_a_reader_of_training_finds_few_files() -> None:
    assert len(list(PACKAGE.glob("*.py"))) <= MAX_FILES_AT_THE_TOP


@pytest.mark.parametrize("module", WITHOUT_TORCH)
def test_a_login_node_needs_no_torch(module: str) -> None:
    forbid = "import sys; sys.modules.update(dict.fromkeys(['torch', 'numpy', 'nvidia']))"
    command = [sys.executable, "-c", f"{forbid}; import {module}"]
    done = subprocess.run(command, cwd=REPO, capture_output=True, text=True, timeout=HANG_SECONDS)
    assert done.returncode == 0, done.stderr


def test_an_import_changes_nothing() -> None:
    """Neither warnings nor limits: process.py does that when a program starts."""
    code = (
        "import resource, warnings\n"
        "state = lambda: (list(warnings.filters), resource.getrlimit(resource.RLIMIT_NOFILE))\n"
        "import torch, PIL.Image, numpy, pyarrow, nvidia.dali, nvidia.dali.fn\n"
        "before = state()\n"
        "import resnet_dist.train, resnet_dist.verbs.verify, resnet_dist.verbs.evaluate\n"
        "assert state() == before, state()\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=REPO, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr


TESTS = sorted((REPO / "tests").rglob("*.py"))


@pytest.mark.parametrize("path", TESTS, ids=lambda path: str(path.relative_to(REPO)))
def test_tests_share_helpers_and_keep_to_what_is_public(path: Path) -> None:
    """No test module imports another; none reaches for a private name of ours."""
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module:
            assert not node.module.startswith("tests.") or node.module.startswith("tests.support.")
            if node.module.startswith("resnet_dist"):
                assert not [name.name for name in node.names if name.name.startswith("_")]
        if isinstance(node, ast.Attribute) and node.attr.startswith("_"):
            is_own = isinstance(node.value, ast.Name) and node.value.id in ("self", "cls")
            assert is_own or node.attr.startswith("__") or node.attr in NOT_OURS, node.lineno


# Python's own; and torch's, which has no other way to tell its hooks.
NOT_OURS = {"_exit", "_replace", "_forward_hooks", "_forward_pre_hooks"}
