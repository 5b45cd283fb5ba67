"""The verbs, their arguments and options."""

import argparse
import os
from collections.abc import Iterable
from pathlib import Path

from resnet_dist import __version__
from resnet_dist.cli import actions
from resnet_dist.cli.hints import Parser
from resnet_dist.data.formats import FORMATS, SOURCES
from resnet_dist.models.sizes import SIZES

IMAGENET_IMAGES = 1_281_167
# The networks that torchvision and timm have, too, under the same names.
EVERYBODYS = ("resnet18", "resnet34", "resnet50", "resnet101", "resnet152")


def make_parser() -> Parser:
    parser = Parser(prog="resnet-dist", description="ResNet training")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_verbs("VERB")

    train = verbs.add_parser("train", help="train a config; the same command resumes after a stop")
    train.set_defaults(verb=actions.train)
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
        "--ranks",
        type=_positive,
        metavar="N",
        help="train with N processes on this machine, one per GPU; default: 1",
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
    status.set_defaults(verb=actions.status)
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
    evaluate.set_defaults(verb=actions.evaluate)
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
    predict.set_defaults(verb=actions.predict)
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
    verify.set_defaults(verb=actions.verify)
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
    compare.set_defaults(verb=actions.compare)
    compare.add_argument(
        "runs", nargs="+", metavar="RUN", help="a run folder, its name, or an MLflow run id"
    )
    compare.add_argument("--run-root", type=_path, default=Path("runs"), metavar="DIR")
    compare.add_argument(
        "--plot", type=_path, metavar="FIGURE.png", help="draw the training and validation error"
    )

    analyze = verbs.add_parser("analyze", help="analyze trained networks")
    analyses = analyze.add_verbs("ANALYSIS")
    responses = analyses.add_parser("responses", help="standard deviation of each layer's output")
    # Overrides are mixed with the checkpoints, as argparse cannot tell two lists apart.
    responses.set_defaults(verb=actions.analyze_responses, overrides=[])
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
    export.set_defaults(verb=actions.export)
    export.add_argument("checkpoint", type=_path, help="RUN/checkpoints/best, or RUN")
    export.add_argument(
        "--to", required=True, choices=("torchvision", "safetensors", "onnx", "pt2")
    )
    export.add_argument(
        "--output", type=_path, metavar="FILE", help="default: RUN/export/MODEL-stepN.EXT"
    )

    _add_bench(verbs.add_parser("bench", help="measure this machine: loading, the step, saving"))

    models = verbs.add_parser("models", help="list the networks: layers, parameters, multiply-adds")
    models.set_defaults(verb=actions.models)

    prepare = verbs.add_parser("prepare", help="prepare a data set")
    data_sets = prepare.add_verbs("DATA_SET")
    digits = data_sets.add_parser("digits", help="scikit-learn's digits as an image folder")
    digits.set_defaults(verb=actions.prepare_digits)
    digits.add_argument("root", type=_path)
    shards = data_sets.add_parser(
        "shards",
        help="convert ImageNet's tars or parquet, image folders, lists or other shards to shards",
        epilog="After a kill, the same command resumes and writes the same bytes.",
    )
    shards.set_defaults(verb=actions.prepare_shards)
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
        help=f"JPEG quality of shrunk images; default: {actions.JPEG_QUALITY}",
    )
    return parser


