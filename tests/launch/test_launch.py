"""The launchers where there is no Slurm: what they print, what they refuse; and one real run."""

import os
import shutil
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image

from resnet_dist.run.outcome import START_TOKEN, Outcome, OutcomeFile
from tests.support.needs import needs
from tests.support.paths import REPO
from tests.support.waiting import HANG_SECONDS

# pip puts it beside the interpreter, which need not be on PATH.
BESIDE = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
SHELLCHECK = shutil.which("shellcheck", path=BESIDE)
SCRIPTS = [REPO / "slurm" / "resnet50.sh", REPO / "launch" / "torchrun.sh"]
RESNET50 = str(REPO / "configs" / "imagenet" / "resnet50.yaml")

NOT_ON_A_LOGIN_NODE = ("torch", "torchvision", "numpy", "nvidia", "mlflow", "PIL")
BLOCK = """
import sys
class Block:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in {names}:
            raise ModuleNotFoundError("blocked: " + name, name=name)
sys.meta_path.insert(0, Block())
"""


def run(command: list, cwd: Path, **environment: str) -> subprocess.CompletedProcess:
    kept = {name: value for name, value in os.environ.items() if not name.startswith("SLURM_")}
    return subprocess.run(
        [str(part) for part in command],
        cwd=cwd,
        env=kept | {"PYTHON": sys.executable} | environment,
        capture_output=True,
        text=True,
        timeout=HANG_SECONDS,
    )


@pytest.fixture
def login_node(tmp_path):
    """PYTHONPATH of an interpreter that has PyYAML and submitit, and cannot import torch."""
    folder = tmp_path / "login_node"
    folder.mkdir()
    (folder / "sitecustomize.py").write_text(BLOCK.format(names=NOT_ON_A_LOGIN_NODE))
    for name in NOT_ON_A_LOGIN_NODE:
        tried = run([sys.executable, "-c", f"import {name}"], tmp_path, PYTHONPATH=str(folder))
        assert f"blocked: {name}" in tried.stderr  # or the tests with it would prove nothing
    return str(folder)


def submit(cwd: Path, *arguments: object, **environment: str) -> subprocess.CompletedProcess:
    return run([sys.executable, REPO / "launch" / "submit.py", *arguments], cwd, **environment)


def assert_one_line(done: subprocess.CompletedProcess, *parts: str) -> None:
    assert done.returncode == 2, done.stdout + done.stderr
    lines = done.stderr.splitlines()
    assert len(lines) == 1, done.stderr
    assert lines[0].startswith("resnet-dist: ")
    for part in parts:
        assert part in lines[0]


@needs("submitit")
def test_submit_dry_run_needs_neither_torch_nor_slurm_nor_data(tmp_path, login_node):
    options = ["--nodes", 4, "--gpus-per-node", 8, "--partition", "gpu", "--time-min", 90]
    options += ["--account", "vision", "--train-images", 1281167, "--dry-run"]
    done = submit(tmp_path, RESNET50, *options, "train.epochs=50", PYTHONPATH=login_node)
    assert done.returncode == 0, done.stderr
    plan, script = done.stdout.split("#!/bin/bash")
    assert "epochs: 50.0" in plan
    assert "8 on each of 32 ranks" in plan
    for line in (
        "#SBATCH --nodes=4",
        "#SBATCH --ntasks-per-node=8",
        "#SBATCH --gpus-per-node=8",
        "#SBATCH --partition=gpu",
        "#SBATCH --account=vision",
        "#SBATCH --time=90",
        "#SBATCH --signal=USR2@120",
        "#SBATCH --open-mode=append",
        "#SBATCH --requeue",
    ):
        assert line in script.splitlines()
    assert "--kill-on-bad-exit=1" in script
    assert not (tmp_path / "runs").exists()  # a dry run leaves nothing behind


@needs("submitit")
def test_submit_refuses_a_bad_config_in_one_line(tmp_path, login_node):
    done = submit(tmp_path, RESNET50, "optim.base_lrr=1", "--dry-run", PYTHONPATH=login_node)
    assert_one_line(done, "optim.base_lrr", "did you mean optim.base_lr?")


@needs("submitit")
def test_submit_refuses_a_plan_that_cannot_be_before_it_submits(tmp_path, login_node):
    options = ["--nodes", 64, "--gpus-per-node", 8, "--train-images", 1281167]
    done = submit(tmp_path, RESNET50, *options, PYTHONPATH=login_node)
    assert_one_line(done, "train.global_batch_size", "512 ranks")


@pytest.mark.parametrize("name", ["submitit", pytest.param("yaml", marks=needs("submitit"))])
def test_submit_names_the_package_that_it_needs(tmp_path, name):
    (tmp_path / "sitecustomize.py").write_text(BLOCK.format(names=(name,)))
    done = submit(tmp_path, RESNET50, "--dry-run", PYTHONPATH=str(tmp_path))
    pip_name = "pyyaml" if name == "yaml" else name
    assert_one_line(done, f"Python package {name}: not installed; pip install {pip_name}")


@pytest.mark.parametrize("nodes", ["1", "2"])
def test_torchrun_refuses_a_bad_config_in_one_line(tmp_path, nodes):
    ranks = {"NNODES": nodes, "NPROC_PER_NODE": "2"}
    done = run([SCRIPTS[1], RESNET50, "train.epoch=1"], tmp_path, **ranks)
    assert_one_line(done, "train.epoch", "did you mean train.epochs?")


