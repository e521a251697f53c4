"""`hsae eval`: the registered evaluations, and those that have a command of their own."""

import typer

from hsae.cli import suite, synthetic
from hsae.cli.evaluations import EvaluationGroup

app = typer.Typer(no_args_is_help=True, cls=EvaluationGroup)
app.command("all")(suite.every)
app.command(name="synthetic")(synthetic.synthetic)


@app.callback()
def _group() -> None:
    """Measure trained SAEs."""
