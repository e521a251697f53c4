"""`hsae eval synthetic`."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer
from rich import get_console

from hsae.cli.common import DeviceOption, RunOption, SetOption, check_folder, say
from hsae.cli.evaluations import ForceOption, Screen, draw
from hsae.eval.harness.options import OUT

if TYPE_CHECKING:
    from hsae.eval.synthetic.compared_runs import Arms
    from hsae.train.config.run_config import RunConfig


def synthetic(
    tier: Annotated[str, typer.Option("--tier", help="T1, T2, T3 (1,024 features), or T3-full (16,384).")] = "T2",
    run: RunOption = None,
    seeds: Annotated[int, typer.Option("--seeds", min=1, max=1000, help="Seeds of each arm, from 0.")] = 3,
    tokens: Annotated[int | None, typer.Option("--tokens", min=1, help="Vectors an arm is trained on.")] = None,
    overrides: SetOption = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for the results.")] = OUT / "synthetic",
    force: ForceOption = False,
    device: DeviceOption = "auto",
) -> None:
    """Train every arm of the run plan on synthetic data, and score it against the true features and the true tree.

    Nothing has to be cached. Results are kept seed by seed; a stopped command goes on where it was.

    Example: hsae eval synthetic --tier T2 --run full,batchtopk
    """
    from hsae.eval.synthetic.compared_runs import load_arms

    check_folder(out)
    arms = load_arms(tier, overrides or (), tokens=tokens)
    selected = None if run is None else arms.select(run)
    evaluate_on_screen(arms, selected, seeds, out, force=force, device=device)


def evaluate_on_screen(
    arms: "Arms",
    runs: "Sequence[RunConfig] | None",
    seeds: int,
    out: Path,
    *,
    force: bool = False,
    device: str = "auto",
) -> None:
    """Train and score runs on a tier of synthetic data, and show their scores."""
    from hsae.eval.synthetic.synthetic_evaluation import evaluate_synthetic

    with Screen("synthetic") as screen:
        result = evaluate_synthetic(arms, runs, range(seeds), folder=out, force=force, device=device, listener=screen)
    say(result.title)
    for table in result.tables():
        get_console().print(draw(table))
    for failure in result.failures():
        say(failure, style="yellow")
    say("results in ", (str(result.path), "bold"))
