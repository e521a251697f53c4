"""The report: runs side by side in one self-contained HTML page, a Markdown table, and one picture.

Everything that comes from a corpus or a file is data: the template escapes it, and the page's own policy forbids
scripts and loading anything. Missing pieces are named, not crashed over. The same inputs give the same bytes.
"""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from hsae.cache.config import at_commit
from hsae.cache.errors import UserError, need
from hsae.cache.files import write_atomically
from hsae.cache.language_model.lm import load_tokenizer
from hsae.cache.reading.provenance import check_tokenizer
from hsae.cache.reading.store import ActivationStore
from hsae.eval import figures
from hsae.eval.core.core_result import read_core
from hsae.eval.harness.listener import SILENT, Listener
from hsae.eval.report import tables
from hsae.eval.report.composed import markdown as composed_markdown
from hsae.eval.report.run_section import MOST_WARNINGS, Material, RunSection
from hsae.eval.report.tables import Row
from hsae.eval.unlearning.config import SIDES
from hsae.train.config.plan import Plan
from hsae.train.config.run_config import RunConfig
from hsae.train.run_record import read_run

CONFIGURED = (
    "model_name", "llm_dtype", "dataset", "context_size", "batch_size_prompts", "n_eval_reconstruction_batches",
    "n_eval_sparsity_variance_batches", "exclude_special_tokens_from_reconstruction",
)  # fmt: skip


def write_report(
    plan: Plan,
    runs: Sequence[RunConfig] | None = None,
    out: Path | str = "report",
    *,
    compare: Sequence[Path] = (),
    listener: Listener = SILENT,
) -> Path:
    """Put runs of a plan side by side in `out`: `index.html`, `report.md`, `summary.png`; returns the page's path.

    None stands for all runs, of which those that are not trained are named in the page. `compare` are core results of
    SAEBench's, old or new, as further rows. The `listener` is warned of what is damaged, missing or left out. Raises
    UserError if one of `runs` has not been trained, there is nothing to report, a file to compare can't be read, or a
    package is missing.
    """
    for run in runs or ():
        if read_run(plan.run_dir(run)) is None:
            raise UserError(
                f"run {plan.label(run)} of plan {plan.name} has not been trained in {plan.run_dir(run)}; "
                f"train it with: hsae train --run {run.number}"
            )
    store = tokenizer = None
    try:
        store = ActivationStore.of(plan.store("eval"), plan.cache.dir)
        tokenizer = load_tokenizer(at_commit(plan.model, store.header.model_commit))
        check_tokenizer(store.root, store.header, tokenizer)
    except UserError as error:
        tokenizer = None
        listener.warn(f"no contexts in this report: {error}")
    specs = {split: plan.requested(split) for split in ("eval", *SIDES)}
    run_dirs = [plan.run_dir(run) for run in (plan.runs.values() if runs is None else runs)]
    material = Material(specs=specs, store=store, tokenizer=tokenizer)
    return Report(run_dirs, material, compare=compare, listener=listener).write(Path(out))


