"""What must not leave this machine: secrets, and paths that name its folders."""

import os
import re
from pathlib import Path

from hsae.cache.errors import UserError

SECRET_NAMES = re.compile(r"TOKEN|SECRET|PASSWORD|API_KEY|ACCESS_KEY", re.IGNORECASE)
SHORTEST = 8
"""Characters of the shortest value of a variable that is taken for a secret."""


def check_public(name: str, text: str) -> None:
    """Raise UserError if a file's text holds a secret of the environment or a path of this machine."""
    for what, private in _private():
        if private in text:
            raise UserError(
                f"{name} holds {what}; nothing was sent. Paths come from a plan that names local files: give "
                "the plan the model's and the corpus's names on the hub, or relative paths"
            )


def _private() -> list[tuple[str, str]]:
    """What it is, in words that give nothing away, and its text."""
    from huggingface_hub import get_token

    secrets = {f"the value of ${name}": value for name, value in os.environ.items() if SECRET_NAMES.search(name)}
    secrets["your token of the hub"] = get_token() or ""
    private = [(what, value) for what, value in secrets.items() if len(value) >= SHORTEST]
    folders = {"home folder": Path.home(), "working folder": Path.cwd()}
    private += [
        (f"a path in your {what} ({folder})", f"{folder}/")
        for what, folder in folders.items()
        if folder != folder.parent
    ]
    return private
