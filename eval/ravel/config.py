"""The `[ravel]` table of a plan."""

from pydantic import Field

from hsae.cache.config import Positive, ProperFraction
from hsae.cache.suites.specs import EntitiesConfig, RavelSpec
from hsae.train.config.plan import Plan


class RavelConfig(EntitiesConfig):
    """The `[ravel]` table: entities, and how latents are chosen that carry an attribute of them.

    The defaults are SAEBench's.
    """

    pairs: int = Field(default=5000, ge=8)
    """Pairs of prompts of each attribute that should change its answer; as many that should not."""
    train_share: ProperFraction = 0.7
    """Share of the pairs (SAEBench's numbers) or of the entities (hsae's) that the mask is trained on; the
    others test it.
    """
    batch_pairs: int = Field(default=8, ge=1)
    """Pairs of one optimiser step. SAEBench: 8 for Gemma; it changes the result."""
    epochs: int = Field(default=2, ge=1)
    """Passes over the pairs in which the mask of latents is learned."""
    learning_rate: Positive = 1e-3
    """Of that mask."""
    least_ceiling: float = Field(default=0.2, ge=0, le=1, strict=False)
    """Refuse a hook at which exchanging the whole residual of the entity changes fewer answers than this share."""
    seed: int = Field(default=42, ge=0)
    """Of pairs and splits."""


def ravel_spec(plan: Plan) -> RavelSpec:
    """RAVEL's store of a plan."""
    data = plan.table(RavelConfig).model_dump(include=set(EntitiesConfig.model_fields))
    return RavelSpec(model=plan.model, hooks=plan.hook.names, data=EntitiesConfig(**data))
