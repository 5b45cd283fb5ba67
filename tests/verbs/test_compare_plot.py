"""Error curves of runs in a real MLflow database: what is averaged, and what is drawn."""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from resnet_dist import cli
from resnet_dist.config import Config, ModelConfig, TrackingConfig
from resnet_dist.errors import UserError
from resnet_dist.models.depths import DEPTHS
from resnet_dist.tracking.journal import Tracker
from resnet_dist.verbs.compare import ErrorCurves, compare, degradation, error_curves

to_hex = pytest.importorskip("matplotlib.colors").to_hex
Figure = pytest.importorskip("matplotlib.figure").Figure
from resnet_dist.verbs import plots  # noqa: E402 (it imports matplotlib)

STEPS_PER_EPOCH = 40  # a quarter: 10 steps
LOGGED = (4, 8, 12, 16, 20, 22)  # every 4 steps, and the end
# Of the last 10 steps' minibatches: 4 steps at 16, 4 at 20, 2 at 22.
TRAIN_ERRORS = {
    "plain20": (90, 80, 70, 40, 30, 20),  # (4*40 + 4*30 + 2*20) / 10 = 32
    "plain56": (90, 85, 80, 60, 50, 40),  # 52
    "resnet20": (90, 60, 50, 35, 25, 15),  # 27
    "resnet56": (90, 60, 40, 20, 10, 5),  # 13
}
VAL_ERRORS = {11: 50, 22: 25}


@pytest.fixture(scope="module")
def run_root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    pytest.importorskip("mlflow")
    root = tmp_path_factory.mktemp("runs")
    with pytest.MonkeyPatch.context() as patch:
        patch.delenv("MLFLOW_TRACKING_URI", raising=False)
        for network, errors in TRAIN_ERRORS.items():
            record(root, network, network, dict(zip(LOGGED, errors, strict=True)))
        record(root, "empty", "resnet20", {})
    return root


