"""Scores against worlds whose hierarchy is known."""
