"""Meters on the parts of both texts, and the changes measured so far, which an interrupted sweep goes on from."""

from collections.abc import Callable
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from hsae.cache.language_model.lm import LanguageModel
from hsae.eval.harness.evaluation import cached_method
from hsae.eval.harness.result_files import read_result, write_result
from hsae.eval.unlearning.config import SIDES, Side, UnlearningConfig
from hsae.eval.unlearning.loss_meter import Change, LossMeter, Passes
from hsae.eval.unlearning.rows import Rows, split_rows


class MeasuredChanges:
    """Changes of the loss by what was measured; a file holds them as long as the inputs are the same."""

    def __init__(self, path: Path, inputs: dict[str, Any]) -> None:
        self.path, self.inputs = path, inputs
        self.changes: dict[str, dict[str, Any]] = {}
        if path.is_file():
            with suppress(ValueError, KeyError, TypeError):  # damaged: measured again
                content = read_result(path, "hsae eval unlearning")
                if content["inputs"] == inputs:
                    self.changes = content["pieces"]
        self.read = len(self.changes)
        """How many were in the file."""

    def get(self, key: str, measure: Callable[[], Change]) -> Change:
        """The change under a key, measured unless it is there."""
        if key not in self.changes:
            self.changes[key] = asdict(measure())
            write_result(self.path, {"inputs": self.inputs, "pieces": self.changes}, allow_nan=True)
        return Change(**self.changes[key])


class Texts:
    """Forget and retain rows, each split in three, with meters. Raises UserError if there are too few documents."""

    def __init__(self, rows: dict[Side, Rows], language: LanguageModel, config: UnlearningConfig) -> None:
        self.language, self.config, self.passes = language, config, Passes()
        self.rows = {side: split_rows(rows[side], config.tune_rows, config.test_rows) for side in SIDES}

    @cached_method
    def meter(self, side: Side, part: str) -> LossMeter:
        """The meter on one part of one side."""
        return self.meter_on(self.rows[side][part])

    def meter_on(self, rows: Rows) -> LossMeter:
        """A meter on any rows."""
        return LossMeter(
            model=self.language,
            rows=rows,
            positions_per_row=self.config.positions_per_row,
            seed=self.config.seed,
            passes=self.passes,
        )
