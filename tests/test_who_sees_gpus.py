"""Who sees the GPUs: the tests marked `gpu`, in a run of their own, and nobody else."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS

# What CUDA's driver is asked first. This one has no device, and notes what it would have shown.
DRIVER = r"""
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
enum { NO_DEVICE = 100, NOT_FOUND = 500 };
int cuInit(unsigned flags) {
    FILE *notes = fopen(getenv("NOTES"), "a");
    char *visible = getenv("CUDA_VISIBLE_DEVICES");
    fprintf(notes, "cuInit sees '%s'\n", visible ? visible : "all");
    fclose(notes);
    return NO_DEVICE;
}
int cuDriverGetVersion(int *version) { *version = 13000; return 0; }
int cuGetExportTable(const void **table, const void *id) { return NOT_FOUND; }
int cuGetErrorName(int error, const char **text) { *text = "none"; return 0; }
int cuGetErrorString(int error, const char **text) { *text = "none"; return 0; }
static int other(void) { return NO_DEVICE; }
int cuGetProcAddress_v2(const char *name, void **f, int version, long flags, int *found) {
    if (found) *found = 0;
    *f = other;
    if (!strcmp(name, "cuInit")) *f = cuInit;
    if (!strcmp(name, "cuDriverGetVersion")) *f = cuDriverGetVersion;
    if (!strcmp(name, "cuGetExportTable")) *f = cuGetExportTable;
    if (!strcmp(name, "cuGetErrorName")) *f = cuGetErrorName;
    if (!strcmp(name, "cuGetErrorString")) *f = cuGetErrorString;
    if (!strcmp(name, "cuGetProcAddress")) *f = cuGetProcAddress_v2;
    return 0;
}
int cuGetProcAddress(const char *name, void **f, int version, long flags) {
    return cuGetProcAddress_v2(name, f, version, flags, 0);
}
"""
ASK = "import torch; torch.cuda.is_available()"
TESTS = f"""
import subprocess
import sys
import pytest
import torch

@pytest.mark.gpu
def test_of_the_gpu():
    pass

def test_of_the_cpu():
    torch.cuda.is_available()

def test_of_a_child_process():
    subprocess.run([sys.executable, "-c", "{ASK}"], check=True)
"""


class Driver:
    """An environment in which CUDA finds a driver, and what that was asked."""

    def __init__(self, folder: Path):
        (folder / "driver.c").write_text(DRIVER)
        output = ["-shared", "-fPIC", "-o", folder / "libcuda.so.1"]
        subprocess.run(["cc", folder / "driver.c", *output], check=True)
        self.notes = folder / "notes"
        self.environment = os.environ | {
            "LD_LIBRARY_PATH": f"{folder}:{os.environ.get('LD_LIBRARY_PATH', '')}",
            "NOTES": str(self.notes),
            "CUDA_VISIBLE_DEVICES": "5",
            "PYTHONPATH": str(REPO),
        }

    def run(self, *command: object, cwd: Path = REPO) -> tuple[str, list[str]]:
        """What it prints, and each question to the driver."""
        self.notes.write_text("")
        done = subprocess.run(
            [sys.executable, *map(str, command)],
            cwd=cwd,
            env=self.environment,
            capture_output=True,
            text=True,
            timeout=HANG_SECONDS,
        )
        assert done.returncode == 0, done.stdout + done.stderr
        return done.stdout, self.notes.read_text().splitlines()


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> Driver:
    if shutil.which("cc") is None:
        pytest.skip("needs a C compiler")
    driver = Driver(tmp_path_factory.mktemp("driver"))
    # Or the tests with it would prove nothing.
    assert driver.run("-c", ASK)[1] == ["cuInit sees '5'"]
    return driver


@pytest.mark.slow
@pytest.mark.parametrize(
    ("selection", "seen", "skipped"),
    [
        ((), ["cuInit sees ''"] * 2, "GPU tests have a run of their own: pytest -m gpu"),
        (("-m", "not gpu"), ["cuInit sees ''"] * 2, None),
        (("-m", "gpu"), ["cuInit sees '5'"], "needs a CUDA device"),
        (("-k", "of_the_gpu"), ["cuInit sees '5'"], "needs a CUDA device"),
    ],
    ids=str,
)
def test_the_gpus_are_seen_by_gpu_tests_alone(
    driver: Driver, tmp_path: Path, selection: list[str], seen: list[str], skipped: str | None
) -> None:
    """With the conftest.py of this folder. Child processes inherit it."""
    (tmp_path / "test_it.py").write_text(TESTS)
    project = ["-c", REPO / "pyproject.toml", "--rootdir", tmp_path, "-p", "tests.conftest"]
    said, questions = driver.run("-m", "pytest", *project, *selection, tmp_path / "test_it.py")
    assert questions == seen
    assert ("SKIPPED" in said) == (skipped is not None)
    assert skipped is None or f": {skipped}\n" in said


@pytest.mark.slow
def test_collecting_all_tests_does_not_initialize_cuda(driver: Driver) -> None:
    """Nor so does importing torch, DALI and the package: hiding the GPUs would come too late."""
    said, questions = driver.run("-m", "pytest", "--collect-only", "-q", "tests")
    assert "test_gpu_raw_pixels" in said
    assert questions == []
