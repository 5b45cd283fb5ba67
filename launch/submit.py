"""Submits a training run to Slurm with submitit: one task per rank, the config as it is now.

    python launch/submit.py configs/imagenet/resnet50.yaml --nodes 2 --gpus-per-node 8
    python launch/submit.py CONFIG.yaml name=lr02 optim.base_lr=0.2 --partition gpu --time-min 720
    python launch/submit.py CONFIG.yaml --nodes 8 --gpus-per-node 8 --dry-run
    python launch/submit.py CONFIG.yaml --local --gpus-per-node 0 --ranks-per-node 2

A job that is preempted or reaches its time limit saves a checkpoint, requeues itself and resumes at
that step. This script needs only PyYAML and submitit; the job needs the other packages too.
With --wait or --local, the exit code says how the run ended: 0 finished, 75 stopped on request (the
same command resumes it), 2 bad input, 1 anything else.
"""

import argparse
import os
import shlex
import signal
import socket
import subprocess
import sys
import time
import uuid
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

REPO = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(REPO))  # the checkout need not be installed

from resnet_dist.errors import UserError, not_installed  # noqa: E402

try:
    import submitit

    from resnet_dist.config import Config
    from resnet_dist.config_file import load_config, recipe_name
    from resnet_dist.process import outlive_the_screen, set_up_process
    from resnet_dist.run.folder import check_run_folder
    from resnet_dist.run.interrupt import Interrupt
    from resnet_dist.run.outcome import START_TOKEN, Ending, Outcome
    from resnet_dist.verbs.dry_run import dry_run
except ModuleNotFoundError as error:
    print(f"resnet-dist: {not_installed(error)}", file=sys.stderr)
    sys.exit(2)

SIGNAL_BEFORE_LIMIT_S = 120
KILLED_WITHIN_S = 300  # Slurm's KillWait is 30 s by default


@dataclass(frozen=True)
class Training:
    """What each task runs.

    After a requeue the same pickle runs again. It carries no progress over, because the run folder
    has the checkpoint to resume from.
    """

    config: Config
    recipe: str
    start: str  # the token by which `finish` recognizes the outcome of this job
    resume_anyway: bool = False

    def __call__(self) -> str:
        """Returns the outcome. Does not return if the job is requeued."""
        job = submitit.helpers.TorchDistributedEnvironment()
        # Each rank sees all GPUs of its node and takes number LOCAL_RANK.
        job.export(set_cuda_visible_devices=False, overwrite=True)
        os.environ["MASTER_ADDR"] = address_of(job.master_addr)
        os.environ[START_TOKEN] = self.start
        # submitit's handler for USR2 requeues at once, in the middle of a step and without saving.
        # Interrupt only records the signal, and all ranks then stop at the same step. It stays
        # installed until the end, so that a second signal does not reach submitit's handler.
        with Interrupt() as interrupt:
            set_up_process()
            outlive_the_screen()
            from resnet_dist.train import train

            try:
                outcome = train(self.config, self.recipe, interrupt, self.resume_anyway)
            except UserError as error:
                if job.rank == 0:
                    print(f"resnet-dist: {error}", file=sys.stderr, flush=True)
                sys.exit(error.exit_code)
            # At this point the run is saved. If Slurm sent its early warning (USR1 or USR2), the
            # job requeues itself. TERM alone is a scancel, which a requeue would undo, or a
            # preemption, after which Slurm requeues the job. A job that someone stops on a
            # workstation stays stopped.
            warned = not interrupt.received.isdisjoint((signal.SIGUSR1, signal.SIGUSR2))
            if outcome is Outcome.STOPPED and warned and "SLURM_JOB_ID" in os.environ:
                requeue(os.environ["SLURM_JOB_ID"], job.rank)
            return outcome.name


def address_of(node: str) -> str:
    """Returns `node` if this host can resolve the name, else the node's address in Slurm."""
    try:
        socket.getaddrinfo(node, None)
        return node
    except OSError:
        shown = subprocess.run(
            ["scontrol", "show", "node", node], capture_output=True, text=True, timeout=60
        )
        fields = dict(field.partition("=")[::2] for field in shown.stdout.split())
        return fields.get("NodeAddr", node)


