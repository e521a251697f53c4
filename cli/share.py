"""`hsae push` and `hsae pull`."""

from pathlib import Path
from typing import Annotated

import typer

from hsae.cli.common import say

RepositoryArgument = Annotated[
    str, typer.Argument(metavar="REPOSITORY", help="owner/name for a run, datasets/owner/name for stores.")
]


def push(
    source: Annotated[Path, typer.Argument(metavar="SOURCE", help="A run's directory, such as runs/3, or a store.")],
    repository: RepositoryArgument,
    model: Annotated[
        str | None,
        typer.Option(
            "--model", metavar="ID", help="The language model's id on the hub, if the plan names it otherwise."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a repository that only you see.")] = False,
    dry_run: Annotated[bool, typer.Option("--dry-run", help="Show what would go, and stop.")] = False,
) -> None:
    """Send a trained run or an activation store to the Hugging Face hub, with a card.

    Files that hold a secret or a path of this machine are refused. What is there already is not sent again.

    Example: hsae push runs/3 me/gemma-2-2b-hsae --private
    """
    from hsae.cache.progress import format_bytes
    from hsae.eval.sharing.share import prepare
    from hsae.eval.sharing.share import push as push_to_hub

    if not dry_run:
        return say("sent: ", (push_to_hub(source, repository, model=model, private=private), "bold"))
    sizes = prepare(source, repository, model=model).sizes
    for name, size in sizes.items():
        say(f"{format_bytes(size):>12}  {name}")
    say(f"{len(sizes)} files, {format_bytes(sum(sizes.values()))}, would go to {repository}")


def pull(
    repository: RepositoryArgument,
    folder: Annotated[Path, typer.Argument(metavar="FOLDER", help="Where a run goes, or the folder of stores.")],
    revision: Annotated[
        str | None, typer.Option("--revision", metavar="COMMIT", help="Commit, tag or branch; default the newest.")
    ] = None,
) -> None:
    """Fetch a run or activation stores from the Hugging Face hub, and check them.

    Example: hsae pull me/gemma-2-2b-hsae runs/3
    """
    from hsae.eval.sharing.share import pull as pull_from_hub

    for path in pull_from_hub(repository, folder, revision=revision):
        say("fetched and checked: ", (str(path), "bold"))
