"""The ablation table: every run over several seeds, each hierarchy number beside its null; as data and Markdown."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from statistics import fmean, stdev
from typing import Any, Literal

from hsae.eval.ablation.significance import LEVEL, MIN_SEEDS, POWER, Comparison

Kind = Literal["core", "composition", "synthetic", "unlearning"]
Verdict = Literal["helps", "hurts", "no evidence", "no verdict"]


@dataclass(frozen=True, kw_only=True)
class Column:
    """One number of the table."""

    key: str
    title: str
    kind: Kind
    """The evaluation that it is of."""
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

    def text(self, column: Column) -> str:
        """As people read it: mean ± standard deviation [null]; * says that the map was fitted."""
        if self.mean is None:
            return ""
        spread = "" if self.sd is None else f" ± {self.sd:.{column.digits}f}"
        null = "" if self.null is None else f" [{self.null:.{column.digits}f}]"
        return f"{self.mean:.{column.digits}f}{spread}{null}{'*' * self.fitted}"

    def to_dict(self) -> dict[str, Any]:
        """As ablations.json has it."""
        return {**asdict(self), "mean": self.mean, "sd": self.sd, "null": self.null}


@dataclass(frozen=True, kw_only=True)
class Row:
    """One run of the table."""

    number: int
    name: str
    cells: Mapping[str, Cell]
    compared: Mapping[str, Cell]
    """What runs are compared by: as `cells`, but hierarchy numbers always of the fitted map, which every run has."""

    @property
    def label(self) -> str:
        """`3 full`."""
        return f"{self.number} {self.name}"


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
class AblationTable:
    """The whole table."""

    plan: str
    seeds: int
    rows: list[Row]
    judgements: list[Judgement]
    comparisons: int = 0
    """How many tests were made, which each is corrected for."""
    missing: list[str] = field(default_factory=list)
    """Results that are not there, or of another model, text or store."""

    @property
    def columns(self) -> list[Column]:
        """Those in which some run has a number."""
        return [column for column in COLUMNS if any(row.cells[column.key].values for row in self.rows)]

    @property
    def method(self) -> str:
        """How the verdicts were reached."""
        if not self.comparisons:
            return f"No test was made: a verdict needs {MIN_SEEDS} seeds or more."
        return (
            "Helps and hurts: Welch's t test of the difference between two runs' means over seeds (variances unequal, "
            f"two-sided; df: its degrees of freedom), p below {LEVEL:g}, and below it against every control too. Where "
            "both runs have the same seeds, the t test of the differences seed by seed (paired) stands beside it. p is "
            f"corrected by Holm's method for all {self.comparisons} comparisons. needs N seeds: with the difference "
            f"and the variances seen here, N seeds a run would find it with a chance of {POWER:.0%}."
        )

    def to_dict(self) -> dict[str, Any]:
        """As ablations.json has it."""
        return {
            "format": 2,
            "plan": self.plan,
            "seeds": self.seeds,
            "test": {"verdict": "welch", "level": LEVEL, "correction": "holm", "comparisons": self.comparisons},
            "runs": [
                {
                    "number": row.number,
                    "name": row.name,
                    "measures": {key: cell.to_dict() for key, cell in row.cells.items()},
                    "compared": {key: cell.to_dict() for key, cell in row.compared.items()},
                }
                for row in self.rows
            ],
            "components": [asdict(judgement) for judgement in self.judgements],
            "missing": self.missing,
        }

    def markdown(self) -> str:
        """The table and a sentence for each component."""
        columns = self.columns
        head = ["run", *(column.title for column in columns)]
        rows = [[row.label, *(row.cells[column.key].text(column) for column in columns)] for row in self.rows]
        lines = [f"# Ablations of plan {self.plan}", ""]
        lines += [f"| {' | '.join(row)} |" for row in (head, [":--", *["--:"] * len(columns)], *rows)]
        lines += [
            "",
            f"Mean ± standard deviation over {self.seeds} seeds (synthetic numbers over theirs); in brackets the same "
            "number of a map without structure; * of a map fitted to the codes, since the run learned none. Components "
            "are compared on fitted maps.",
            "",
            *(f"* {judgement.sentence}" for judgement in self.judgements),
            "",
            self.method,
            "",
        ]
        if self.missing:
            lines += [f"Not there, or of another model, text or store: {', '.join(self.missing)}.", ""]
        return "\n".join(lines)
