"""Pictures: SVG for pages, in colours of the page's light or dark scheme; PNG for files. Same data, same bytes.

Shapes: F coarse latents, G fine latents.
"""

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import need
from hsae.eval.hierarchy.maps import edges, half_normal, participation_ratio

PALETTE = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9")  # Okabe & Ito: colour-blind safe
GREY = "#7f7f7f"
TEXT = "#010203"
VARIABLES = {TEXT: "currentColor", GREY: "var(--grey)"} | {color: f"var(--c{n})" for n, color in enumerate(PALETTE)}
MOST_ROWS_DRAWN, MOST_COLUMNS_DRAWN = 64, 160
TREES_DRAWN, CHILDREN_DRAWN = 4, 6
STYLE: Any = {  # matplotlib types its keys one by one
    "svg.hashsalt": "hsae", "svg.fonttype": "none", "text.parse_math": False, "font.family": "sans-serif",
    "font.size": 9, "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT,
    "ytick.color": TEXT,
    "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left",
    "axes.titleweight": "bold", "legend.frameon": False, "axes.linewidth": 0.6, "figure.constrained_layout.use": True,
    "grid.color": GREY, "grid.linewidth": 0.4, "grid.alpha": 0.3, "xtick.major.width": 0.6, "ytick.major.width": 0.6,
}  # fmt: skip


@dataclass(frozen=True)
class Point:
    """A value with its 95 % interval, on a labelled line; `whole` is False for one level of a model with several."""

    label: str
    value: float | None
    low: float | None
    high: float | None
    whole: bool = True


@contextmanager
def style() -> Iterator[None]:
    """matplotlib in this module's style, for what is drawn and saved inside; its own settings stay as they are.

    Raises UserError if matplotlib is not installed.
    """
    need("the pictures", "matplotlib", "report")
    from matplotlib import style as styles

    with styles.context(STYLE, after_reset=True):
        yield


def new_figure(width: float, height: float, **options: Any) -> Any:
    """A matplotlib figure of so many inches, which no window shows."""
    from matplotlib.figure import Figure

    return Figure(figsize=(width, height), **options)


def save_png(figure: Any, path: Path) -> None:
    """Write the figure, the same bytes for the same data."""
    figure.savefig(path, format="png", dpi=130, metadata={"Software": None})


def svg(figure: Any, description: str) -> str:
    """The figure as an <svg> element in the page's own colours."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    text = buffer.getvalue()
    text = text[text.index("<svg") :]
    text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
    text = re.sub(r'<g id="[^"]*">', "<g>", text)  # a page has many figures, and ids must be unique
    for color, variable in VARIABLES.items():
        text = text.replace(color, variable)
    return text.replace("<svg ", f'<svg role="img" aria-label="{description}" ', 1)


# --- runs side by side ----------------------------------------------------------------------------------------------


def _dots(axis: Any, points: Sequence[Point], title: str) -> None:
    """Whole models as filled dots, single levels as hollow ones, intervals as bars."""
    for place, point in enumerate(reversed(points)):
        if point.value is None:
            axis.text(0.02, place, "undefined", transform=axis.get_yaxis_transform(), va="center", fontsize=7)
            continue
        if point.low is not None and point.high is not None:
            axis.plot([point.low, point.high], [place, place], color=PALETTE[0], linewidth=2, alpha=0.45)
        fill = {"markerfacecolor": PALETTE[0]} if point.whole else {"markerfacecolor": "none", "markeredgewidth": 1.2}
        axis.plot([point.value], [place], "o", color=PALETTE[0], markersize=5, **fill)
    axis.set_ylim(-0.6, len(points) - 0.4)
    axis.set_yticks(range(len(points)), [point.label for point in reversed(points)])
    for label, point in zip(axis.get_yticklabels(), reversed(points), strict=False):  # none where an axis is shared
        label.set_fontweight("bold" if point.whole else "normal")
    axis.tick_params(axis="y", length=0)
    axis.set_title(title)
    axis.grid(axis="x")


@style()
def comparison(panels: Mapping[str, Sequence[Point]]) -> str:
    """One panel a metric, one line a view, dots with 95 % intervals. SVG."""
    lines = max((len(points) for points in panels.values()), default=1)
    height = 0.7 + 0.22 * lines
    figure = new_figure(9, height)
    axes = figure.subplots(1, len(panels), sharey=True, squeeze=False)
    for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
        _dots(axis, points, title)
    return svg(figure, "Dot plot of the results in the table above")


# --- training -------------------------------------------------------------------------------------------------------


@style()
def training_curves(lines: Sequence[dict[str, Any]]) -> str:
    """Loss, explained variance, L0 and dead share of each level over tokens, with the curriculum's stages. SVG."""
    return svg(_training(lines), "Training curves: loss, explained variance, L0 and dead latents over tokens")


