"""Pictures: SVG for pages, in the page's own text colour; PNG for files. Same data, same bytes.

Shapes: F coarse latents, G fine latents.
"""

import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsae.cache.errors import UserError

PALETTE = (
    "#0072b2",
    "#d55e00",
    "#009e73",
    "#cc79a7",
    "#e69f00",
    "#56b4e9",
    "#7f7f7f",
)  # Okabe & Ito: colour-blind safe
TEXT = "#010203"  # replaced by `currentColor` in SVG
MOST_ROWS_DRAWN, MOST_COLUMNS_DRAWN = 64, 160


@dataclass(frozen=True)
class Point:
    """A value with its interval, on a labelled line."""

    label: str
    value: float | None
    low: float | None
    high: float | None


def _pyplot() -> Any:
    try:
        import matplotlib
    except ImportError:
        raise UserError("pictures need matplotlib; run: pip install 'hsae[report]'") from None
    matplotlib.use("Agg")
    from matplotlib import pyplot

    pyplot.rcParams.update(
        {
            "svg.hashsalt": "hsae", "svg.fonttype": "none", "font.family": "sans-serif", "font.size": 9,
            "text.color": TEXT, "axes.labelcolor": TEXT, "axes.edgecolor": TEXT, "xtick.color": TEXT, "ytick.color": TEXT,
            "axes.spines.top": False, "axes.spines.right": False, "axes.titlesize": 9, "axes.titlelocation": "left",
            "legend.frameon": False, "axes.linewidth": 0.6, "figure.constrained_layout.use": True,
        }
    )  # fmt: skip
    return pyplot


def _svg(figure: Any) -> str:
    """The figure as an <svg> element that takes the page's text colour; the figure is closed."""
    buffer = io.StringIO()
    figure.savefig(buffer, format="svg", transparent=True, metadata={"Date": None, "Creator": None})
    _pyplot().close(figure)
    text = buffer.getvalue()
    return text[text.index("<svg") :].replace(TEXT, "currentColor")


def _dots(axis: Any, points: Sequence[Point], title: str) -> None:
    for place, point in enumerate(reversed(points)):
        if point.value is None:
            axis.text(0.02, place, "undefined", transform=axis.get_yaxis_transform(), va="center", fontsize=7)
            continue
        if point.low is not None and point.high is not None:
            axis.plot([point.low, point.high], [place, place], color=PALETTE[0], linewidth=1.5, alpha=0.5)
        axis.plot([point.value], [place], "o", color=PALETTE[0], markersize=4)
    axis.set_yticks(range(len(points)), [point.label for point in reversed(points)])
    axis.set_ylim(-0.6, len(points) - 0.4)
    axis.set_title(title)
    axis.grid(axis="x", linewidth=0.3, alpha=0.5)


def comparison(panels: Mapping[str, Sequence[Point]]) -> str:
    """One panel a metric, one line a view, dots with 95 % intervals. SVG."""
    pyplot = _pyplot()
    lines = max((len(points) for points in panels.values()), default=1)
    figure, axes = pyplot.subplots(1, len(panels), figsize=(9, 0.6 + 0.22 * lines), sharey=True, squeeze=False)
    for axis, (title, points) in zip(axes[0], panels.items(), strict=True):
        _dots(axis, points, title)
    return _svg(figure)


def training_curves(lines: Sequence[dict[str, Any]]) -> str:
    """Loss, explained variance, L0 and dead share of each level over tokens, the curriculum's stages shaded. SVG."""
    pyplot = _pyplot()
    metrics = [line for line in lines if line["kind"] == "metrics"]
    tokens = [line["tokens"] / 1e3 for line in metrics]
    figure, axes = pyplot.subplots(2, 2, figsize=(9, 4.2), sharex=True)
    axes[0, 0].plot(tokens, [line["loss"] for line in metrics], color=PALETTE[6], linewidth=1.2)
    axes[0, 0].set_title("loss")
    for axis, key, title in (
        (axes[0, 1], "level_explained_variance", "explained variance of the residual, levels ≥ l"),
        (axes[1, 0], "l0", "L0: active latents per token"),
        (axes[1, 1], "dead", "share of dead latents"),
    ):
        for level in range(len(metrics[0][key])):
            values = [line[key][level] for line in metrics]
            axis.plot(tokens, [float("nan") if value is None else value for value in values], color=PALETTE[level],
                      linewidth=1.2, label=f"level {level + 1}")  # fmt: skip
        axis.set_title(title)
    axes[1, 1].set_ylim(-0.02, 1.02)
    if len(metrics[0]["l0"]) > 1:
        axes[0, 1].legend(fontsize=8)
    per_step = metrics[0]["tokens"] / metrics[0]["step"] / 1e3
    starts = [(line["step"] * per_step, line["stage"]) for line in lines if line["kind"] == "stage"]
    ends = [start for start, _ in starts[1:]] + [tokens[-1]]
    for axis in axes.flat:
        for number, ((start, _), end) in enumerate(zip(starts, ends, strict=True)):
            if number % 2:
                axis.axvspan(start, end, color=PALETTE[6], alpha=0.12, linewidth=0)
        axis.grid(linewidth=0.3, alpha=0.4)
    if len(starts) > 1:
        for number, ((start, _), end) in enumerate(zip(starts, ends, strict=True), 1):
            axes[0, 0].text(
                (start + end) / 2, 0.98, str(number), transform=axes[0, 0].get_xaxis_transform(), ha="center", va="top"
            )
    for axis in axes[1]:
        axis.set_xlabel("thousand tokens")
    return _svg(figure)