class Report:
    """Run directories side by side, and results from elsewhere."""

    def __init__(
        self,
        run_dirs: Sequence[Path],
        material: Material | None = None,
        *,
        compare: Sequence[Path] = (),
        listener: Listener = SILENT,
    ) -> None:
        """Reads everything. Raises UserError as `write_report` does."""
        self.material = material or Material(specs={})
        self.template = _template()
        others = _compared(compare)
        self.left_out: list[tuple[str, str]] = []
        """Runs, and why something of theirs is not shown."""
        self.absent: list[str] = []
        """Runs that are not trained yet."""
        infos = {}
        for run_dir in run_dirs:
            try:
                info = read_run(run_dir)
            except UserError as error:
                self.left_out.append((run_dir.name, str(error)))
                listener.warn(str(error))
                continue
            if info is None:
                self.absent.append(run_dir.name)
            else:
                infos[run_dir] = info
        if not infos and not others:
            nothing = "there is nothing to report: no run has been trained yet; run `hsae train --all` first"
            raise UserError(self.left_out[0][1] if self.left_out else nothing)
        self.sections: list[RunSection] = []
        for run_dir, info in infos.items():
            listener.status(f"report: run {info['number']} {info['name']}")
            section = RunSection(run_dir, info, self.material)
            self.sections.append(section)
            self.left_out += [(section.label, text) for text in section.left_out]
            for text in section.missing:
                listener.warn(f"run {section.label}: {text}")
        self.rows = [row for section in self.sections for row in section.rows]
        self.others = [replace(row, notes=[*row.notes, *_differing(row, self.rows)]) for row in others]

    def write(self, out: Path) -> Path:
        """Write `index.html`, `report.md` and, of runs that are evaluated, `summary.png`; returns the page's path."""
        page, markdown = self.page(), self.markdown()
        out.mkdir(parents=True, exist_ok=True)
        write_atomically(out / "index.html", lambda path: path.write_text(page, encoding="utf-8"))
        write_atomically(out / "report.md", lambda path: path.write_text(markdown, encoding="utf-8"))
        if self.rows:
            write_atomically(out / "summary.png", self._draw_summary)
        else:
            (out / "summary.png").unlink(missing_ok=True)
        return out / "index.html"

    @property
    def title(self) -> str:
        """The page's title."""
        if not self.sections:
            return "Sparse autoencoders side by side"
        info = self.sections[0].info
        return f"Hierarchical sparse autoencoders on {info['model']}, {info['hook']}"

    def page(self) -> str:
        """The HTML."""
        every = [*self.rows, *self.others]
        html: str = self.template.render(
            title=self.title,
            facts=self._facts(),
            absent=self.absent,
            table=tables.results([row for row in every if row.corrected]),
            columns=tables.COLUMNS,
            one_text=tables.one_text(every),
            saebench=tables.saebench(every),
            foreign=any(not row.corrected for row in every),
            saebench_columns=[heading for _, heading in tables.SAEBENCH_COLUMNS],
            notes=[(row.label, row.notes) for row in every if row.notes],
            left_out=self.left_out,
            differences=(self.rows[0].result.hsae or {}).get("differences", []) if self.rows else [],
            comparison=figures.comparison(tables.panels(self.rows)) if self.rows else None,
            sections=self.sections,
            most_warnings=MOST_WARNINGS,
        )
        return html

    def markdown(self) -> str:
        """The tables."""
        composed = [(section.label, section.composed) for section in self.sections]
        return tables.markdown(self.title, [*self.rows, *self.others], self.left_out) + composed_markdown(composed)

    def _draw_summary(self, path: Path) -> None:
        """The results, and one composition map: of the first additive run, or else of the first that has one."""
        composed = [section for section in self.sections if section.model and section.model.compositions]
        section = min(composed, key=lambda entry: not (entry.model and entry.model.is_nested), default=None)
        part, above = None, ""
        if section is not None and section.model is not None:
            last = section.model.compositions[-1]
            part, above = last.contributions, f"run {section.info['number']}: what level {last.level} is made of"
        figures.summary_png(path, tables.panels(self.rows), part, self.title, above)

    def _facts(self) -> list[tuple[str, str]]:
        """What was trained and evaluated on what."""
        facts, store = [], self.material.store
        info = self.sections[0].info if self.sections else None
        if info is not None:
            config = info["config"]
            stream = f"{config['tokens']:,} tokens in batches of {config['batch_tokens']:,}, seed {config['seed']}"
            facts = [
                ("model", f"{info['model']}, {info['hook']}, width {info['d_in']}"),
                ("training", f"plan {info['plan']}: {stream}"),
                ("training store", info["train_store"]),
            ]
        if store is not None:
            spec, tokens = store.spec, store.rows * store.context
            text = f"{tokens:,} tokens of {spec.corpus.corpus} in rows of {store.context}, {spec.model.dtype}; "
            header = store.header
            facts += [
                ("evaluation", f"{text}{store.clean_rows:,} of {store.rows:,} rows through the model"),
                ("evaluation store", store.root.name),
                ("digests", f"weights {header.model_digest[:12]}, corpus {header.corpus_digest[:12]}"),
            ]
        if info is not None:
            facts += [
                ("versions", ", ".join(f"{name} {version}" for name, version in info["versions"].items())),
                ("hardware", str(info.get("hardware", "not recorded"))),
            ]
        return facts


def _template() -> Any:
    need("the report", "matplotlib", "report")
    need("the report", "jinja2", "report")
    import jinja2

    environment = jinja2.Environment(
        autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return environment.from_string((Path(__file__).parent / "report.html").read_text(encoding="utf-8"))


def _compared(paths: Sequence[Path]) -> list[Row]:
    """Results from elsewhere, by release name; the file's name is added where two have one release."""
    results = [(path, read_core(path)) for path in paths]
    names = [result.release or path.stem for path, result in results]
    rows = []
    for name, (path, result) in zip(names, results, strict=True):
        width = (result.sae_config or {}).get("d_sae")
        latents = (width if isinstance(width, int) else None) or len(result.details) or None
        run = name if names.count(name) == 1 else f"{name} ({path.name})"
        rows.append(Row(run=run, view="", latents=latents, result=result, notes=result.notes))
    return rows


def _differing(row: Row, rows: Sequence[Row]) -> list[str]:
    """In what a result from elsewhere was made otherwise than the plan's own: one sentence, or none."""
    if not rows:
        return []
    mine, other = rows[0].result.eval_config, row.result.eval_config
    parts = [f"{key} {other.get(key)} (here {mine.get(key)})" for key in CONFIGURED if other.get(key) != mine.get(key)]
    if not parts:
        return []
    return [f"Made otherwise than the rows of this plan, so not to be compared digit by digit: {', '.join(parts)}."]