@style()
def training_png(lines: Sequence[dict[str, Any]], path: Path) -> None:
    """The same picture as a file."""
    save_png(_training(lines), path)


def _training(lines: Sequence[dict[str, Any]]) -> Any:
    metrics = [line for line in lines if line["kind"] == "metrics"]
    tokens = [line["tokens"] / 1e3 for line in metrics]
    figure = new_figure(9, 4.6)
    axes = figure.subplots(2, 2, sharex=True)
    axes[0, 0].plot(tokens, _numbers(line["loss"] for line in metrics), color=GREY, linewidth=1.4)
    panels = (
        (axes[0, 1], "level_explained_variance", "explained variance, levels ≥ l"),
        (axes[1, 0], "l0", "L0 (active latents per token)"),
        (axes[1, 1], "dead", "share of latents that are dead"),
    )
    levels = len(metrics[0]["l0"])
    for axis, key, _ in panels:
        for level in range(levels):
            values = _numbers(line[key][level] for line in metrics)
            axis.plot(tokens, values, color=PALETTE[level % len(PALETTE)], linewidth=1.4, label=f"level {level + 1}")
    axes[1, 0].set_ylim(bottom=0)
    axes[1, 1].set_ylim(-0.02, 1.02)
    if levels > 1:
        axes[0, 1].legend(loc="lower right")
    named = _shade_stages(axes, lines, metrics)
    for axis, title in ((axes[0, 0], "training loss"), *((axis, title) for axis, _, title in panels)):
        axis.set_title(title, pad=6 + 8.5 * (named if axis in axes[0] else 0))
        axis.grid()
        axis.set_xlim(0, 1.01 * tokens[-1])
    for axis in axes[1]:
        axis.set_xlabel("thousand tokens")
    return figure


def _numbers(values: Any) -> list[float]:
    return [float("nan") if value is None else float(value) for value in values]


def stage_ends(lines: Sequence[dict[str, Any]]) -> list[tuple[str, float, float]]:
    """The stages of a training log with the thousands of tokens at which each began and ended."""
    metrics = [line for line in lines if line["kind"] == "metrics"]
    stages = [line for line in lines if line["kind"] == "stage"]
    per_step = metrics[0]["tokens"] / max(1, metrics[0]["step"]) / 1e3
    starts = [stage["step"] * per_step for stage in stages]
    ends = [*starts[1:], max(metrics[-1]["tokens"] / 1e3, *starts)] if starts else []
    return [(stage["stage"], start, end) for stage, start, end in zip(stages, starts, ends, strict=True)]


