"""What each verb does: it calls a function elsewhere, and prints what that returns.

Each imports what it needs when it runs, so a dry run works without torch.
"""

import argparse
import json
import os
import sys
from collections.abc import Callable
from functools import wraps
from pathlib import Path

from resnet_dist.config import Config
from resnet_dist.config_file import load_config, recipe_name
from resnet_dist.errors import UserError
from resnet_dist.process import outlive_the_screen, stop_with_launcher
from resnet_dist.run.folder import check_run_folder
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.verbs.given import check_trained, split_arguments

JPEG_QUALITY = 90


def train(arguments: argparse.Namespace) -> None:
    if arguments.init_from is not None:  # in quotes, as a path may contain YAML syntax
        text = json.dumps(arguments.init_from, ensure_ascii=False)
        arguments.overrides.append(f"model.init_from={text}")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        _dry_run(arguments, config)
        return
    if arguments.world_size or arguments.train_images:
        raise UserError("command line: --world-size and --train-images go with --dry-run")
    has_launcher, is_main = "RANK" in os.environ, os.environ.get("RANK", "0") == "0"
    if arguments.ranks is not None and has_launcher:
        raise UserError("command line: --ranks: torchrun has started the ranks; leave it out")
    if arguments.is_program:
        outlive_the_screen()
    with Interrupt() as interrupt:  # before importing torch, which takes seconds
        from resnet_dist.run.finished import result_if_finished
        from resnet_dist.run.preflight import check_start

        result = result_if_finished(config)
        if result is not None:
            if is_main:
                print(result)
            return
        check_start(config, arguments.resume_anyway, is_main)
        if (arguments.ranks or 1) > 1:
            if not os.path.isfile(arguments.config):  # such as <(sed ...)
                why = "is not a file, so the ranks cannot read it; write it to one"
                raise UserError(f"{arguments.config}: {why}")
            from resnet_dist.run.ranks import train_on_ranks

            given = [arguments.config, *arguments.overrides]
            given += ["--resume-anyway"] if arguments.resume_anyway else []
            sys.exit(train_on_ranks(arguments.ranks, given, config.run_dir, interrupt))
        stop_with_launcher()
        from resnet_dist.train import train

        recipe = recipe_name(arguments.config)
        outcome = train(config, recipe, interrupt, arguments.resume_anyway)
    if outcome.exit_code and not has_launcher:
        sys.exit(outcome.exit_code)


def _dry_run(arguments: argparse.Namespace, config: Config) -> None:
    from resnet_dist.verbs.dry_run import dry_run

    world_size = arguments.world_size or arguments.ranks or int(os.environ.get("WORLD_SIZE", "1"))
    local_size = min(int(os.environ.get("LOCAL_WORLD_SIZE", world_size)), world_size)
    print(dry_run(config, world_size, local_size, arguments.train_images), flush=True)
    check_run_folder(config, arguments.resume_anyway)  # the plan is useful even if it is refused


