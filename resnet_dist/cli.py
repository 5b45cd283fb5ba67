"""The command line: one verb per subcommand. It has no logic; each verb calls a function elsewhere.

Exit codes: 0 done; 2 bad input, with one line that says what and where; 1 any other failure (some
images could not be read by `predict`, or cannot be trained on according to `verify`). `train` exits
with 75 when it was stopped on request and the same command resumes it. Under a launcher, which
takes every code but 0 for a crash, a rank that was stopped exits with 0; ask `status` instead.
"""

import argparse
import json
import os
import signal
import sys
import time
from pathlib import Path

from resnet_dist import __version__
from resnet_dist.config_file import load_config, recipe_name
from resnet_dist.data.formats import FORMATS, SOURCES
from resnet_dist.errors import UserError, not_installed, shortened
from resnet_dist.process import set_up_process
from resnet_dist.run.interrupt import Interrupt
from resnet_dist.run.stderr_filter import filter_stderr

OTHER_RANKS_LINGER_SECONDS = 5.0
IMAGENET_IMAGES = 1_281_167
JPEG_QUALITY = 90

# Each verb imports what it needs when it runs, so a dry run works without torch.


def main(argv: list[str] | None = None) -> None:
    set_up_process()
    if argv is None:
        filter_stderr()
    parser = _parser()
    # argparse does not recognize overrides after an option (`train x.yaml --dry-run seed=1`).
    arguments, rest = parser.parse_known_args(argv)
    if rest and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides += rest
    try:
        arguments.verb(arguments)
        sys.stdout.flush()
    except BrokenPipeError:  # the reader, such as `head`, has closed the pipe
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        sys.exit(128 + signal.SIGPIPE)
    except ModuleNotFoundError as error:
        # The package may be missing on one node only, so the first rank of each node reports it.
        _refuse(not_installed(error), speaks=os.environ.get("LOCAL_RANK", "0") == "0")
    except UserError as error:
        # The error is the same on every rank, so rank 0 reports it.
        _refuse(error, speaks=os.environ.get("RANK", "0") == "0")


def _refuse(error: UserError, speaks: bool) -> None:
    # The other ranks exit later: torchrun kills all ranks when the first one exits.
    if speaks:
        print(shortened(f"resnet-dist: {error}"), file=sys.stderr, flush=True)
    else:
        time.sleep(OTHER_RANKS_LINGER_SECONDS)
    sys.exit(error.exit_code)


def _train(arguments: argparse.Namespace) -> None:
    if arguments.init_from is not None:  # in quotes, as a path may contain YAML syntax
        text = json.dumps(arguments.init_from, ensure_ascii=False)
        arguments.overrides.append(f"model.init_from={text}")
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        from resnet_dist.verbs.dry_run import dry_run

        world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", "1"))
        local_size = int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        local_size = min(local_size, world_size)
        print(dry_run(config, world_size, local_size, arguments.train_images))
        return
    if arguments.world_size or arguments.train_images:
        raise UserError("command line: --world-size and --train-images go with --dry-run")
    with Interrupt() as interrupt:  # before importing torch, which takes seconds
        from resnet_dist.train import train

        recipe = recipe_name(arguments.config)
        outcome = train(config, recipe, interrupt, arguments.resume_anyway)
    if outcome.exit_code and "RANK" not in os.environ:  # no launcher
        sys.exit(outcome.exit_code)