def requeue(job_id: str, rank: int) -> None:
    """Requeues the job from rank 0, and waits on all ranks to be killed.

    Does not return, because submitit would then write a result, which marks the job as done.
    """
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # submitit ignores TERM; here it must end us
    if rank == 0:
        print(f"stopped on request: requeueing job {job_id}", flush=True)
        subprocess.run(["scontrol", "requeue", job_id], check=True, timeout=60)
    time.sleep(KILLED_WITHIN_S)
    raise RuntimeError(f"job {job_id} was not requeued; submit it again to resume it")


# --------------------------------------------------------------------------------------------------
# On the login node


class SlurmExecutor(submitit.SlurmExecutor):
    """submitit's executor, which also works without Slurm, as --dry-run only needs its script."""

    @classmethod
    def affinity(cls) -> int:
        return 2

    def script(self) -> str:
        return str(self._make_submission_file_text(self._submitit_command_str, "dry-run"))


def main(argv: list[str] | None = None) -> None:
    arguments = parse(argv)
    try:
        run(arguments)
    except UserError as error:
        print(f"resnet-dist: {error}", file=sys.stderr, flush=True)
        sys.exit(2)


def run(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    # Checks the plan before anything is queued, so that an error is not only in the job's log.
    ranks_per_node = arguments.ranks_per_node
    ranks = arguments.nodes * ranks_per_node
    plan = dry_run(config, ranks, ranks_per_node, arguments.train_images)
    if arguments.dry_run:
        print(plan)
        if not arguments.local:
            print("\n" + slurm_executor(arguments, config).script())
    check_run_folder(config, arguments.resume_anyway)
    if arguments.dry_run:
        return
    start = f"submit-{uuid.uuid4().hex[:12]}"
    training = Training(config, recipe_name(arguments.config), start, arguments.resume_anyway)
    make_private(arguments.log_dir)
    if arguments.local:
        run_here(arguments, training)
        return
    job = slurm_executor(arguments, config).submit(training)
    print(f"submitted job {job.job_id}, log: {job.paths.stdout}")
    if arguments.wait:
        finish(job, training)


def slurm_executor(arguments: argparse.Namespace, config: Config) -> SlurmExecutor:
    executor = SlurmExecutor(arguments.log_dir)
    names = ("partition", "account", "qos", "constraint", "exclude", "comment", "mem", "gres")
    chosen = {name: getattr(arguments, name) for name in names}
    if arguments.gpus_per_node:
        chosen["gpus_per_node"] = arguments.gpus_per_node
    executor.update_parameters(
        job_name=config.name,
        nodes=arguments.nodes,
        ntasks_per_node=arguments.ranks_per_node,
        cpus_per_task=arguments.cpus_per_task,
        time=arguments.time_min,
        signal_delay_s=SIGNAL_BEFORE_LIMIT_S,
        stderr_to_stdout=True,  # one log per rank
        # The job unpickles Training, and so needs this checkout.
        setup=[
            f"export PYTHONPATH={shlex.quote(str(REPO))}${{PYTHONPATH:+:$PYTHONPATH}}",
            f"export OMP_NUM_THREADS=${{OMP_NUM_THREADS:-{arguments.cpus_per_task}}}",
        ],
        # Since Slurm 22.05 srun does not inherit --cpus-per-task from sbatch. --kill-on-bad-exit
        # ends all ranks when one fails.
        srun_args=[f"--cpus-per-task={arguments.cpus_per_task}", "--kill-on-bad-exit=1"],
        additional_parameters={"requeue": True},
        **{name: value for name, value in chosen.items() if value is not None},
    )
    return executor


def make_private(log_dir: Path) -> None:
    """Makes the log folder accessible to its owner only.

    It holds submitit's pickles, and anyone who could change them could run code as the owner.
    """
    parent = log_dir.parent if "%j" in log_dir.name else log_dir
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)


# --------------------------------------------------------------------------------------------------
# On this machine


