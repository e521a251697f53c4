"""Atomic file writes, for run directories."""

from hsae.cache.files import PARTIAL, write_atomically

__all__ = ["PARTIAL", "write_atomically"]
