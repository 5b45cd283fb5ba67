"""Draws the figures of He et al. 2015 for our runs.

Uses matplotlib's object-oriented API: no pyplot, no display, no global state. The suffix of the
file determines the format, such as PNG, PDF or SVG.
"""

from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backend_bases import FigureCanvasBase
from matplotlib.figure import Figure

from resnet_dist.errors import UserError
from resnet_dist.verbs.compare import WINDOW_EPOCHS, ErrorCurves, panels, span

DOTS_PER_INCH = 150
# The first five are the colours of figure 6 (20, 32, 44, 56 and 110 layers), a little darker where
# a thin line would be too faint. The others follow when there are more curves.
COLORS = (
    *("#c4a000", "#00a5a5", "#1a8a1a", "#e01010", "#000000"),
    *("#2050d0", "#b030b0", "#f07800", "#7a4a20", "#808080"),
)
LONG_RUN_STEPS = 10_000  # for runs at least this long, the axis counts in 1e4, as in the paper


def check_path(path: Path) -> None:
    """Raises UserError if a figure cannot be written to `path`. Call it before the work is done."""
    kinds = FigureCanvasBase.get_supported_filetypes()
    if path.suffix[1:].lower() not in kinds:
        raise UserError(
            f"{path}: {path.suffix or 'no suffix'}: unknown figure format; use .png, .pdf or .svg "
            f"(supported: {', '.join(sorted(kinds))})"
        )
    if not path.parent.is_dir():
        raise UserError(f"{path}: no folder {path.parent}; create it, or give a different path")


def save(figure: Figure, path: Path) -> None:
    """Writes the figure to `path`. Raises UserError if it cannot be written."""
    try:
        figure.savefig(path, dpi=DOTS_PER_INCH)
    except OSError as error:
        raise UserError(f"{path}: {error.strerror or error}; give a different path") from error


def error_figure(curves: Sequence[ErrorCurves]) -> Figure:
    """Draws error in percent over iterations, as in figures 4 and 6: training thin, validation
    bold.

    See `panels` for when plain and residual nets have panels of their own. The panels share one y
    axis.
    """
    sides = panels(curves)
    figure = Figure(figsize=(5.2 * len(sides) + 1.2, 4.6), layout="constrained")
    axes = figure.subplots(1, len(sides), sharey=True, squeeze=False)[0]
    last_step = max(curve.train[-1, 0] for curve in curves)
    unit = 1e4 if last_step >= LONG_RUN_STEPS else 1
    colors = _colors(sides.values())
    for ax, (title, side), side_colors in zip(axes, sides.items(), colors, strict=True):
        for curve, color in zip(side, side_colors, strict=True):
            for points, bold in ((curve.smoothed_train(), False), (curve.val, True)):
                ax.plot(
                    points[:, 0] / unit,
                    points[:, 1],
                    color=color,
                    linewidth=2.2 if bold else 0.9,
                    marker="o" if bold and len(points) == 1 else "",
                    label=curve.name if bold else None,
                    zorder=3 if bold else 2,
                )
        ax.set_title(title, fontsize=12)
        ax.set_xlabel("iter. (1e4)" if unit > 1 else "iter.", fontsize=12)
        ax.set_xlim(0, last_step / unit)
        _finish(ax)
        ax.legend(fontsize=10, loc="upper right", framealpha=0.9, edgecolor="0.8").set_zorder(4)
    axes[0].set_ylim(0, _top(curves))
    axes[0].set_ylabel("error (%)", fontsize=12)
    windows = span(round(curve.window_steps) for curve in curves)
    caption = (
        f"thin: training error of the minibatches, moving average over {WINDOW_EPOCHS:g} epochs "
        f"({windows} iter.);  bold: validation error"
    )
    figure.supxlabel(caption, fontsize=8.5, color="0.35")
    return figure


def response_figure(responses: Mapping[str, Sequence[float]]) -> Figure:
    """Draws the layers' standard deviations of each checkpoint, as in figure 7: once in layer
    order, and once sorted by size."""
    figure = Figure(figsize=(8, 5.6), layout="constrained")
    original, by_size = figure.subplots(2, 1, sharex=True, sharey=True)
    for number, (name, stds) in enumerate(responses.items()):
        layers = range(1, len(stds) + 1)
        color = COLORS[number % len(COLORS)]
        original.plot(layers, stds, color=color, linewidth=1.5, label=name)
        by_size.plot(layers, sorted(stds, reverse=True), color=color, linewidth=1.5, label=name)
    original.set_xlabel("layer index (original)", fontsize=12)
    by_size.set_xlabel("layer index (sorted by magnitude)", fontsize=12)
    for ax in (original, by_size):
        ax.tick_params(labelbottom=True)
        ax.set_ylabel("std", fontsize=12)
        _finish(ax)
    figure.legend(*original.get_legend_handles_labels(), loc="outside right upper", fontsize=10)
    caption = (
        "standard deviation of each layer's BN output, before the nonlinearity and the addition"
    )
    figure.supxlabel(caption, fontsize=8.5, color="0.35")
    return figure


def _colors(sides: Iterable[Sequence[ErrorCurves]]) -> list[list[str]]:
    """Returns a colour for each curve of each panel.

    As in the paper there is one colour per depth, unless two curves of a panel have the same depth.
    """
    depths = [[curve.net.depths if curve.net else () for curve in side] for side in sides]
    known = sorted({of_net for side in depths for of_net in side}, key=sum)
    if any(len(set(side)) < len(side) for side in depths):
        return [[COLORS[i % len(COLORS)] for i in range(len(side))] for side in depths]
    return [[COLORS[known.index(of_net) % len(COLORS)] for of_net in side] for side in depths]


def _top(curves: Sequence[ErrorCurves]) -> float:
    """Returns the upper end of the y axis, in percent.

    At least 90 % of each curve's points are below it, but the high errors at the start may not be.
    For a run of the paper's 64k iterations it is about 20 to 25 %, as in the paper.
    """
    drawn = [points[:, 1] for curve in curves for points in (curve.smoothed_train(), curve.val)]
    highest = max(np.quantile(errors, 0.9) for errors in drawn if len(errors))
    return min(100, 5 * (highest // 5 + 1))


def _finish(ax: Axes) -> None:
    ax.grid(color="0.9", linewidth=0.6)
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=10)
