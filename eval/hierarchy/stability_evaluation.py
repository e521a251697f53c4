"""`hsae eval stability`: how alike the seeds of a run are. The result lies in the directory of the first seed."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import Tensor

from hsae.cache.errors import UserError
from hsae.eval.harness.envelope import hsae_version
from hsae.eval.harness.evaluation import Evaluation, Options, Result
from hsae.eval.harness.listener import Listener
from hsae.eval.harness.result_files import write_result
from hsae.eval.harness.tables import Table, spread_cell
from hsae.eval.harness.targets import Found, RunTarget, Selection
from hsae.eval.hierarchy.composition_file import FORMAT, read_composition, read_maps
from hsae.eval.hierarchy.stability import Agreement, Member, stability
from hsae.train.config.plan import Plan

FILE = Path("eval") / "stability.json"
READ_FROM = ("store", "corpus", "model", "read_from", "settings")
"""Inputs of composition that maps of several seeds must share."""


@dataclass(frozen=True, kw_only=True)
class SeedsTarget:
    """A run over several seeds."""

    members: tuple[RunTarget, ...]
    """The run of each seed."""

    @property
    def folder(self) -> Path:
        """Where the result goes."""
        return self.members[0].folder

    @property
    def label(self) -> str:
        """Short name for people."""
        return self.members[0].label

    @property
    def run_dir(self) -> Path:
        """The run of the first seed."""
        return self.members[0].run_dir

    @property
    def inputs(self) -> dict[str, Any]:
        """What the result depends on; it is made anew each time, so maps are not among it."""
        return {"hsae": hsae_version(), "models": [member.inputs["sae"] for member in self.members]}


class Stability(Evaluation[None, SeedsTarget]):
    """How alike a run's seeds are, beside what chance gives."""

    name = "stability"
    without = frozenset({"all_runs", "sae", "out", "force", "device"})
    default_seeds = 3

    @classmethod
    def packages(cls, options: Options) -> tuple[tuple[str, str, str], ...]:
        """Latents are matched by scipy."""
        return (("scipy", "scipy", "eval"),)

    @classmethod
    def open_store(cls, plan: Plan) -> None:
        """Nothing: trained models and the results of composition are read."""

    @classmethod
    def select(cls, plan: Plan, selection: Selection, listener: Listener) -> Sequence[SeedsTarget]:
        """The named runs. Raises UserError if none is named, or a seed has not been trained."""
        if selection.run is None:
            raise UserError("name the runs: --run 3")
        if selection.seeds < 2:
            raise UserError(f"stability compares two seeds or more, not --seeds {selection.seeds}")
        plans = [plan.seeded(index) for index in range(selection.seeds)]
        return [
            SeedsTarget(members=tuple(RunTarget.of(seeded, config) for seeded in plans))
            for config in plan.select(selection.run)
        ]

    def check(self, target: SeedsTarget) -> None:
        """Refuse seeds whose maps were read from different text. Raises UserError."""
        config = target.members[0].config
        if config.levels > 1 and len({_maps_of(member)[1] for member in target.members}) > 1:
            raise UserError(
                f"the maps of the seeds of run {target.label} were read off on different stores or settings, or not of "
                f"every seed; make them alike with: hsae eval composition --run {config.number} "
                f"--seeds {len(target.members)} --force"
            )

    def find(self, target: SeedsTarget) -> Found[dict[str, Any]]:
        """Where the result belongs; it is always made anew."""
        return Found(path=target.run_dir / FILE, result=None)

    def measure(self, target: SeedsTarget) -> dict[str, Any]:
        """The agreement of the seeds."""
        agreement = stability([_member(member) for member in target.members])
        return {"format": FORMAT, **target.inputs, "agreement": [item.model_dump() for item in agreement]}

    def write(self, path: Path, content: dict[str, Any]) -> Path:
        """Write the result file, atomically and with its checksum."""
        write_result(path, content)
        return path

    def tables(self, results: Sequence[Result[SeedsTarget]]) -> list[Table]:
        """Of each run every measure beside chance."""
        return [_table(result) for result in results]

    def notes(self, results: Sequence[Result[SeedsTarget]]) -> list[str]:
        """None."""
        return []


def _table(result: Result[SeedsTarget]) -> Table:
    title = f"run {result.label}, {len(result.target.members)} seeds"
    table = Table(title, ("measure", "level", "value", "sd over pairs", "chance", "z"))
    for entry in result.content["agreement"]:
        item = Agreement.model_validate(entry)
        sd = "" if item.sd is None else f"{item.sd:.3f}"
        z = "" if item.null.z is None else f"{item.null.z:+.1f}"
        chance = spread_cell(item.null.mean, item.null.sd, digits=3)
        table.add(item.name.replace("_", " "), str(item.level), f"{item.value:.3f}", sd, chance, z)
    return table


def _member(target: RunTarget) -> Member:
    """What is compared of a seed: directions, and maps as composition read them, or else as trained."""
    model, maps = target.load(), _maps_of(target)[0]
    directions = [model.directions(level) for level in range(1, target.config.levels + 1)]
    if maps is None:
        maps = {f"learned{part.level}": part.contributions for part in model.compositions}
    return directions, maps


def _maps_of(target: RunTarget) -> tuple[dict[str, Tensor] | None, tuple[str, ...] | None]:
    """(maps of this very model that composition has read, what from by READ_FROM); None if there are none."""
    composition, maps = read_composition(target.run_dir), read_maps(target.run_dir)
    if composition is None or maps is None or composition.inputs.get("sae") != target.inputs["sae"]:
        return None, None
    return maps, tuple(str(composition.inputs.get(key)) for key in READ_FROM)
