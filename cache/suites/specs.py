"""What determines the stores of the evaluation suites. Frozen models, checked when they are made."""

import hashlib
import json
from typing import Annotated, Any, ClassVar, Literal, get_args

from pydantic import Field

from hsae.cache.config import Config, ModelConfig
from hsae.cache.storage.paths import Place, place

PROBE_FORMAT = 2
Suite = Literal["sparse-probing", "scr", "tpp", "absorption"]
SUITES: tuple[Suite, ...] = get_args(Suite)


class SuiteConfig(Config):
    """The `[suite]` table: what the evaluations of labelled texts and words are made from."""

    tasks: str = Field(default="saebench", min_length=1)
    """`saebench` (from the hub), `python` (texts that ship with Python), or a TOML file of local data sets."""
    revisions: dict[str, str] = Field(default_factory=dict)
    """Hub data set -> revision; what is not named is taken as it is now, and the revision found is recorded."""
    train_per_class: int = Field(default=2000, ge=4)
    """Training texts of a class (sparse probing, TPP)."""
    test_per_class: int = Field(default=500, ge=2)
    """Test texts of a class."""
    train_per_quadrant: int = Field(default=1000, ge=2)
    """Training texts of each combination of two attributes (SCR)."""
    test_per_quadrant: int = Field(default=250, ge=1)
    """Test texts of each combination."""
    context: int = Field(default=128, ge=4)
    """Tokens after which a text is cut, BOS included."""
    batch_rows: int = Field(default=16, ge=1)
    """Texts of one forward pass: part of what the bits depend on."""
    words: int | None = Field(default=None, ge=60)
    """Words for absorption; None takes every word of the vocabulary."""
    prompt_template: str = "{word} starts with the letter:"
    """Absorption's question, which ends after the word's own tokens."""
    icl_examples: int = Field(default=10, ge=0)
    """Answered questions before the one asked."""
    min_letters: int = Field(default=20, ge=1, le=26)
    """Letters that the ground-truth probe must tell, or absorption is refused."""
    seed: int = Field(default=42, ge=0)
    """Of the choice of texts and words."""


class StoredConfig(Config):
    """What determines a store, and so names it."""

    @property
    def fingerprint(self) -> str:
        """Sixteen hex digits over every field and the format of the sets."""
        return content_key({"format": PROBE_FORMAT, **self.model_dump(mode="json")})


class ProbeSpec(StoredConfig):
    """What determines the store of labelled texts or words of one suite."""

    suite: Suite
    model: ModelConfig
    hooks: Annotated[tuple[str, ...], Field(strict=False)]
    tasks: SuiteConfig

    @property
    def batch_rows(self) -> int:
        """Texts of one forward pass."""
        return self.tasks.batch_rows

    def path(self, root: str | Place) -> Place:
        """The store's file in a folder or at a URL of stores."""
        return suites_folder(root) / self.suite / f"{self.model.slug}-{self.fingerprint}.json"


class EntitiesConfig(Config):
    """The part of the `[ravel]` table that the store depends on."""

    entities: str = Field(default="saebench", min_length=1)
    """`saebench` (RAVEL's cities and Nobel prize winners, on the hub), `facts` (countries and cities that come with
    hsae), a TOML file with [[entity]] tables, or a folder with RAVEL's own JSON files.
    """
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


class RavelSpec(StoredConfig):
    """What determines RAVEL's store."""

    suite: ClassVar[Literal["ravel"]] = "ravel"
    model: ModelConfig
    hooks: Annotated[tuple[str, ...], Field(strict=False)]
    data: EntitiesConfig

    @property
    def batch_rows(self) -> int:
        """Prompts of one forward pass."""
        return self.data.batch_rows

    def path(self, root: str | Place) -> Place:
        """The store's file in a folder or at a URL of stores."""
        return suites_folder(root) / self.suite / f"{self.model.slug}-{self.fingerprint}.json"


SuiteSpec = ProbeSpec | RavelSpec


def suites_folder(root: str | Place) -> Place:
    """Where suites' stores lie in a folder or at a URL. Raises StoreError for a URL that can't be a store's."""
    return place(root) / "probe"


def content_key(content: dict[str, Any]) -> str:
    """Sixteen hex digits over JSON-ready content."""
    return hashlib.sha256(json.dumps(content, sort_keys=True).encode()).hexdigest()[:16]
