"""benchmarks/gpu_tests.py: a process for each test, and what becomes of it in one line."""

import os
import re
import signal
import subprocess
import sys
import tomllib
from importlib.metadata import packages_distributions
from itertools import chain
from pathlib import Path

import pytest

from benchmarks.offline_pack import BUNDLES
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS, wait_until

COMMAND = [sys.executable, REPO / "benchmarks" / "gpu_tests.py"]

OF_ALL_KINDS = """
import os
import signal
import subprocess
import time
import pytest

@pytest.mark.parametrize("name", ["plain", "with :: and a [blank]"])
def test_passes(name, record_property):
    record_property("largest_difference", 0.0)

def test_fails():
    assert 1 == 2, "two lines\\nof it"

@pytest.fixture
def broken():
    raise RuntimeError("from the fixture")

def test_errs(broken):
    pass

def test_is_skipped():
    pytest.skip("for a reason")

def test_crashes():
    os.kill(os.getpid(), signal.SIGSEGV)

def test_crashes_at_the_end():
    import atexit
    atexit.register(os.kill, os.getpid(), signal.SIGABRT)

def test_hangs():
    subprocess.Popen(["sleep", "1000"])
    time.sleep(1000)
"""


@pytest.fixture
def of_all_kinds(tmp_path: Path) -> Path:
    (tmp_path / "pytest.ini").write_text("[pytest]\nfilterwarnings = error\nmarkers = gpu\n")
    (tmp_path / "test_it.py").write_text(OF_ALL_KINDS)
    return tmp_path


def run_them(folder: Path, *arguments: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [*COMMAND, *arguments], cwd=folder, capture_output=True, text=True, timeout=HANG_SECONDS
    )


@pytest.mark.slow
def test_each_test_has_a_process_of_its_own(of_all_kinds: Path) -> None:
    done = run_them(of_all_kinds, "--jobs=2", "--timeout=25", "--logs=logs", "-m", "not gpu")
    *lines, numbers = done.stdout.splitlines()
    assert lines == [
        "FAILED test_it.py::test_fails: AssertionError: two lines of it assert 1 == 2",
        'FAILED test_it.py::test_errs: failed on setup with "RuntimeError: from the fixture"',
        "SKIPPED test_it.py::test_is_skipped: for a reason",
        "CRASHED test_it.py::test_crashes: SIGSEGV",
        "CRASHED test_it.py::test_crashes_at_the_end: SIGABRT after the test had passed",
        "TIMED OUT test_it.py::test_hangs: after 25 s",
    ]
    assert numbers.startswith("2 crashed, 2 failed, 2 passed, 1 skipped, 1 timed out in ")
    assert done.returncode == 1
    logs = {path.name: path.read_text() for path in (of_all_kinds / "logs").iterdir()}
    assert len(logs) == 5
    assert "Segmentation fault" in logs["test_it.py_test_crashes.log"]


def test_what_passes_or_is_skipped_is_no_failure(of_all_kinds: Path) -> None:
    done = run_them(of_all_kinds, "-m", "not gpu", "-k", "passes or skipped")
    assert done.returncode == 0, done.stdout
    assert done.stdout.splitlines()[-1].startswith("2 passed, 1 skipped in ")


def test_no_time_and_nothing_to_run(of_all_kinds: Path) -> None:
    done = run_them(of_all_kinds, "--limit=0", "-m", "not gpu", "-k", "passes")
    assert (done.returncode, done.stdout.count("NOT RUN")) == (1, 2)
    done = run_them(of_all_kinds)  # -m gpu
    assert (done.returncode, done.stdout) == (2, "")
    assert "nothing to run: " in done.stderr
    (of_all_kinds / "test_it.py").write_text("import no_such_module")
    done = run_them(of_all_kinds)
    assert (done.returncode, done.stdout) == (2, "")
    assert "No module named 'no_such_module'" in done.stderr


def test_a_module_that_cannot_be_imported_costs_its_own_tests_only(of_all_kinds: Path) -> None:
    (of_all_kinds / "test_no_package.py").write_text("import no_such_module")
    (of_all_kinds / "test_no_syntax.py").write_text("def (")
    done = run_them(of_all_kinds, "--logs=logs", "-m", "not gpu", "-k", "passes")
    package, syntax, numbers = done.stdout.splitlines()
    assert package == (
        "NOT COLLECTED test_no_package.py: ModuleNotFoundError: No module named 'no_such_module'"
    )
    assert syntax.startswith("NOT COLLECTED test_no_syntax.py: ")
    assert "SyntaxError: invalid syntax" in syntax
    assert numbers.startswith("2 not collected, 2 passed in ")
    assert done.returncode == 1
    log = of_all_kinds / "logs" / "test_no_package.py.log"
    assert "test_no_package.py:1: in <module>" in log.read_text()


@pytest.mark.slow
def test_the_gpu_tests_need_no_more_than_a_machine_without_internet_is_given() -> None:
    """Of the packages that offline_pack.py does not carry over, none is needed to collect them."""
    given = {"torch", "torchvision", "numpy", "pillow", "resnet-dist"}
    given.update(*(bundle.wheels for bundle in BUNDLES.values()))
    project = tomllib.loads((REPO / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"].values()
    named = {
        re.match(r"[\w-]+", requirement)[0].lower()  # type: ignore[index]
        for requirement in chain(project["dependencies"], *extras)
    }
    forbidden = [
        module
        for module, owners in packages_distributions().items()
        if {owner.lower() for owner in owners} <= named - given
    ]
    # Python's own way to forbid an import. Of pyarrow, the part for Parquet is left out.
    code = f"""
import sys
sys.modules.update(dict.fromkeys({[*forbidden, "pyarrow._parquet"]}))
import pytest
sys.exit(pytest.main(["-q", "-p", "no:cacheprovider", "--collect-only", "-m", "gpu"]))
"""
    # Plugins of pytest, such as pytest-xdist, would be loaded where they are installed.
    env = os.environ | {"PYTEST_DISABLE_PLUGIN_AUTOLOAD": "1"}
    command = [sys.executable, "-c", code]
    done = subprocess.run(
        command, cwd=REPO, env=env, capture_output=True, text=True, timeout=HANG_SECONDS
    )
    assert done.returncode == 0, done.stdout
    assert "test_gpu_raw_pixels" in done.stdout


def test_its_end_is_its_tests_end(of_all_kinds: Path) -> None:
    started = of_all_kinds / "started"
    body = "import os, time\ndef test_it():\n    open('started', 'w').write(str(os.getpid()))\n"
    (of_all_kinds / "test_it.py").write_text(f"{body}    time.sleep(1000)\n")
    process = subprocess.Popen([*COMMAND, "-m", "not gpu"], cwd=of_all_kinds)
    wait_until(lambda: started.exists() and started.read_text(), "no test began")
    process.send_signal(signal.SIGTERM)
    assert process.wait(HANG_SECONDS) == 128 + signal.SIGTERM
    with pytest.raises(ProcessLookupError):
        os.kill(int(started.read_text()), 0)
