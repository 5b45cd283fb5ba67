"""Trains the networks of the paper's CIFAR-10 table and compares their errors with the paper's.

    python benchmarks/cifar10_paper.py data.root=/data/cifar10              # all, 64k steps
    python benchmarks/cifar10_paper.py --iterations 2000 --nets plain20 plain56 resnet20 resnet56

Uses the configs in configs/paper/cifar10/, with the lr drops at 1/2 and 3/4 of --iterations. Small
networks leave a GPU idle between kernels, so --at-once runs share the device. Runs are kept as
runs/NET-ITERATIONS. The same command again resumes unfinished runs, and only reads the results of
finished ones. Adds its rows to benchmarks/results/cifar10-<iterations>-<device>.json.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import torch

from resnet_dist.bench.results import versions

REPO = Path(__file__).resolve().parent.parent
RESULTS = REPO / "benchmarks" / "results"
PAPER_ITERATIONS = 64_000
# He et al. 2015, table 6. For ResNet-110 this is the best of five runs (6.61 +- 0.16). The plain
# nets are only in figure 6.
PAPER_TEST_ERROR_PCT = {
    "resnet20": 8.75,
    "resnet32": 7.51,
    "resnet44": 7.17,
    "resnet56": 6.97,
    "resnet110": 6.43,
}
# Longest first, so that the runs that finish last are short ones.
NETS = ["resnet110", "plain56", "resnet56", "resnet44", "resnet32", "plain20", "resnet20"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.partition("\n")[0], allow_abbrev=False)
    parser.add_argument("--nets", nargs="+", default=NETS, metavar="NET")
    parser.add_argument("--iterations", type=int, default=PAPER_ITERATIONS)
    parser.add_argument("--at-once", type=int, default=4, help="runs that share the device")
    parser.add_argument("--run-root", type=Path, default=REPO / "runs")
    arguments, overrides = parser.parse_known_args()
    run_root, iterations = arguments.run_root.absolute(), arguments.iterations
    names = {net: f"{net}-{iterations}" for net in arguments.nets}
    commands = {n: command(n, names[n], iterations, run_root, overrides) for n in names}
    run_all(commands, arguments.at_once, run_root)
    settings = [text for text in overrides if not text.startswith("data.root=")]
    rows = {net: result(run_root / names[net]) | {"overrides": settings} for net in names}
    gpu = torch.cuda.is_available()
    device = torch.cuda.get_device_name(0) if gpu else f"{os.cpu_count()}-core CPU"
    path = RESULTS / f"cifar10-{iterations}-{'-'.join(device.lower().split())}.json"
    if path.is_file():
        rows = json.loads(path.read_text())["runs"] | rows
    report = {
        "device": device,
        "python": platform.python_version(),
        **versions(),
        "iterations": iterations,
        "runs": rows,
    }
    RESULTS.mkdir(exist_ok=True)
    path.write_text(json.dumps(report, indent=1) + "\n")
    print(table(rows))
    print(f"written: {path}")


def command(
    net: str, name: str, iterations: int, run_root: Path, overrides: list[str]
) -> list[str]:
    return [
        *(sys.executable, "-m", "resnet_dist", "train", f"configs/paper/cifar10/{net}.yaml"),
        f"name={name}",
        f"train.iterations={iterations}",
        f"optim.milestones_iterations=[{iterations // 2}, {iterations * 3 // 4}]",
        f"train.log_every_steps={max(1, iterations // 100)}",
        f"train.eval_every_iterations={max(1, iterations // 20)}",
        f"tracking.run_root={run_root}",
        *overrides,
    ]


def run_all(commands: dict[str, list[str]], at_once: int, run_root: Path) -> None:
    """Runs all commands, `at_once` at a time. Exits with an error at the end if any of them
    failed."""
    run_root.mkdir(parents=True, exist_ok=True)
    waiting = list(commands)
    running: dict[str, subprocess.Popen[bytes]] = {}
    failed = []
    while waiting or running:
        while waiting and len(running) < at_once:
            net = waiting.pop(0)
            print("+", *commands[net], flush=True)
            with open(run_root / f"{net}.log", "ab") as log:
                running[net] = subprocess.Popen(commands[net], cwd=REPO, stdout=log, stderr=log)
        for net, process in list(running.items()):
            if process.poll() is not None:
                del running[net]
                print(f"{net}: exit code {process.returncode}", flush=True)
                if process.returncode:
                    failed.append(net)
        time.sleep(1)
    if failed:
        sys.exit(f"failed: {', '.join(failed)}; see {run_root}/NET.log")


def result(run_dir: Path) -> dict[str, Any]:
    """Reads the errors at the end of a run from its journal."""
    train: list[float] = []
    test: list[float] = []
    for line in (run_dir / "journal.jsonl").read_text().splitlines():
        metrics = json.loads(line)["metrics"]
        if "train/acc1" in metrics:
            train.append(100 - metrics["train/acc1"])
        if "val/acc1" in metrics:
            test.append(100 - metrics["val/acc1"])
    last = train[-5:]  # 5 of 100 log lines: the last 5 % of the run
    return {
        "train_error_pct": round(sum(last) / len(last), 2),
        "test_error_pct": round(test[-1], 2),
    }


def table(rows: dict[str, dict[str, Any]]) -> str:
    lines = [f"{'network':<12}{'train error %':>14}{'test error %':>14}{'paper':>8}"]
    for net, row in rows.items():
        paper = PAPER_TEST_ERROR_PCT.get(net, "-")
        lines.append(f"{net:<12}{row['train_error_pct']:>14}{row['test_error_pct']:>14}{paper:>8}")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
