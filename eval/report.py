"""The report: runs side by side in one self-contained HTML page, a Markdown table, and one picture.

Everything that comes from a corpus or a file is data: the template escapes it. Missing pieces are said, not crashed over.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from hsae.cache.errors import UserError
from hsae.cache.store import ActivationStore
from hsae.eval import contexts, figures
from hsae.eval.schema import CoreResult, read_core
from hsae.train.files import write_atomically
from hsae.train.model import TrainedModel, load_model
from hsae.train.rundir import read_metrics, read_run

COLUMNS = (  # key of a corrected measure, heading, digits, whether more is better (None: neither)
    ("explained_variance", "explained variance", 3, True),
    ("ce_loss_score", "CE score", 3, True),
    ("kl_div_score", "KL score", 3, True),
    ("l0", "L0", 1, None),
)
SAEBENCH_COLUMNS = (
    ("ce_loss_score", "CE score"), ("kl_div_score", "KL score"), ("explained_variance", "EV"),
    ("explained_variance_legacy", "EV (legacy)"), ("cossim", "cosine"), ("l0", "L0"), ("frac_alive", "alive"), ("mse", "mse"),
)  # fmt: skip
PANELS = ("explained_variance", "ce_loss_score")
COARSE_SHOWN, CHILDREN_SHOWN, CONTEXTS_SHOWN, LATENTS_SHOWN = 4, 3, 3, 4
COMMON = 0.2  # latents that fire on more tokens than this say little in a list of contexts


@dataclass(frozen=True, kw_only=True)
class Row:
    """A line of the tables: one view of one run, or a result that was read from elsewhere."""

    label: str
    view: str
    latents: int | None
    result: CoreResult
    notes: list[str]


@dataclass(frozen=True, kw_only=True)
class LatentCard:
    """A latent and where it is most active; `children` are the fine latents it is composed of."""

    title: str
    density: float
    contexts: list[contexts.Context]
    weight: float | None = None
    children: "list[LatentCard]" = field(default_factory=list)


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the page says of one run."""

    info: dict[str, Any]
    stages: list[str]
    warnings: list[str]
    curves: str | None
    maps: list[str]
    cards: list[LatentCard]
    missing: list[str]


