"""What a run is made of: the `[train]` and `[runs.N]` tables of a plan. Levels are given finest first."""

from collections.abc import Sequence
from itertools import pairwise
from typing import Annotated, Literal, Self

from pydantic import AfterValidator, Field, model_validator
from pydantic_core import PydanticCustomError

from hsae.cache.config import Config, NonNegative, Positive
from hsae.registry import ACTIVATIONS, LOSSES

Fraction = Annotated[float, Field(ge=0, le=1, strict=False)]


class StreamConfig(Config):
    """Keys of `[train]` that every run shares, because all runs read one stream."""

    dir: str = "runs"
    """Folder of the run directories."""
    tokens: int = Field(ge=1)
    """Tokens a run sees; more than the store holds means several epochs."""
    batch_tokens: int = Field(default=2048, ge=2)
    """Tokens a step; 2-4k is usual."""
    seed: int = Field(default=0, ge=0)
    """Order of the stream and, with a run's number, its initial weights; further seeds change the weights alone."""
    log_steps: int = Field(default=10, ge=1)
    """Steps between two lines of metrics.jsonl."""
    checkpoint_steps: int = Field(default=200, ge=1)
    """Steps between two checkpoints."""
    matched: bool = True
    """Refuse a plan whose runs differ in total width or total L0."""

    @property
    def steps(self) -> int:
        """Optimiser steps of a run."""
        return max(1, self.tokens // self.batch_tokens)


class CompositionConfig(Config):
    """How W_l, the map from level l-1's code to level l's, is learned."""

    mode: Literal["none", "normalised", "literal", "probe", "frozen"] = "none"
    """normalised: codes divided by their running rms, W >= 0, proximal L1. literal: ||W h_{l-1} - h_l||^2 + L1 in the
    loss. Controls: probe (as normalised, but neither code feels it) and frozen (as normalised, but W is random and
    never learns)."""
    weight: NonNegative = 0.1
    """Coefficient gamma of the composition loss once ramped up."""
    commitment: NonNegative = 0.1
    """Coefficient c that pulls level l's code towards its mixture (normalised mode)."""
    l1: NonNegative = 0.01
    """L1 penalty on W: proximal step per unit of learning rate (normalised), or coefficient in the loss (literal)."""


class Stage(Config):
    """One stretch of a curriculum: which levels learn, how fast, and whether composition is on."""

    name: str
    """What the log calls it."""
    until: Fraction
    """Share of the run's steps at which the stage ends."""
    levels: Annotated[tuple[int, ...], Field(strict=False, min_length=1)]
    """Levels that take part (1 is the finest)."""
    rates: dict[Annotated[int, Field(strict=False)], NonNegative] = Field(default_factory=dict)
    """Learning-rate multiplier of a level; 1 if not named, 0 freezes it."""
    warmup: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Levels whose learning rate warms up again from the stage's start; a level that joins always does."""
    refresh: Annotated[tuple[int, ...], Field(strict=False)] = ()
    """Levels whose optimiser state is forgotten at the stage's start."""
    composition: Literal["off", "ramp", "on"] = "off"
    """ramp goes linearly from 0 to the full weight over the stage."""
    sparsify: bool = False
    """Take the proximal L1 step on W."""


def _any_of(names: Sequence[str]) -> str:
    """`a, b or c`."""
    return " or ".join(filter(None, [", ".join(names[:-1]), names[-1]]))


def _registered(activation: str) -> str:
    if activation not in ACTIVATIONS:
        allowed = _any_of([repr(name) for name in ACTIVATIONS])
        raise PydanticCustomError("literal_error", "Input should be {allowed}", {"allowed": allowed})
    return activation


class RunConfig(Config):
    """One run of the plan: a model and how it is trained."""

    number: int = Field(ge=0)
    """The N of `[runs.N]`."""
    name: str = Field(pattern=r"^[a-z0-9][a-z0-9.-]*$")
    """What commands and tables call it: small letters, digits, `.` and `-`."""
    structure: Literal["flat", "stacked", "additive"]
    """flat: one level. stacked: level l reads level l-1's code. additive: every level reads the residual."""
    activation: Annotated[str, AfterValidator(_registered)] = "batchtopk"
    """One of the registry's: relu, topk, batchtopk, jumprelu, gated."""
    selection: Literal["level", "joint"] = "level"
    """level: each level keeps its own l0. joint: one BatchTopK over all levels keeps the sum of l0; without composition
    and curriculum that is a Matryoshka SAE (Bussmann et al. 2025, arXiv 2503.17547), each level an increment of its
    nested prefixes."""
    child_gate: bool = False
    """additive: a latent may fire only if its parent, the coarse latent with the largest share of it in W, does. It
    begins when composition is fully on; latents without a parent are free."""
    widths: Annotated[tuple[Annotated[int, Field(ge=1)], ...], Field(strict=False, min_length=1)]
    """Latents of each level, strictly falling."""
    l0: Annotated[tuple[Positive, ...], Field(strict=False, min_length=1)]
    """Active latents per token of each level: k of topk and batchtopk, a controller's target for others."""
    level_weights: Annotated[tuple[NonNegative, ...], Field(strict=False)] | None = None
    """Weight of each level's reconstruction loss; 1 each if not given."""
    stop_gradient: bool = True
    """stacked: level l's losses don't reach level l-1's weights."""
    composition: CompositionConfig = CompositionConfig()
    curriculum: Literal["none", "coarse-first", "fine-first"] | Annotated[tuple[Stage, ...], Field(strict=False)] = (
        "none"
    )
    """A packaged schedule, or stages of one's own."""
    learning_rate: Positive | Literal["auto"] = "auto"
    """auto: 2e-4 * sqrt(2^14 / total width)."""
    warmup_steps: int = Field(default=1000, ge=0)
    """Linear warm-up, at the start and for a level when it joins; at most a tenth of the run."""
    decay: Fraction = 0.2
    """Share of the run at its end over which the learning rate falls linearly to 0."""
    gradient_clip: Positive = 1.0
    """Largest norm of the gradient."""
    precision: Literal["auto", "bfloat16", "float32"] = "auto"
    """Type of the matrix products; weights and optimiser stay float32. auto: bfloat16 where that is fast."""
    losses: dict[str, NonNegative] = Field(default_factory=dict, exclude_if=lambda losses: not losses)
    """Weights of further losses of the registry, or other weights of those that every run has, by name."""
    aux_weight: NonNegative = 1 / 32
    """Weight of the auxiliary loss that revives dead latents (AuxK); 0 turns it off."""
    aux_latents: int = Field(default=512, ge=1)
    """Dead latents that take part in a vector's auxiliary reconstruction, at most half the input width."""
    dead_after_tokens: int = Field(default=1_000_000, ge=1)
    """A latent that did not fire for so many tokens is dead."""
    resample_steps: int = Field(default=0, ge=0)
    """Give dead latents new directions every so many steps (Bricken et al. 2023), until the rate falls; 0 never."""
    sparsity_start: Positive = 1e-3
    """relu, jumprelu, gated: the sparsity coefficient that the controller starts from."""
    bandwidth: Positive = 0.05
    """jumprelu: width of the kernel that carries gradients to the thresholds, in units of the scaled residual."""

    @property
    def levels(self) -> int:
        """Number of levels L."""
        return len(self.widths)

    @property
    def rate(self) -> float:
        """The learning rate at its peak."""
        if self.learning_rate != "auto":
            return self.learning_rate
        return float(2e-4 * (2**14 / sum(self.widths)) ** 0.5)

    @model_validator(mode="after")
    def _consistent(self) -> Self:
        levels, activation = self.levels, ACTIVATIONS[self.activation]
        if (self.structure == "flat") != (levels == 1):
            raise ValueError(
                f"structure {self.structure!r} with {levels} width(s) {list(self.widths)}: "
                "flat has one level, stacked and additive two or more"
            )
        if len(self.l0) != levels:
            raise ValueError(f"l0 has {len(self.l0)} value(s) for {levels} width(s)")
        if self.level_weights is not None and len(self.level_weights) != levels:
            raise ValueError(f"level_weights has {len(self.level_weights)} value(s) for {levels} width(s)")
        if any(coarse >= fine for fine, coarse in pairwise(self.widths)):
            raise ValueError(f"widths {list(self.widths)} must fall strictly: level 1 is the finest and widest")
        for level, (width, l0) in enumerate(zip(self.widths, self.l0, strict=True), 1):
            if l0 >= width:
                raise ValueError(f"level {level}: l0 {l0:g} must be below its width {width}")
            if activation.needs_whole_l0 and l0 != int(l0):
                raise ValueError(f"level {level}: {self.activation} needs a whole number for l0, not {l0:g}")
        if activation.is_flat_only and levels > 1:
            others = _any_of([name for name, other in ACTIVATIONS.items() if not other.is_flat_only])
            raise ValueError(f"activation {self.activation!r} is for flat runs; levels use {others}")
        if unknown := sorted(self.losses.keys() - LOSSES.keys()):
            raise ValueError(f"there is no loss {unknown[0]!r}; there are {', '.join(LOSSES)}")
        further = [name for name, weight in self.losses.items() if weight and not LOSSES[name].is_standard]
        if self.losses.get("reconstruction") == 0 and not further:
            raise ValueError("losses: without reconstruction there is nothing to train; give another loss a weight")
        if self.selection == "joint" and (self.structure != "additive" or self.activation != "batchtopk"):
            raise ValueError("selection 'joint' needs structure 'additive' and activation 'batchtopk'")
        mapped = self.structure == "additive" and self.composition.mode != "none"
        if self.child_gate and (not mapped or self.selection == "joint"):
            raise ValueError("child_gate needs structure 'additive', a composition mode, and selection 'level'")
        if levels == 1 and self.composition.mode != "none":
            raise ValueError("composition needs two levels or more")
        if levels == 1 and self.curriculum != "none":
            raise ValueError("a curriculum needs two levels or more")
        if isinstance(self.curriculum, tuple):
            self._check_stages(self.curriculum)
        return self

    def _check_stages(self, stages: tuple[Stage, ...]) -> None:
        ends = [stage.until for stage in stages]
        if not ends or ends[-1] != 1 or any(a >= b for a, b in pairwise(ends)):
            raise ValueError(f"curriculum stages end at {ends}: `until` must rise and the last must be 1.0")
        for stage in stages:
            named = (*stage.levels, *stage.rates, *stage.warmup, *stage.refresh)
            if unknown := [level for level in named if not 1 <= level <= self.levels]:
                raise ValueError(
                    f"curriculum stage {stage.name!r} names level(s) {unknown}; this run has 1 to {self.levels}"
                )
            if len(set(stage.levels)) != len(stage.levels):
                raise ValueError(f"curriculum stage {stage.name!r} names a level twice: {list(stage.levels)}")
            if all(stage.rates.get(level, 1.0) == 0 for level in stage.levels):
                raise ValueError(f"in curriculum stage {stage.name!r} no level learns: every rate is 0")
        if set(stages[-1].levels) != set(range(1, self.levels + 1)):
            raise ValueError(f"the last curriculum stage must train all {self.levels} levels")
