"""`hsae quickstart`: the whole pipeline on real Gemma-3-270M and the text that ships with Python."""

from pathlib import Path
from typing import Annotated

import typer
from rich import get_console

from hsae.cli.common import SetOption, check_folder, say


def quickstart(
    out: Annotated[Path, typer.Option("--out", help="Folder for activations, runs and report.")] = Path("quickstart"),
    overrides: SetOption = None,
) -> None:
    """Cache, train runs 0-5, evaluate and report on Gemma-3-270M; no GPU, no hub, minutes on two cores.

    A second call goes on from what is there.

    Example: hsae quickstart
    """
    from hsae.cli.pipeline import ShownPipeline
    from hsae.eval.pipeline import run_quickstart

    check_folder(out)
    seconds = run_quickstart(out, overrides or (), ShownPipeline())
    get_console().rule("done")
    get_console().print(
        "  ".join(f"{name} {value:.0f} s" for name, value in seconds.items()) + f"  total {sum(seconds.values()):.0f} s"
    )
    say("Look at ", (str((out / "report" / "index.html").resolve()), "bold"))
