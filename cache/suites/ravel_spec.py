"""What determines the store of RAVEL: entities whose attributes a language model is asked for. Frozen models, checked when they are made."""

from typing import Annotated

from pydantic import Field

from hsae.cache.format.spec import Config, ModelConfig
from hsae.cache.storage.paths import Place
from hsae.cache.suites.suite_spec import PROBE_FORMAT, content_key, model_slug, probe_folder


class EntitiesConfig(Config):
    """The part of the `[ravel]` table that the store depends on."""

    entities: str = Field(default="saebench", min_length=1)
    """`saebench` (RAVEL's cities and Nobel prize winners, on the hub), `facts` (countries and cities that come with hsae), a TOML file
    with [[entity]] tables, or a folder with RAVEL's own JSON files."""
    revision: str | None = None
    """Hub revision of `saebench`; None is the newest. The commit that was read is recorded."""
    top_entities: int = Field(default=500, ge=4)
    """Entities of a type that are kept: those with the most prompts answered right."""
    min_prompts: int = Field(default=20, ge=4)
    """An attribute with fewer prompts answered right is left out."""
    new_tokens: int = Field(default=6, ge=1)
    """Tokens in which an answer must come."""
    batch_rows: int = Field(default=16, ge=1)
    """Prompts of one forward pass: part of what the bits depend on."""


class RavelSpec(Config):
    """What determines RAVEL's store."""

    model: ModelConfig
    hooks: Annotated[tuple[str, ...], Field(strict=False)]
    data: EntitiesConfig

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over every field and the format of the sets."""
        return content_key({"format": PROBE_FORMAT, **self.model_dump(mode="json")})

    def path(self, root: str | Place) -> Place:
        """The store's file in a folder or at a URL of stores."""
        return probe_folder(root) / "ravel" / f"{model_slug(self.model)}-{self.fingerprint}.json"
