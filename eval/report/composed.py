"""A run's composition in the report: pictures of its maps, measures beside their nulls, and failures by name."""

import math
from dataclasses import dataclass, field
from pathlib import Path

import torch
from torch import Tensor

from hsae.eval import figures
from hsae.eval.core.current import Current
from hsae.eval.harness.targets import model_digest
from hsae.eval.hierarchy import maps
from hsae.eval.hierarchy.composition_file import FILE, read_composition, read_maps
from hsae.eval.hierarchy.composition_result import CompositionResult, Measured, PairResult
from hsae.eval.report.tables import Cell, plain
from hsae.train.model.hierarchical_sae import HierarchicalSAE

MARKDOWN = (
    "participation_ratio", "composition_fvu", "gain_over_best_input", "coverage", "coverage_lift", "or_agreement",
    "probe_top5",
)  # fmt: skip


@dataclass(frozen=True, kw_only=True)
class Picture:
    """An SVG and what to say below it."""

    picture: str
    caption: str


@dataclass(frozen=True, kw_only=True)
class MeasureTable:
    """The measures of one map: lines of a name and cells (value, permuted, z, random, z)."""

    heading: str
    lines: list[tuple[str, list[Cell]]]


@dataclass(frozen=True, kw_only=True)
class Composed:
    """A run's composition."""

    pictures: list[Picture] = field(default_factory=list)
    tables: list[MeasureTable] = field(default_factory=list)
    failures: list[str] = field(default_factory=list)
    unchecked: list[str] = field(default_factory=list)
    """Failures that could not be looked for, and why."""
    missing: list[str] = field(default_factory=list)
    result: CompositionResult | None = None


def composed_of(run_dir: Path, model: HierarchicalSAE | None, current: Current | None = None) -> Composed:
    """What is known of a run; nothing if it has one level. Results of another model or store are left out and named."""
    if model is None or len(model.levels) == 1:
        return Composed()
    content, read = read_composition(run_dir), read_maps(run_dir)
    if content is not None and content.inputs.get("sae") != model_digest(run_dir / "model"):
        content, missing = None, ["composition.json is of another model than the one here; run `hsae eval composition`"]
    elif content is not None and current is not None and (reason := current.why_not(content.inputs)) is not None:
        content, missing = None, [f"composition.json is {reason}; run `hsae eval composition`"]
    else:
        there = "composition.json is damaged" if (run_dir / FILE).is_file() else "no hierarchy measures yet"
        missing = [] if content is not None else [f"{there}; run `hsae eval composition`"]
        if content is not None and read is None:
            missing = ["the maps of composition.json are damaged or missing; run `hsae eval composition`"]
        elif content is not None and content.failures is None:
            missing = ["failures have not been looked for; run `hsae eval composition`"]
    if content is None or read is None:
        read = {f"learned{part.level}": part.contributions for part in model.compositions}
    result = content.result if content is not None else None
    return Composed(
        pictures=[picture for key, part in sorted(read.items(), key=_order) for picture in _pictures(key, part)],
        tables=[_table(pair, name) for pair in (result.pairs if result else []) for name in pair.readings],
        failures=[failure.text for failure in content.failures or ()] if content else [],
        unchecked=[f"{name} ({why})" for name, why in content.unchecked.items()] if content else [],
        missing=missing,
        result=result,
    )


def _order(entry: tuple[str, Tensor]) -> tuple[bool, str]:
    """Learned maps first."""
    return not entry[0].startswith("learned"), entry[0]


def _pictures(key: str, contributions_FG: Tensor) -> list[Picture]:
    """The map as a whole, and its strongest rows as trees."""
    level = int(key.lstrip("abcdefghijklmnopqrstuvwxyz"))
    fitted = key.startswith("fitted")
    ratios = maps.participation_ratio(contributions_FG)
    null = maps.participation_ratio(figures.reference(contributions_FG))
    empty, fine = int((ratios == 0).sum()), contributions_FG.shape[1]
    caption = "Read off the codes by non-negative regression after training. " if fitted else ""
    caption += (
        "Participation ratio: how many fine latents a coarse one is made of (1 is a copy). "
        f"Median {_median(ratios)}; nulls: {_median(null)} for half-normal weights in as many random places, "
        f"about {2 / math.pi * fine:.0f} for dense ones. Columns are ordered by the row they bring most to, so the "
        "diagonal is made by the order; what tells is how many cells a row has beside it."
    )
    if empty:
        caption += f" {empty} of {len(ratios)} coarse latents have an empty row: nothing composes them."
    pictures = [Picture(picture=figures.composition(contributions_FG, level), caption=caption)]
    if bool((contributions_FG > 0).any()):
        trees = (
            "The coarse latents with the largest contributions (not chosen for how they look), and the fine latents "
            "they are made of, by number, with each one’s contribution w · rms(fine) / rms(coarse). A child is a fine "
            "latent that brings at least a tenth of the largest contribution."
        )
        pictures.append(Picture(picture=figures.trees(contributions_FG, level), caption=trees))
    return pictures


def _median(ratios: Tensor) -> str:
    filled = ratios[ratios > 0]
    return f"{float(torch.median(filled)):.1f}" if len(filled) else "undefined"


def _table(pair: PairResult, name: str) -> MeasureTable:
    return MeasureTable(
        heading=f"Level {pair.level} of level {pair.level - 1}, {name} map",
        lines=[(key.replace("_", " "), _cells(entry)) for key, entry in pair.readings[name].measures.items()],
    )


def _cells(entry: Measured) -> list[Cell]:
    """Value with interval; then mean with sd, and z, of each null."""
    interval = "" if entry.low is None or entry.high is None else f"{entry.low:.3g} – {entry.high:.3g}"
    value = "undefined" if entry.value is None else f"{entry.value:.3g}"
    cells = [Cell(value, entry.reason or interval)]
    for null in (entry.nulls.get("permuted"), entry.nulls.get("random")):
        if null is None:
            cells += [Cell("–"), Cell("–")]
        else:
            cells += [Cell(f"{null.mean:.3g}", f"± {null.sd:.2g}"), Cell("–" if null.z is None else f"{null.z:+.1f}")]
    return cells


def markdown(runs: list[tuple[str, Composed]]) -> str:
    """A line for each map of each run: the main measures with z against both nulls; below, the failures.

    Empty if nothing is measured.
    """
    lines = []
    for label, composed in runs:
        for pair in composed.result.pairs if composed.result is not None else []:
            for name, reading in pair.readings.items():
                cells = [_short(reading.measures.get(key)) for key in MARKDOWN]
                lines.append(f"| {plain(label)} · level {pair.level} | {name} | {' | '.join(cells)} |")
    if not lines:
        return ""
    headings = ["run", "map", *(key.replace("_", " ") for key in MARKDOWN)]
    text = [
        "", "## Composition", "", f"| {' | '.join(headings)} |", f"|:--|:--|{'--:|' * len(MARKDOWN)}", *lines, "",
        "In brackets: z against permuted and random maps (– where a null can't differ). A fitted map is read off the "
        "codes by non-negative regression, so runs with and without a learned one compare on it.", "",
    ]  # fmt: skip
    text += [f"- **{plain(label)}**: {plain(failure)}" for label, composed in runs for failure in composed.failures]
    return "\n".join(text).rstrip() + "\n"


def _short(entry: Measured | None) -> str:
    if entry is None or entry.value is None:
        return "undefined"
    scores = [entry.nulls[name].z if name in entry.nulls else None for name in ("permuted", "random")]
    return f"{entry.value:.3g} ({', '.join('–' if z is None else f'{z:+.1f}' for z in scores)})"
