"""Where the checkout, its tests and their golden files lie."""

import os
from pathlib import Path

TESTS = Path(__file__).resolve().parent
ROOT = TESTS.parent
GOLDEN = Path(os.environ.get("HSAE_GOLDEN", TESTS / "golden"))
"""SAEBench's own results, and the inputs that they were made of; another set of the same layout may stand in their
place.
"""
GOLDEN_MODEL = TESTS / "golden" / "model"
"""A tiny random Gemma-2 with a tokenizer."""
