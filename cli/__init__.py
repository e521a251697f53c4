"""Typer commands; no logic lives here."""
