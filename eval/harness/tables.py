"""Tables of results as plain data: the command line draws them, a notebook prints them as text."""

from dataclasses import dataclass, field


@dataclass(frozen=True)
class PlusMinus:
    """A number as text, and half its interval."""

    value: str
    half: str

    def __str__(self) -> str:
        return f"{self.value} ±{self.half}"


Cell = str | PlusMinus


@dataclass(frozen=True)
class Row:
    """The cells of a row; `is_doubtful` rows are shown as a warning."""

    cells: tuple[Cell, ...]
    is_doubtful: bool = False


@dataclass(frozen=True)
class Table:
    """A table: the first column names what a row is about, the others hold numbers."""

    title: str
    columns: tuple[str, ...]
    rows: list[Row] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    """Lines below it."""
    is_dense: bool = False
    """Whether it has so many columns that the command line spares spaces."""

    def add(self, *cells: Cell, is_doubtful: bool = False) -> None:
        """Append a row."""
        self.rows.append(Row(cells, is_doubtful))

    def __str__(self) -> str:
        lines = [self.columns, *(tuple(map(str, row.cells)) for row in self.rows)]
        first, *others = (max(map(len, column)) for column in zip(*lines, strict=True))
        text = ("  ".join([name.ljust(first), *map(str.rjust, cells, others)]).rstrip() for name, *cells in lines)
        return "\n".join([self.title, *text, *self.notes])


def interval_cell(value: float | None, low: float | None, high: float | None, digits: int | None = 3) -> Cell:
    """A number with the larger half of its interval: `0.912 ±.004`; `undefined` if there is none."""
    if value is None:
        return "undefined"
    return spread_cell(value, None if low is None or high is None else max(high - value, value - low), digits)


def spread_cell(value: float, half: float | None, digits: int | None = None) -> Cell:
    """A number and its spread; with as many digits as are worth reading unless `digits` are given."""
    if digits is None:
        digits = 1 if abs(value) >= 10 else 2 if abs(value) >= 1 else 3
    text = f"{value:.{digits}f}"
    return text if half is None else PlusMinus(text, f"{half:.{digits}f}".removeprefix("0") or "0")