def _shade_stages(axes: Any, lines: Sequence[dict[str, Any]], metrics: Sequence[dict[str, Any]]) -> int:
    """Shade every second stage and write names above the upper panels; returns how many lines the longest takes."""
    stages = stage_ends(lines)
    if len(stages) < 2:
        return 0
    total, most = metrics[-1]["tokens"] / 1e3, 0
    for number, (name, start, end) in enumerate(stages):
        wrapped = textwrap.wrap(name, max(7, int(60 * (end - start) / total))) or [""]
        most = max(most, len(wrapped))
        for axis in axes.flat if number % 2 else ():
            axis.axvspan(start, end, color=GREY, alpha=0.16, linewidth=0)
        for axis in axes[0]:
            axis.text((start + end) / 2, 1.02, "\n".join(wrapped), transform=axis.get_xaxis_transform(), ha="center",
                      va="bottom", fontsize=6.5, linespacing=1.05, in_layout=False)  # fmt: skip
    return most


# --- composition ----------------------------------------------------------------------------------------------------


def drawn_part(contributions_FG: Tensor) -> Tensor:
    """The strongest rows, strongest first, and the columns that matter to them.

    The columns are ordered so that what a row is made of lies on a diagonal.
    """
    contributions_FG = contributions_FG.abs()
    rows = contributions_FG.square().sum(1).topk(min(MOST_ROWS_DRAWN, len(contributions_FG))).indices
    part = contributions_FG[rows]
    columns = part.amax(0).topk(min(MOST_COLUMNS_DRAWN, part.shape[1])).indices
    part = part[:, columns]
    order = sorted(
        range(part.shape[1]), key=lambda column: (int(part[:, column].argmax()), -float(part[:, column].max()))
    )
    return part[:, order]


def _matrix(axis: Any, contributions_FG: Tensor, title: str) -> Any:
    """Nothing is see-through and a strong contribution dark blue, so that it reads on any background."""
    from matplotlib.colors import LinearSegmentedColormap

    part = drawn_part(contributions_FG)
    colors = [(0.0, (0.0, 0.45, 0.75, 0.0)), (0.15, (0.0, 0.45, 0.75, 0.3)), (1.0, (0.0, 0.45, 0.75, 1.0))]
    image = axis.imshow(
        part.numpy(), aspect="auto", cmap=LinearSegmentedColormap.from_list("share", colors), vmin=0,
        vmax=max(1e-9, float(part.max())), interpolation="nearest",
    )  # fmt: skip
    axis.set_title(title)
    axis.set_xlabel(f"fine latents ({_of(part.shape[1], contributions_FG.shape[1])})")
    axis.set_ylabel(f"coarse latents ({_of(part.shape[0], contributions_FG.shape[0])})")
    axis.set_xticks([])
    axis.set_yticks([])
    for side in ("top", "right"):
        axis.spines[side].set_visible(True)
    return image


def _of(shown: int, count: int) -> str:
    return f"all {count}" if shown == count else f"the {shown} strongest of {count}"


@style()
def composition(contributions_FG: Tensor, level: int) -> str:
    """A map W between two levels, and how many fine latents make up each coarse one, beside a random map. SVG."""
    figure = new_figure(9, 3.6)
    left, right = figure.subplots(1, 2, width_ratios=(2, 1))
    image = _matrix(left, contributions_FG, f"what level {level} is made of")
    bar = figure.colorbar(image, ax=left, fraction=0.03, pad=0.015, label="contribution: w · rms(fine) / rms(coarse)")
    bar.outline.set_linewidth(0.6)
    ratios, null = participation_ratio(contributions_FG), participation_ratio(reference(contributions_FG))
    top = max(2.0, float(torch.cat([ratios, null]).quantile(0.99)))
    bins = torch.linspace(0, top, 30).tolist()
    right.hist(ratios.clamp_max(top).numpy(), bins=bins, color=PALETTE[0], alpha=0.75, label="this map")
    outline = {"histtype": "step", "color": PALETTE[1], "linewidth": 1.5, "label": "random map (null)"}
    right.hist(null.clamp_max(top).numpy(), bins=bins, **outline)
    right.margins(y=0.3)
    right.set_title("participation ratio")
    right.set_xlabel("fine latents per coarse latent")
    right.set_ylabel("number of coarse latents")
    right.legend(loc="upper right", fontsize=8)
    return svg(figure, f"Composition matrix of level {level} and its distribution of participation ratios")


