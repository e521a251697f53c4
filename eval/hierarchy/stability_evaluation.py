"""`hsae eval stability`: how alike the seeds of a run are. The result lies in the directory of the first seed."""

from collections.abc import Sequence
from typing import Any

from pydantic import Field
from torch import Tensor

from hsae.cache.errors import UserError
from hsae.eval.harness.evaluation import Result
from hsae.eval.harness.options import Options
from hsae.eval.harness.result_files import hsae_version
from hsae.eval.harness.run_evaluation import RunEvaluation
from hsae.eval.harness.tables import Table, spread_cell
from hsae.eval.harness.targets import ResultPlace, RunTarget
from hsae.eval.hierarchy.composition_file import FORMAT, read_composition, read_maps
from hsae.eval.hierarchy.stability import Agreement, Member, stability
from hsae.train.config.plan import Plan

READ_FROM = ("store", "corpus", "model", "read_from", "settings")
"""Inputs of composition that maps of several seeds must share."""


class StabilityOptions(Options):
    """Options of `hsae eval stability`."""

    seeds: int = Field(
        default=3, ge=2, le=1000, description="Seeds that are compared: seed i lies in <train.dir>/seed<i>."
    )


class Stability(RunEvaluation[None]):
    """How alike a run's seeds are, beside what chance gives."""

    name, file = "stability", "stability.json"
    options_kind = StabilityOptions
    without = RunEvaluation.without | {"force", "device"}

    @classmethod
    def packages(cls, options: StabilityOptions) -> tuple[tuple[str, str, str], ...]:
        """Latents are matched by scipy."""
        return (("scipy", "scipy", "eval"),)

    @classmethod
    def open_store(cls, plan: Plan) -> None:
        """Nothing: trained models and the results of composition are read."""

    def check(self, target: RunTarget) -> None:
        """Refuse a seed that was not trained, and seeds whose maps were read from different text. Raises UserError."""
        sources = {_read_maps(seed)[1] for seed in self._seeds(target)}
        if len(sources) > 1 and target.config.levels > 1:
            raise UserError(
                f"the maps of the seeds of run {target.label} were read off on different stores or settings, or not of "
                f"every seed; make them alike with: hsae eval composition --run {target.config.number} "
                f"--seeds {self.options.seeds} --force"
            )

    def _seeds(self, target: RunTarget) -> list[RunTarget]:
        return [RunTarget.of(target.plan.seeded(index), target.config) for index in range(self.options.seeds)]

    def find(self, target: RunTarget) -> ResultPlace:
        """Where the result belongs; it is always made anew."""
        return ResultPlace(target.folder / self.file)

    def measure(self, target: RunTarget) -> dict[str, Any]:
        """The agreement of the seeds."""
        seeds = self._seeds(target)
        agreement = stability([_member(seed) for seed in seeds])
        return {
            "format": FORMAT,
            "hsae": hsae_version(),
            "models": [seed.inputs["sae"] for seed in seeds],
            "agreement": [item.model_dump() for item in agreement],
        }

    def tables(self, results: Sequence[Result[RunTarget]]) -> list[Table]:
        """Of each run every measure beside chance."""
        return [self._table(result) for result in results]

    def _table(self, result: Result[RunTarget]) -> Table:
        columns = ("measure", "level", "value", "sd over pairs", "chance", "z")
        table = Table(f"run {result.label}, {self.options.seeds} seeds", columns)
        for item in map(Agreement.model_validate, result.content["agreement"]):
            sd = "" if item.sd is None else f"{item.sd:.3f}"
            z = "" if item.null.z is None else f"{item.null.z:+.1f}"
            chance = spread_cell(item.null.mean, item.null.sd, digits=3)
            table.add(item.name.replace("_", " "), str(item.level), f"{item.value:.3f}", sd, chance, z)
        return table


def _member(target: RunTarget) -> Member:
    """What is compared of a seed: directions, and maps as composition read them, or else as trained."""
    model, maps = target.load(), _read_maps(target)[0]
    directions = [model.directions(level) for level in range(1, target.config.levels + 1)]
    return directions, maps or {f"learned{part.level}": part.contributions for part in model.compositions}


def _read_maps(target: RunTarget) -> tuple[dict[str, Tensor], tuple[str, ...] | None]:
    """(maps of this very model that composition has read, what from by READ_FROM); ({}, None) if there are none."""
    composition, maps = read_composition(target.run_dir), read_maps(target.run_dir)
    if composition is None or maps is None or composition.inputs.get("sae") != target.inputs["sae"]:
        return {}, None
    return maps, tuple(str(composition.inputs.get(key)) for key in READ_FROM)
