"""`hsae eval`: every registered evaluation, all of them one after the other, and synthetic data."""

from typing import Any

import typer

from hsae.cli.common import say
from hsae.cli.evaluations import SHARED, EvaluationGroup, Screen, load_selected, option, summarise, with_options
from hsae.cli.synthetic import synthetic
from hsae.eval.harness.options import DrawOptions

app = typer.Typer(no_args_is_help=True, cls=EvaluationGroup)
app.command("synthetic")(synthetic)


@app.callback()
def _group() -> None:
    """Measure trained SAEs."""


@app.command("all")
@with_options(SHARED | {"draws": option("draws", DrawOptions.model_fields["draws"])})
def every(*, draws: int, force: bool, device: str, **selected: Any) -> None:
    """Core and every evaluation of the suite, unlearning and RAVEL where their stores are.

    One that fails does not stop the others; status 1 if any did.

    Example: hsae eval all --plan gemma-3-270m
    """
    from hsae.eval.harness.evaluate_all import evaluate_all, names_in_all

    plan, selection = load_selected(**selected)
    outcomes = evaluate_all(plan, selection, draws=draws, force=force, device=device, listen=Screen)
    if failed := summarise(names_in_all(), outcomes):
        say(f"{failed} of {len(names_in_all())} evaluations failed")
        raise typer.Exit(1)
