"""`hsae cache copy`, `recode` and `serve`: a store elsewhere, in another codec, for others."""

import os
from pathlib import Path
from typing import Annotated, Literal

import typer
from rich import get_console

from hsae.cli.common import say

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

    Example: hsae cache recode activations/tiny-train-0123456789abcdef.zarr s3://bucket/activations --codec compact
    """
    _transfer(source, folder, codec)


def serve(
    path: Annotated[Path, typer.Argument(metavar="PATH", help="A store, or a folder of stores, on this machine.")],
    host: Annotated[
        str, typer.Option("--host", help="Address to listen at: 127.0.0.1 for this machine only, 0.0.0.0 for all.")
    ] = "127.0.0.1",
    port: Annotated[int, typer.Option("--port", min=0, max=65535, help="0 picks a free one.")] = 8420,
    certificate: Annotated[
        Path | None, typer.Option("--certificate", metavar="FILE", help="Certificate chain (PEM) for https.")
    ] = None,
    key: Annotated[Path | None, typer.Option("--key", metavar="FILE", help="Its private key (PEM).")] = None,
) -> None:
    """Let other machines read stores over HTTP: `--set cache.dir=http://HOST:PORT` there, the same HSAE_TOKEN on both
    sides, and HSAE_TOKEN_HOST=http://HOST:PORT on theirs (HOST:PORT alone means https).

    Example: hsae cache serve activations --host 0.0.0.0
    """
    from hsae.cache.storage.paths import place
    from hsae.cache.storage.server import serve as serve_stores

    place(str(path))

    def started(url: str, names: list[str]) -> None:
        say("serving at ", (url, "bold"), ", for reading only:")
        for name in names:
            say(f"  {name}")
        if key is None and host not in ("127.0.0.1", "::1", "localhost"):
            say("without --certificate and --key the token crosses the network in the clear", style="yellow")

    serve_stores(
        path, os.environ.get("HSAE_TOKEN"), host=host, port=port, certificate=certificate, key=key, started=started
    )


def _transfer(source: str, folder: str, codec: Literal["mappable", "compact", "int8"] | None) -> None:
    from hsae.cache.building.copying import copy as copy_store
    from hsae.cache.progress import bars

    with bars(get_console()) as progress:
        target = copy_store(source, folder, codec=codec, progress=progress)
    say("copied and checked: ", (str(target), "bold"))
