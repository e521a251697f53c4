"""Progressive layer addition: which levels learn when (declared stages, in either order)."""

from dataclasses import dataclass

from hsae.train.config.run_config import RunConfig, Stage


def stages(run: RunConfig) -> tuple[Stage, ...]:
    """The stages of a run; a run without a curriculum has one stage in which everything learns."""
    everything = tuple(range(1, run.levels + 1))
    if isinstance(run.curriculum, tuple):
        return run.curriculum
    if run.curriculum != "none":
        return _progressive(everything[::-1] if run.curriculum == "coarse-first" else everything)
    if run.composition.mode == "none":
        return (Stage(name="joint", until=1.0, levels=everything),)
    return (
        Stage(name="joint", until=0.2, levels=everything),
        Stage(name="joint, composition ramp", until=0.4, levels=everything, composition="ramp"),
        Stage(name="joint, sparse composition", until=1.0, levels=everything, composition="on", sparsify=True),
    )


def _progressive(order: tuple[int, ...]) -> tuple[Stage, ...]:
    """One level alone until 30 %, the others added one after the other until 40 %, then all together.

    A joining level warms up alone while those before it stand still; they are freed at 40 %, when composition ramps up
    to 60 %. The proximal step thins W from 60 % on. For two levels this is the schedule 30 / 40 / 60 / 80 / 100.
    """
    joins = (
        Stage(
            name=f"level {order[count]} joins",
            until=0.3 + 0.1 * count / (len(order) - 1),
            levels=order[: count + 1],
            rates=dict.fromkeys(order[:count], 0.0),
        )
        for count in range(1, len(order))
    )
    return (
        Stage(name=f"level {order[0]} alone", until=0.3, levels=order[:1]),
        *joins,
        Stage(name="all levels, composition ramp", until=0.6, levels=order, composition="ramp"),
        Stage(name="all levels, sparse composition", until=0.8, levels=order, composition="on", sparsify=True),
        Stage(name="decay", until=1.0, levels=order, composition="on", sparsify=True),
    )


@dataclass(frozen=True)
class Moment:
    """What holds at one optimiser step."""

    stage: Stage
    composition: float
    """Share of the composition weight that is on, 0 to 1."""
    starts: bool
    """Whether this is the stage's first step."""
    warmup_starts: dict[int, int]
    """For each active level the step from which its learning rate warms up: when it joined, or a stage said so last."""


class Curriculum:
    """The stages of a run laid over its steps."""

    def __init__(self, run: RunConfig, steps: int) -> None:
        self.stages = stages(run)
        self.ends = [max(1, round(stage.until * steps)) for stage in self.stages]
        self.ends[-1] = steps

    def at(self, step: int) -> Moment:
        """The moment at `step` (0-based)."""
        index = next((i for i, end in enumerate(self.ends) if step < end), len(self.ends) - 1)
        stage = self.stages[index]
        start = self.ends[index - 1] if index else 0
        ramp = (step + 1 - start) / max(1, self.ends[index] - start)
        share = {"off": 0.0, "on": 1.0, "ramp": ramp}[stage.composition]
        warmup_starts = {}
        for level in stage.levels:
            first = next(i for i, earlier in enumerate(self.stages) if level in earlier.levels)
            again = [i for i, earlier in enumerate(self.stages[: index + 1]) if level in earlier.warmup]
            last = max([first, *again])
            warmup_starts[level] = self.ends[last - 1] if last else 0
        return Moment(stage, min(1.0, share), step == start, warmup_starts)
