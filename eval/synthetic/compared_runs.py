"""The arms that are compared on synthetic worlds: runs 0 to 13 of the default plan, with the sizes of one tier.

A tier says how many latents there are in all. How they, and the active ones, are split is one rule for every tier,
set down before any tier was trained and blind to its truth:
- a quarter of the latents is coarse (each further level a quarter of the one below);
- 5 % of the latents are active, in all arms alike;
- the levels share them evenly. In a tree an active child brings an active parent, one for one, so that every level has
  as much to say of a vector as the next; a split in proportion to width starves the coarse one.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from importlib import resources
from typing import Any

from hsae.cache.errors import UserError
from hsae.cache.files import parse_toml
from hsae.eval.synthetic.worlds import TIERS, Tier
from hsae.train.config.plan import DEFAULT_PLAN, apply_override, checked_runs, read_tables, select_runs
from hsae.train.config.run_config import RunConfig, StreamConfig

SOURCE = "the synthetic arms"
ACTIVE = 0.05
COARSE = 0.25
LEVELS = 2
NUMBERS = range(14)


@dataclass(frozen=True, kw_only=True)
class Arms:
    """The arms of one tier and the stream they share."""

    tier: Tier
    train: StreamConfig
    runs: dict[int, RunConfig]

    def select(self, text: str) -> list[RunConfig]:
        """Arms named by `3`, `0-5`, `baseline` or a comma-separated list of those, in the order of their numbers."""
        return select_runs(self.runs, text, SOURCE)


def load_arms(tier: str, overrides: Sequence[str] = (), *, tokens: int | None = None) -> Arms:
    """The packaged arms for a tier, with `key=value` overrides (`train.` and `runs.`) applied. Raises UserError.

    `tokens` is how many vectors each is trained on, if not as many as the tier says.
    """
    if tokens is not None:
        if any(value.strip().startswith("train.tokens") for value in overrides):
            raise UserError("--tokens and --set train.tokens exclude each other")
        overrides = [*overrides, f"train.tokens={tokens}"]
    if tier not in TIERS:
        raise UserError(f"no tier {tier!r}; there are {', '.join(TIERS)}")
    latents = TIERS[tier].latents
    packaged = parse_toml(resources.files("hsae.eval.synthetic").joinpath("synthetic.toml").read_bytes())
    planned = read_tables(DEFAULT_PLAN)[1]["runs"]
    tables: dict[str, Any] = {
        "train": packaged["train"] | packaged["tiers"].get(tier, {}),
        "runs": {str(number): planned[str(number)] for number in NUMBERS},
    }
    for run in tables["runs"].values():
        levels = 1 if run["structure"] == "flat" else LEVELS
        run |= {"widths": split_widths(latents, levels), "l0": [ACTIVE * latents / levels] * levels}
    for override in overrides:
        apply_override(tables, override, tables)
    stream, runs = checked_runs(SOURCE, tables["train"], tables["runs"])
    return Arms(tier=TIERS[tier], train=stream, runs=runs)


def split_widths(latents: int, levels: int) -> list[int]:
    """Widths of `levels` levels, finest first: the coarser ones together get a quarter, and so on."""
    widths = []
    for _ in range(levels - 1):
        coarser = round(COARSE * latents)
        widths.append(latents - coarser)
        latents = coarser
    return [*widths, latents]
