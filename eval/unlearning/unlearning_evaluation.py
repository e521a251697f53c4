"""`hsae eval unlearning`: every arm of a run swept on two texts, and shown side by side.

A run's result is `eval/unlearning.json` in its directory, with `unlearning.png` beside it where matplotlib is
installed; while a sweep is under way, what was measured lies in `unlearning.partial.json`.
"""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsae.cache.errors import UserError
from hsae.eval.harness.evaluation import Evaluation, Result
from hsae.eval.harness.result_files import publish
from hsae.eval.harness.tables import Cell, Table, interval_cell
from hsae.eval.harness.targets import RunTarget
from hsae.eval.unlearning import pareto
from hsae.eval.unlearning.intervention import of_model
from hsae.eval.unlearning.loss_meter import MeasuredChanges, Texts
from hsae.eval.unlearning.questions_evaluation import UnlearningQuestions
from hsae.eval.unlearning.signature import evaluate_signature
from hsae.eval.unlearning.sweep import Sweep
from hsae.eval.unlearning.text_pair import TextPairEvaluation, UnlearningOptions

PARTIAL, FIGURE = "unlearning.partial.json", "unlearning.png"


class Unlearning(TextPairEvaluation):
    """Whether clamping latents makes the model forget one text and keep another, for every way of choosing them."""

    file = "unlearning.json"

    @classmethod
    def for_options(cls, options: UnlearningOptions) -> type[Evaluation[Any, Any]]:
        """With `qa` SAEBench's form."""
        return UnlearningQuestions if options.qa else cls

    def measure(self, target: RunTarget) -> dict[str, Any]:
        """Every arm swept, and the signature test."""

        def progress(arm: str, done: int, total: int) -> None:
            self.listener.progress(f"{target.label}: {arm}", done, total)

        model = target.load()
        sweep = Sweep(
            model=model,
            dictionary=of_model(model, self.device),
            texts=Texts(self.rows(target), self.language, self.config),
            changes=MeasuredChanges(target.folder / PARTIAL, self.inputs(target)),
            progress=progress,
        )
        arms, profile = sweep.run()
        signature = evaluate_signature(sweep)
        (target.folder / FIGURE).unlink(missing_ok=True)  # never beside another result
        passes = {**asdict(sweep.texts.passes), "measured_before": sweep.changes.read}
        content = {"arms": arms, "signature": signature, "profile": profile, "passes": passes}
        return self.result("hsae_unlearning", target, content)

    def write(self, path: Path, content: dict[str, Any]) -> Path:
        """Write the result, and remove what was measured on the way."""
        super().write(path, content)
        (path.parent / PARTIAL).unlink(missing_ok=True)
        return path

    def discard(self, target: RunTarget) -> None:
        """Throw away what an interrupted sweep measured."""
        (target.folder / PARTIAL).unlink(missing_ok=True)

    def complete(self, target: RunTarget, content: dict[str, Any]) -> dict[str, Any]:
        """The result as it is; its figure is drawn if it is not there and matplotlib is installed."""
        path, title, most = target.folder / FIGURE, f"unlearning, run {target.label}", max(self.config.budgets)
        with suppress(UserError):
            if not path.is_file():
                publish(path, lambda partial: pareto.draw(partial, content["arms"], most, title))
        return content

    def tables(self, results: Sequence[Result[RunTarget]]) -> list[Table]:
        """Of each run the loss added at every budget, and the signature test."""
        return [table for item in results for table in (_loss_table(item), *_signature_tables(item))]


def _loss_table(item: Result[RunTarget]) -> Table:
    """Forget loss added at each budget of retain loss, with intervals over documents."""
    title = "loss added on forget text, nats a token, within a budget of loss added on retain text"
    arms, passes, signature = (item.content[key] for key in ("arms", "passes", "signature"))
    budgets = list(arms["none"]["at_retain"])
    columns = ("arm", *(f"≤ {budget}" for budget in budgets), "area")
    table = Table(f"run {item.label}: {title}; ± spans the 95 % interval over documents", columns)
    for name, arm in arms.items():
        entries = [arm["at_retain"][budget] for budget in budgets]
        cells = [_cell({**entry, "value": entry["forget_dce"]}, 2) for entry in entries]
        table.add(name, *cells, _cell(arm["area"], 2))
    table.notes.append(
        f"{passes['run']:,} rows passed through the suffix, {passes['spared']:,} spared because nothing fired; "
        f"{passes['unembedded']:,} positions unembedded"
    )
    if signature["explanation"] is not None:
        table.notes.append(f"no signature test: {signature['explanation']}")
    return table


def _signature_tables(item: Result[RunTarget]) -> list[Table]:
    tables = []
    for pair in item.content["signature"]["pairs"]:
        title = f"run {item.label}: latents chosen on {pair['selected_on']}, tested on {pair['tested_on']}: loss added"
        table = Table(title, ("arm", "own topic", "sibling", "carried over", "retain"))
        for name, arm in pair["arms"].items():
            table.add(name, *(_cell(arm[key]) for key in ("own", "sibling", "carried", "retain")))
        tables.append(table)
    return tables


def _cell(entry: Mapping[str, float | None], digits: int = 3) -> Cell:
    """A number with its interval; an exact 0, which doing nothing gives, without."""
    low, high = (entry["low"], entry["high"]) if entry["value"] else (None, None)
    return interval_cell(entry["value"], low, high, digits)
