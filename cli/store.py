"""`hsae cache copy` and `hsae cache recode`: a store elsewhere, or in another codec."""

from typing import Annotated, Literal

import typer
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from hsae.cli.common import console

SourceArgument = Annotated[str, typer.Argument(metavar="STORE", help="Directory or URL of a complete store.")]
FolderArgument = Annotated[
    str, typer.Argument(metavar="FOLDER", help="Folder or URL that the copy is put in, under its own name.")
]


def copy(source: SourceArgument, folder: FolderArgument) -> None:
    """Copy a store between disks and S3: what is there already is kept, and everything is read back and checked.

    Example: hsae cache copy activations/gemma-3-270m-train-0123456789abcdef.zarr s3://bucket/activations
    """
    _transfer(source, folder, None)


def recode(
    source: SourceArgument,
    folder: FolderArgument,
    codec: Annotated[
        Literal["mappable", "compact", "int8"], typer.Option("--codec", help="Codec of the copy; int8 is lossy.")
    ],
) -> None:
    """Copy a store into another codec; plans find the copy with --set cache.codec=CODEC.

    Example: hsae cache recode activations/gemma-3-270m-train-0123456789abcdef.zarr s3://bucket/activations --codec compact
    """
    _transfer(source, folder, codec)


def _transfer(source: str, folder: str, codec: Literal["mappable", "compact", "int8"] | None) -> None:
    from hsae.cache.transfer import copy as copy_store

    columns = (TextColumn("copying"), BarColumn(), TextColumn("{task.completed}/{task.total} chunks"))
    with Progress(*columns, TimeRemainingColumn(compact=True), console=console) as bars:
        task = bars.add_task("", total=None)
        target = copy_store(
            source, folder, codec=codec, progress=lambda done, total: bars.update(task, completed=done, total=total)
        )
    console.print(f"copied and checked: [bold]{escape(str(target))}[/]", soft_wrap=True)
