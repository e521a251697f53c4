"""Trade-offs: the best setting within a budget, the curve of forgetting against harm, its area, and intervals.

Settings are chosen on tune documents and reported on test documents. Intervals are 95 % bootstrap intervals with whole
documents as the unit, forget and retain drawn apart; every arm sees the same draws.

Shapes: S resamples (the first is the data itself), K documents.
"""

from collections.abc import Collection, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from hsae.eval import figures
from hsae.eval.harness.estimates import Resampler
from hsae.eval.harness.result_files import read_result, run_option


class DocumentBootstrap:
    """Means over rows, of the data and of resamples of whole documents."""

    def __init__(self, documents: Sequence[int], resamples: int, seed: int) -> None:
        numbers = {document: place for place, document in enumerate(dict.fromkeys(documents))}
        self.document_R = torch.tensor([numbers[document] for document in documents])
        self.weights_SK = Resampler(len(numbers), resamples=resamples, seed=seed).weights(0, len(numbers))

    def mean(self, sums_R: Sequence[float], positions_R: Sequence[int]) -> Tensor:
        """[S] sum over rows per position."""
        return self._totals(sums_R) / self._totals(positions_R).clamp_min(1)

    def _totals(self, values_R: Sequence[float]) -> Tensor:
        values_K = torch.zeros(self.weights_SK.shape[1], dtype=torch.float64)
        values_K.index_add_(0, self.document_R, torch.tensor(values_R, dtype=torch.float64))
        return self.weights_SK @ values_K


def choose(retain: Sequence[float], forget: Sequence[float | None], budget: float) -> int | None:
    """The setting within the budget on retain with the largest loss on forget; None if none beats doing nothing."""
    settings = enumerate(zip(retain, forget, strict=True))
    within = [(gain, -index) for index, (harm, gain) in settings if gain is not None and harm <= budget and gain > 0]
    return -max(within)[1] if within else None


def frontier(retain: Sequence[float], forget: Sequence[float | None]) -> list[int]:
    """Settings that no other beats: less harm and more forgetting, and more forgetting than doing nothing; by harm."""
    settings = enumerate(zip(retain, forget, strict=True))
    unbeaten, best = [], 0.0
    for _, loss, index in sorted((harm, -gain, index) for index, (harm, gain) in settings if gain is not None):
        if -loss > best:
            unbeaten.append(index)
            best = -loss
    return unbeaten


def area(retain: Sequence[Tensor], forget: Sequence[Tensor], most: float) -> Tensor:
    """[S] mean over budgets from 0 to `most` of the best forgetting within each; doing nothing costs nothing."""
    if not retain:
        return torch.zeros(1, dtype=torch.float64)
    harm_SP, gain_SP = torch.stack(list(retain), 1).clamp_min(0), torch.stack(list(forget), 1)
    order_SP = torch.sort(harm_SP, dim=1, stable=True).indices
    harm_SP, gain_SP = harm_SP.gather(1, order_SP), gain_SP.gather(1, order_SP)
    best_SP = gain_SP.clamp_min(0).cummax(1).values
    ends_SP = torch.cat([harm_SP[:, 1:], torch.full_like(harm_SP[:, :1], most)], 1).clamp_max(most)
    return ((ends_SP - harm_SP.clamp_max(most)) * best_SP).sum(1) / most


@figures.style()
def draw(path: Path, arms: dict[str, Any], most: float, title: str) -> None:
    """The Pareto figure, PNG: each arm's settings measured on test documents, as steps with intervals on forget."""
    figure = figures.new_figure(7.5, 4.2, facecolor="white")
    axis = figure.subplots()
    _curves(axis, arms, most)
    axis.set_title(title)
    figures.save_png(figure, path)


@figures.style()
def picture(
    path: Path, weights: str | None, stores: Mapping[str, Collection[str]] | None = None
) -> tuple[str | None, str | None]:
    """(the Pareto figure of a result file as SVG, or None; what is wrong with the file, or None).

    `weights` is the digest of the model that lies there, `stores` has the fingerprints of the plan's stores by side,
    `forget` and `retain`: a result of another model or of other texts is not shown.
    """
    if not path.is_file():
        return None, None
    try:
        content = read_result(path, f"hsae eval unlearning{run_option(path)}")
        if weights is not None and content["inputs"]["sae"] != weights:
            return None, f"{path.name} is of another model than the one here; run `hsae eval unlearning --force`"
        for side, fingerprints in (stores or {}).items():
            if str(content["inputs"][f"{side}_store"]) not in fingerprints:
                return None, f"{path.name} is of another {side} store than the plan's; run `hsae eval unlearning`"
        arms, most = content["arms"], float(content["arms"]["none"]["area"]["up_to"])
        figure = figures.new_figure(9, 4.2)
        _curves(figure.subplots(), arms, most)
        return figures.svg(figure, "Loss added on forget text over loss added on retain text, for every arm"), None
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        return None, f"{path.name} is damaged ({error!r}); run `hsae eval unlearning --force`"


def _curves(axis: Any, arms: dict[str, Any], most: float) -> None:
    styles = ("-", "--", ":", "-.")
    for number, (name, arm) in enumerate(arms.items()):
        if name == "none":
            continue
        color = figures.PALETTE[number % len(figures.PALETTE)]
        points = sorted(
            (point["test"] for point in arm["pareto"] if point["test"] is not None),
            key=lambda point: point["retain_dce"]["value"],
        )
        harm, gain, best = [0.0], [0.0], 0.0
        for point in points:
            retain, forget = point["retain_dce"]["value"], point["forget_dce"]
            best = max(best, forget["value"])
            harm.append(max(0.0, retain))
            gain.append(best)
            if forget["low"] is not None:
                axis.plot([max(0.0, retain)] * 2, [forget["low"], forget["high"]], color=color, linewidth=1, alpha=0.5)
            axis.plot([max(0.0, retain)], [forget["value"]], "o", color=color, markersize=4)
        axis.plot(
            [*harm, max(most, harm[-1])], [*gain, gain[-1]], drawstyle="steps-post", color=color,
            linestyle=styles[number // len(figures.PALETTE) % 4], linewidth=1.4, label=name,
        )  # fmt: skip
    axis.set_xlim(left=-0.02 * most, right=1.15 * most)  # what does no harm at all is seen too
    axis.set_xlabel("loss added on retain text (nats a token)")
    axis.set_ylabel("loss added on forget text (nats a token)")
    axis.grid()
    axis.legend(loc="upper left", bbox_to_anchor=(1.01, 1), borderaxespad=0, fontsize=7)
