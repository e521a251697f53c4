"""Run directories: what is in them and whose they are."""