def _status(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.status import status

    given = arguments.run, arguments.overrides, arguments.run_root, arguments.start
    line, exit_code = status(*given)
    print(line)
    if arguments.exit_code:
        sys.exit(exit_code)


def _evaluate(arguments: argparse.Namespace) -> None:
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


def _predict(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.predict import predict

    if not predict(arguments.checkpoint, arguments.paths, arguments.top, arguments.csv):
        sys.exit(1)


def _verify(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.verify import verify

    threads = arguments.threads or len(os.sched_getaffinity(0))
    given = arguments.data, arguments.format, threads, arguments.dry_run
    if not verify(*given, arguments.list):
        sys.exit(1)


def _compare(arguments: argparse.Namespace) -> None:
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


def _models(arguments: argparse.Namespace) -> None:
    from resnet_dist.models.counts import table_of_networks

    print(table_of_networks())


def _analyze_responses(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.responses import analyze_responses, describe_responses, split_arguments

    if arguments.output is not None:
        from resnet_dist.verbs import plots

        plots.check_path(arguments.output)
    paths, overrides = split_arguments(arguments.checkpoints + arguments.overrides)
    measured = analyze_responses(paths, overrides, arguments.images)
    print(describe_responses(measured))
    if arguments.output is not None:
        figure = plots.response_figure({one.name: list(one.stds.values()) for one in measured})
        plots.save(figure, arguments.output)
        print(f"\nfigure  {arguments.output}")


def _prepare_digits(arguments: argparse.Namespace) -> None:
    from resnet_dist.data.prepare.digits import write_digits

    train_images, val_images = write_digits(arguments.root)
    print(f"{arguments.root}: {train_images} train and {val_images} val images of 10 digits")


def _prepare_shards(arguments: argparse.Namespace) -> None:
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


def _bench_loader(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.loader import IMAGES_PER_THREAD, Settings, bench_loader
    from resnet_dist.bench.results import cores_per_gpu
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


def _bench_memory(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.memory import bench_memory
    from resnet_dist.distributed import start_alone

    config = load_config(arguments.config, arguments.overrides)
    bench_memory(config, start_alone("bench memory"), arguments.epochs, arguments.output)


def _bench_index(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.index import bench_index

    bench_index(arguments.images, arguments.output)


def _bench_order(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.order import bench_order

    bench_order(arguments.images, arguments.output)


def _bench_checkpoint(arguments: argparse.Namespace) -> None:
    from resnet_dist.bench.checkpoint import bench_checkpoint
    from resnet_dist.distributed import start_alone

    start_alone("bench checkpoint")
    bench_checkpoint(arguments.folder, arguments.runs, arguments.output)


def _bench_deterministic(arguments: argparse.Namespace) -> None:
    from resnet_dist import distributed
    from resnet_dist.bench.deterministic import bench_deterministic

    bench_deterministic(distributed.start(), arguments.runs, arguments.steps, arguments.output)
    distributed.stop()


def _export(arguments: argparse.Namespace) -> None:
    from resnet_dist.verbs.export import export

    print(export(arguments.checkpoint, arguments.to, arguments.output))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resnet-dist", description="ResNet training")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train a config; the same command resumes after a stop")
    train.set_defaults(verb=_train)
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override the file"
    )
    train.add_argument(
        "--init-from",
        metavar="WEIGHTS",
        help="fine-tune: a checkpoint, a run folder, or torchvision:FILE.pth (model.init_from)",
    )
    train.add_argument(
        "--resume-anyway",
        action="store_true",
        help="resume even though settings, data or decoder have changed",
    )
    train.add_argument(
        "--dry-run", action="store_true", help="print the merged config and the plan, then exit"
    )
    train.add_argument(
        "--world-size",
        type=_positive,
        metavar="N",
        help="dry run: plan for N ranks",
    )
    train.add_argument(
        "--train-images", type=_positive, metavar="N", help="dry run: plan without the data"
    )

    status = verbs.add_parser("status", help="how a run ended, or whether it is running")
    status.set_defaults(verb=_status)
    status.add_argument("run", metavar="RUN", help="a run folder, its name, or its CONFIG.yaml")
    status.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override CONFIG.yaml"
    )
    status.add_argument("--run-root", type=_path, default=Path("runs"), metavar="DIR")
    status.add_argument(
        "--exit-code",
        action="store_true",
        help="exit with 0: finished, 75: stopped (resumable), 2: bad input, 1: anything else",
    )
    status.add_argument(
        "--start", metavar="TOKEN", help="only the start with this $RESNET_DIST_START counts"
    )
    # Launchers pass the arguments of `train` on. These two do not matter here.
    status.add_argument("--init-from", help=argparse.SUPPRESS)
    status.add_argument("--resume-anyway", action="store_true", help=argparse.SUPPRESS)

    evaluate = verbs.add_parser("evaluate", help="exact acc1, acc5 and loss of a checkpoint")
    evaluate.set_defaults(verb=_evaluate)
    evaluate.add_argument("checkpoint", type=_path, help="RUN/checkpoints/best, or RUN")
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value")
    evaluate.add_argument(
        "--protocol", choices=("center-crop", "ten-crop", "multi-scale"), default="center-crop"
    )
    evaluate.add_argument(
        "--scales", metavar="PX,...", help="multi-scale; default: 224,256,384,480,640"
    )
    evaluate.add_argument(
        "--recalibrate-bn",
        type=_positive,
        metavar="N",
        help="first recompute the BN statistics over N training images",
    )
    evaluate.add_argument(
        "--save-to", type=_path, metavar="FOLDER", help="write a checkpoint with these statistics"
    )

    predict = verbs.add_parser(
        "predict",
        help="classify images",
        epilog="Exit code 1: some images could not be read (one line each on stderr).",
    )
    predict.set_defaults(verb=_predict)
    predict.add_argument("checkpoint", type=_path, help="RUN/checkpoints/best, or RUN")
    predict.add_argument(
        "paths", nargs="+", metavar="PATH", help="image files, or folders to search for images"
    )
    predict.add_argument(
        "--top", type=_positive, default=1, metavar="K", help="the K likeliest classes; default: 1"
    )
    predict.add_argument("--csv", action="store_true", help="print CSV instead of a table")

    verify = verbs.add_parser(
        "verify",
        help="decode every image: which can be trained on, and how",
        epilog="Unreadable images are listed in DATA/bad_samples.tsv, and runs leave them out. "
        "Exit code 1: some images cannot be trained on.",
    )
    verify.set_defaults(verb=_verify)
    verify.add_argument(
        "data", type=_path, metavar="DATA", help="the folder that data.root is set to"
    )
    verify.add_argument(
        "--format",
        choices=tuple(FORMATS),
        help="default: recognized by the files",
    )
    verify.add_argument("--threads", type=_positive, metavar="N", help="default: one per core")
    verify.add_argument("--dry-run", action="store_true", help="do not write bad_samples.tsv")
    verify.add_argument(
        "--list", type=_path, metavar="FILE.tsv", help="write name, kind and reason of each finding"
    )

    compare = verbs.add_parser("compare", help="compare runs: differing settings, and scores")
    compare.set_defaults(verb=_compare)
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, its name, or an MLflow run id"
    )
    compare.add_argument("--run-root", type=_path, default=Path("runs"), metavar="DIR")
    compare.add_argument(
        "--plot", type=_path, metavar="FIGURE.png", help="draw the training and validation error"
    )

    analyze = verbs.add_parser("analyze", help="analyze trained networks")
    analyses = analyze.add_subparsers(required=True, metavar="ANALYSIS")
    responses = analyses.add_parser("responses", help="standard deviation of each layer's output")
    # Overrides are mixed with the checkpoints, as argparse cannot tell two lists apart.
    responses.set_defaults(verb=_analyze_responses, overrides=[])
    responses.add_argument(
        "checkpoints",
        nargs="+",
        metavar="CHECKPOINT",
        help="checkpoints, and key.sub=value settings for all of them",
    )
    responses.add_argument("--output", type=_path, metavar="FIGURE.png", help="draw a figure")
    responses.add_argument(
        "--images", type=_positive, metavar="N", help="use N validation images; default: all"
    )

    export = verbs.add_parser("export", help="convert a network for other programs")
    export.set_defaults(verb=_export)
    export.add_argument("checkpoint", type=_path, help="RUN/checkpoints/best, or RUN")
    export.add_argument(
        "--to", required=True, choices=("torchvision", "safetensors", "onnx", "pt2")
    )
    export.add_argument(
        "--output", type=_path, metavar="FILE", help="default: RUN/export/MODEL-stepN.EXT"
    )

    _add_bench(verbs.add_parser("bench", help="measure this machine: loading, saving, determinism"))

    models = verbs.add_parser("models", help="list the networks: layers, parameters, multiply-adds")
    models.set_defaults(verb=_models)

    prepare = verbs.add_parser("prepare", help="prepare a data set")
    data_sets = prepare.add_subparsers(required=True, metavar="DATA_SET")
    digits = data_sets.add_parser("digits", help="scikit-learn's digits as an image folder")
    digits.set_defaults(verb=_prepare_digits)
    digits.add_argument("root", type=_path)
    shards = data_sets.add_parser(
        "shards",
        help="convert ImageNet's tars or parquet, image folders, lists or other shards to shards",
        epilog="After a kill, the same command resumes and writes the same bytes.",
    )
    shards.set_defaults(verb=_prepare_shards)
    shards.add_argument("source", type=_path, metavar="SOURCE")
    shards.add_argument("dest", type=_path, metavar="DEST")
    shards.add_argument(
        "--format",
        choices=(*FORMATS, *SOURCES),
        help="what SOURCE is; default: recognized by the files",
    )
    shards.add_argument(
        "--images-per-shard", type=_positive, default=1000, metavar="N", help="default: 1000"
    )
    shards.add_argument("--workers", type=_positive, metavar="N", help="default: one per core")
    limit = shards.add_mutually_exclusive_group()
    limit.add_argument(
        "--longest-px", type=_positive, metavar="N", help="shrink larger images, as JPEG"
    )
    limit.add_argument(
        "--shortest-px", type=_positive, metavar="N", help="the same, by the shorter side"
    )
    shards.add_argument(
        "--quality",
        type=int,
        choices=range(1, 101),
        metavar="1..100",
        help=f"JPEG quality of shrunk images; default: {JPEG_QUALITY}",
    )
    return parser


def _add_bench(bench: argparse.ArgumentParser) -> None:
    benches = bench.add_subparsers(required=True, metavar="BENCH")
    loader = benches.add_parser("loader", help="compare our loader with torchvision's and DALI's")
    loader.set_defaults(verb=_bench_loader)
    loader.add_argument("data", type=_path, metavar="DATA", help="a folder of photos, or data.root")
    loader.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    loader.add_argument("--threads", type=_positive, metavar="N", help="default: cores per GPU")
    loader.add_argument("--runs", type=_positive, default=7, metavar="N", help="default: 7")
    loader.add_argument(
        "--images", type=_positive, metavar="N", help="images per run; default: 2000 per thread"
    )
    loader.add_argument(
        "--shards",
        type=_path,
        metavar="DATA",
        help="the same photos as shards; default: made from DATA",
    )
    loader.add_argument(
        "--tune", action="store_true", help="find the fastest settings and print them as YAML"
    )
    loader.add_argument(
        "--run-root",
        type=os.path.expanduser,
        metavar="RUNS",
        help="where runs keep the report on this GPU's decoders; default: probe them now",
    )
    loader.add_argument(
        "--no-peers",
        action="store_true",
        help="measure ours only; with --runs 1 that takes a minute",
    )

    memory = benches.add_parser("memory", help="measure the memory used in each epoch of loading")
    memory.set_defaults(verb=_bench_memory)
    memory.add_argument("config", metavar="CONFIG.yaml")
    memory.add_argument(
        "overrides", nargs="*", metavar="key.sub=value", help="settings that override the file"
    )
    memory.add_argument("--epochs", type=_positive, default=10, metavar="N", help="default: 10")

    index = benches.add_parser("index", help="measure what an index costs each process of a node")
    index.set_defaults(verb=_bench_index)
    order = benches.add_parser(
        "order", help="measure how well shards are mixed and how they are read"
    )
    order.set_defaults(verb=_bench_order)
    for one in (index, order):
        one.add_argument(
            "--images",
            type=_positive,
            default=IMAGENET_IMAGES,
            metavar="N",
            help=f"default: ImageNet's {IMAGENET_IMAGES:,}",
        )
    deterministic = benches.add_parser(
        "deterministic", help="measure what train.deterministic costs"
    )
    deterministic.set_defaults(verb=_bench_deterministic)
    deterministic.add_argument("--runs", type=_positive, default=7, metavar="N", help="default: 7")
    deterministic.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="steps per run; default: 20"
    )
    saving = benches.add_parser("checkpoint", help="measure what saving checkpoints costs training")
    saving.set_defaults(verb=_bench_checkpoint)
    saving.add_argument(
        "folder", type=_path, metavar="FOLDER", help="a folder on the disk for checkpoints"
    )
    saving.add_argument("--runs", type=_positive, default=40, metavar="N", help="default: 40")
    for one in (loader, memory, index, order, deterministic, saving):
        one.add_argument(
            "--output", type=_path, metavar="FILE.json", help="write the figures to a file"
        )


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # the shell does not expand --option=~/x


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
