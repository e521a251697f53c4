"""What a caller may choose of an evaluation. Light, because the command line derives its options from these classes."""

from pathlib import Path

from pydantic import BaseModel, ConfigDict, Field

OUT = Path("eval_results")  # for results of SAEs that belong to no run


class Options(BaseModel):
    """What a caller may choose of one evaluation. Each field is an option of its command, its description the help."""

    model_config = ConfigDict(extra="forbid", frozen=True)


class DrawOptions(Options):
    """Options of evaluations that draw texts or entities at random."""

    draws: int = Field(
        default=5, ge=1, le=1000, description="Seeds of the evaluation's own draws: what intervals span."
    )
