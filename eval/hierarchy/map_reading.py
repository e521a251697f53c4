"""The pass over text in which maps between levels are read, with the tokens on which probes are trained.

Shapes: B rows of a batch, T context, N kept tokens of a batch, D residual width, G fine latents.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from hsae.cache.reading.store import ActivationStore
from hsae.eval.harness.listener import Progress
from hsae.eval.hierarchy.fitted import CodeMoments
from hsae.eval.hierarchy.maps import LevelMap
from hsae.eval.hierarchy.probes import TOKENS as PROBE_TOKENS
from hsae.eval.hierarchy.probes import Probes, train_probes
from hsae.train.model.hierarchical_sae import HierarchicalSAE

BATCH_TOKENS = 4096
FIT_TOKENS = 1 << 17  # most tokens on which maps are read


@dataclass(frozen=True)
class Text:
    """Rows `first` to `last` - 1 of a store, in batches; of a long text evenly spaced ones."""

    store: ActivationStore
    hook: str
    first: int
    last: int
    device: str

    def batches(self, most_tokens: int | None = None) -> list[tuple[int, int]]:
        """First row of each batch, and the one behind its last."""
        rows = max(1, BATCH_TOKENS // self.store.context)
        every = [(start, min(start + rows, self.last)) for start in range(self.first, self.last, rows)]
        if most_tokens is None or len(every) * rows * self.store.context <= most_tokens:
            return every
        count = max(1, most_tokens // (rows * self.store.context))
        return [every[index * len(every) // count] for index in range(count)]

    def read(self, start: int, stop: int) -> tuple[Tensor, Tensor]:
        """Residuals [B, T, D] in float32 and the mask [B, T] of tokens that are not special."""
        mask_BT = ~self.store.special_mask(self.store.tokens(start, stop))
        return self.store.acts(self.hook, start, stop).to(self.device).float(), mask_BT.to(self.device)


class MapReading:
    """Second moments of neighbouring codes, from which maps are read, and a sample of tokens for probes."""

    def __init__(self, model: HierarchicalSAE, text: Text, progress: Progress) -> None:
        self.model, self.tokens = model, 0
        widths = [level.d_sae for level in model.levels]
        self.moments = {
            level: CodeMoments(widths[level - 1], widths[level - 2], text.device) for level in range(2, len(widths) + 1)
        }
        self.sample: list[Tensor] = []
        batches = text.batches(FIT_TOKENS) if self.moments else []
        sampled = max(1, PROBE_TOKENS // max(1, len(batches)))
        for done, (start, stop) in enumerate(batches, 1):
            x_BTD, mask_BT = text.read(start, stop)
            x_ND = x_BTD[mask_BT]
            codes = model.codes(x_ND)
            for level, moments in self.moments.items():
                moments.add(codes[level - 2], codes[level - 1])
            self.sample.append(x_ND[:: max(1, -(-len(x_ND) // sampled))])
            self.tokens += len(x_ND)
            progress("reading maps", done, len(batches))
        self.scales = {level: moments.scale() for level, moments in self.moments.items()}

    def maps(self, level: int) -> dict[str, LevelMap]:
        """The readings that there are, by name."""
        fitted = {"fitted": self.moments[level].fit()}
        learned = next((part for part in self.model.compositions if part.level == level), None)
        if learned is None:
            return fitted
        scale = self.scales[level]
        return {"learned": LevelMap.of_contributions(scale.contributions(learned.weight), scale), **fitted}

    def probes(self, level: int) -> Probes | None:
        """Probes of the fine latents of a pair, from the sampled tokens; None if none fires often enough."""
        x_ND = torch.cat(self.sample)
        fires_NG = torch.cat([self.model.codes(part)[level - 2] > 0 for part in torch.split(x_ND, BATCH_TOKENS)])
        probes = train_probes(x_ND, fires_NG)
        return probes if len(probes.children_C) else None
