"""`hsae cache`: build, info, verify, ls."""

from collections.abc import Sequence
from typing import TYPE_CHECKING, Annotated, Literal

import typer
from rich import get_console
from rich.table import Table
from rich.text import Text

from hsae.cli.common import DeviceOption, PlanOption, ProfileOption, SetOption, profile, say
from hsae.cli.evaluations import Screen

if TYPE_CHECKING:
    from hsae.cache.building.estimate import Estimate
    from hsae.cache.config import Split
    from hsae.train.config.plan import Plan

app = typer.Typer(no_args_is_help=True)
OWN_STORES: "dict[str, tuple[Split, ...]]" = {"unlearning": ("forget", "retain"), "autointerp": ("autointerp",)}
StoreArgument = Annotated[str, typer.Argument(metavar="STORE", help="Directory or URL of a store.")]


@app.command()
def build(
    plan: PlanOption = None,
    overrides: SetOption = None,
    split: Annotated[
        Literal["train", "eval", "both"] | None, typer.Option("--split", help="Which store; default both.")
    ] = None,
    suite: Annotated[
        Literal["sparse-probing", "scr", "tpp", "absorption", "ravel", "all", "unlearning", "autointerp"] | None,
        typer.Option(
            "--suite",
            help="What an evaluation of the suite needs instead: labelled texts and words (all: of the first four, "
            "see [suite] in the plan), entities and their attributes for ravel ([ravel]), forget and retain text for "
            "unlearning, or the text of autointerp (the evaluation store, or [autointerp.text]).",
        ),
    ] = None,
    device: DeviceOption = "auto",
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show sizes and estimated time, and stop.")] = False,
    trace: ProfileOption = None,
) -> None:
    """Run the language model once over the plan's text and write its activation stores.

    Interrupted at any moment, the same command goes on where it was. Under torchrun or Slurm the workers share the
    chunks.

    Example: hsae cache build --plan gemma-3-270m
    """
    from hsae.cache.errors import UserError
    from hsae.train.config.plan import load_plan

    if suite is not None and split is not None:
        raise UserError(f"--split {split} doesn't go with --suite {suite}, which has stores of its own")
    if suite is not None and trace is not None:
        raise UserError("--profile doesn't go with --suite; it traces how activation stores are built")
    loaded = load_plan(plan, overrides or ())
    if suite is not None and suite not in OWN_STORES:
        return _build_suites(loaded, suite, device, dry_run=dry_run)
    splits = OWN_STORES[suite] if suite else ("eval", "train") if split is None or split == "both" else (split,)
    with profile(trace, "build"):
        build_on_screen(loaded, splits, device, dry_run=dry_run)


def _build_suites(plan: "Plan", suite: str, device: str, *, dry_run: bool) -> None:
    """Make the store of labelled texts, words or entities of one suite, or with `all` of the first four."""
    from hsae.cache.device import pick_device
    from hsae.cache.errors import UserError
    from hsae.cache.suites.build import build_suites
    from hsae.cache.suites.ravel_store import RavelStore
    from hsae.cache.suites.specs import SUITES, RavelSpec, SuiteSpec
    from hsae.eval.probing.config import probe_spec
    from hsae.eval.ravel.config import ravel_spec
    from hsae.eval.ravel.ravel_runs import describe_store

    chosen = pick_device(device)
    if dry_run:
        raise UserError("--dry-run doesn't go with --suite: what the texts come to is known once they are read")
    specs: list[SuiteSpec] = [probe_spec(plan, name) for name in SUITES if suite in (name, "all")]
    if suite == "ravel":
        specs = [ravel_spec(plan)]
    with Screen("texts") as screen:
        paths = build_suites(specs, plan.cache.dir, device=chosen, progress=screen.progress, say=say)
    for spec, path in zip(specs, paths, strict=True):
        if isinstance(spec, RavelSpec):
            say(describe_store(RavelStore(spec, plan.cache.dir)))
        say(f"{spec.suite} store: ", (str(path), "bold"))


def build_on_screen(plan: "Plan", splits: "Sequence[Split]", device: str, *, dry_run: bool = False) -> None:
    """Say what the plan's stores of these splits take, and make them unless it is a `dry_run`."""
    from hsae.cache.device import pick_device
    from hsae.cache.launcher import share
    from hsae.cache.progress import bars
    from hsae.train.stores import plan_stores

    chosen = pick_device(device)
    planned = plan_stores(plan, splits, chosen)
    for warning in planned.warnings:
        say(warning, style="yellow")
    get_console().print(_sizes(planned.estimates, plan.name, chosen))
    if dry_run:
        return planned.check(say)
    with bars(get_console()) as progress:
        stores = planned.build(progress=progress, say=say, share=share())
    for store in stores:
        say(f"{store.spec.split} store: ", (str(store.root), "bold"))


