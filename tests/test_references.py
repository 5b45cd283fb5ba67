"""Documents, docstrings and comments refer to files that exist."""

import re
import subprocess

import pytest

from tests.support.paths import REPO

REFERENCE = re.compile(r"(?<![\w/:.<{$*-])[\w-]+(?:/[\w.-]+)*\.(?:py|md|sh)\b")
READ = (".py", ".md", ".sh", ".yaml", "Makefile", "Dockerfile", ".ci/run")
EXAMPLES = {"utils.py"}  # CONTRIBUTING.md: what there is none of
# Their own files are made while they run.
WRITE_FILES = {"tests/benchmarks/test_gpu_tests.py", "tests/test_who_sees_gpus.py"}


def test_every_file_that_is_mentioned_exists() -> None:
    listed = subprocess.run(["git", "ls-files"], cwd=REPO, capture_output=True, text=True)
    if listed.returncode != 0:
        pytest.skip("needs a git checkout")
    files = [name for name in listed.stdout.splitlines() if (REPO / name).is_file()]
    ends = {name[at:] for name in files for at in [0, *(m.end() for m in re.finditer("/", name))]}
    dangling = [
        f"{name}:{number}: {reference}"
        for name in files
        if name.endswith(READ) and name not in WRITE_FILES
        for number, line in enumerate((REPO / name).read_text().splitlines(), start=1)
        if "://" not in line
        for reference in REFERENCE.findall(line)
        if reference not in ends | EXAMPLES and not reference.endswith("sitecustomize.py")
    ]
    assert dangling == []
