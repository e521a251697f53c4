"""`hsae doctor`."""

import json

import typer
from rich import get_console
from rich.table import Table

from hsae.cli.common import JsonOption


def doctor(as_json: JsonOption = False) -> None:
    """Show what this machine and this installation have: versions, devices, disk, caches, extras and credentials.

    Of secrets it says only whether they are set. Status 1: hsae can't work as it is installed.

    Example: hsae doctor
    """
    from dataclasses import asdict

    from hsae.cache.doctor import examine

    findings = examine()
    if as_json:
        typer.echo(json.dumps([asdict(finding) for finding in findings], indent=2))
    else:
        table = Table("", "", "", box=None, show_header=False)
        last = ""
        for finding in findings:
            group = "" if finding.group == last else finding.group
            table.add_row(group, finding.name, finding.value, style="red" if finding.is_bad else "")
            last = finding.group
        get_console().print(table)
    if any(finding.is_bad for finding in findings):
        raise typer.Exit(1)