def write_report(
    run_dirs: Sequence[Path],
    out: Path,
    *,
    compare: Sequence[Path] = (),
    store: ActivationStore | None = None,
    tokenizer: Any = None,
    hook: str | None = None,
) -> Path:
    """Write `index.html`, `report.md` and `summary.png` into `out`; returns the page's path.

    `store` and `tokenizer` give the top contexts; without them the page says so. Raises UserError if there is nothing to report or a file
    to compare can't be read.
    """
    template = _template()
    others = [_compared(path) for path in compare]
    runs = [(run_dir, info) for run_dir in run_dirs if (info := read_run(run_dir)) is not None]
    if not runs and not others:
        raise UserError("there is nothing to report: no run has been trained yet; run `hsae train --all` first")
    models = {run_dir: _model(run_dir) for run_dir, _ in runs}
    rows = [row for run_dir, info in runs for row in _rows(run_dir, info)]
    sections = [_section(run_dir, info, models[run_dir], store, tokenizer, hook) for run_dir, info in runs]
    out.mkdir(parents=True, exist_ok=True)
    panels = _panels(rows)
    page = template.render(
        title=_title(runs),
        facts=_facts(runs, store),
        table=_table([*rows, *others]),
        columns=COLUMNS,
        saebench=[
            (row.label, [_number(row.result.metric(key)) for key, _ in SAEBENCH_COLUMNS]) for row in (*rows, *others)
        ],
        saebench_columns=[heading for _, heading in SAEBENCH_COLUMNS],
        notes=[(row.label, row.notes) for row in (*rows, *others) if row.notes],
        differences=(rows[0].result.hsae or {}).get("differences", []) if rows else [],
        comparison=figures.comparison(panels) if rows else None,
        sections=sections,
    )
    write_atomically(out / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
    markdown = _markdown(_title(runs), [*rows, *others])
    write_atomically(out / "report.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    if rows:
        drawn = _drawn_map(models)
        write_atomically(out / "summary.png", lambda path: _save_summary(path, panels, drawn, _title(runs)))
    return out / "index.html"


def _template() -> Any:
    try:
        import jinja2
    except ImportError:
        raise UserError("the report needs jinja2; run: pip install 'hsae[report]'") from None
    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def _save_summary(path: Path, panels: dict[str, list[figures.Point]], drawn: torch.Tensor | None, title: str) -> None:
    picture = path.with_suffix(".png")
    figures.summary_png(picture, panels, drawn, title)
    picture.replace(path)


def _compared(path: Path) -> Row:
    result = read_core(path)
    width = (result.sae_config or {}).get("d_sae")
    label = result.release or path.stem
    return Row(label=label, view=result.name, latents=width, result=result, notes=result.notes)


def _model(run_dir: Path) -> TrainedModel | None:
    try:
        return load_model(run_dir / "model")
    except UserError:
        return None


def _rows(run_dir: Path, info: dict[str, Any]) -> list[Row]:
    """A row for each evaluated view of a run, in the order whole, level 1, level 2, ..."""
    results = [read_core(path) for path in sorted((run_dir / "eval" / "core").glob("*_eval_results.json"))]
    results.sort(key=lambda result: (result.name != "sae", result.name))
    rows = []
    for result in results:
        label = f"{info['number']} {info['name']}" + ("" if result.name == "sae" else f" · {result.name}")
        notes = result.notes if result.dead or any("negative" in note for note in result.notes) else []
        rows.append(Row(label=label, view=result.name, latents=len(result.details) or None, result=result, notes=notes))
    return rows


def _title(runs: Sequence[tuple[Path, dict[str, Any]]]) -> str:
    if not runs:
        return "hsae report"
    info = runs[0][1]
    return f"{info['plan']}: hierarchical sparse autoencoders on {info['model']}, {info['hook']}"


def _facts(runs: Sequence[tuple[Path, dict[str, Any]]], store: ActivationStore | None) -> list[tuple[str, str]]:
    facts = []
    if runs:
        info = runs[0][1]
        config = info["config"]
        facts += [
            (
                "training",
                f"{config['tokens']:,} tokens in batches of {config['batch_tokens']:,}, seed {config['seed']}; store {info['train_store']}",
            ),
            ("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())),
        ]
    if store is not None:
        spec, tokens = store.spec, store.rows * store.context
        facts.append(
            (
                "evaluation",
                f"{tokens:,} tokens of {spec.corpus.corpus}, {store.clean_rows:,} of {store.rows:,} rows through the model; {spec.model.dtype}",
            )
        )
        facts.append(
            (
                "digests",
                f"weights {store.header.model_digest[:12]}, corpus {store.header.corpus_digest[:12]}, store {spec.fingerprint}",
            )
        )
    return facts


# --- tables ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cell:
    """A number of a table, as text."""

    text: str
    interval: str = ""
    best: bool = False


def _number(value: float | None, digits: int = 4) -> str:
    return "undefined" if value is None else f"{value:.{digits}g}"


def _table(rows: Sequence[Row]) -> list[tuple[Row, str, list[Cell]]]:
    """Corrected measures with intervals; the best is marked only where its interval lies clear of all others'."""
    best = {key: _clear_winner(rows, key) for key, _, _, higher in COLUMNS if higher}
    table = []
    for row in rows:
        cells = []
        for key, _, digits, _ in COLUMNS:
            measure = row.result.measure(key)
            if measure is None or measure.value is None:
                known = row.result.metric(key)
                cells.append(
                    Cell(
                        "undefined" if known is None else f"{known:.{digits}f}",
                        "SAEBench's" if known is not None else "",
                    )
                )
            else:
                interval = "" if measure.low is None else f"{measure.low:.{digits}f} – {measure.high:.{digits}f}"
                cells.append(Cell(f"{measure.value:.{digits}f}", interval, best.get(key) is row))
        dead = row.result.measure("dead_fraction")
        alive = row.result.metric("frac_alive") if dead is None or dead.value is None else 1 - dead.value
        cells.append(
            Cell("0 %" if row.result.dead else "not recorded" if alive is None else f"{alive:.1%}".replace("%", " %"))
        )
        table.append((row, "dead" if row.result.dead else "", cells))
    return table


def _clear_winner(rows: Sequence[Row], key: str) -> Row | None:
    measured = [
        (row, measure)
        for row in rows
        if (measure := row.result.measure(key)) and measure.value is not None and measure.low is not None
    ]
    if len(measured) < 2:
        return None
    measured.sort(key=lambda entry: -(entry[1].value or 0))
    first, top = measured[0]
    clear = top.low is not None and top.low > max(other.high or 0 for _, other in measured[1:])
    return first if clear else None


def _markdown(title: str, rows: Sequence[Row]) -> str:
    headings = ["SAE", "latents", *(heading for _, heading, _, _ in COLUMNS), "alive"]
    lines = [
        f"# {title}",
        "",
        "| " + " | ".join(headings) + " |",
        "|" + "|".join([":--", *["--:"] * (len(headings) - 1)]) + "|",
    ]
    for row, state, cells in _table(rows):
        name = row.label.replace("|", "\\|") + (" (dead)" if state else "")
        texts = [cell.text + (f" ({cell.interval})" if cell.interval else "") for cell in cells]
        lines.append("| " + " | ".join([name, str(row.latents or "?"), *texts]) + " |")
    lines += [
        "",
        "In brackets: 95 % bootstrap intervals over rows. CE and KL scores: 1 is the clean model, 0 a zeroed residual.",
    ]
    for row in rows:
        lines += [f"- **{row.label}**: {note}" for note in row.notes]
    return "\n".join(lines) + "\n"


def _panels(rows: Sequence[Row]) -> dict[str, list[figures.Point]]:
    headings = {key: heading for key, heading, _, _ in COLUMNS}
    panels = {}
    for key in PANELS:
        measures = [(row.label, row.result.measure(key)) for row in rows]
        panels[headings[key]] = [
            figures.Point(
                label,
                measure.value if measure else None,
                measure.low if measure else None,
                measure.high if measure else None,
            )
            for label, measure in measures
        ]
    return panels


def _drawn_map(models: dict[Path, TrainedModel | None]) -> torch.Tensor | None:
    """The map of the first additive run that has one, else of the first run that has one."""
    found = [model for model in models.values() if model is not None and model.compositions]
    additive = [model for model in found if model.structure == "additive"]
    chosen = (additive or found)[:1]
    return chosen[0].compositions[0].contributions if chosen else None


# --- one run --------------------------------------------------------------------------------------------------------


def _section(
    run_dir: Path,
    info: dict[str, Any],
    model: TrainedModel | None,
    store: ActivationStore | None,
    tokenizer: Any,
    hook: str | None,
) -> RunSection:
    lines = read_metrics(run_dir)
    missing = []
    if not any(line["kind"] == "metrics" for line in lines):
        missing.append("no training metrics")
    if model is None:
        missing.append("no trained model: the run was not finished")
    if not any((run_dir / "eval" / "core").glob("*.json")):
        missing.append("no core evaluation yet; run `hsae eval core`")
    cards: list[LatentCard] = []
    if model is not None:
        if store is None or tokenizer is None or hook is None:
            missing.append("no contexts: the evaluation store or the tokenizer is not there")
        elif store.header.d_model != model.levels[0].d_in:
            missing.append("no contexts: the evaluation store has another width than the model")
        else:
            cards = _cards(model, store, hook, tokenizer)
    return RunSection(
        info=info,
        stages=[line["stage"] for line in lines if line["kind"] == "stage"],
        warnings=[f"step {line['step']}: {line['message']}" for line in lines if line["kind"] == "warning"],
        curves=figures.training_curves(lines) if any(line["kind"] == "metrics" for line in lines) else None,
        maps=[figures.composition(part.contributions, part.level) for part in model.compositions] if model else [],
        cards=cards,
        missing=missing,
    )


def _cards(model: TrainedModel, store: ActivationStore, hook: str, tokenizer: Any) -> list[LatentCard]:
    """Coarse latents with the fine ones they are composed of; without a composition map, a few latents of each level."""
    views = model.views()
    if not model.compositions:
        levels = list(views) if model.structure == "flat" else [name for name in views if name != "sae"]
        cards = []
        for name in levels:
            firing = contexts.firing(views[name], store, hook)
            latents = _heaviest(firing, LATENTS_SHOWN)
            found = contexts.top_contexts(views[name], store, hook, tokenizer, latents, CONTEXTS_SHOWN)
            cards += [_card(name, latent, firing, found) for latent in latents]
        return cards
    part = model.compositions[-1]
    coarse, fine = f"level{part.level}", f"level{part.level - 1}"
    coarse_firing, fine_firing = contexts.firing(views[coarse], store, hook), contexts.firing(views[fine], store, hook)
    parents = [
        latent for latent in _heaviest(coarse_firing, len(part.contributions)) if part.contributions[latent].any()
    ][:COARSE_SHOWN]
    children = {parent: _children(part.contributions[parent]) for parent in parents}
    every = sorted({child for found in children.values() for child in found})
    shown = contexts.top_contexts(views[coarse], store, hook, tokenizer, parents, CONTEXTS_SHOWN)
    below = contexts.top_contexts(views[fine], store, hook, tokenizer, every, CONTEXTS_SHOWN - 1)
    return [
        _card(
            coarse, parent, coarse_firing, shown,
            children=[_card(fine, child, fine_firing, below, weight=float(part.contributions[parent, child])) for child in children[parent]],
        )
        for parent in parents
    ]  # fmt: skip


def _children(contributions_G: torch.Tensor) -> list[int]:
    values, indices = contributions_G.topk(min(CHILDREN_SHOWN, len(contributions_G)))
    return [int(index) for value, index in zip(values, indices, strict=True) if value > 0]


def _heaviest(firing: contexts.Firing, count: int) -> list[int]:
    """Alive latents with the largest mean activation, those that fire nearly everywhere left out."""
    eligible = torch.where((firing.density_F > 0) & (firing.density_F < COMMON), firing.mass_F, 0.0)
    order = sorted(range(len(eligible)), key=lambda latent: (-float(eligible[latent]), latent))
    return [latent for latent in order[:count] if eligible[latent] > 0]


def _card(
    view: str,
    latent: int,
    firing: contexts.Firing,
    found: dict[int, list[contexts.Context]],
    weight: float | None = None,
    children: list[LatentCard] | None = None,
) -> LatentCard:
    title = f"{'latent' if view == 'sae' else view.replace('level', 'level ') + ' latent'} {latent}"
    return LatentCard(
        title=title,
        density=float(firing.density_F[latent]),
        contexts=found[latent],
        weight=weight,
        children=children or [],
    )