def reference(contributions_FG: Tensor) -> Tensor:
    """A random map to compare participation ratios with: half-normal weights, as many a row, in random places."""
    alive_G = (contributions_FG != 0).any(0)
    return half_normal(contributions_FG, alive_G, torch.Generator().manual_seed(0))


@style()
def trees(contributions_FG: Tensor, level: int) -> str:
    """The coarse latents with the largest sum of C^2, each with its strongest children. SVG."""
    power_F = contributions_FG.square().sum(1)
    parents = [
        parent for parent in power_F.topk(min(TREES_DRAWN, len(power_F))).indices.tolist() if power_F[parent] > 0
    ]
    figure = new_figure(9, 2.3)
    axes = figure.subplots(1, max(1, len(parents)), squeeze=False)
    children_FG = edges(contributions_FG)
    widest = max(1e-9, float(contributions_FG.max()))
    for axis in axes[0]:
        axis.set_axis_off()
    for axis, parent in zip(axes[0], parents, strict=False):
        _tree(axis, parent, contributions_FG[parent], children_FG[parent], level, widest)
    return svg(figure, f"The strongest latents of level {level} with the latents of level {level - 1} they are made of")


def _tree(axis: Any, parent: int, share_G: Tensor, child_G: Tensor, level: int, widest: float) -> None:
    """One parent on the left, its strongest children on the right; lines are as thick as contributions."""
    count = int(child_G.sum())
    shown = torch.where(child_G, share_G, 0.0).topk(min(CHILDREN_DRAWN, count)).indices.tolist()
    middle = (CHILDREN_DRAWN - 1) / 2
    for place, child in enumerate(shown):
        height = CHILDREN_DRAWN - 1 - place
        share = float(share_G[child])
        axis.plot([0, 1], [middle, height], color=PALETTE[0], linewidth=0.4 + 4 * share / widest, alpha=0.55)
        axis.plot([1], [height], "o", color=PALETTE[0], markersize=3.5)
        axis.text(1.07, height, f"{child}", va="center", fontsize=7.5)
        axis.text(1.75, height, f"{share:.2f}", va="center", ha="right", fontsize=7.5)
    axis.plot([0], [middle], "o", color=PALETTE[1], markersize=6)
    rest = 1 - float(share_G[shown].square().sum() / share_G.square().sum())
    axis.set_title(f"level {level} latent {parent}", fontsize=8.5)
    text = f"{count} children; {rest:.0%} of ΣC² not drawn"
    axis.text(0, -0.9, text, fontsize=7, va="top")
    axis.set_xlim(-0.1, 2)
    axis.set_ylim(-1.4, CHILDREN_DRAWN - 0.5)


# --- one picture ----------------------------------------------------------------------------------------------------


@style()
def summary_png(
    path: Path, panels: Mapping[str, Sequence[Point]], contributions_FG: Tensor | None, title: str, map_title: str
) -> None:
    """One picture for a README: the comparison, and a composition map if there is one."""
    lines = max((len(points) for points in panels.values()), default=1)
    count = len(panels) + (contributions_FG is not None)
    widths = [*(1.0,) * len(panels), *((1.7,) if contributions_FG is not None else ())]
    figure = new_figure(12, max(3.6, 0.9 + 0.25 * lines), facecolor="white")
    axes = figure.subplots(1, count, width_ratios=widths, squeeze=False)
    for number, (axis, (name, points)) in enumerate(zip(axes[0], panels.items(), strict=False)):
        _dots(axis, points, name)
        if number:
            axis.set_yticklabels([])
    if contributions_FG is not None:
        image = _matrix(axes[0, -1], contributions_FG, map_title)
        figure.colorbar(image, ax=axes[0, -1], fraction=0.04, pad=0.02, label="contribution to the coarse latent")
    figure.suptitle(title, fontsize=10, x=0.01, ha="left")
    save_png(figure, path)
