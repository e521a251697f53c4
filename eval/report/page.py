"""The report: runs side by side in one self-contained HTML page, a Markdown table, and one picture.

Everything that comes from a corpus or a file is data: the template escapes it, and the page's own policy forbids scripts and
loading anything. Missing pieces are said, not crashed over. The same inputs give the same bytes.
"""

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hsae.cache.errors import UserError, need
from hsae.cache.files import write_atomically
from hsae.cache.format.spec import StoreSpec
from hsae.cache.reading.store import ActivationStore
from hsae.eval import figures
from hsae.eval.core.core_result import read_core
from hsae.eval.core.current import Current, inputs_of, same_bits
from hsae.eval.harness.targets import model_digest
from hsae.eval.report import tables
from hsae.eval.report.cards import LatentCard, cards_of
from hsae.eval.report.composed import Composed, composed_of
from hsae.eval.report.composed import markdown as composed_markdown
from hsae.eval.report.tables import LevelLine, Row
from hsae.eval.unlearning import pareto
from hsae.train.model.hierarchical_sae import CONFIG_FILE, WEIGHTS_FILE, HierarchicalSAE
from hsae.train.model.model_files import load_model
from hsae.train.runs.metrics_log import damaged_metrics, read_metrics
from hsae.train.runs.run_record import check_same_model, read_run

MOST_WARNINGS = 12


@dataclass(frozen=True, kw_only=True)
class RunSection:
    """What the page says of one run."""

    info: dict[str, Any]
    about: str
    stages: list[str]
    warnings: list[str]
    more_warnings: int
    curves: str | None
    levels: list[LevelLine]
    composed: Composed
    unlearned: str | None
    cards: list[LatentCard]
    missing: list[str]


