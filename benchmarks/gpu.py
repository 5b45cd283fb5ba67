"""Runs all GPU tests and benchmarks of this project on one GPU machine, in ten minutes.

    python benchmarks/gpu.py                          # on the GPU machine
    python benchmarks/gpu.py --small --device cpu     # a rehearsal, to check that everything runs

For a GPU machine without internet, pack the missing packages on a different machine:

    python benchmarks/offline_pack.py FOLDER          # with internet; then copy FOLDER over
    python benchmarks/gpu.py --offline FOLDER         # on the GPU machine; installs nothing

Each stage is a separate process with its own time limit. If one fails, the next one runs all the
same. --limit is the time limit for all stages. After each stage, all results so far are written to
DIR/<gpu>-<date>.json, and the whole output of the stage to the .log file next to it. At the end a
table is printed. The exit code is 0 if every stage succeeded.
"""

import argparse
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

from stages import LOGS, OUTPUT, Runner, Stage

REPO = Path(__file__).resolve().parent.parent
LADDER = (
    *("nchw-fp32", "channels-last", "tf32", "bf16", "fused"),
    *("ema", "sync-batchnorm", "deterministic"),
)
PHOTOS = (2048, 256)  # train, val
SMALL_PHOTOS = (40, 10)
SMALL_LIMIT_SECONDS = 170


