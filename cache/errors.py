"""Errors a user can cause; the command line prints their text and exits with status 2."""

from importlib.util import find_spec


class UserError(ValueError):
    """A request that can't be met: the text says what was given, what is allowed and what to do next."""


class StoreError(UserError):
    """An activation store is missing, unfinished, damaged or made for another configuration."""


class ModelError(UserError):
    """A language model, tokenizer or hook point can't be used as asked."""


class CorpusError(UserError):
    """A corpus can't be read, or has too little text."""


class UnreachableError(CorpusError):
    """A data set on the hub can't be reached now; what was read of it stays."""


class NotApplicable(UserError):
    """An evaluation lacks what it needs here, or would mean nothing: it is left out, and others go on."""


def need(why: str, package: str, extra: str, module: str | None = None) -> None:
    """Raise UserError naming the extra to install, unless `package` is there; `module` is what it is imported as."""
    if find_spec(module or package) is None:
        raise UserError(f"{why}: this needs the package {package}; run: pip install 'hsae[{extra}]'")