def write_report(
    run_dirs: Sequence[Path],
    out: Path,
    *,
    compare: Sequence[Path] = (),
    specs: Mapping[str, StoreSpec] | None = None,
    store: ActivationStore | None = None,
    tokenizer: Any = None,
    progress: Callable[[str], None] | None = None,
    say: Callable[[str], None] = lambda text: None,
) -> Path:
    """Write `index.html`, `report.md` and `summary.png` into `out`; returns the page's path.

    `specs` are of the plan's stores `eval`, `forget` and `retain`, which need not be there: results of others are left out and named. `store` and `tokenizer`
    give the top contexts; without them the page says so. `progress` is told what is being looked at, `say` what is
    damaged, missing or left out. Raises UserError if there is nothing to report, a file to compare can't be read, or matplotlib or jinja2 is missing.
    """
    need("the report", "matplotlib", "report")
    template = _template()
    specs = specs or ({"eval": store.spec} if store is not None else {})
    current = Current.of(specs["eval"], store) if specs else None
    texts = {side: same_bits(spec) for side, spec in specs.items() if side != "eval"}
    others = _compared(compare)
    infos: dict[Path, dict[str, Any] | None] = {}
    left_out: list[tuple[str, str]] = []
    for run_dir in run_dirs:
        try:
            infos[run_dir] = read_run(run_dir)
        except UserError as error:
            left_out.append((run_dir.name, str(error)))
            say(str(error))
    runs = {run_dir: info for run_dir, info in infos.items() if info is not None}
    if not runs and not others and left_out:
        raise UserError(left_out[0][1])
    if not runs and not others:
        raise UserError("there is nothing to report: no run has been trained yet; run `hsae train --all` first")
    rows: list[Row] = []
    sections, maps = [], []
    for run_dir, info in runs.items():
        if progress is not None:
            progress(f"run {info['number']} {info['name']}")
        model = _model(run_dir)
        own, unreadable = _rows(run_dir, info, current)
        rows += own
        left_out += [(f"{info['number']} {info['name']}", text) for text in unreadable]
        maps += [(not model.is_nested, info, model.compositions[-1])] if model and model.compositions else []
        sections.append(_section(run_dir, info, model, own, unreadable, current, texts, store, tokenizer))
        for text in sections[-1].missing:
            say(f"run {info['number']} {info['name']}: {text}")
    others = [replace(row, notes=[*row.notes, *_differing(row, rows)]) for row in others]
    every = [*rows, *others]
    title, panels = _title(list(runs.values())), tables.panels(rows)
    page = template.render(
        title=title,
        facts=_facts(list(runs.values()), store),
        absent=[run_dir.name for run_dir, info in infos.items() if info is None],
        table=tables.results([row for row in every if row.corrected]),
        columns=tables.COLUMNS,
        one_text=tables.one_text(every),
        saebench=tables.saebench(every),
        foreign=any(not row.corrected for row in every),
        saebench_columns=[heading for _, heading in tables.SAEBENCH_COLUMNS],
        notes=[(row.label, row.notes) for row in every if row.notes],
        left_out=left_out,
        differences=(rows[0].result.hsae or {}).get("differences", []) if rows else [],
        comparison=figures.comparison(panels) if rows else None,
        sections=sections,
    )
    out.mkdir(parents=True, exist_ok=True)
    write_atomically(out / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
    measured = [(f"{section.info['number']} {section.info['name']}", section.composed) for section in sections]
    markdown = tables.markdown(title, every, left_out) + composed_markdown(measured)
    write_atomically(out / "report.md", lambda path: path.write_text(markdown, encoding="utf-8"))
    if rows:
        _, info, part = min(maps, key=lambda entry: entry[0], default=(False, {}, None))
        drawn, above = (
            (part.contributions, f"run {info['number']}: what level {part.level} is made of") if part else (None, "")
        )
        write_atomically(out / "summary.png", lambda path: figures.summary_png(path, panels, drawn, title, above))
    else:
        (out / "summary.png").unlink(missing_ok=True)
    return out / "index.html"


def _template() -> Any:
    need("the report", "jinja2", "report")
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


# --- what there is --------------------------------------------------------------------------------------------------


def _compared(paths: Sequence[Path]) -> list[Row]:
    """Results from elsewhere, by release name; the file's name is added where two have one release."""
    found = [(path, read_core(path)) for path in paths]
    names = [result.release or path.stem for path, result in found]
    return [
        Row(
            run=name if names.count(name) == 1 else f"{name} ({path.name})",
            view="",
            latents=_whole((result.sae_config or {}).get("d_sae")) or len(result.details) or None,
            result=result,
            notes=result.notes,
        )
        for name, (path, result) in zip(names, found, strict=True)
    ]


CONFIGURED = (
    "model_name", "llm_dtype", "dataset", "context_size", "batch_size_prompts", "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches", "exclude_special_tokens_from_reconstruction",
)  # fmt: skip


def _differing(row: Row, rows: Sequence[Row]) -> list[str]:
    """In what a result from elsewhere was made otherwise than the plan's own: one sentence, or none."""
    if not rows:
        return []
    mine, other = rows[0].result.eval_config, row.result.eval_config
    parts = [f"{key} {other.get(key)} (here {mine.get(key)})" for key in CONFIGURED if other.get(key) != mine.get(key)]
    return (
        [f"Made otherwise than the rows of this plan, so not to be compared digit by digit: {', '.join(parts)}."]
        if parts
        else []
    )


def _whole(value: object) -> int | None:
    return value if isinstance(value, int) else None


def _model(run_dir: Path) -> HierarchicalSAE | None:
    try:
        return load_model(run_dir / "model")
    except UserError:
        return None


def _harm(run_dir: Path) -> str:
    """Why a finished run has no model to show."""
    try:
        load_model(run_dir / "model")
    except UserError as error:
        return str(error)
    return ""


def _rows(run_dir: Path, info: dict[str, Any], current: Current | None) -> tuple[list[Row], list[str]]:
    """A row for each evaluated view of a run, in the order whole, level 1, level 2, ...; and what was left out."""
    rows: list[Row] = []
    unreadable: list[str] = []
    model_dir = run_dir / "model"
    present = (
        model_digest(model_dir)
        if (model_dir / CONFIG_FILE).is_file() and (model_dir / WEIGHTS_FILE).is_file()
        else None
    )
    for path in sorted((run_dir / "eval" / "core").glob("*_eval_results.json")):
        try:
            result = read_core(path)
        except UserError as error:
            unreadable.append(str(error))
            continue
        inputs = inputs_of(result.hsae)
        if present is not None and inputs.get("sae") not in (None, present):
            unreadable.append(f"{path.name} is of another model than the one here; run `hsae eval core --force`")
        elif current is not None and (reason := current.why_not(inputs)) is not None:
            unreadable.append(f"{path.name} is {reason}; left out")
        elif result.name in {row.view for row in rows}:
            unreadable.append(f"{path.name} is a second result of {result.name}; left out")
        else:
            notes = result.notes if result.dead or any("negative" in note for note in result.notes) else []
            run = f"{info['number']} {info['name']}"
            rows.append(Row(run=run, view=result.name, latents=len(result.details) or None, result=result, notes=notes))
    rows.sort(key=lambda row: (row.view != "sae", [int(digits) for digits in re.findall(r"\d+", row.view)], row.view))
    return rows, unreadable


def _title(infos: Sequence[dict[str, Any]]) -> str:
    if not infos:
        return "Sparse autoencoders side by side"
    return f"Hierarchical sparse autoencoders on {infos[0]['model']}, {infos[0]['hook']}"


def _facts(infos: Sequence[dict[str, Any]], store: ActivationStore | None) -> list[tuple[str, str]]:
    """What was trained and evaluated on what."""
    facts = []
    if infos:
        info = infos[0]
        config = info["config"]
        facts = [
            ("model", f"{info['model']}, {info['hook']}, width {info['d_in']}"),
            (
                "training",
                f"plan {info['plan']}: {config['tokens']:,} tokens in batches of {config['batch_tokens']:,}, seed {config['seed']}",
            ),
            ("training store", info["train_store"]),
        ]
    if store is not None:
        spec, tokens = store.spec, store.rows * store.context
        text = f"{tokens:,} tokens of {spec.corpus.corpus} in rows of {store.context}, {spec.model.dtype}; "
        facts += [
            ("evaluation", f"{text}{store.clean_rows:,} of {store.rows:,} rows through the model"),
            ("evaluation store", store.root.name),
            ("digests", f"weights {store.header.model_digest[:12]}, corpus {store.header.corpus_digest[:12]}"),
        ]
    if infos:
        facts += [
            ("versions", ", ".join(f"{name} {version}" for name, version in infos[0]["versions"].items())),
            ("hardware", str(infos[0].get("hardware", "not recorded"))),
        ]
    return facts


# --- one run --------------------------------------------------------------------------------------------------------


def _section(
    run_dir: Path,
    info: dict[str, Any],
    model: HierarchicalSAE | None,
    rows: Sequence[Row],
    unreadable: Sequence[str],
    current: Current | None,
    texts: Mapping[str, frozenset[str]],
    store: ActivationStore | None,
    tokenizer: Any,
) -> RunSection:
    log = read_metrics(run_dir)
    measured = any(line["kind"] == "metrics" for line in log)
    missing = [*unreadable]
    if not measured:
        missing.append("no training metrics")
    if harmed := damaged_metrics(run_dir):
        missing.append(f"damaged lines of metrics.jsonl, left out: {', '.join(map(str, harmed))}")
    if model is None:
        missing.append("no trained model: the run was not finished" if not info.get("complete") else _harm(run_dir))
    if not rows:
        missing.append(f"no core evaluation {'of this store ' if unreadable else ''}yet; run `hsae eval core`")
    composed = composed_of(run_dir, model, current)
    missing += composed.missing
    weights = model_digest(run_dir / "model") if model is not None else None
    unlearned, wrong = pareto.picture(run_dir / "eval" / "unlearning.json", weights, texts)
    missing += [] if wrong is None else [wrong]
    cards: list[LatentCard] = []
    if model is not None:
        if store is None or tokenizer is None:
            missing.append("no contexts: the evaluation store or the tokenizer is not there")
        elif info["hook"] not in store.spec.hooks or store.header.d_model != info["d_in"]:
            missing.append("no contexts: the evaluation store is one of another hook or width")
        else:
            try:
                check_same_model(run_dir, store.url, store.header)
                cards = cards_of(model, store, info["hook"], tokenizer)
            except UserError as error:
                missing.append(f"no contexts: {error}")
    warnings = [f"step {line['step']}: {line['message']}" for line in log if line["kind"] == "warning"]
    config = info["config"]
    structure, widths = config["structure"], config["widths"]
    return RunSection(
        info=info,
        about=_about(config),
        stages=[f"{name} ({start:,.0f}–{end:,.0f}k)" for name, start, end in figures.stage_ends(log)]
        if measured
        else [],
        warnings=warnings[:MOST_WARNINGS],
        more_warnings=max(0, len(warnings) - MOST_WARNINGS),
        curves=figures.training_curves(log) if measured else None,
        levels=tables.levels(rows, structure, widths, log) if len(widths) > 1 else [],
        composed=composed,
        unlearned=unlearned,
        cards=cards,
        missing=missing,
    )


def _about(config: dict[str, Any]) -> str:
    """A run's configuration in a line."""
    curriculum, mode = config["curriculum"], config["composition"]["mode"]
    parts = [
        f"{config['structure']}, {config['activation']}",
        f"{' + '.join(f'{width:,}' for width in config['widths'])} latents",
        f"target L0 {' + '.join(f'{l0:g}' for l0 in config['l0'])}",
    ]
    if len(config["widths"]) > 1:
        parts.append("no composition loss" if mode == "none" else f"composition {mode}")
        named = curriculum if isinstance(curriculum, str) else "of its own"
        parts.append("no curriculum" if named == "none" else f"curriculum {named}")
    return "; ".join(parts)
