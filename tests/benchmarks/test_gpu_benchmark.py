"""The GPU benchmark continues whatever becomes of a stage, and writes what it knows."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path
from types import ModuleType
from typing import Any
from weakref import ref

import pytest

from benchmarks.stages import LOGS, OUTPUT, Runner, Stage
from tests.support.paths import REPO
from tests.support.waiting import wait_until

TELLS = "import json, sys; json.dump({'speed': 7}, open(sys.argv[1], 'w')); print('a'); print('b')"
LOGS_AND_FAILS = """
import pathlib, sys
folder = pathlib.Path(sys.argv[1])
folder.mkdir(parents=True)
(folder / "more.log").write_text("more of it")
print("1 failed")
raise ValueError("no such thing")
"""
# In another session, as torchrun's workers are, and it ignores what it can: it must go, too.
CHILD = "import signal, time; signal.signal(signal.SIGABRT, signal.SIG_IGN); time.sleep(100)"
HANGS = f"""
import pathlib, subprocess, sys, time
child = subprocess.Popen([sys.executable, "-c", {CHILD!r}], start_new_session=True)
pathlib.Path(sys.argv[1]).write_text(str(child.pid))
print("waiting", flush=True)
time.sleep(100)
"""


def stage(
    name: str, code: str, *arguments: object, limit_seconds: float = 60, **kwargs: Any
) -> Stage:
    command = (sys.executable, "-c", code, *map(str, arguments))
    return Stage(name, command, limit_seconds, **kwargs)


@pytest.fixture
def path(tmp_path: Path) -> Path:
    return tmp_path / "results" / "gpu.json"


@pytest.fixture
def runner(path: Path, tmp_path: Path) -> Runner:
    path.parent.mkdir()
    (tmp_path / "scratch").mkdir()
    return Runner(path, tmp_path / "scratch", 300, {})


def written(path: Path) -> list[dict[str, Any]]:
    stages: list[dict[str, Any]] = json.loads(path.read_text())["stages"]
    return stages


def is_running(pid: int) -> bool:
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except OSError:
        return False


def test_a_crash_a_failure_and_a_hang_cost_one_stage_each(
    runner: Runner, path: Path, tmp_path: Path
) -> None:
    child = tmp_path / "child"
    stages = [
        stage("crash", "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"),
        stage("failure", LOGS_AND_FAILS, LOGS),
        stage("hang", HANGS, child, limit_seconds=3),
        Stage("no program", ("/no/such/program",), 60),
        stage("good", TELLS, OUTPUT, lines=2),
        stage("figures", TELLS, OUTPUT, line=lambda figures: f"{figures['speed']} img/s"),
    ]
    for number, one in enumerate(stages, 1):
        runner.run(one, REPO)
        assert [done["stage"] for done in written(path)] == [s.name for s in stages[:number]]

    crash, failure, hang, missing, good, figures = written(path)
    assert crash["outcome"] == "crashed (SIGSEGV)"
    assert failure["outcome"] == "failed (exit code 1)"
    assert failure["said"] == ["1 failed", "ValueError: no such thing"]
    assert hang["outcome"] == "over its limit"
    assert hang["said"][0] == "waiting"
    assert hang["seconds"] < 30
    wait_until(lambda: not is_running(int(child.read_text())), "the hung test's child still runs")
    assert missing["outcome"] == "failed (No such file or directory)"
    assert (good["outcome"], good["said"], good["figures"]) == ("ok", ["a", "b"], {"speed": 7})
    assert figures["said"] == ["7 img/s"]

    log = path.with_suffix(".log").read_text()
    assert "Segmentation fault" in log
    assert "more of it" in log
    assert "Fatal Python error: Aborted" in log  # and where in the code it hung
    rows = runner.table().splitlines()
    assert [row.split("  ")[0].strip() for row in rows[2:]] == [
        *("crash", "failure", "", "hang", "", "no program", "good", "", "figures")
    ]


def test_stages_for_which_no_time_is_left_do_not_start(path: Path, tmp_path: Path) -> None:
    path.parent.mkdir()
    late = Runner(path, tmp_path, 8, {})
    assert late.run(stage("long", "raise SystemExit(1)"), REPO).outcome == "not started"
    short = late.run(stage("short", "import time; time.sleep(60)", limit_seconds=15), REPO)
    assert short.outcome == "over its limit"
    assert short.seconds < 15  # the limit of all stages came first
    assert [one["outcome"] for one in written(path)] == ["not started", "over its limit"]


def test_the_outcome_of_a_launcher_names_its_child_s_signal(runner: Runner) -> None:
    outcomes = [runner.run(stage("one", f"raise SystemExit({code})"), REPO) for code in (134, 3)]
    assert [one.outcome for one in outcomes] == ["crashed (SIGABRT)", "failed (exit code 3)"]


FILLS_THE_DISK = """
import contextlib, sys
with contextlib.suppress(OSError), open(sys.argv[1], "wb", buffering=0) as file:
    while file.write(bytes(4096)):
        pass
