"""The ablation table: every run of a plan over several seeds, each hierarchy number beside its null, and what each component does.

Nothing is computed here: results of core, composition, unlearning and of a synthetic tier are read from where those evaluations wrote them.

A component is judged by two runs that differ in nothing else: it helps or hurts if Welch's t test of their means over seeds says so,
corrected for all comparisons of the table (`ablation_tests`). Below three seeds there is no verdict.

Results of another model, text or store than the plan's have no place in the table; where the evaluation store is not there to tell which
text is the plan's, all must at least be of the same.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from statistics import fmean, stdev
from typing import Any, Literal

from hsae.cache.errors import UserError
from hsae.cache.reading.store import ActivationStore
from hsae.cache.storage.paths import place
from hsae.eval.harness.current import DIGESTS, Current, core_results, inputs_of, same_bits
from hsae.eval.harness.result_files import read_result
from hsae.eval.harness.targets import is_trained, model_digest, whole_view
from hsae.eval.hierarchy.runs import read_composition
from hsae.eval.report.ablation_tests import LEVEL, MANY, MIN_SEEDS, POWER, Comparison, compare
from hsae.eval.unlearning.config import SIDES
from hsae.eval.unlearning.runs import config_digest
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig

BUDGET = "0.01"
"""Loss on retain, in nats a token, at which unlearning is compared."""
UNLEARNED = Path("eval") / "unlearning.json"
TEXT = "models or evaluation texts"
UNLEARNING = ("model", "tokenizer", "hook", "config", *(f"{side}_corpus" for side in SIDES))
"""Inputs that all results of unlearning share."""
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
    seeds: tuple[int, ...] = ()
    """Which seed each value is of."""
    nulls: tuple[float, ...] = ()
    fitted: bool = False
    """Read off a map fitted to the codes, because the run learned none."""

    @property
    def sample(self) -> dict[int, float]:
        """The value of each seed."""
        return dict(zip(self.seeds, self.values, strict=True))

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


Verdict = Literal["helps", "hurts", "no evidence", "no verdict"]


@dataclass(frozen=True, kw_only=True)
class Effect:
    """A component's effect on one number."""

    column: str
    comparison: Comparison
    verdict: Verdict
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
    comparisons: int = 0
    """How many tests were made, which each is corrected for."""
    missing: list[str] = field(default_factory=list)
    """Results that are not there, or of another model, text or store."""

    def json(self) -> dict[str, Any]:
        """JSON-ready content."""
        return {
            "format": 2,
            "plan": self.plan,
            "seeds": self.seeds,
            "test": {"verdict": "welch", "level": LEVEL, "correction": "holm", "comparisons": self.comparisons},
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
    """The table of these runs over seeds; `synthetic` is the content of a tier's results file.

    Raises UserError if a run isn't trained, or if results that would be averaged or compared are of different texts or settings.
    """
    missing: list[str] = []
    current, made = _current(plan), _Made()
    lines = [_line(plan, config, seeds, current, synthetic, missing, made) for config in runs]
    made.check(seeds)
    by_name = {line.name: line for line in lines}
    judged, comparisons = judge(COMPONENTS, by_name)
    return Ablations(
        plan=plan.name, seeds=seeds, lines=lines, judgements=judged, comparisons=comparisons, missing=missing
    )


def _current(plan: Plan) -> Current:
    """What the plan's evaluation store stands for, with its digests if it lies on this machine and is whole."""
    store = None
    if isinstance(place(plan.cache.dir), Path):
        with suppress(UserError):
            store = ActivationStore.of(plan.store("eval"), plan.cache.dir)
    return Current.of(plan.asked("eval"), store)


class _Made:
    """What the results of a table were made of, which must be the same for all."""

    def __init__(self) -> None:
        self.seen: dict[str, dict[str, tuple[str, str]]] = {}
        self.runs: dict[str, dict[int, None]] = {}

    def add(self, kind: str, number: int, label: str, what: str, *values: object) -> None:
        """A result of a run and its inputs of one sort; inputs that it says nothing of are not compared."""
        self.runs.setdefault(kind, {})[number] = None
        if any(value is not None for value in values):
            self.seen.setdefault(what, {}).setdefault(str(values), (kind, label))

    def check(self, seeds: int) -> None:
        """Raise UserError if two results differ, of a table over so many seeds."""
        for what, found in self.seen.items():
            if len(found) > 1:
                (first, one), (kind, other) = list(found.values())[:2]
                commands = (
                    f"hsae eval {each} --run {','.join(map(str, self.runs[each]))} --seeds {seeds} --force"
                    for each in dict.fromkeys((first, kind))
                )
                raise UserError(
                    f"{first} of {one} and {kind} of {other} are of different {what}, so they can't stand in one table; make them "
                    f"alike with: {' and '.join(commands)}"
                )


def _line(
    plan: Plan,
    config: RunConfig,
    seeds: int,
    current: Current,
    synthetic: Mapping[str, Any] | None,
    missing: list[str],
    made: _Made,
) -> Line:
    cells: dict[str, dict[int, Entry]] = {column.key: {} for column in COLUMNS}
    compared: dict[str, dict[int, Entry]] = {column.key: {} for column in COLUMNS}
    for seeded in (plan.seeded(index) for index in range(seeds)):
        run_dir = seeded.run_dir(config)
        if not is_trained(seeded, config):
            raise UserError(
                f"run {seeded.label(config)} has not been trained to its end in {run_dir}; train it with: "
                f"hsae train --run {config.number} --seeds {seeds}"
            )
        number, label, weights = config.number, seeded.label(config), model_digest(run_dir / "model")
        for kind, found in (
            ("core", _core(run_dir, config, weights, current, partial(made.add, "core", number, label))),
            (
                "composition",
                _composition(
                    run_dir, seeded, config, weights, current, partial(made.add, "composition", number, label)
                ),
            ),
            ("unlearning", _unlearning(seeded, run_dir, weights, partial(made.add, "unlearning", number, label))),
        ):
            if found is None:
                if kind != "unlearning" or (run_dir / UNLEARNED).is_file():  # which is measured on some runs only
                    missing.append(f"{kind} of {label}")
                continue
            for key, shown, fitted in found:
                if shown is not None:
                    cells[key][seeded.seed_index] = shown
                if fitted is not None:
                    compared[key][seeded.seed_index] = fitted
    for key, seed, entry in _synthetic(synthetic, config.name):
        cells[key][seed] = compared[key][seed] = entry
    return Line(
        number=config.number,
        name=config.name,
        cells={key: _cell(entries) for key, entries in cells.items()},
        compared={key: _cell(entries) for key, entries in compared.items()},
    )


Entry = tuple[float, float | None, bool]
"""A value, its null, and whether it is of a fitted map."""


def _cell(entries: Mapping[int, Entry]) -> Cell:
    return Cell(
        values=tuple(value for value, _, _ in entries.values()),
        seeds=tuple(entries),
        nulls=tuple(null for _, null, _ in entries.values() if null is not None),
        fitted=any(fitted for _, _, fitted in entries.values()),
    )


Found = list[tuple[str, Entry | None, Entry | None]]


Made = Callable[..., None]
"""Is told what a result was made of: a name for it, and values."""


def _core(run_dir: Path, config: RunConfig, weights: str, current: Current, made: Made) -> Found | None:
    result = core_results(run_dir, weights, current).get(whole_view(config))
    if result is None:
        return None
    made(TEXT, *map(inputs_of(result.hsae).get, DIGESTS))
    entries: Found = []
    for column in COLUMNS:
        if column.kind == "core" and (measure := result.measure(column.key)) is not None:
            entry = None if measure.value is None else (measure.value, None, False)
            entries.append((column.key, entry, entry))
    return entries


def _composition(
    run_dir: Path, plan: Plan, config: RunConfig, weights: str, current: Current, made: Made
) -> Found | None:
    """Hierarchy numbers of the two coarsest levels; none for a flat run."""
    if config.levels == 1:
        return []
    content = read_composition(run_dir)
    if content is None or content["inputs"].get("sae") != weights:
        return None
    inputs = content["inputs"]
    if current.why_not(inputs) is not None:
        return None
    made(TEXT, *map(inputs.get, DIGESTS))
    read_from = (
        "training store" if inputs.get("read_from") in same_bits(plan.asked("train")) else inputs.get("read_from")
    )
    made("texts to read maps on, or settings", read_from, inputs.get("settings"))
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


def _unlearning(plan: Plan, run_dir: Path, weights: str, made: Made) -> Found | None:
    """Loss on the forgotten text at BUDGET, of the run's main arm; of its very model on the plan's very texts, with its settings."""
    try:
        content = read_result(run_dir / UNLEARNED, "hsae eval unlearning")
        inputs = content["inputs"]
        if (
            inputs["sae"] != weights
            or inputs["config"] != config_digest(plan)
            or any(inputs[f"{side}_store"] not in same_bits(plan.asked(side)) for side in SIDES)
        ):
            return None
        arms = content["arms"]
        main = next(name for name in ("descend", "sae", "level1") if name in arms)
        value = arms[main]["at_retain"][BUDGET]["forget_dce"]
        made("texts to forget and retain, or settings", *(inputs[key] for key in UNLEARNING))
    except (OSError, ValueError, KeyError, TypeError, StopIteration):
        return None
    entry = None if value is None else (float(value), None, False)
    return [("forget_dce", entry, entry)]


def _synthetic(content: Mapping[str, Any] | None, name: str) -> list[tuple[str, int, Entry]]:
    rows = (content or {}).get("arms", {}).get(name, {}).get("seeds", ())
    found = []
    for row in rows:
        for column in COLUMNS:
            if column.kind == "synthetic" and isinstance(value := row.get(column.key), float | int):
                null = row.get(f"{column.key}_{column.null}") if column.null else None
                found.append((column.key, int(row["seed"]), (float(value), null, False)))
    return found


# --- judging --------------------------------------------------------------------------------------------------------


def judge(components: Sequence[Component], lines: Mapping[str, Line]) -> tuple[list[Judgement], int]:
    """What each component whose two runs are there does to every number that has a better direction; and how many tests that took.

    Raises ModuleNotFoundError without scipy if a run has MIN_SEEDS or more.
    """
    there = [component for component in components if {component.present, component.absent} <= lines.keys()]
    pairs = {}
    for component in there:
        for other in (component.absent, *component.controls):
            for column in COLUMNS:
                if column.better and other in lines:
                    one, two = (lines[name].compared[column.key] for name in (component.present, other))
                    if one.values and two.values:
                        pairs[component.present, other, column.key] = one.sample, two.sample
    compared = compare(pairs)
    tests = sum(comparison.welch is not None for comparison in compared.values())
    return [_judgement(component, lines, compared) for component in there], tests


def _judgement(
    component: Component, lines: Mapping[str, Line], compared: Mapping[tuple[str, str, str], Comparison]
) -> Judgement:
    effects = []
    for column in COLUMNS:
        comparison = compared.get((component.present, component.absent, column.key))
        if comparison is None:
            continue
        verdict = _verdict(comparison, column)
        unproven: tuple[str, ...] = ()
        if verdict == "helps":
            unproven = tuple(
                name
                for name in component.controls
                if name in lines
                and (
                    (control := compared.get((component.present, name, column.key))) is None
                    or _verdict(control, column) != "helps"
                )
            )
        effects.append(
            Effect(
                column=column.key,
                comparison=comparison,
                verdict="no evidence" if unproven else verdict,
                unproven=unproven,
            )
        )
    sentence = _sentence(component, lines[component.present], lines[component.absent], effects)
    return Judgement(component=component, effects=tuple(effects), sentence=sentence)


def _verdict(comparison: Comparison, column: Column) -> Verdict:
    if comparison.welch is None:
        return "no verdict"
    if comparison.welch.p >= LEVEL:
        return "no evidence"
    return "helps" if comparison.difference * column.better > 0 else "hurts"


def _sentence(component: Component, present: Line, absent: Line, effects: Sequence[Effect]) -> str:
    titles = {column.key: column for column in COLUMNS}
    name = component.name[0].upper() + component.name[1:]
    start = f"{name} (run {present.number} {present.name} against {absent.number} {absent.name})"
    if not effects:
        return f"{start}: nothing to compare."
    clauses = []
    for verdict in ("helps", "hurts"):
        if found := [_found(effect, titles[effect.column]) for effect in effects if effect.verdict == verdict]:
            clauses.append(f"{verdict} {', '.join(found)}")
    for effect in effects:
        if effect.unproven:
            column = titles[effect.column].title
            clauses.append(
                f"is no better than {' and '.join(effect.unproven)} on {column}, so nothing is claimed there"
            )
    open_ = [effect for effect in effects if effect.verdict == "no evidence" and not effect.unproven]
    if open_:
        rest = ", ".join(f"{titles[effect.column].title} (needs {_needed(effect.comparison)})" for effect in open_)
        clauses.append(f"no evidence on {rest}")
    untested: dict[str, list[str]] = {}
    for effect in effects:
        if effect.verdict == "no verdict":
            untested.setdefault(_untested(effect.comparison), []).append(titles[effect.column].title)
    clauses += [f"no verdict on {', '.join(names)} ({reason})" for reason, names in untested.items()]
    return f"{start}: {'; '.join(clauses)}."


def _found(effect: Effect, column: Column) -> str:
    welch, paired = effect.comparison.welch, effect.comparison.paired
    assert welch is not None
    told = f"{effect.comparison.difference:+.{column.digits}f}, t {welch.t:.1f}, df {welch.df:.1f}, {_p(welch.p)}"
    if paired is not None:
        told += f"; paired t {paired.t:.1f}, df {paired.df:.0f}, {_p(paired.p)}"
    return f"{column.title} ({told})"


def _p(value: float) -> str:
    return "p < 0.0001" if value < 1e-4 else f"p {value:.2g}"


def _needed(comparison: Comparison) -> str:
    return f"more than {MANY:,} seeds" if comparison.needs is None else f"{comparison.needs} seeds"


def _untested(comparison: Comparison) -> str:
    if comparison.seeds >= MIN_SEEDS:
        return "no test: neither run varies over seeds"
    number = "one seed: no interval" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    return f"{number}; needs {MIN_SEEDS} seeds or more"


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


def method(table: Ablations) -> str:
    """How the sentences were come by."""
    if not table.comparisons:
        return f"No test was made: a verdict needs {MIN_SEEDS} seeds or more."
    return (
        "Helps and hurts: Welch's t test of the difference between two runs' means over seeds (variances unequal, two-sided; df: its degrees of "
        f"freedom), p below {LEVEL:g}, and below it against every control too. Where both runs have the same seeds, the t test of the differences "
        f"seed by seed (paired) stands beside it. p is corrected by Holm's method for all {table.comparisons} comparisons. needs N seeds: with the "
        f"difference and the variances seen here, N seeds a run would find it with a chance of {POWER:.0%}."
    )


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
        method(table),
        "",
    ]
    if table.missing:
        lines += [f"Not there, or of another model, text or store: {', '.join(table.missing)}.", ""]
    return "\n".join(lines)