@pytest.fixture(autouse=True)
def _no_server(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("MLFLOW_TRACKING_URI", raising=False)


def record(root: Path, name: str, network: str, train_errors: Mapping[int, float]) -> None:
    config = Config(
        name=name, model=ModelConfig(name=network), tracking=TrackingConfig(run_root=str(root))
    )
    config.run_dir.mkdir()
    (config.run_dir / "config.yaml").write_text("")
    tracker = Tracker(config, {}, records=True, warn=pytest.fail)
    for step, error in train_errors.items():
        tracker.log(step, {"train/acc1": 100 - error, "progress/epoch": step / STEPS_PER_EPOCH})
    for step, error in VAL_ERRORS.items() if train_errors else ():
        tracker.log(step, {"val/acc1": 100 - error})
    assert tracker.close("FINISHED", {}) is not None


def curve(network: str, errors: Mapping[int, float], name: str = "") -> ErrorCurves:
    points = np.array(list(errors.items()), dtype=np.float64)
    return ErrorCurves(
        name or network, DEPTHS.get(network), network, points, np.empty((0, 2)), STEPS_PER_EPOCH
    )


def test_degradation_in_numbers(run_root: Path) -> None:
    block = compare(list(TRAIN_ERRORS), run_root).partition("\n\n")[2]
    assert block.splitlines() == [
        "degradation (training error, mean over the minibatches of the last 0.25 epochs: "
        "10 steps, at step 22)",
        "  plain20 32.00 % -> plain56 52.00 %: +20.00 points",
        "  resnet20 27.00 % -> resnet56 13.00 %: -14.00 points",
    ]


@pytest.mark.parametrize(
    "names",
    [
        ["plain20", "plain56", "resnet20"],
        ["plain20", "resnet20", "resnet56"],
        ["plain20", "plain56"],
        ["plain20", "plain56", "resnet56", "empty"],  # empty: a resnet20 with nothing logged yet
    ],
)
def test_degradation_needs_two_depths_of_both_kinds(run_root: Path, names: list[str]) -> None:
    assert "degradation" not in compare(names, run_root)


def test_degradation_names_what_is_uneven() -> None:
    """Runs at other steps, runs of one network, other shortcuts, depths that one kind lacks."""
    runs = [
        curve("plain34", {10: 30}),
        curve("plain18", {10: 20}),
        curve("resnet18", {10: 10}),
        curve("resnet18", {20: 20}, name="again"),
        curve("resnet34", {10: 12}),
        curve("resnet18_c", {10: 14}),
        curve("resnet34_c", {10: 11}),
        curve("resnet50", {10: 1}),  # bottlenecks: no counterpart
        curve("resnet20", {10: 1}),  # another form
        curve("vgg19", {10: 1}),
        curve("unknown", {10: 1}),
    ]
    assert degradation(runs).splitlines()[1:] == [
        "  plain18 20.00 % at step 10 -> plain34 30.00 % at step 10: +10.00 points",
        "  resnet18 15.00 % at step 10 to 20 (mean of 2 runs) -> resnet34 12.00 % at step 10: "
        "-3.00 points",
        "  resnet18_c 14.00 % at step 10 -> resnet34_c 11.00 % at step 10: -3.00 points",
    ]


def test_the_moving_average_weighs_minibatches_equally() -> None:
    """Uneven points, as after a stop: each counts for the steps since the one before."""
    steps = [3, 10, 12, 20, 21, 22, 30, 50]
    errors = np.random.default_rng(0).uniform(0, 100, len(steps))
    smoothed = curve("resnet20", dict(zip(steps, errors, strict=True))).smoothed_train()
    by_step = {
        step: [error] * (step - before)
        for step, before, error in zip(steps, [0, *steps], errors, strict=False)
    }
    for step, mean in smoothed:
        window = [by_step[other] for other in steps if abs(other - step) <= 5]
        assert mean == pytest.approx(np.mean(np.concatenate(window)))
    assert smoothed[-1, 1] == pytest.approx(errors[-1])  # alone in its window
    assert len({round(mean, 6) for mean in smoothed[3:6, 1]}) == 1  # 20, 21, 22 share theirs


def drawn(figure: Figure) -> list[dict[str, tuple[str, float, list[float]]]]:
    """Per panel: label -> colour, width and errors of the lines, training before validation."""
    found: list[dict[str, tuple[str, float, list[float]]]] = []
    for ax in figure.axes:
        lines = ax.get_lines()
        found.append({})
        for train, val in zip(lines[::2], lines[1::2], strict=True):
            assert train.get_color() == val.get_color()
            assert train.get_linewidth() * 2 <= val.get_linewidth()
            errors = [float(error) for error in np.asarray(val.get_ydata())]
            found[-1][str(val.get_label())] = (
                to_hex(val.get_color()),
                train.get_xdata()[-1],
                errors,
            )
    return found


def test_plain_and_residual_stand_side_by_side(run_root: Path) -> None:
    curves = error_curves(list(TRAIN_ERRORS), run_root)
    figure = plots.error_figure(curves)
    plain, residual = figure.axes
    assert np.array_equal(plain.get_lines()[0].get_xydata(), curves[0].smoothed_train())
    assert [ax.get_title() for ax in figure.axes] == ["plain networks", "residual networks"]
    assert plain.get_ylim() == residual.get_ylim()
    assert plain.get_shared_y_axes().joined(plain, residual)
    left, right = drawn(figure)
    assert list(left) == ["plain20", "plain56"]
    assert list(right) == ["resnet20", "resnet56"]
    for shallow, deep in (left.values(), right.values()):
        assert shallow[1:] == deep[1:] == (22, [50, 25])
        assert shallow[0] != deep[0]
    left, right = drawn(plots.error_figure(error_curves([*left, "resnet56"], run_root)))
    assert left["plain56"][0] == right["resnet56"][0]  # a colour per depth, as in the paper
    assert [text.get_text() for text in plain.get_legend().get_texts()] == list(left)
    assert "moving average over 0.25 epochs (10 iter.)" in figure.get_supxlabel()


def test_one_kind_is_one_panel_and_runs_keep_their_colours_apart() -> None:
    runs = [curve("resnet20", {10: 50, 20: 40}, name) for name in ("a", "b", "c")]
    (panel,) = drawn(plots.error_figure(runs))
    assert len({color for color, *_ in panel.values()}) == 3
    (panel,) = drawn(
        plots.error_figure([*runs, curve("unknown", {10: 5}), curve("plain20", {9: 9})])
    )
    assert len({color for color, *_ in panel.values()}) == 5
    left, right = drawn(plots.error_figure([*runs, curve("plain20", {9: 9})]))
    assert (len(left), len(right)) == (1, 3)
    assert len({color for color, *_ in right.values()}) == 3


def test_long_runs_count_in_1e4_and_show_nine_tenths() -> None:
    steps = range(64, 64_001, 64)
    run = curve("resnet20", {step: 90 if step < 6000 else 18 for step in steps})
    (ax,) = plots.error_figure([run]).axes
    assert ax.get_xlabel() == "iter. (1e4)"
    assert ax.get_xlim() == (0, 6.4)
    assert ax.get_ylim() == (0, 20)
    short = replace(run, train=run.train[:100])
    (ax,) = plots.error_figure([short]).axes
    assert ax.get_xlabel() == "iter."
    assert ax.get_ylim() == (0, 95)


@pytest.mark.parametrize(
    ("suffix", "start"),
    [("png", b"\x89PNG"), ("pdf", b"%PDF"), ("svg", b"<?xml"), ("PNG", b"\x89PNG")],
)
def test_the_command_line(
    run_root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str], suffix: str, start: bytes
) -> None:
    figure = tmp_path / f"errors.{suffix}"
    runs = ["plain20", "resnet20"]
    cli.main(["compare", *runs, "--run-root", str(run_root), "--plot", str(figure)])
    said = capsys.readouterr().out
    assert said == f"{compare(runs, run_root)}\n\nfigure  {figure}\n"
    assert figure.read_bytes().startswith(start)
    if suffix == "png":
        with Image.open(figure) as image:
            pixels = np.asarray(image.convert("RGB"))
        assert all((pixels == color).all(2).any() for color in ((0xC4, 0xA0, 0), (255, 255, 255)))


@pytest.mark.parametrize(
    ("path", "line"),
    [
        ("errors.xyz", r"errors\.xyz: \.xyz: unknown figure format; use \.png, \.pdf"),
        ("errors", "errors: no suffix: unknown figure format"),
        ("absent/errors.png", r"absent/errors\.png: no folder .*absent; create it"),
        ("folder.png", r"folder\.png: Is a directory; give a different path"),
    ],
)
def test_a_path_that_takes_no_figure(
    run_root: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    path: str,
    line: str,
) -> None:
    (tmp_path / "folder.png").mkdir()
    with pytest.raises(SystemExit, match="2"):
        cli.main(
            ["compare", "plain20", "--run-root", str(run_root), "--plot", f"{tmp_path}/{path}"]
        )
    assert re.fullmatch(f"resnet-dist: .*{line}.*\n", capsys.readouterr().err)


def test_a_run_without_training_error(run_root: Path, tmp_path: Path) -> None:
    assert "FINISHED" in compare(["plain20", "empty"], run_root)
    with pytest.raises(UserError, match=r"^empty: MLflow has no train/acc1 of this run"):
        error_curves(["plain20", "empty"], run_root)
