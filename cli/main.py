"""The `hsae` command."""

import atexit
import gc
import io
import os
import sys
from typing import Annotated

import typer
from rich.text import Text

from hsae.cli import ablate, cache, doctor, plan, quickstart, report, share, store, train
from hsae.cli import eval as eval_commands
from hsae.cli.common import error_console, one_line, use_plain_console

PIPED_WIDTH = 160  # columns of tables in pipes and files, which have no width of their own

COLLECT_AFTER = 50_000, 20, 100
"""Objects between two runs of the garbage collector, and runs between its longer ones: importing torch and transformers
makes a million objects that stay, and to search them again and again takes a sixth of the time of those imports."""

app = typer.Typer(
    help="Hierarchical sparse autoencoders: cache a language model's activations once, then train and evaluate.",
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # which takes [table] and [/] in help for what they are
    context_settings={"help_option_names": ["-h", "--help"]},
)
cache.app.command("copy")(store.copy)
cache.app.command("recode")(store.recode)
cache.app.command("serve")(store.serve)
app.add_typer(cache.app, name="cache", help="Write, check, list, copy and serve activation stores.")
app.command(name="train")(train.train)
app.add_typer(plan.app, name="plan", help="Show, explain and check plans.")
app.add_typer(eval_commands.app, name="eval", help="Measure trained SAEs.")
app.command(name="report")(report.report)
app.command(name="ablate")(ablate.ablate)
app.command(name="push")(share.push)
app.command(name="pull")(share.pull)
app.command(name="doctor")(doctor.doctor)
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
    use_plain_console(width=None if sys.stdout.isatty() or "COLUMNS" in os.environ else PIPED_WIDTH)


def main() -> None:
    """Run a command. Status 2: the user can mend it; 1: the machine or the network failed; 130: interrupted.

    A bug shows its traceback.
    """
    from hsae.cache.errors import UserError
    from hsae.cache.reading import page_faults

    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(
                errors="backslashreplace"
            )  # names of files may hold anything, and the terminal's encoding may lack it
    gc.set_threshold(*COLLECT_AFTER)
    atexit.register(gc.freeze)  # Python would search all that was imported once more before it ends
    page_faults.enable()
    try:
        app()
    except SystemExit as ended:
        if ended.code == 130:
            error_console().print("Interrupted.")
        raise
    except Exception as error:
        line = one_line(error)
        if line is None:
            raise
        from hsae.cache.storage.retry import redact

        error_console().print(Text.assemble(("Error:", "bold red"), f" {redact(line)}"), soft_wrap=True)
        sys.exit(2 if isinstance(error, UserError) else 1)
