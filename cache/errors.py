"""Errors a user can cause; the command line prints their text and exits with status 2."""

from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from typing import Any


class UserError(ValueError):
    """A request that can't be met: the text says what was given, what is allowed and what to do next."""


class StoreError(UserError):
    """An activation store is missing, unfinished, damaged or made for another configuration."""


class DamagedFileError(StoreError):
    """A file of a store is missing or is not what was written, and can be made again."""

    def __init__(self, root: Any, path: Any, problem: str) -> None:
        super().__init__(f"{path} {problem}; find and mend all such files with: hsae cache verify {root} --repair")
        self.path, self.problem = path, problem


@contextmanager
def missing_is_damage(root: Any, path: Any) -> Iterator[None]:
    """Raise DamagedFileError where what is done to a file of a store finds none."""
    try:
        yield
    except (FileNotFoundError, NotADirectoryError, IsADirectoryError):
        raise DamagedFileError(root, path, "is missing") from None


class ModelError(UserError):
    """A language model, tokenizer or hook point can't be used as asked."""


class CorpusError(UserError):
    """A corpus can't be read, or has too little text."""


class UnreachableError(CorpusError):
    """A data set on the hub can't be reached now; what was read of it stays."""


class NotApplicable(UserError):
    """An evaluation lacks what it needs here, or would mean nothing: it is left out, and others go on."""


class RemoteError(OSError):
    """A remote store can't be reached, or refuses."""


class TooLongError(RemoteError):
    """A reply has more bytes than it can have."""

    @classmethod
    def than(cls, most: int) -> "TooLongError":
        """One of a reply of more than `most` bytes."""
        return cls(f"more than {most:,} bytes come, which it can't have")


def need(why: str, package: str, extra: str, module: str | None = None, *, kind: type[UserError] = UserError) -> None:
    """Raise an error naming the extra to install, unless `package` is there; `module` is what it is imported as."""
    if find_spec(module or package) is None:
        raise kind(f"{why}: this needs the package {package}; run: pip install 'hsae[{extra}]'")