def test_batch_script_refuses_a_bad_config_before_it_starts_anything(tmp_path):
    fake = tmp_path / "bin"
    fake.mkdir()
    (fake / "scontrol").write_text(f"#!/bin/sh\necho '   Command={SCRIPTS[0]} train.epoch=1'\n")
    (fake / "srun").write_text(f"#!/bin/sh\ntouch {tmp_path}/started\n")
    for command in fake.iterdir():
        command.chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n[0-1]", "SLURM_JOB_NUM_NODES": "2"}
    slurm |= {"SLURM_SUBMIT_DIR": str(tmp_path), "PATH": f"{fake}:{os.environ['PATH']}"}
    done = run([SCRIPTS[0], "train.epoch=1"], tmp_path, **slurm)
    assert_one_line(done, "train.epoch", "did you mean train.epochs?")
    assert not (tmp_path / "started").exists()


USR1 = "kill -USR1 $PPID; sleep 0.5"  # the early warning, as srun's parent gets it


@pytest.mark.parametrize(
    ("ending", "srun", "code", "last_line"),
    [
        (Outcome.FINISHED, "", 0, "job 7 is done"),
        (Outcome.STOPPED, "exit 1", 75, "job 7 was stopped by a scancel or a preemption"),
        (Outcome.STOPPED, USR1, 0, "requeue 7"),
        (Outcome.FINISHED, USR1, 0, "job 7 is done"),
        (Outcome.BAD_INPUT, "exit 1", 2, "/runs/tiny: bad input"),
        (Outcome.FAILED, "exit 3", 3, "job 7 failed with exit code 3"),
        (Outcome.RUNNING, "", 1, "job 7 failed with exit code 1"),  # killed
        (None, USR1, 1, "job 7 failed with exit code 1"),  # another start's ending
    ],
)
def test_batch_script_ends_as_the_run_did(
    tmp_path, tiny_yaml, monkeypatch, ending, srun, code, last_line
):
    monkeypatch.setenv(START_TOKEN, "7.2" if ending else "7.1")
    with OutcomeFile(tmp_path / "runs" / "tiny", writes=True, say=print) as written:
        written.end(ending or Outcome.STOPPED, 3)
    for name, body in {
        "scontrol": f"[ $1 = show ] && echo Command={SCRIPTS[0]} NodeAddr=127.0.0.1 || echo $@",
        "srun": srun,
        "scancel": "",
    }.items():
        (tmp_path / name).write_text(f"#!/bin/sh\n{body}\n")
        (tmp_path / name).chmod(0o755)
    slurm = {"SLURM_JOB_ID": "7", "SLURM_JOB_NODELIST": "n0", "SLURM_JOB_NUM_NODES": "1"}
    slurm |= {"SLURM_RESTART_COUNT": "2", "SLURM_SUBMIT_DIR": str(REPO), "CONFIG": str(tiny_yaml)}
    slurm |= {"PATH": f"{tmp_path}:{os.environ['PATH']}", "PYTHON": sys.executable}
    log = tmp_path / "log"  # a file, as Slurm has it: the reminder's last sleep may outlive the job
    with open(log, "w") as file:
        command = [SCRIPTS[0], "train.epochs=1", "--resume-anyway"]
        done = subprocess.run(
            command,
            env=os.environ | slurm,
            stdout=file,
            stderr=file,
            timeout=HANG_SECONDS,
            check=False,
        )
    assert done.returncode == code, log.read_text()
    assert last_line in log.read_text().splitlines()[-1]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
def test_shell_scripts_are_well_formed(script):
    assert os.access(script, os.X_OK)
    checked = run(["bash", "-n", script], REPO)
    assert checked.returncode == 0, checked.stderr


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda path: path.name)
@pytest.mark.skipif(SHELLCHECK is None, reason="shellcheck is not installed")
def test_shellcheck_finds_nothing(script):
    checked = run([SHELLCHECK, script], REPO)
    assert checked.returncode == 0, checked.stdout


@needs("submitit")
def test_submit_local_trains_on_two_ranks(tmp_path):
    for split in ("train", "val"):
        for number in range(12):
            folder = tmp_path / "data" / split / f"class{number % 2}"
            folder.mkdir(parents=True, exist_ok=True)
            Image.new("RGB", (32, 32), (20 * number, 255 * (number % 2), 0)).save(
                folder / f"{number}.png"
            )
    done = submit(
        tmp_path,
        REPO / "configs" / "quickstart.yaml",
        *("--local", "--gpus-per-node", 0, "--ranks-per-node", 2),
        *("name=tiny", "data.root=data", "train.global_batch_size=4", "train.epochs=1"),
        "tracking.mlflow=false",
        OMP_NUM_THREADS="1",
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "resnet20 on 2 x cpu" in done.stdout
    assert "finished at step 3" in done.stdout
    assert done.stdout.endswith(" is done\n")
    assert (tmp_path / "runs" / "tiny" / "checkpoints" / "latest" / "state.pt").is_file()


@pytest.mark.slow
@needs("submitit")
@pytest.mark.parametrize(
    ("overrides", "code", "last_line"),
    [
        (["train.epochs=100000"], 75, "was stopped; submit it again to resume it"),
        (["model.init_from=torchvision:nowhere.pth"], 2, "had bad input; see its logs in "),
    ],
)
def test_submit_local_ends_as_the_run_did(tmp_path, tiny_yaml, overrides, code, last_line):
    command = [sys.executable, REPO / "launch" / "submit.py", tiny_yaml, *overrides, "--local"]
    said = []
    with subprocess.Popen(
        [str(part) for part in [*command, "--gpus-per-node", 0]],
        cwd=tmp_path,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
    ) as process:
        for line in process.stdout:
            if "step 1/" in line:
                process.send_signal(signal.SIGTERM)
            said.append(line)
    assert process.returncode == code, "".join(said)
    assert last_line in said[-1]