def main() -> None:
    parser = argparse.ArgumentParser(
        allow_abbrev=False,
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--device", choices=("cuda", "cpu"), help="default: a GPU if there is one")
    parser.add_argument("--small", action="store_true", help="rehearsal; always on with a CPU")
    parser.add_argument(
        "--limit", type=float, metavar="SECONDS", help="default: 560, or 170 with --small"
    )
    parser.add_argument("--output", type=Path, default=REPO / "benchmarks/results", metavar="DIR")
    parser.add_argument(
        "--offline", type=Path, metavar="FOLDER", help="use packages that offline_pack.py packed"
    )
    parser.add_argument("--tune", action="store_true", help="also find the fastest loader settings")
    given = parser.parse_args()
    gpu = None if given.device == "cpu" else name_of_gpu()
    if given.device == "cuda" and gpu is None:
        parser.error("--device cuda: nvidia-smi finds no GPU; rehearse with --small --device cpu")
    small = given.small or gpu is None
    given.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory(prefix="resnet-dist-gpu-") as name:
        scratch = Path(name)
        site = scratch / "site"
        env = {
            "PYTHONPATH": os.pathsep.join(
                filter(None, [str(site), str(REPO), os.environ.get("PYTHONPATH")])
            ),
            "DECODING_REPORTS": str(scratch / "runs" / ".index"),  # for the GPU tests
        }
        if gpu is None:  # one thread, so that other programs on the machine matter less
            env |= {"CUDA_VISIBLE_DEVICES": "", "OMP_NUM_THREADS": "1"}
        limit = given.limit or (SMALL_LIMIT_SECONDS if small else 560)
        runner = Runner(results_path(given.output, gpu), scratch, limit, env)
        work = [*preparation(given.offline, site), *stages(scratch, gpu is not None, small)]
        if given.tune:
            command = loader(scratch / "photos", scratch / "runs", small, "--tune")
            work.append(Stage("loader, tuned", command, 600, lines=8))
        try:
            for stage in work:
                runner.run(stage, REPO)
        finally:
            print(f"\n{runner.table()}\n\nwritten: {runner.path}")
    sys.exit(any(one.outcome != "ok" for one in runner.records))


def preparation(offline: Path | None, site: Path) -> list[Stage]:
    if offline is None:
        return []
    return [Stage("offline packages", script("offline_unpack.py", offline.resolve(), site), 60)]


def stages(scratch: Path, gpu: bool, small: bool) -> list[Stage]:
    """Returns the stages, most important first. The last ones run only if there is time left."""
    photos, runs = scratch / "photos", scratch / "runs"
    counts = SMALL_PHOTOS if small else PHOTOS
    size = ("--small",) if small else ()
    tests = ("--logs", LOGS, *(("tests/models/test_dropout.py",) if small else ("--limit", 100)))
    step = ("--batch-size", 4, "--steps", 2, "--small") if small else ()
    two_ranks = torchrun(2, "train", "configs/quickstart.yaml", f"data.root={photos}")
    two_ranks += ("name=two-ranks", f"tracking.run_root={runs}", "tracking.mlflow=false")
    two_ranks += ("train.deterministic=true", "train.iterations=4", "train.global_batch_size=16")
    first = [
        Stage("environment", script("gpu_environment.py", OUTPUT), 60),
        Stage("photos", script("noise_photos.py", photos, *counts), 60),
        Stage("decode probe", probe(runs, gpu, small), 130, lines=6),
        Stage("GPU tests", script("gpu_tests.py", *tests), 120, lines=24),
        *(Stage(f"step, {rung}", ladder(rung, *step), 60) for rung in LADDER),
        Stage("loader", loader(photos, runs, small, "--no-peers"), 120, line=loader_line),
        Stage("one rank", script("gpu_one_rank.py", *size, "--output", OUTPUT), 60),
        Stage("two ranks, gloo", two_ranks, 120),
        Stage("train", script("gpu_train.py", "speed", photos, runs, *size, *output()), 120),
        Stage("resume", script("gpu_train.py", "resume", photos, runs, *size, *output()), 120),
    ]
    # Most of its time is compilation.
    compiled = Stage("step, compiled", ladder("compiled", *step), 150)
    batch_copy = Stage("batch copy", script("gpu_batch_copy.py", *step, *output()), 100)
    if small:
        return [*first, compiled, batch_copy]
    return [
        *first,
        compiled,
        *(Stage(f"step, fused, {n}", ladder("fused", "--batch-size", n), 60) for n in (512, 1024)),
        Stage("step, fp16", ladder("fp16"), 60),
        batch_copy,
        Stage(
            "checkpoint",
            product("bench", "checkpoint", scratch, "--runs", 3, "--no-wait", *output()),
            120,
        ),
        Stage(
            "deterministic",
            product("bench", "deterministic", "--runs", 2, "--steps", 10, "--no-wait", *output()),
            80,
        ),
        Stage("loader, peers too", loader(photos, runs, small), 240, line=loader_line),
    ]


def probe(runs: Path, gpu: bool, small: bool) -> tuple[str, ...]:
    """Returns the command that probes the GPU's decoders, and keeps the report where the stages
    after it look for it."""
    device = "cuda:0" if gpu else "cpu"
    size = ("--images", 4, "--seconds", 0.1) if small else ()
    command = ("-m", "resnet_dist.data.load.probe", "--device", device, "--keep", runs / ".index")
    command += ("--limit", 100)
    return python(*command, *size, *output())


def ladder(rung: str, *options: object) -> tuple[str, ...]:
    return script("gpu_ladder.py", rung, *options, *output())


def loader(photos: Path, runs: Path, small: bool, *options: object) -> tuple[str, ...]:
    """Returns the command of `bench loader`, with the batch size of a large GPU and one round."""
    options = ("--runs", 1, "--run-root", runs, *options)
    size = ("--batch-size", 4, "--images", 16) if small else ("--batch-size", 256, "--images", 4096)
    return product("bench", "loader", photos, "--no-wait", *size, *options, *output())


def loader_line(figures: dict[str, Any]) -> str:
    return "; ".join(
        f"{one['loader']}, {one['train_crop']}: {one['images_per_sec']:,.0f} img/s"
        for one in figures["loaders"]
    )


def product(*arguments: object) -> tuple[str, ...]:
    return python("-m", "resnet_dist", *arguments)


def torchrun(ranks: int, *arguments: object) -> tuple[str, ...]:
    # Gives an address, because a machine may not be able to resolve its own name.
    launcher = ("-m", "torch.distributed.run", "--standalone", "--local-addr=127.0.0.1")
    launcher += (f"--nproc_per_node={ranks}",)
    return python(*launcher, "-m", "resnet_dist", *arguments)


def script(name: str, *arguments: object) -> tuple[str, ...]:
    return python(REPO / "benchmarks" / name, *arguments)


def python(*arguments: object) -> tuple[str, ...]:
    return sys.executable, *map(str, arguments)


def output() -> tuple[str, str]:
    return "--output", OUTPUT


def name_of_gpu() -> str | None:
    """Returns the name of the first GPU, or None. Does not use torch, which may be broken here."""
    command = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=30)
    except (OSError, subprocess.TimeoutExpired):
        return None
    names = done.stdout.split("\n") if done.returncode == 0 else []
    return names[0].strip() or None if names else None


def results_path(folder: Path, gpu: str | None) -> Path:
    """Returns a path for the results that does not exist yet."""
    machine = gpu or f"{len(os.sched_getaffinity(0))}-core-cpu"
    stem = "-".join([*machine.lower().split(), time.strftime("%Y-%m-%d")])
    path, number = folder / f"{stem}.json", 1
    while path.exists():
        number += 1
        path = folder / f"{stem}-{number}.json"
    return path


if __name__ == "__main__":
    main()
