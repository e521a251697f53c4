"""The report's tables: which numbers stand beside each other, as text, and what may be called best."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from hsae.eval import figures
from hsae.eval.core.core_result import CoreResult
from hsae.eval.harness.estimates import Estimate
from hsae.train.model.hierarchical_sae import STRUCTURES

COLUMNS = (  # key of a measure, heading, digits, whether more is better (None: neither)
    ("explained_variance", "explained variance", 3, True),
    ("ce_loss_score", "CE score", 3, True),
    ("kl_div_score", "KL score", 3, True),
    ("cossim", "cosine", 3, None),
    ("l0", "L0", 1, None),
)
SAEBENCH_COLUMNS = (
    ("ce_loss_score", "CE score"), ("ce_loss_with_sae", "CE with SAE"), ("ce_loss_without_sae", "CE clean"),
    ("ce_loss_with_ablation", "CE ablated"), ("kl_div_score", "KL score"), ("explained_variance", "EV"),
    ("explained_variance_legacy", "EV (legacy)"), ("cossim", "cosine"), ("l2_ratio", "L2 ratio"), ("mse", "mse"),
    ("l0", "L0"), ("frac_alive", "alive"),
)  # fmt: skip
PANELS = ("explained_variance", "ce_loss_score")
ONE_TEXT = ("model", "tokenizer", "corpus", "exclude_special_tokens", "store")  # inputs that rows of one table share
LOG_LINES = 5  # at the end of a training log, for "at the end of training"


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the tables: one view of one run, or a result that was read from elsewhere."""

    run: str
    """`3 full`, or the release name of a result from elsewhere."""
    view: str
    """`sae`, `level1`, ...; empty for results from elsewhere."""
    latents: int | None
    result: CoreResult
    notes: list[str]

    @property
    def whole(self) -> bool:
        """Whether this is a model as a whole rather than one of its levels."""
        return self.view in ("", "sae")

    @property
    def corrected(self) -> bool:
        """Whether hsae made the result, so that it has corrected measures."""
        return bool(self.result.hsae)

    @property
    def label(self) -> str:
        """Run and view: `3 full`, `3 full · level 1`."""
        return self.run if self.whole else f"{self.run} · {self.view.replace('level', 'level ')}"


@dataclass(frozen=True)
class Cell:
    """A number of a table, as text."""

    text: str
    small: str = ""
    best: bool = False


@dataclass(frozen=True, kw_only=True)
class LevelLine:
    """What one level of a run is worth."""

    level: int
    latents: int
    cells: list[Cell]


def number(value: float | None, digits: int = 4) -> str:
    """A number in so many significant digits; `undefined` for None, which SAEBench's files write as -1."""
    return "undefined" if value is None else f"{value:.{digits}g}"


def percent(share: float) -> str:
    """`98.4 %`."""
    return f"{100 * share:.1f} %"


def _measured(measure: Estimate | None, digits: int, best: bool = False) -> Cell | None:
    if measure is None or measure.value is None:
        return None
    interval = "" if measure.low is None else f"{measure.low:.{digits}f} – {measure.high:.{digits}f}"
    return Cell(f"{measure.value:.{digits}f}", interval, best)


def _cell(row: Row, key: str, digits: int, best: bool) -> Cell:
    """A corrected measure, never SAEBench's number of the same name; the cosine is SAEBench's; or why there is none."""
    if key == "cossim":
        known = row.result.metric(key)
        return Cell("undefined" if known is None else f"{known:.{digits}f}")
    measure = row.result.measure(key)
    return _measured(measure, digits, best) or Cell("not recorded" if measure is None else "undefined")


def alive(result: CoreResult) -> Cell:
    """Share of latents that fired at all."""
    dead = result.measure("dead_fraction")
    share = result.metric("frac_alive") if dead is None or dead.value is None else 1 - dead.value
    return Cell("0 %" if result.dead else "not recorded" if share is None else percent(share))


def results(rows: Sequence[Row]) -> list[tuple[Row, list[Cell]]]:
    """One line a row: corrected measures with intervals; the best is marked if its interval is clear of all others."""
    best = {key: _clear_winner(rows, key) for key, _, _, higher in COLUMNS if higher}
    return [
        (row, [*(_cell(row, key, digits, best.get(key) is row) for key, _, digits, _ in COLUMNS), alive(row.result)])
        for row in rows
    ]


def one_text(rows: Sequence[Row]) -> bool:
    """Whether all of hsae's own results are of one evaluation store in one state, so that intervals can be compared."""
    every = [row.result.inputs for row in rows if row.corrected]
    return len({tuple(str(inputs.get(key)) for key in ONE_TEXT) for inputs in every}) <= 1


