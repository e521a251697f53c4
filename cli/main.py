"""The `hsae` command."""

import sys
from typing import Annotated

import typer

from hsae.cli import ablate, autointerp, cache, quickstart, report, store, train, unlearning
from hsae.cli import eval as eval_commands
from hsae.cli.common import errors

app = typer.Typer(
    help="Hierarchical sparse autoencoders: cache a language model's activations once, then train and evaluate at will.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache.app.command("copy")(store.copy)
cache.app.command("recode")(store.recode)
cache.app.command("serve")(store.serve)
app.add_typer(cache.app, name="cache", help="Write, check, list, copy and serve activation stores.")
app.command(name="train")(train.train)
app.add_typer(eval_commands.app, name="eval", help="Measure trained SAEs.")
eval_commands.app.command(name="unlearning")(unlearning.unlearning)
eval_commands.app.command(name="autointerp")(autointerp.autointerp)
app.command(name="report")(report.report)
app.command(name="ablate")(ablate.ablate)
app.command(name="quickstart")(quickstart.quickstart)


def _version(wanted: bool) -> None:
    if wanted:
        from importlib.metadata import version

        typer.echo(f"hsae {version('hsae')}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    """Options of the command itself."""


def main() -> None:
    """Run a command; a mistake of the user's ends with one clear line and status 2, a failing machine with status 1."""
    from hsae.cache.errors import UserError

    try:
        app()
    except UserError as error:
        errors.print(f"[bold red]Error:[/] {_escaped(error)}", soft_wrap=True)
        sys.exit(2)
    except OSError as error:
        errors.print(f"[bold red]Error:[/] {_escaped(error)}", soft_wrap=True)
        sys.exit(1)
    except RuntimeError as error:
        if type(error).__name__ != "OutOfMemoryError":
            raise
        errors.print(
            "[bold red]Error:[/] the GPU is out of memory; lower train.batch_tokens, or train fewer runs at once"
        )
        sys.exit(1)
    except KeyboardInterrupt:
        errors.print("Interrupted.")
        sys.exit(130)


def _escaped(error: Exception) -> str:
    from rich.markup import escape

    return escape(str(error))
