"""Packaged run plans."""
