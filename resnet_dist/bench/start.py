"""`bench start`: what it costs to start: the CPU time of `--help` and of `--dry-run`, and the time
until the first step of the quickstart is done, in parts.

Each start is a process of its own. The quickstart is that of `make quickstart`, on two ranks, in a
run folder of its own, and is stopped after its first step.
"""

import itertools
import os
import re
import signal
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from resnet_dist.bench import results
from resnet_dist.bench.turns import Spread, figures_of, spread, take_turns
from resnet_dist.data.prepare.digits import write_digits
from resnet_dist.errors import UserError

RANKS = 2
FIRST_STEP = re.compile(r"first step ([\d.]+) s after the start: (.*)")


def bench_start(config: Path, runs: int, output: Path | None) -> None:
    """Prints the costs. config: configs/quickstart.yaml.

    Raises:
        UserError: the config does not exist, or a start failed.
    """
    if not config.is_file():
        raise UserError(f"{config}: not found; start from the folder of the repository")
    with tempfile.TemporaryDirectory(prefix="bench-start-") as name:
        root = Path(name) / "digits"
        write_digits(root)
        train = ["train", str(config), f"data.root={root}", f"tracking.run_root={name}/runs"]
        parts: list[dict[str, float]] = []
        numbers = itertools.count()

        def first_step() -> float:
            seconds, found = _first_step([*train, f"name=start{next(numbers)}"])
            parts.append(found)
            return seconds

        contestants = {
            "--help, CPU s": lambda: _cpu_seconds(["--help"]),
            "train --dry-run, CPU s": lambda: _cpu_seconds([*train, "--dry-run"]),
            f"quickstart on {RANKS} ranks, s to the first step": first_step,
        }
        turns = take_turns(contestants, runs)
    del parts[0]  # of the warm-up
    medians = {part: Spread.of([one[part] for one in parts]).median for part in parts[0]}
    figures = {
        "seconds": {what: figures_of(of_this) for what, of_this in turns.items()},
        "first_step_parts_seconds": {part: round(value, 2) for part, value in medians.items()},
    }
    table = [["", "median", "quartiles"]]
    for what, of_this in turns.items():
        found = spread(of_this)
        table.append([what, f"{found.median:.2f}", found.text(2)])
    print(results.columns(table))
    print("parts: " + ", ".join(f"{part} {value:.1f}" for part, value in medians.items()))
    results.write(output, "start", figures)


def _command(arguments: list[str]) -> list[str]:
    return [sys.executable, "-m", "resnet_dist", *arguments]


def _environment(**more: str) -> dict[str, str]:
    """Returns an environment in which Python keeps compiled code, as it does by default."""
    kept = {key: value for key, value in os.environ.items() if key != "PYTHONDONTWRITEBYTECODE"}
    return kept | more


def _cpu_seconds(arguments: list[str]) -> float:
    process = subprocess.Popen(_command(arguments), stdout=subprocess.DEVNULL, env=_environment())
    _, status, usage = os.wait4(process.pid, 0)
    process.returncode = os.waitstatus_to_exitcode(status)
    if process.returncode:
        raise UserError(f"resnet-dist {' '.join(arguments)}: exit code {process.returncode}")
    return usage.ru_utime + usage.ru_stime


def _first_step(arguments: list[str]) -> tuple[float, dict[str, float]]:
    """Returns the seconds that a training reports for its first step, and their parts."""
    threads = max(1, results.cores() // RANKS)
    with subprocess.Popen(
        _command([*arguments, "--ranks", str(RANKS)]),
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=_environment(OMP_NUM_THREADS=str(threads), PYTHONUNBUFFERED="1"),
    ) as process:
        assert process.stdout is not None
        said: list[str] = []
        for line in process.stdout:
            said.append(line)
            found = FIRST_STEP.search(line)
            if found:
                process.send_signal(signal.SIGTERM)
                process.communicate()
                return float(found[1]), _parts(found[2])
    raise UserError(f"the quickstart ended without a first step: {''.join(said[-3:]).strip()}")


def _parts(text: str) -> dict[str, float]:
    words: dict[str, Any] = {}
    for part in text.split(", "):
        name, _, seconds = part.rpartition(" ")
        words[name] = float(seconds)
    return words