def run_here(arguments: argparse.Namespace, training: Training) -> None:
    """Starts the ranks on this machine, prints rank 0's log, and exits as the run does.

    On Ctrl-C or TERM the ranks save a checkpoint and stop.
    """
    paths = [str(REPO), *filter(None, [os.environ.get("PYTHONPATH")])]
    os.environ["PYTHONPATH"] = os.pathsep.join(paths)
    executor = submitit.LocalExecutor(arguments.log_dir)
    executor.update_parameters(
        tasks_per_node=arguments.ranks_per_node,
        gpus_per_node=arguments.gpus_per_node,
        timeout_min=arguments.time_min,
        signal_delay_s=SIGNAL_BEFORE_LIMIT_S,
        stderr_to_stdout=True,
    )
    # submitit's controller, which starts the ranks, would kill them on Ctrl-C but forwards TERM. So
    # it inherits "ignore Ctrl-C" from here, and our own handlers below send it TERM.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    job = executor.submit(training)
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, lambda *_: os.kill(int(job.job_id), signal.SIGTERM))
    with open(wait_for(job.paths.stdout)) as log:
        while not job.done():
            show(log)
            time.sleep(0.2)
        show(log)
    finish(job, training)


def wait_for(path: Path) -> Path:
    while not path.exists():
        time.sleep(0.1)
    return path


def show(log: IO[str]) -> None:
    print(log.read(), end="", flush=True)


def finish(job: Any, training: Training) -> None:
    """Waits for the job, and exits with the outcome in the run folder.

    submitit itself only knows whether a job is done or failed.
    """
    job.wait()
    ending = Ending.read(training.config.run_dir)
    ours = ending is not None and ending.start == training.start
    outcome = ending.outcome if ending is not None and ours else Outcome.FAILED
    if outcome is Outcome.FINISHED:
        print(f"job {job.job_id} is done")
    elif outcome is Outcome.STOPPED:
        print(f"job {job.job_id} was stopped; submit it again to resume it")
    else:
        what = "had bad input" if outcome is Outcome.BAD_INPUT else "failed"
        folder = job.paths.stdout.parent
        print(f"resnet-dist: job {job.job_id} {what}; see its logs in {folder}", file=sys.stderr)
    sys.exit(outcome.exit_code)


# --------------------------------------------------------------------------------------------------


def parse(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        prog="launch/submit.py",
        description="Submits a training run to Slurm.",
        allow_abbrev=False,
    )
    parser.add_argument("config", metavar="CONFIG.yaml")
    parser.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override the config"
    )
    parser.add_argument("--resume-anyway", action="store_true", help="passed on to `train`")
    parser.add_argument("--nodes", type=int, default=1)
    parser.add_argument(
        "--gpus-per-node", type=int, default=8, help="0 trains on CPUs (default: 8)"
    )
    parser.add_argument("--ranks-per-node", type=int, help="default: one per GPU")
    parser.add_argument("--cpus-per-task", type=int, default=8, help="cores per rank (default: 8)")
    parser.add_argument(
        "--time-min", type=int, default=24 * 60, help="time limit of each start (default: 1440)"
    )
    for name in ("partition", "account", "qos", "constraint", "exclude", "comment", "mem", "gres"):
        parser.add_argument(f"--{name}", help="passed on to sbatch")
    parser.add_argument("--log-dir", type=Path, default=Path("runs/submitit/%j"), metavar="DIR")
    parser.add_argument("--dry-run", action="store_true", help="print config, plan and script")
    parser.add_argument(
        "--train-images", type=int, metavar="N", help="plan for N images, without the data"
    )
    parser.add_argument("--local", action="store_true", help="run the ranks here, without Slurm")
    parser.add_argument("--wait", action="store_true", help="wait until the job ends")
    arguments = parser.parse_intermixed_args(argv)
    if arguments.ranks_per_node is None:
        arguments.ranks_per_node = arguments.gpus_per_node or 1
    for name in ("nodes", "ranks_per_node", "cpus_per_task", "time_min"):
        if getattr(arguments, name) < 1:
            parser.error(f"--{name.replace('_', '-')} must be at least 1")
    if arguments.local and arguments.nodes > 1:
        parser.error("--local runs on one node only")
    return arguments


if __name__ == "__main__":
    main()