def _clear_winner(rows: Sequence[Row], key: str) -> Row | None:
    measured = [(row, row.result.measure(key)) for row in rows]
    known = [(m.low, m.high, row) for row, m in measured if m is not None and m.low is not None and m.high is not None]
    if len(known) < 2 or not one_text(rows):
        return None
    top = max(known, key=lambda entry: entry[0])
    return top[2] if all(top[0] > high for _, high, row in known if row is not top[2]) else None


def panels(rows: Sequence[Row]) -> dict[str, list[figures.Point]]:
    """What the dot plots show."""
    headings = {key: heading for key, heading, _, _ in COLUMNS}
    return {headings[key]: [_point(row, row.result.measure(key) or Estimate(None)) for row in rows] for key in PANELS}


def _point(row: Row, measure: Estimate) -> figures.Point:
    return figures.Point(row.label, measure.value, measure.low, measure.high, row.whole)


def levels(
    rows: Sequence[Row], structure: str, widths: Sequence[int], log: Sequence[dict[str, Any]]
) -> list[LevelLine]:
    """The value of each level, coarsest first: what levels >= l explain, in evaluation and at the end of training.

    A view that reads exactly levels >= l is needed: all levels together, the coarsest alone, each level of a stack.
    """
    by_view = {row.view: row.result for row in rows}
    last = [line for line in log if line["kind"] == "metrics"][-LOG_LINES:]
    lines = []
    for level in range(len(widths), 0, -1):
        from_here = by_view.get(STRUCTURES[structure].view_from(level, len(widths)))
        own = by_view.get(f"level{level}")
        ends = [line["level_explained_variance"][level - 1] for line in last]
        trained = [value for value in ends if value is not None]
        none = Cell("not evaluated")
        cells = [
            (_measured(own.measure("l0"), 1) or none) if own else none,
            alive(own) if own else none,
            (_measured(from_here.measure("explained_variance"), 3) or none) if from_here else none,
            (_measured(from_here.measure("ce_loss_score"), 3) or none) if from_here else none,
            Cell(f"{sum(trained) / len(trained):.3f}" if trained else "not recorded"),
        ]
        lines.append(LevelLine(level=level, latents=widths[level - 1], cells=cells))
    return lines


def saebench(rows: Sequence[Row]) -> list[tuple[Row, list[str]]]:
    """One line a row: SAEBench's own numbers, as its files have them."""
    return [(row, [number(row.result.metric(key)) for key, _ in SAEBENCH_COLUMNS]) for row in rows]


def markdown(title: str, rows: Sequence[Row], left_out: Sequence[tuple[str, str]] = ()) -> str:
    """The results as Markdown: a table of corrected measures and, of results from elsewhere, one of SAEBench's.

    `left_out` are runs and why a result of theirs is not in it.
    """
    lines = [f"# {plain(title)}", ""]
    if own := [row for row in rows if row.corrected]:
        lines += _header(["SAE", "latents", *(heading for _, heading, _, _ in COLUMNS), "alive"])
        for row, cells in results(own):
            texts = [_bold(cell) + (f" ({cell.small})" if cell.small else "") for cell in cells]
            lines.append(_line([_name(row), str(row.latents or "?"), *texts]))
        lines += [
            "",
            "In brackets: 95 % bootstrap intervals over rows. CE and KL scores: 1 is the clean model, 0 a zeroed "
            "residual. Cosine is SAEBench's. “undefined” is what SAEBench's files write as -1: 0/0, no value.",
            "",
        ]
        if not one_text(own):
            lines += ["**These results are of different stores or settings; they can't be compared.**", ""]
    if len(own) < len(rows):
        lines += ["## SAEBench's own numbers", ""]
        lines += _header(["SAE", "latents", *(heading for _, heading in SAEBENCH_COLUMNS)])
        lines += [_line([_name(row), str(row.latents or "?"), *texts]) for row, texts in saebench(rows)]
        lines += ["", "As SAEBench computes them, losses in nats; its EV is not the explained variance above.", ""]
    for row in rows:
        lines += [f"- **{plain(row.label)}**: {plain(note)}" for note in row.notes]
    lines += [f"- **{plain(run)}**: {plain(text)}" for run, text in left_out]
    return "\n".join(lines).rstrip() + "\n"


def _name(row: Row) -> str:
    return plain(row.label) + (" (dead)" if row.result.dead else "")


def _header(headings: Sequence[str]) -> list[str]:
    return [_line(headings), f"|:--|{'--:|' * (len(headings) - 1)}"]


def _line(cells: Sequence[str]) -> str:
    return f"| {' | '.join(cells)} |"


def _bold(cell: Cell) -> str:
    return f"**{cell.text}**" if cell.best else cell.text


def plain(text: str) -> str:
    """Text that Markdown shows as it is, on one line and without becoming HTML."""
    for mark in "\\|<`*[":
        text = text.replace(mark, "\\" + mark)
    return " ".join(text.split())
