"""Stage 1: everything that touches bytes on disk or the language model."""