def _sizes(estimates: "list[Estimate]", plan: str, device: str) -> Table:
    from hsae.cache.progress import format_bytes

    model = estimates[0].spec.model
    table = Table(title=f"plan {plan}, {model.id} in {model.dtype} on {device}")
    for column in ("store", "state", "rows", "tokens", "on disk", "free", "model", "time, about"):
        table.add_column(column, justify="left" if column in ("store", "state") else "right", no_wrap=True)
    for item in estimates:
        spec = item.spec
        table.add_row(
            f"{spec.split}, {len(spec.hooks)} hook{'s' if len(spec.hooks) > 1 else ''}",
            item.state,
            f"{spec.rows:,}",
            f"{spec.rows * spec.context:,}",
            format_bytes(item.bytes),
            format_bytes(item.free_bytes),
            format_bytes(item.model_bytes),
            "-" if item.state == "complete" else _duration(item.seconds),
        )
    return table


def _duration(seconds: float | None) -> str:
    if seconds is None:
        return "?"
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"


@app.command()
def info(store: StoreArgument) -> None:
    """Show what a store holds and what it was made from.

    Example: hsae cache info activations/gemma-3-270m-train-0123456789abcdef.zarr
    """
    from hsae.cache.reading.store import ActivationStore

    opened = ActivationStore.open(store, require_complete=False)
    table = Table(title=str(opened.root), show_header=False)
    for key, value in opened.describe().items():
        table.add_row(key, value)
    get_console().print(table)


@app.command()
def verify(
    store: StoreArgument,
    repair: Annotated[bool, typer.Option("--repair", help="Make damaged and missing files again.")] = False,
    device: DeviceOption = "auto",
) -> None:
    """Read every file of a store anew and check it; name what is damaged. Status 1 if something is (still) wrong.

    Example: hsae cache verify activations/gemma-3-270m-train-0123456789abcdef.zarr --repair
    """
    from hsae.cache.building.repair import repair as repair_store
    from hsae.cache.building.verification import verify as verify_store
    from hsae.cache.device import pick_device
    from hsae.cache.errors import UserError
    from hsae.cache.format.layout import is_sealed
    from hsae.cache.progress import bars
    from hsae.cache.storage.paths import place
    from hsae.cache.storage.retry import redact

    if device != "auto" and not repair:
        raise UserError(f"--device {device} says where --repair computes; it doesn't go without it")
    with bars(get_console()) as progress:
        damages = verify_store(store, progress)
    for damage in damages:
        say(("damaged", "red"), f" {damage.path} {damage.problem}")
    unsealed = not is_sealed(place(store))
    if repair and (damages or unsealed):
        left = repair_store(store, damages, device=pick_device(device), say=say)
        get_console().print(f"{len(damages) - len(left)} of {len(damages)} damaged files repaired")
        damages = left
    elif damages:
        say(f"{len(damages)} damaged; mend with: hsae cache verify {redact(store)} --repair")
    else:
        get_console().print("all chunks are whole")
        if unsealed:
            say(
                "but an older hsae made this store, whose header has no checksum: a digit that changed in it is not "
                f"noticed. If it is right, give it one with: hsae cache verify {redact(store)} --repair"
            )
    if damages:
        raise typer.Exit(1)


@app.command("ls")
def list_stores(
    folder: Annotated[
        str | None, typer.Argument(help="Folder or URL of stores; default: the plan's cache.dir.")
    ] = None,
    plan: PlanOption = None,
    overrides: SetOption = None,
) -> None:
    """List the stores in a folder: activations, and what evaluations are made from.

    Example: hsae cache ls
    """
    from hsae.cache.errors import UserError
    from hsae.cache.progress import format_bytes
    from hsae.cache.storage.paths import place
    from hsae.cache.suites.catalogue import list_stores as stores_of
    from hsae.train.config.plan import load_plan

    if folder is not None and (plan is not None or overrides):
        raise UserError("FOLDER says what to list; it doesn't go with --plan or --set")
    home = folder or load_plan(plan, overrides or ()).cache.dir
    table = Table(title=str(place(home)))
    for column in ("store", "state", "model", "hooks", "rows or texts", "size"):
        table.add_column(column, overflow="fold")
    for store in stores_of(home):
        if store.problem:
            table.add_row(store.name, Text(store.problem, "red"), "", "", "", "")
        else:
            state = "complete" if store.is_complete else "not finished"
            cells = (store.model, ", ".join(store.hooks), f"{store.count:,}", format_bytes(store.bytes))
            table.add_row(store.name, state, *cells)
    get_console().print(table)
