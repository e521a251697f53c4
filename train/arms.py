"""The arms that are compared on synthetic worlds: `synthetic.toml` read for one tier.

A tier says how many latents there are in all. How they, and the active ones, are split is one rule for every tier, set down
before any tier was trained and blind to its truth:
- a quarter of the latents is coarse (each further level a quarter of the one below);
- 5 % of the latents are active, in all arms alike;
- the levels share them evenly. In a tree an active child brings an active parent, one for one, so that every level has as much
  to say of a vector as the next; a split in proportion to width, which the levels' sizes may suggest, starves the coarse one.
"""

import tomllib
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hsae.train.config import RunConfig, StreamConfig
from hsae.train.plan import apply_override, checked_runs, select_runs
from hsae.train.synthetic import Tier, tier_named

SOURCE = "the synthetic arms"
ACTIVE = 0.05
COARSE = 0.25


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The arms of one tier and the stream they share."""

    tier: Tier
    train: StreamConfig
    runs: dict[int, RunConfig]

    def select(self, text: str) -> list[RunConfig]:
        """Arms named by `3`, `0-5`, `baseline` or a comma-separated list of those, in the order of their numbers."""
        return select_runs(self.runs, text, SOURCE)


def load_arms(tier: str, overrides: Sequence[str] = ()) -> Arms:
    """Read the packaged arms for a tier and apply `key=value` overrides (`train.` and `runs.`). Raises UserError."""
    world = tier_named(tier)
    tables: dict[str, Any] = tomllib.loads(resources.files("hsae.train").joinpath("synthetic.toml").read_text())
    tables["train"] |= tables["tiers"].get(tier, {})
    for override in overrides:
        apply_override(tables, override, ("train", "runs"))
    for table in (table for table in tables["runs"].values() if isinstance(table, dict)):
        levels = 1 if table.get("structure") == "flat" else 2
        table.setdefault("widths", split_widths(world.latents, levels))
        table.setdefault("l0", [ACTIVE * world.latents / levels] * levels)
    stream, runs = checked_runs(SOURCE, tables["train"], tables["runs"])
    return Arms(tier=world, train=stream, runs=runs)


def split_widths(latents: int, levels: int) -> list[int]:
    """Widths of `levels` levels, finest first: the coarser ones together get a quarter, and so on."""
    widths = []
    for _ in range(levels - 1):
        coarser = round(COARSE * latents)
        widths.append(latents - coarser)
        latents = coarser
    return [*widths, latents]