def status(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.status import status

    given = arguments.run, arguments.overrides, arguments.run_root, arguments.start
    line, exit_code = status(*given)
    print(line)
    if arguments.exit_code:
        sys.exit(exit_code)


def evaluate(arguments: argparse.Namespace) -> None:
    check_trained(arguments.checkpoint, arguments.overrides)
    from resnet_dist.data.view.protocol import CENTER_CROP, protocol_of

    protocol = protocol_of(arguments.protocol, arguments.scales)
    bn_images, save_to = arguments.recalibrate_bn, arguments.save_to
    if save_to is not None and bn_images is None:
        raise UserError("command line: --save-to goes with --recalibrate-bn")
    from resnet_dist.verbs.evaluate import evaluate_checkpoint

    given = (arguments.checkpoint, arguments.overrides)
    score = evaluate_checkpoint(*given, protocol, bn_images, save_to)
    if os.environ.get("RANK", "0") == "0":
        if bn_images is not None:
            print(f"BN statistics of {bn_images:,} training images")
        if save_to is not None:
            print(f"checkpoint  {save_to}")
        if protocol != CENTER_CROP:
            print(protocol)
        print(score)


def predict(arguments: argparse.Namespace) -> None:
    check_trained(arguments.checkpoint)
    from resnet_dist.verbs.predict import predict

    if not predict(arguments.checkpoint, arguments.paths, arguments.top, arguments.csv):
        sys.exit(1)


def verify(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.verify import verify

    threads = arguments.threads or len(os.sched_getaffinity(0))
    given = arguments.data, arguments.format, threads, arguments.dry_run
    if not verify(*given, arguments.list):
        sys.exit(1)


def compare(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.compare import compare, error_curves

    if arguments.plot is None:
        print(compare(arguments.runs, arguments.run_root))
        return
    from resnet_dist.verbs import plots

    plots.check_path(arguments.plot)
    print(compare(arguments.runs, arguments.run_root))
    curves = error_curves(arguments.runs, arguments.run_root)
    plots.save(plots.error_figure(curves), arguments.plot)
    print(f"\nfigure  {arguments.plot}")


def models(arguments: argparse.Namespace) -> None:
    from resnet_dist.models.sizes import table_of_networks

    print(table_of_networks())


def analyze_responses(arguments: argparse.Namespace) -> None:
    paths, overrides = split_arguments(arguments.checkpoints + arguments.overrides)
    for path in paths:
        check_trained(path, overrides)
    from resnet_dist.verbs.responses import analyze_responses, describe_responses

    if arguments.output is not None:
        from resnet_dist.verbs import plots

        plots.check_path(arguments.output)
    measured = analyze_responses(paths, overrides, arguments.images)
    print(describe_responses(measured))
    if arguments.output is not None:
        figure = plots.response_figure({one.name: list(one.stds.values()) for one in measured})
        plots.save(figure, arguments.output)
        print(f"\nfigure  {arguments.output}")


def prepare_digits(arguments: argparse.Namespace) -> None:
    from resnet_dist.data.prepare.digits import write_digits

    train_images, val_images = write_digits(arguments.root)
    print(f"{arguments.root}: {train_images} train and {val_images} val images of 10 digits")


def prepare_shards(arguments: argparse.Namespace) -> None:
    from resnet_dist.data.prepare.reencode import Limit
    from resnet_dist.data.prepare.write_shards import Settings, prepare_shards

    longest_px, shortest_px = arguments.longest_px, arguments.shortest_px
    limit = None
    if longest_px or shortest_px:
        side = "longest" if longest_px else "shortest"
        limit = Limit(side, longest_px or shortest_px, arguments.quality or JPEG_QUALITY)
    elif arguments.quality:
        raise UserError("command line: --quality goes with --longest-px or --shortest-px")
    settings = Settings(arguments.images_per_shard, limit)
    workers = arguments.workers or len(os.sched_getaffinity(0))
    given = arguments.source, arguments.dest, settings, workers, arguments.format
    print(prepare_shards(*given))


def _bench(verb: Callable[[argparse.Namespace], None]) -> Callable[[argparse.Namespace], None]:
    """Adds what all benchmarks have in common."""

    @wraps(verb)
    def bench(arguments: argparse.Namespace) -> None:
        if arguments.no_wait:
            from resnet_dist.bench.quiet import measure_at_once

            measure_at_once()
        verb(arguments)

    return bench


@_bench
def bench_loader(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.loader import IMAGES_PER_THREAD, bench_loader
    from resnet_dist.bench.results import cores_per_gpu
    from resnet_dist.bench.streams import Settings
    from resnet_dist.bench.tune import tune

    threads = arguments.threads or cores_per_gpu()
    images = arguments.images or IMAGES_PER_THREAD * threads
    sizes = arguments.batch_size, threads, images, arguments.runs
    settings = Settings(*sizes, run_root=arguments.run_root)
    if arguments.tune and arguments.shards is not None:
        raise UserError("command line: --shards does not go with --tune")
    if arguments.tune:
        tune(arguments.data, settings, arguments.output)
    else:
        with_peers = not arguments.no_peers
        bench_loader(arguments.data, arguments.shards, settings, arguments.output, with_peers)


@_bench
def bench_peers(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.results import cores_per_gpu
    from resnet_dist.bench.streams import Settings
    from resnet_dist.bench.trainers import bench_peers

    images = arguments.batch_size * arguments.steps
    sizes = arguments.batch_size, arguments.threads or cores_per_gpu(), images, arguments.runs
    # A step takes far longer than a batch; only without one must as many batches be in flight.
    warm = 2 if arguments.sleep_ms is None else None
    bench_peers(
        arguments.data,
        Settings(*sizes, run_root=arguments.run_root, warm=warm),
        arguments.output,
        model=arguments.model,
        precision=arguments.precision or _usual_precision(),
        sleep_ms=arguments.sleep_ms,
    )


@_bench
def bench_step(arguments: argparse.Namespace) -> None:
    from resnet_dist import distributed
    from resnet_dist.bench.step import Shape, bench_step

    world = distributed.start()
    batch_size = arguments.batch_size or (128 if world.device.type == "cuda" else 8)
    precision = arguments.precision or _usual_precision()
    layout, is_compiled = arguments.layout, arguments.compile
    shape = Shape(arguments.model, batch_size, arguments.px, precision, layout, is_compiled)
    bench_step(world, shape, arguments.runs, arguments.profile, arguments.output)
    distributed.stop()


def _usual_precision() -> str:
    import torch

    return "bf16" if torch.cuda.is_available() else "fp32"


@_bench
def bench_end_to_end(arguments: argparse.Namespace) -> None:
    from resnet_dist import distributed
    from resnet_dist.bench.end_to_end import bench_end_to_end

    config = load_config(arguments.config, arguments.overrides)
    bench_end_to_end(config, distributed.start(), arguments.runs, arguments.output)
    distributed.stop()


@_bench
def bench_allreduce(arguments: argparse.Namespace) -> None:
    from resnet_dist import distributed
    from resnet_dist.bench.allreduce import bench_allreduce

    bench_allreduce(distributed.start(), arguments.runs, arguments.output)
    distributed.stop()


@_bench
def bench_loop(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.loop import bench_loop
    from resnet_dist.distributed import start_alone

    bench_loop(start_alone("bench loop"), arguments.runs, arguments.steps, arguments.output)


@_bench
def bench_start(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.start import bench_start

    bench_start(Path("configs/quickstart.yaml"), arguments.runs, arguments.output)


@_bench
def bench_memory(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.memory import bench_memory
    from resnet_dist.distributed import start_alone

    config = load_config(arguments.config, arguments.overrides)
    bench_memory(config, start_alone("bench memory"), arguments.epochs, arguments.output)


@_bench
def bench_index(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.index import bench_index

    bench_index(arguments.images, arguments.output)


@_bench
def bench_order(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.order import bench_order

    bench_order(arguments.images, arguments.output)


@_bench
def bench_checkpoint(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.checkpoint import bench_checkpoint
    from resnet_dist.distributed import start_alone

    start_alone("bench checkpoint")
    bench_checkpoint(arguments.folder, arguments.runs, arguments.output)


@_bench
def bench_deterministic(arguments: argparse.Namespace) -> None:
    from resnet_dist import distributed
    from resnet_dist.bench.deterministic import bench_deterministic

    bench_deterministic(distributed.start(), arguments.runs, arguments.steps, arguments.output)
    distributed.stop()


def export(arguments: argparse.Namespace) -> None:
    check_trained(arguments.checkpoint)
    from resnet_dist.verbs.export import export

    print(export(arguments.checkpoint, arguments.to, arguments.output))
