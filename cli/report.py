"""`hsae report`."""

from pathlib import Path
from typing import Annotated

import typer

from hsae.cli.common import AllOption, PlanOption, RunOption, SetOption, check_folder, named_runs, say, waiting

MOST_TOLD = 12  # lines of what the report lacks


def report(
    run: RunOption = None,
    all_runs: AllOption = False,
    plan: PlanOption = None,
    overrides: SetOption = None,
    compare: Annotated[
        list[Path] | None,
        typer.Option(
            "--compare",
            metavar="FILE",
            help="A core result written by SAEBench, old or new, as a further row. Repeatable.",
        ),
    ] = None,
    out: Annotated[Path, typer.Option("--out", help="Folder for index.html, report.md and summary.png.")] = Path(
        "report"
    ),
) -> None:
    """Put the runs side by side in one self-contained HTML page and a Markdown table.

    Example: hsae report --compare other_eval_results.json
    """
    from hsae.cache.errors import UserError
    from hsae.train.config.plan import load_plan
    from hsae.train.runs.run_directory import read_run

    check_folder(out)
    loaded = load_plan(plan, overrides or ())
    run = named_runs(loaded, run, all_runs)
    selected = loaded.select(run) if run is not None else list(loaded.runs.values())
    for config in selected if run is not None and not all_runs else ():
        if read_run(loaded.run_dir(config)) is None:
            raise UserError(
                f"run {loaded.label(config)} of plan {loaded.name} has not been trained in {loaded.run_dir(config)}; "
                f"train it with: hsae train --run {config.number}"
            )

    from hsae.cache.config import at_commit
    from hsae.cache.language_model.lm import load_tokenizer
    from hsae.cache.reading.provenance import check_tokenizer
    from hsae.cache.reading.store import ActivationStore
    from hsae.eval.report.page import write_report
    from hsae.eval.unlearning.config import SIDES

    store = tokenizer = None
    try:
        store = ActivationStore.of(loaded.store("eval"), loaded.cache.dir)
        tokenizer = load_tokenizer(at_commit(loaded.model, store.header.model_commit))
        check_tokenizer(store.root, store.header, tokenizer)
    except UserError as error:
        tokenizer = None
        say(f"no contexts in this report: {error}", style="yellow")
    run_dirs = [loaded.run_dir(config) for config in selected]
    absent: list[str] = []
    with waiting("report") as tell:
        path = write_report(
            run_dirs,
            out,
            compare=compare or (),
            specs={split: loaded.asked(split) for split in ("eval", *SIDES)},
            store=store,
            tokenizer=tokenizer,
            progress=lambda text: tell(f"report: {text}"),
            say=absent.append,
        )
    for text in absent[:MOST_TOLD]:
        say(text, style="yellow")
    if len(absent) > MOST_TOLD:
        say(f"and {len(absent) - MOST_TOLD} more such lines, which are in the page", style="yellow")
    say("report: ", (str(path), "bold"), f", table: {path.with_name('report.md')}")
