"""What `hsae eval composition` shows of a run: a table of its levels, and one of each map beside its nulls."""

from hsae.eval.harness.estimates import Estimate
from hsae.eval.harness.tables import Cell, Table, interval_cell, spread_cell
from hsae.eval.hierarchy.composition_result import CompositionResult, Measured, PairResult
from hsae.train.model.hierarchical_sae import STRUCTURES


def composition_tables(label: str, result: CompositionResult) -> list[Table]:
    """The tables of one run, with what is undefined or was not measured below them."""
    return [
        _level_table(label, result),
        *(_pair_table(label, pair, name) for pair in result.pairs for name in pair.readings),
    ]


def _level_table(label: str, result: CompositionResult) -> Table:
    worth = "this level and all coarser ones" if STRUCTURES[result.structure].is_nested else "decoded from this level"
    columns = ("level", "latents", "L0", "silent", "EV", "CE score")
    table = Table(f"run {label}: levels; EV and CE score: {worth}", columns)
    for level in reversed(result.levels):
        ce = "no result" if level.ce_loss_score.value is None else _cell(level.ce_loss_score)
        table.add(
            str(level.level),
            str(level.latents),
            _cell(level.l0),
            f"{level.silent:.1%}",
            _cell(level.explained_variance),
            ce,
        )
    for pair in result.pairs:
        table.notes.extend(f"{name} map of level {pair.level}: none, {why}" for name, why in pair.reasons.items())
    return table


def _pair_table(label: str, pair: PairResult, name: str) -> Table:
    levels = f"level {pair.level} ({pair.coarse}) of level {pair.level - 1} ({pair.alive_fine} of {pair.fine} alive)"
    columns = ("measure", "value", "permuted", "z", "random", "z")
    table = Table(f"run {label}: {levels}, {name} map", columns)
    for key, entry in pair.readings[name].measures.items():
        measure = key.replace("_", " ")
        table.add(measure, _cell(entry), *_null_cells(entry, "permuted"), *_null_cells(entry, "random"))
        if entry.reason is not None:
            table.notes.append(f"{measure} is undefined: {entry.reason}")
    return table


def _cell(estimate: Estimate | Measured) -> Cell:
    return interval_cell(estimate.value, estimate.low, estimate.high, digits=None)


def _null_cells(entry: Measured, name: str) -> tuple[Cell, Cell]:
    """Mean and standard deviation of a null's draws, and z."""
    if (null := entry.nulls.get(name)) is None:
        return "", ""
    return spread_cell(null.mean, null.sd), "" if null.z is None else f"{null.z:+.1f}"
