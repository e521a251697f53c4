"""Options that several commands share, and the console they print to."""

from typing import Annotated

import typer
from rich.console import Console

console = Console(highlight=False)
errors = Console(stderr=True, highlight=False)

PlanOption = Annotated[
    str | None,
    typer.Option(
        "--plan", metavar="NAME|FILE", help="Packaged plan or TOML file; default ./hsae.toml, else gemma-2-2b."
    ),
]
SetOption = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Override a value of the plan, e.g. --set cache.train.rows=2000. Repeatable."
    ),
]
DeviceOption = Annotated[str, typer.Option("--device", help="auto, cpu, cuda or cuda:N.")]
RunOption = Annotated[
    str | None, typer.Option("--run", metavar="RUNS", help="Runs by number or name: 3, 0-5, baseline, or a list 0,3.")
]
AllOption = Annotated[bool, typer.Option("--all", help="Every run of the plan.")]
SeedsOption = Annotated[
    int,
    typer.Option(
        "--seeds",
        min=1,
        metavar="N",
        help="Seeds train.seed to train.seed + N - 1; seed i lies in <train.dir>/seed<i>.",
    ),
]
