"""What each component does: two runs that differ in nothing else are compared number by number, and a sentence says it.

A component helps or hurts a number if Welch's t test of the two runs' means over seeds says so, corrected for all
comparisons of the table. Below three seeds there is no verdict.
"""

from collections import defaultdict
from collections.abc import Mapping, Sequence

from hsae.eval.ablation.significance import LEVEL, MANY, MIN_SEEDS, Comparison, TTest, compare
from hsae.eval.ablation.table import COLUMNS, Column, Component, Effect, Judgement, Row, Verdict

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
BY_KEY = {column.key: column for column in COLUMNS}
Comparisons = Mapping[tuple[str, str, str], Comparison]
"""(run, other run, column) -> their comparison."""


def judge(components: Sequence[Component], rows: Mapping[str, Row]) -> tuple[list[Judgement], int]:
    """(what each component does whose two runs are among `rows`, given by name; how many tests that took).

    Every number that has a better direction is judged.

    Raises ModuleNotFoundError without scipy if a run has MIN_SEEDS or more.
    """
    judged = [component for component in components if {component.present, component.absent} <= rows.keys()]
    samples = {
        (component.present, other, column.key): (one.sample, two.sample)
        for component in judged
        for other in (component.absent, *component.controls)
        if other in rows
        for column in COLUMNS
        if column.better
        and (one := rows[component.present].compared[column.key]).values
        and (two := rows[other].compared[column.key]).values
    }
    comparisons = compare(samples)
    tests = sum(comparison.welch is not None for comparison in comparisons.values())
    return [_judgement(component, rows, comparisons) for component in judged], tests


def _judgement(component: Component, rows: Mapping[str, Row], comparisons: Comparisons) -> Judgement:
    effects = []
    for column in COLUMNS:
        comparison = comparisons.get((component.present, component.absent, column.key))
        if comparison is None:
            continue
        verdict = _verdict(comparison, column)
        unproven = tuple(
            name
            for name in component.controls
            if verdict == "helps"
            and name in rows
            and _verdict(comparisons.get((component.present, name, column.key)), column) != "helps"
        )
        verdict = "no evidence" if unproven else verdict
        effects.append(Effect(column=column.key, comparison=comparison, verdict=verdict, unproven=unproven))
    sentence = _sentence(component, rows[component.present], rows[component.absent], effects)
    return Judgement(component=component, effects=tuple(effects), sentence=sentence)


def _verdict(comparison: Comparison | None, column: Column) -> Verdict:
    if comparison is None or comparison.welch is None:
        return "no verdict"
    if comparison.welch.p >= LEVEL:
        return "no evidence"
    return "helps" if comparison.difference * column.better > 0 else "hurts"


def _sentence(component: Component, present: Row, absent: Row, effects: Sequence[Effect]) -> str:
    name = component.name[0].upper() + component.name[1:]
    start = f"{name} (run {present.label} against {absent.label})"
    if not effects:
        return f"{start}: nothing to compare."
    clauses = []
    for verdict in ("helps", "hurts"):
        if numbers := [_number(effect) for effect in effects if effect.verdict == verdict]:
            clauses.append(f"{verdict} {', '.join(numbers)}")
    unclear, untested = [], defaultdict(list)
    for effect in effects:
        title = BY_KEY[effect.column].title
        if effect.unproven:
            controls = " and ".join(effect.unproven)
            clauses.append(f"is no better than {controls} on {title}, so nothing is claimed there")
        elif effect.verdict == "no evidence":
            unclear.append(f"{title} (needs {_needed_seeds(effect.comparison)})")
        elif effect.verdict == "no verdict":
            untested[_why_untested(effect.comparison)].append(title)
    if unclear:
        clauses.append(f"no evidence on {', '.join(unclear)}")
    clauses += [f"no verdict on {', '.join(titles)} ({reason})" for reason, titles in untested.items()]
    return f"{start}: {'; '.join(clauses)}."


def _number(effect: Effect) -> str:
    comparison, column = effect.comparison, BY_KEY[effect.column]
    assert comparison.welch is not None
    paired = "" if comparison.paired is None else f"; paired {_test(comparison.paired, 0)}"
    return f"{column.title} ({comparison.difference:+.{column.digits}f}, {_test(comparison.welch, 1)}{paired})"


def _test(test: TTest, digits: int) -> str:
    p = "p < 0.0001" if test.p < 1e-4 else f"p {test.p:.2g}"
    return f"t {test.t:.1f}, df {test.df:.{digits}f}, {p}"


def _needed_seeds(comparison: Comparison) -> str:
    return f"more than {MANY:,} seeds" if comparison.needs is None else f"{comparison.needs} seeds"


def _why_untested(comparison: Comparison) -> str:
    if comparison.seeds >= MIN_SEEDS:
        return "no test: neither run varies over seeds"
    number = "one seed: no interval" if comparison.seeds == 1 else f"{comparison.seeds} seeds"
    return f"{number}; needs {MIN_SEEDS} seeds or more"
