"""A verb per subcommand. No logic: each verb is a function elsewhere.

Exit codes: 0 done (or stopped cleanly on request), 2 bad input (one line says what and where).
"""

import argparse
import os
import sys
import time
from pathlib import Path

from resnet_dist import __version__
from resnet_dist.config import Config, to_yaml
from resnet_dist.config_file import load_config
from resnet_dist.data.listing import count_images
from resnet_dist.errors import UserError
from resnet_dist.interrupt import Interrupt
from resnet_dist.plan import Plan
from resnet_dist.run_folder import check_run_folder

OTHER_RANKS_LINGER_SECONDS = 5.0

# The verbs import what they need: a dry run works without torch, and `compare` without DALI.


def main(argv: list[str] | None = None) -> None:
    parser = _parser()
    # argparse takes no overrides after an option (`train x.yaml --dry-run seed=1`): they are left.
    arguments, left = parser.parse_known_args(argv)
    if left and (not hasattr(arguments, "overrides") or any(text.startswith("-") for text in left)):
        parser.error(f"unrecognized arguments: {' '.join(left)}")
    if left:
        arguments.overrides += left
    try:
        arguments.verb(arguments)
    except UserError as error:
        # A UserError is the same on every rank: rank 0 speaks for all. The others linger, as
        # torchrun ends all ranks when the first one leaves.
        if os.environ.get("RANK", "0") == "0":
            print(f"resnet-dist: {error}", file=sys.stderr, flush=True)
        else:
            time.sleep(OTHER_RANKS_LINGER_SECONDS)
        sys.exit(2)


def _train(arguments: argparse.Namespace) -> None:
    config = load_config(arguments.config, arguments.overrides)
    if arguments.dry_run:
        world_size = arguments.world_size or int(os.environ.get("WORLD_SIZE", "1"))
        print(dry_run(config, world_size, arguments.train_images))
        return
    if arguments.world_size or arguments.train_images:
        raise UserError("command line: --world-size and --train-images go with --dry-run")
    with Interrupt() as interrupt:  # before torch: its import takes seconds
        from resnet_dist.train import train

        train(config, recipe_name(arguments.config), interrupt)


def _evaluate(arguments: argparse.Namespace) -> None:
    from resnet_dist.evaluate import evaluate_checkpoint

    score = evaluate_checkpoint(arguments.checkpoint, arguments.overrides)
    if os.environ.get("RANK", "0") == "0":
        print(score)


def _compare(arguments: argparse.Namespace) -> None:
    from resnet_dist.compare import compare, error_curves

    if arguments.plot is None:
        print(compare(arguments.runs, arguments.run_root))
        return
    from resnet_dist import plots

    plots.check_path(arguments.plot)
    print(compare(arguments.runs, arguments.run_root))
    plots.draw_errors(error_curves(arguments.runs, arguments.run_root), arguments.plot)
    print(f"\nfigure  {arguments.plot}")


def _prepare_digits(arguments: argparse.Namespace) -> None:
    from resnet_dist.data.prepare import write_digits

    train_images, val_images = write_digits(arguments.root)
    print(f"{arguments.root}: {train_images} train and {val_images} val images of 10 digits")


def dry_run(config: Config, world_size: int, train_images: int | None) -> str:
    """The merged config and the plan, as text. Counts the images unless `train_images` is given."""
    val_images = None
    if train_images is None:
        data = config.data
        try:
            train_images = count_images(data.format, Path(data.root), "train")
            val_images = data.holdout_images or count_images(data.format, Path(data.root), "val")
        except UserError as error:
            raise UserError(f"{error} (--train-images N plans without the data)") from None
    train_images -= config.data.holdout_images
    plan = Plan.of(config, world_size, train_images, val_images)
    text = to_yaml(config) + "\n" + plan.describe()
    try:
        check_run_folder(config)
    except UserError as error:  # the plan is worth reading all the same
        text += f"\n\nnot to be trained under this name: {error}"
    return text


def recipe_name(path: str) -> str:
    """configs/imagenet/resnet50.yaml -> imagenet/resnet50."""
    parts = Path(path).with_suffix("").parts
    return "/".join(parts[parts.index("configs") + 1 :]) if "configs" in parts else parts[-1]


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="resnet-dist", description="ResNet training")
    parser.add_argument("--version", action="version", version=__version__)
    verbs = parser.add_subparsers(required=True, metavar="VERB")

    train = verbs.add_parser("train", help="train the config; the same command again goes on")
    train.set_defaults(verb=_train)
    train.add_argument("config", metavar="CONFIG.yaml")
    train.add_argument("overrides", nargs="*", metavar="key.sub=value", help="on top of the file")
    train.add_argument(
        "--dry-run", action="store_true", help="print the merged config and the plan"
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

    evaluate = verbs.add_parser("evaluate", help="exact acc1, acc5 and loss of a checkpoint")
    evaluate.set_defaults(verb=_evaluate)
    evaluate.add_argument("checkpoint", type=Path, help="RUN/checkpoints/best, or RUN")
    evaluate.add_argument("overrides", nargs="*", metavar="key.sub=value")

    compare = verbs.add_parser("compare", help="runs side by side: settings that differ, scores")
    compare.set_defaults(verb=_compare)
    compare.add_argument("runs", nargs="+", metavar="RUN", help="run folder, its name, or a run id")
    compare.add_argument("--run-root", type=Path, default=Path("runs"), metavar="DIR")
    compare.add_argument(
        "--plot", type=Path, metavar="FIGURE.png", help="draw training and validation error"
    )

    prepare = verbs.add_parser("prepare", help="make a data set ready")
    data_sets = prepare.add_subparsers(required=True, metavar="DATA_SET")
    digits = data_sets.add_parser("digits", help="scikit-learn's digits as an image folder")
    digits.set_defaults(verb=_prepare_digits)
    digits.add_argument("root", type=Path)
    return parser


def _positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text!r} is not a whole number above zero")
    return int(text)