def participation_ratio(contributions_FG: Tensor) -> Tensor:
    """(sum |C|)^2 / sum C^2 of each row, [F]: the number of fine latents a coarse one is made of; 1 is a copy, 0 an empty row."""
    absolute = contributions_FG.abs()
    return absolute.sum(1).square() / absolute.square().sum(1).clamp_min(1e-30)


def permuted(contributions_FG: Tensor) -> Tensor:
    """The same entries in random places (fixed seed): a map with equal weights and no structure."""
    generator = torch.Generator().manual_seed(0)
    flat = contributions_FG.flatten()
    return flat[torch.randperm(len(flat), generator=generator)].view_as(contributions_FG)


def drawn_part(contributions_FG: Tensor) -> Tensor:
    """The strongest rows, and the columns that matter to them, ordered so that what a row is made of lies on a diagonal."""
    rows = contributions_FG.square().sum(1).topk(min(MOST_ROWS_DRAWN, len(contributions_FG))).indices
    part = contributions_FG[rows]
    columns = part.amax(0).topk(min(MOST_COLUMNS_DRAWN, part.shape[1])).indices
    part = part[:, columns]
    order = sorted(
        range(part.shape[1]), key=lambda column: (int(part[:, column].argmax()), -float(part[:, column].max()))
    )
    return part[:, order]


def _matrix(axis: Any, contributions_FG: Tensor, title: str) -> Any:
    part = drawn_part(contributions_FG)
    image = axis.imshow(
        part.numpy(), aspect="auto", cmap="Blues", vmin=0, vmax=max(1e-9, float(part.max())), interpolation="nearest"
    )
    axis.set_title(title)
    axis.set_xlabel(f"fine latents (the {part.shape[1]} strongest of {contributions_FG.shape[1]})")
    axis.set_ylabel(f"coarse latents ({part.shape[0]} of {contributions_FG.shape[0]})")
    axis.set_xticks([])
    axis.set_yticks([])
    return image


def composition(contributions_FG: Tensor, level: int) -> str:
    """The map W between two levels, and how many fine latents each coarse one is made of beside the permuted map. SVG."""
    pyplot = _pyplot()
    figure, (left, right) = pyplot.subplots(1, 2, figsize=(9, 3.4), width_ratios=(2, 1))
    image = _matrix(left, contributions_FG, f"contributions to level {level}: w·rms(fine) / rms(coarse)")
    figure.colorbar(image, ax=left, fraction=0.03, pad=0.01)
    ratios, null = participation_ratio(contributions_FG), participation_ratio(permuted(contributions_FG))
    top = max(2.0, float(torch.cat([ratios, null]).quantile(0.99)))
    bins = torch.linspace(0, top, 30).tolist()
    right.hist(ratios.clamp_max(top).numpy(), bins=bins, color=PALETTE[0], alpha=0.8, label="learned")
    right.hist(
        null.clamp_max(top).numpy(),
        bins=bins,
        histtype="step",
        color=PALETTE[1],
        linewidth=1.3,
        label="permuted W (null)",
    )
    right.set_title("participation ratio")
    right.set_xlabel("fine latents per coarse latent")
    right.set_ylabel("coarse latents")
    right.legend(fontsize=8)
    return _svg(figure)


def summary_png(path: Path, panels: Mapping[str, Sequence[Point]], contributions_FG: Tensor | None, title: str) -> None:
    """One picture for a README: the comparison, and a composition map if there is one."""
    pyplot = _pyplot()
    lines = max((len(points) for points in panels.values()), default=1)
    count = len(panels) + (contributions_FG is not None)
    widths = [*(1.0,) * len(panels), *((1.6,) if contributions_FG is not None else ())]
    figure, axes = pyplot.subplots(
        1, count, figsize=(12, max(3.6, 0.8 + 0.25 * lines)), width_ratios=widths, squeeze=False, facecolor="white"
    )
    for number, (axis, (name, points)) in enumerate(zip(axes[0], panels.items(), strict=False)):
        _dots(axis, points, name)
        if number:
            axis.set_yticklabels([])
    if contributions_FG is not None:
        image = _matrix(axes[0, -1], contributions_FG, "how coarse latents are composed of fine ones")
        figure.colorbar(image, ax=axes[0, -1], fraction=0.04, pad=0.02)
    figure.suptitle(title, fontsize=10)
    figure.savefig(path, dpi=130, metadata={"Software": None})
    pyplot.close(figure)