"""


def test_a_full_disk_costs_what_was_to_be_written(
    disk: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    path = disk / "gpu.json"
    runner = Runner(path, disk, 300, {})
    runner.run(stage("before", TELLS, OUTPUT), REPO)
    full = runner.run(stage("fills", FILLS_THE_DISK, disk / "filler"), REPO)
    lost = runner.run(stage("on the full disk", "print('seen')"), REPO)
    assert [one["stage"] for one in written(path)] == ["before"]
    (disk / "filler").unlink()
    runner.run(stage("after", TELLS, OUTPUT), REPO)
    said = capsys.readouterr().out
    assert said.count(f"{path}: not written: [Errno 28] No space left on device\n") == 2
    names = ["before", "fills", "on the full disk", "after"]
    assert [one["stage"] for one in written(path)] == names
    assert all(name in runner.table() for name in names)
    assert full.outcome == "ok"
    assert lost.outcome != "ok"  # it could not print what it saw


@pytest.mark.parametrize("gone", ["results", "scratch"])
def test_a_folder_that_is_gone_costs_what_was_to_be_written(
    runner: Runner, path: Path, tmp_path: Path, gone: str, capsys: pytest.CaptureFixture[str]
) -> None:
    deletes = f"import shutil; shutil.rmtree({str(tmp_path / gone)!r}); print('done')"
    first = runner.run(stage("deletes", deletes), REPO)
    second = runner.run(stage("second", TELLS, tmp_path / "told"), REPO)
    said = capsys.readouterr().out
    assert first.outcome == "ok"
    if gone == "results":
        assert (first.said, second.said) == (["done"], ["b"])
        for lost in (path, path.with_suffix(".log")):
            assert said.count(f"{lost}: not written: [Errno 2] No such file") == 2
    else:
        assert "not read: [Errno 2] No such file" in first.said[0]
        assert second.outcome == "failed (No such file or directory)"
        assert [one["stage"] for one in written(path)] == ["deletes", "second"]
    assert len(runner.table().splitlines()) == 2 + 2


def test_a_gpu_that_is_not_there_is_one_line(tmp_path: Path) -> None:
    command = [sys.executable, "benchmarks/gpu.py", "--device", "cuda", "--output", str(tmp_path)]
    env = os.environ | {"PATH": str(tmp_path)}  # no nvidia-smi
    done = subprocess.run(command, cwd=REPO, env=env, capture_output=True, text=True)
    assert done.returncode == 2
    assert "--device cuda: nvidia-smi finds no GPU" in done.stderr
    assert not list(tmp_path.iterdir())


@pytest.fixture
def batch_copy(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    monkeypatch.syspath_prepend(str(REPO / "benchmarks"))
    return importlib.import_module("gpu_batch_copy")


@pytest.mark.parametrize("way", ["dlpack", "copy"])
def test_a_batch_is_freed_where_it_is_let_go(batch_copy: ModuleType, way: str) -> None:
    """Within the capture of a CUDA graph, say."""
    import torch

    held = next(stream := batch_copy.outputs(way, 2, 8, torch.device("cpu")))
    tensors = [ref(tensor) for tensor in held]
    held.clear()
    assert [tensor() for tensor in tensors] == [None, None]
    stream.close()


@pytest.mark.parametrize(
    ("code", "word"),
    [
        ("print('ok')", "ok"),
        ("raise RuntimeError('no capture')", "RuntimeError: no capture"),
        ("import os; os.abort()", "the process ended with SIGABRT"),
        (
            "import os; print('ok', flush=True); os.abort()",
            "the process ended with SIGABRT after it had printed: ok",
        ),
    ],
)
def test_what_became_of_a_capture(batch_copy: ModuleType, code: str, word: str) -> None:
    assert batch_copy.last_word([sys.executable, "-c", code], 60) == word
    assert batch_copy.last_word(["sleep", "100"], 0.1) == "the process did not end within 0.1 s"
