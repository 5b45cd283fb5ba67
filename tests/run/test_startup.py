"""The time from the start of a process to its first step, and its parts."""

import re
import subprocess
import sys
import time
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from resnet_dist.run import startup as startup_module
from resnet_dist.run.startup import Startup, process_began
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS

CPU = torch.device("cpu")
LINE = r"first step (\d+\.\d) s after the start: (.+)"
PARTS = ["imports", "process group", "data index", "checkpoint", "decoder"]
PARTS += ["network and optimizer", "loaders"]
PARTS += ["rest", "first batch", "first step"]


def tenths(text: str) -> int:
    return round(10 * float(text))


def parts_of(line: str) -> tuple[int, dict[str, int]]:
    """Tenths of a second: the total, and each part."""
    total, parts = re.fullmatch(LINE, line).groups()  # type: ignore[union-attr]
    named = (part.rpartition(" ") for part in parts.split(", "))
    return tenths(total), {name: tenths(seconds) for name, _, seconds in named}


def test_parts_add_up_and_the_first_step_alone_is_told(monkeypatch: pytest.MonkeyPatch) -> None:
    """By a clock that no other process can hold up."""
    now = 1000.0
    monkeypatch.setattr(startup_module, "time", SimpleNamespace(monotonic=lambda: now))
    said: list[str] = []
    startup = Startup(now - 1.26)
    startup.mark("imports")
    for _ in range(7):
        now += 0.034  # each piece would be rounded to 0.0
        startup.mark("data index")
        startup.mark("checkpoint")
    now += 0.2
    startup.mark("data index")  # a part may come in pieces
    startup.end(CPU, said.append)
    now += 5.0
    startup.mark("data index")
    startup.end(CPU, said.append)
    (line,) = said
    total, parts = parts_of(line)
    assert list(parts) == ["imports", "data index", "checkpoint", "first step"]
    assert sum(parts.values()) == total
    assert parts["imports"] == 13
    assert parts["data index"] == 4
    assert parts["checkpoint"] == 0
    assert parts["first step"] == 0
    assert total == 17


def test_the_start_is_the_process_s_and_not_the_import_s() -> None:
    code = (
        "import time; time.sleep(0.7); from resnet_dist.run.startup import process_began as began; "
    )
    code += "time.sleep(0.3); print(time.monotonic() - began())"
    before = time.monotonic()
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, timeout=HANG_SECONDS
    )
    age = float(done.stdout)
    # It slept so long; and is younger than what waited for it, but that the kernel counts in 10 ms.
    assert 1.0 < age < time.monotonic() - before + 0.1
    assert process_began() < before - 0.1  # pytest's own


def test_training_tells_it_once(tiny_yaml: Path) -> None:
    """The total is the time that passed, as seen from outside."""
    began = time.monotonic()
    with subprocess.Popen(
        [sys.executable, "-m", "resnet_dist", "train", tiny_yaml, "train.epochs=1"],
        stdout=subprocess.PIPE,
        text=True,
        cwd=REPO,
    ) as process:
        assert process.stdout is not None
        seen = [(line.rstrip("\n"), time.monotonic() - began) for line in process.stdout]
    assert process.returncode == 0
    ((line, after),) = [one for one in seen if one[0].startswith("first step")]
    total, parts = parts_of(line)
    assert list(parts) == PARTS
    assert sum(parts.values()) == total
    assert parts["imports"] == max(parts.values()) > 0
    # The line may be read late, on a machine that is busy; but it cannot be before it is said.
    assert 0.5 * after < total / 10 < after + 0.2
    texts = [text for text, _ in seen]
    assert " step 1/" in texts[texts.index(line) + 1]


@pytest.mark.gpu
def test_a_gpu_is_waited_for() -> None:
    said: list[str] = []
    startup = Startup(time.monotonic())
    x = torch.rand(4096, 4096, device="cuda")
    torch.cuda.synchronize()
    startup.mark("before")
    begun, done = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    begun.record()
    for _ in range(300):
        x = x @ x  # about 40 TFLOP, which the CPU has queued long before they are done
    done.record()
    assert not done.query()  # or the test would prove nothing
    startup.end(x.device, said.append)
    assert done.query()
    tenths = begun.elapsed_time(done) / 100  # it is given in milliseconds
    assert parts_of(said[0])[1]["first step"] >= int(tenths)
