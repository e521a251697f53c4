"""The ablation table: every run of a plan over several seeds, each hierarchy number beside its null, and what each component does.

Nothing is computed here: results of core, composition, unlearning and of a synthetic tier are read from where those evaluations wrote them.

A component is judged by two runs that differ in nothing else. z = (difference of the means over seeds) / its standard error; beyond 3 the
component helps or hurts, else there is no evidence. With three seeds the standard errors are themselves rough: |z| > 3 happens by
chance in about 4 % of comparisons (t with 4 degrees of freedom), so a single one of many is a hint and no more.
"""

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from hsae.cache.errors import UserError
from hsae.eval.core.schema import read_core
from hsae.eval.core.targets import RESULTS, is_trained, model_digest, whole_view
from hsae.eval.hierarchy.runs import read_composition
from hsae.train.config import RunConfig
from hsae.train.plan import Plan

SIGMA = 3.0
BUDGET = "0.01"
"""Loss on retain, in nats a token, at which unlearning is compared."""
Kind = Literal["core", "composition", "synthetic", "unlearning"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of the table."""

    key: str
    title: str
    kind: Kind
    better: int
    """1 if more is better, -1 if less is, 0 if neither."""
    digits: int = 3
    null: str | None = None
    """Which null stands beside it."""


COLUMNS = (
    Column(key="explained_variance", title="EV", kind="core", better=1),
    Column(key="ce_loss_score", title="CE score", kind="core", better=1),
    Column(key="l0", title="L0", kind="core", better=0, digits=1),
    Column(key="composition_fvu", title="FVU", kind="composition", better=-1, null="permuted"),
    Column(key="gain_over_best_input", title="gain", kind="composition", better=1, null="permuted"),
    Column(key="participation_ratio", title="PR", kind="composition", better=0, digits=1, null="random"),
    Column(key="or_agreement", title="OR", kind="composition", better=1, null="permuted"),
    Column(key="coverage_lift", title="lift", kind="composition", better=1, digits=2, null="permuted"),
    Column(key="probe_top5", title="probe", kind="composition", better=1, null="permuted"),
    Column(key="parent_f1", title="parent F1", kind="synthetic", better=1),
    Column(key="absorption", title="absorbed", kind="synthetic", better=-1),
    Column(key="edge_f1", title="edge F1", kind="synthetic", better=1, null="permuted"),
    Column(key="forget_dce", title="forget dCE", kind="unlearning", better=1),
)


@dataclass(frozen=True, kw_only=True)
class Component:
    """What two runs differ in."""

    name: str
    present: str
    """Name of the run that has it."""
    absent: str
    """Name of the run without it."""
    controls: tuple[str, ...] = ()
    """Runs that `present` must beat as well before a claim is made."""


COMPONENTS = (
    Component(name="composition loss", present="full", absent="no-composition", controls=("frozen-w", "probe-w")),
    Component(name="curriculum", present="full", absent="no-curriculum"),
    Component(name="coarse-first order", present="full", absent="fine-first"),
    Component(name="L1 on W", present="full", absent="no-l1"),
    Component(name="level 1 learning with W", present="full", absent="fine-frozen"),
    Component(name="curriculum of a stack", present="stacked-curriculum", absent="stacked"),
    Component(name="normalised composition in a stack", present="stacked-curriculum", absent="literal"),
    Component(name="hierarchy over flat BatchTopK", present="full", absent="batchtopk"),
    Component(name="hierarchy over Matryoshka", present="full", absent="matryoshka"),
)


@dataclass(frozen=True, kw_only=True)
class Cell:
    """One number of one run over seeds."""

    values: tuple[float, ...] = ()
    nulls: tuple[float, ...] = ()
    fitted: bool = False
    """Read off a map fitted to the codes, because the run learned none."""

    @property
    def mean(self) -> float | None:
        """None without values."""
        return fmean(self.values) if self.values else None

    @property
    def sd(self) -> float | None:
        """Standard deviation over seeds (n - 1); None below two."""
        return stdev(self.values) if len(self.values) > 1 else None

    @property
    def null(self) -> float | None:
        """Mean of the nulls."""
        return fmean(self.nulls) if self.nulls else None


@dataclass(frozen=True, kw_only=True)
class Line:
    """One run of the table."""

    number: int
    name: str
    cells: dict[str, Cell]
    compared: dict[str, Cell]
    """What runs are compared by: as `cells`, but hierarchy numbers always of the fitted map, which every run has."""


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A component's effect on one number."""

    column: str
    difference: float
    z: float | None
    """None if neither run varies over seeds."""
    verdict: Literal["helps", "hurts", "no evidence"]
    unproven: tuple[str, ...] = ()
    """Controls that the run with the component does not beat, though it beats the one without."""


@dataclass(frozen=True, kw_only=True)
class Judgement:
    """A component's effects and a plain sentence."""

    component: Component
    effects: tuple[Effect, ...]
    sentence: str


@dataclass(frozen=True, kw_only=True)
class Ablations:
    """The whole table."""

    plan: str
    seeds: int
    lines: list[Line]
    judgements: list[Judgement]
    missing: list[str] = field(default_factory=list)
    """Results that are not there."""

    def json(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {
            "format": 1,
            "plan": self.plan,
            "seeds": self.seeds,
            "sigma": SIGMA,
            "runs": [
                {
                    "number": line.number,
                    "name": line.name,
                    "measures": {key: _cell_json(cell) for key, cell in line.cells.items()},
                    "compared": {key: _cell_json(cell) for key, cell in line.compared.items()},
                }
                for line in self.lines
            ],
            "components": [asdict(judgement) for judgement in self.judgements],
            "missing": self.missing,
        }


def _cell_json(cell: Cell) -> dict[str, Any]:
    return {**asdict(cell), "mean": cell.mean, "sd": cell.sd, "null": cell.null}


# --- reading results ------------------------------------------------------------------------------------------------


def collect(plan: Plan, runs: Sequence[RunConfig], seeds: int, synthetic: Mapping[str, Any] | None) -> Ablations:
    """The table of these runs over seeds; `synthetic` is the content of a tier's results file. Raises UserError if a run isn't trained."""
    missing: list[str] = []
    lines = [_line(plan, config, seeds, synthetic, missing) for config in runs]
    by_name = {line.name: line for line in lines}
    judged = [
        judge(component, by_name) for component in COMPONENTS if {component.present, component.absent} <= by_name.keys()
    ]
    return Ablations(plan=plan.name, seeds=seeds, lines=lines, judgements=judged, missing=missing)


def _line(plan: Plan, config: RunConfig, seeds: int, synthetic: Mapping[str, Any] | None, missing: list[str]) -> Line:
    cells: dict[str, list[tuple[float, float | None, bool]]] = {column.key: [] for column in COLUMNS}
    compared: dict[str, list[tuple[float, float | None, bool]]] = {column.key: [] for column in COLUMNS}
    for seeded in (plan.seeded(index) for index in range(seeds)):
        run_dir = seeded.run_dir(config)
        if not is_trained(seeded, config):
            raise UserError(
                f"run {seeded.label(config)} has not been trained to its end in {run_dir}; train it with: "
                f"hsae train --run {config.number} --seeds {seeds}"
            )
        for kind, found in (
            ("core", _core(run_dir, config)),
            ("composition", _composition(run_dir, config)),
            ("unlearning", _unlearning(run_dir)),
        ):
            if found is None:
                if kind != "unlearning":  # measured on some runs only: its cells are empty for the others
                    missing.append(f"{kind} of {seeded.label(config)}")
                continue
            for key, shown, fitted in found:
                cells[key] += [shown] if shown is not None else []
                compared[key] += [fitted] if fitted is not None else []
    for key, entry in _synthetic(synthetic, config.name):
        cells[key].append(entry)
        compared[key].append(entry)
    return Line(
        number=config.number,
        name=config.name,
        cells={key: _cell(entries) for key, entries in cells.items()},
        compared={key: _cell(entries) for key, entries in compared.items()},
    )


Entry = tuple[float, float | None, bool]


def _cell(entries: Sequence[Entry]) -> Cell:
    return Cell(
        values=tuple(value for value, _, _ in entries),
        nulls=tuple(null for _, null, _ in entries if null is not None),
        fitted=any(fitted for _, _, fitted in entries),
    )


Found = list[tuple[str, Entry | None, Entry | None]]


def _core(run_dir: Path, config: RunConfig) -> Found | None:
    digest, view = model_digest(run_dir / "model"), whole_view(config)
    for path in sorted((run_dir / RESULTS / "core").glob("*_eval_results.json")):
        try:
            result = read_core(path)
        except UserError:
            continue
        if result.name == view and ((result.hsae or {}).get("inputs") or {}).get("sae") == digest:
            entries: Found = []
            for column in COLUMNS:
                if column.kind == "core" and (measure := result.measure(column.key)) is not None:
                    entry = None if measure.value is None else (measure.value, None, False)
                    entries.append((column.key, entry, entry))
            return entries
    return None


def _composition(run_dir: Path, config: RunConfig) -> Found | None:
    """Hierarchy numbers of the two coarsest levels; none for a flat run."""
    if config.levels == 1:
        return []
    content = read_composition(run_dir)
    if content is None or content["inputs"]["sae"] != model_digest(run_dir / "model"):
        return None
    readings = content["parsed"].pairs[-1].readings
    found: Found = []
    for column in COLUMNS:
        if column.kind == "composition":
            entries: dict[str, Entry] = {}
            for name, reading in readings.items():
                measured = reading.measures.get(column.key)
                if measured is not None and measured.value is not None:
                    null = measured.nulls.get(column.null or "")
                    entries[name] = (measured.value, None if null is None else null.mean, name == "fitted")
            found.append((column.key, entries.get("learned", entries.get("fitted")), entries.get("fitted")))
    return found


def _unlearning(run_dir: Path) -> Found | None:
    """Loss on the forgotten text at BUDGET, of the run's main arm."""
    try:
        content = json.loads((run_dir / "eval" / "unlearning.json").read_text())
        arms = content["arms"]
        main = next(name for name in ("descend", "sae", "level1") if name in arms)
        value = arms[main]["at_retain"][BUDGET]["forget_dce"]
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    entry = None if value is None else (float(value), None, False)
    return [("forget_dce", entry, entry)]


def _synthetic(content: Mapping[str, Any] | None, name: str) -> list[tuple[str, Entry]]:
    rows = (content or {}).get("arms", {}).get(name, {}).get("seeds", ())
    found = []
    for row in rows:
        for column in COLUMNS:
            if column.kind == "synthetic" and isinstance(value := row.get(column.key), float | int):
                null = row.get(f"{column.key}_{column.null}") if column.null else None
                found.append((column.key, (float(value), null, False)))
    return found


# --- judging --------------------------------------------------------------------------------------------------------


def z_score(one: Cell, other: Cell) -> float | None:
    """Difference of two means in standard errors; None below two seeds each, or if neither varies."""
    if one.mean is None or other.mean is None or one.sd is None or other.sd is None:
        return None
    error = math.sqrt(one.sd**2 / len(one.values) + other.sd**2 / len(other.values))
    return (one.mean - other.mean) / error if error > 0 else None


def judge(component: Component, lines: Mapping[str, Line]) -> Judgement:
    """What the component does to every number that has a better direction."""
    present, absent = lines[component.present], lines[component.absent]
    effects = []
    for column in COLUMNS:
        one, other = present.compared[column.key], absent.compared[column.key]
        if column.better == 0 or one.mean is None or other.mean is None:
            continue
        z = z_score(one, other)
        verdict: Literal["helps", "hurts", "no evidence"] = "no evidence"
        if z is not None and abs(z) > SIGMA:
            verdict = "helps" if z * column.better > 0 else "hurts"
        unproven: tuple[str, ...] = ()
        if verdict == "helps":
            unproven = tuple(
                name
                for name in component.controls
                if name in lines and not _beats(one, lines[name].compared[column.key], column.better)
            )
            verdict = "no evidence" if unproven else "helps"
        effects.append(
            Effect(column=column.key, difference=one.mean - other.mean, z=z, verdict=verdict, unproven=unproven)
        )
    return Judgement(
        component=component, effects=tuple(effects), sentence=_sentence(component, present, absent, effects)
    )


def _beats(one: Cell, other: Cell, better: int) -> bool:
    z = z_score(one, other)
    return z is not None and z * better > SIGMA


def _sentence(component: Component, present: Line, absent: Line, effects: Sequence[Effect]) -> str:
    titles = {column.key: column for column in COLUMNS}

    def listed(verdict: str) -> str:
        parts = []
        for effect in effects:
            if effect.verdict == verdict:
                column = titles[effect.column]
                parts.append(f"{column.title} ({effect.difference:+.{column.digits}f}, {abs(effect.z or 0):.1f} σ)")
        return ", ".join(parts)

    name = component.name[0].upper() + component.name[1:]
    start = f"{name} (run {present.number} {present.name} against {absent.number} {absent.name})"
    if not effects:
        return f"{start}: nothing to compare."
    clauses = [f"{verdict} {text}" for verdict in ("helps", "hurts") if (text := listed(verdict))]
    unproven = [effect for effect in effects if effect.unproven]
    for effect in unproven:
        clauses.append(
            f"is no better than {' and '.join(effect.unproven)} on {titles[effect.column].title}, so nothing is claimed there"
        )
    rest = [
        titles[effect.column].title for effect in effects if effect.verdict == "no evidence" and not effect.unproven
    ]
    if not clauses:
        return f"{start}: no evidence at {SIGMA:g} σ for any effect ({', '.join(rest)})."
    tail = f"; no evidence on {', '.join(rest)}" if rest else ""
    return f"{start}: {'; '.join(clauses)}{tail}."


# --- writing --------------------------------------------------------------------------------------------------------


def shown_columns(table: Ablations) -> list[Column]:
    """The columns in which some run has a number."""
    return [column for column in COLUMNS if any(line.cells[column.key].values for line in table.lines)]


def text(cell: Cell, column: Column) -> str:
    """A cell as people read it: mean ± standard deviation [null]; * says that the map was fitted."""
    if cell.mean is None:
        return ""
    parts = f"{cell.mean:.{column.digits}f}"
    if cell.sd is not None:
        parts += f" ± {cell.sd:.{column.digits}f}"
    if cell.null is not None:
        parts += f" [{cell.null:.{column.digits}f}]"
    return parts + ("*" if cell.fitted and column.kind == "composition" else "")


def markdown(table: Ablations) -> str:
    """The table and a sentence per component."""
    columns = shown_columns(table)
    head = ["run", *(column.title for column in columns)]
    rows = [
        [f"{line.number} {line.name}", *(text(line.cells[column.key], column) for column in columns)]
        for line in table.lines
    ]
    lines = [f"# Ablations of plan {table.plan}", ""]
    lines += [f"| {' | '.join(row)} |" for row in (head, [":--", *["--:"] * len(columns)], *rows)]
    lines += [
        "",
        f"Mean ± standard deviation over {table.seeds} seeds (synthetic numbers over theirs); in brackets the same number of a "
        "map without structure; * of a map fitted to the codes, since the run learned none. Components are compared on fitted maps.",
        "",
        *(f"* {judgement.sentence}" for judgement in table.judgements),
        "",
    ]
    if table.missing:
        lines += [f"Not there: {', '.join(table.missing)}.", ""]
    return "\n".join(lines)
