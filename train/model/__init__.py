"""Hierarchical SAEs: the one that is trained, the one that is saved, and how other tools see it."""