def _add_bench(bench: Parser) -> None:
    benches = bench.add_verbs("BENCH")
    loader = benches.add_parser("loader", help="compare our loader with torchvision's and DALI's")
    loader.set_defaults(verb=actions.bench_loader)
    _add_side_by_side(loader)
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
        "--no-peers",
        action="store_true",
        help="measure ours only; with --runs 1 that takes a minute",
    )

    peers = benches.add_parser("peers", help="compare our trainer with torchvision's and timm's")
    peers.set_defaults(verb=actions.bench_peers)
    _add_side_by_side(peers)
    peers.add_argument("--steps", type=_positive, default=20, metavar="N", help="default: 20")
    _add_network(peers, EVERYBODYS)
    peers.add_argument(
        "--sleep-ms", type=_positive, metavar="N", help="sleep so long instead of each step"
    )

    step = benches.add_parser("step", help="measure a training step and its parts")
    step.set_defaults(verb=actions.bench_step)
    step.add_argument(
        "--batch-size", type=_positive, metavar="N", help="default: 128 on a GPU, 8 on a CPU"
    )
    _add_network(step, SIZES)
    step.add_argument("--px", type=_positive, default=224, metavar="N", help="default: 224")
    step.add_argument("--layout", choices=("channels_last", "contiguous"), default="channels_last")
    step.add_argument("--compile", action="store_true", help="with torch.compile")
    step.add_argument("--profile", action="store_true", help="name the ten dearest operations")
    end_to_end = benches.add_parser("e2e", help="find out what limits a config on this machine")
    end_to_end.set_defaults(verb=actions.bench_end_to_end)
    allreduce = benches.add_parser("allreduce", help="measure sums over ranks against the wire")
    allreduce.set_defaults(verb=actions.bench_allreduce)
    loop = benches.add_parser("loop", help="measure what training's loop adds to a bare one")
    loop.set_defaults(verb=actions.bench_loop)
    loop.add_argument("--steps", type=_positive, default=100, metavar="N", help="default: 100")
    start = benches.add_parser("start", help="measure what it costs to start")
    start.set_defaults(verb=actions.bench_start)
    for one in (step, end_to_end, allreduce, loop, start):
        one.add_argument("--runs", type=_positive, default=7, metavar="N", help="default: 7")

    memory = benches.add_parser("memory", help="measure the memory used in each epoch of loading")
    memory.set_defaults(verb=actions.bench_memory)
    for one in (end_to_end, memory):
        one.add_argument("config", metavar="CONFIG.yaml")
        one.add_argument(
            "overrides", nargs="*", metavar="key.sub=value", help="settings that override the file"
        )
    memory.add_argument("--epochs", type=_positive, default=10, metavar="N", help="default: 10")

    index = benches.add_parser("index", help="measure what an index costs each process of a node")
    index.set_defaults(verb=actions.bench_index)
    order = benches.add_parser(
        "order", help="measure how well shards are mixed and how they are read"
    )
    order.set_defaults(verb=actions.bench_order)
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
    deterministic.set_defaults(verb=actions.bench_deterministic)
    deterministic.add_argument("--runs", type=_positive, default=7, metavar="N", help="default: 7")
    deterministic.add_argument(
        "--steps", type=_positive, default=20, metavar="N", help="steps per run; default: 20"
    )
    saving = benches.add_parser("checkpoint", help="measure what saving checkpoints costs training")
    saving.set_defaults(verb=actions.bench_checkpoint)
    saving.add_argument(
        "folder", type=_path, metavar="FOLDER", help="a folder on the disk for checkpoints"
    )
    saving.add_argument("--runs", type=_positive, default=40, metavar="N", help="default: 40")
    measuring = (loader, peers, step, end_to_end, allreduce, loop, start, memory, index, order)
    for one in (*measuring, deterministic, saving):
        one.add_argument(
            "--no-wait",
            action="store_true",
            help="do not wait until the machine is idle, and repeat nothing that was disturbed",
        )
        one.add_argument(
            "--output", type=_path, metavar="FILE.json", help="write the figures to a file"
        )


def _add_side_by_side(bench: Parser) -> None:
    bench.add_argument("data", type=_path, metavar="DATA", help="a folder of photos, or data.root")
    bench.add_argument("--batch-size", type=_positive, default=64, metavar="N", help="default: 64")
    bench.add_argument("--threads", type=_positive, metavar="N", help="default: cores per GPU")
    bench.add_argument("--runs", type=_positive, default=7, metavar="N", help="default: 7")
    bench.add_argument(
        "--run-root",
        type=os.path.expanduser,
        metavar="RUNS",
        help="where runs keep the report on this GPU's decoders; default: probe them now",
    )


def _add_network(bench: Parser, networks: Iterable[str]) -> None:
    bench.add_argument(
        "--model",
        choices=tuple(networks),
        default="resnet50",
        metavar="NAME",
        help="default: resnet50",
    )
    bench.add_argument(
        "--precision",
        choices=("fp32", "tf32", "bf16", "fp16"),
        help="default: bf16 on a GPU, fp32 on a CPU",
    )


def _path(text: str) -> Path:
    return Path(os.path.expanduser(text))  # the shell does not expand --option=~/x


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
