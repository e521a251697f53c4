"""The picture of an ablation table: one panel a number, a dot a seed, a bar at the mean, a hollow mark at the null."""

from pathlib import Path

from hsae.cache.files import write_atomically
from hsae.eval import figures
from hsae.eval.ablation.table import AblationTable

PER_ROW = 4


@figures.style()
def save_figure(table: AblationTable, path: Path) -> None:
    """Write the picture to `path`. Raises UserError if matplotlib is missing."""
    columns = table.columns
    names = [row.label for row in table.rows]
    rows = -(-len(columns) // PER_ROW)
    height = 0.22 * len(names) + 0.7
    figure = figures.new_figure(3.1 * PER_ROW, height * rows)
    axes = figure.subplots(rows, PER_ROW, squeeze=False, sharey=True)
    for axis in axes.flat[len(columns) :]:
        axis.set_visible(False)
    for axis, column in zip(axes.flat, columns, strict=False):
        for place, row in enumerate(table.rows):
            cell = row.cells[column.key]
            if cell.mean is None:
                continue
            axis.plot(cell.values, [place] * len(cell.values), "o", color="#2563a8", markersize=3.5, alpha=0.6)
            axis.plot([cell.mean], [place], "|", color="#0b2540", markersize=11, markeredgewidth=1.6)
            if cell.null is not None:
                axis.plot([cell.null], [place], "D", color="#9a6a1f", markersize=4, fillstyle="none")
        arrow = {1: " ↑", -1: " ↓", 0: ""}[column.better]
        axis.set_title(f"{column.title}{arrow}" + (f" (◇ {column.null} map)" if column.null else ""), fontsize=9)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_ylim(len(names) - 0.5, -0.5)
        axis.tick_params(axis="x", labelsize=8)
        axis.grid(axis="y", color="#dddddd", linewidth=0.6)
    write_atomically(path, lambda partial: figures.save_png(figure, partial))
