"""A map W read off the codes by non-negative regression, on which runs with and without a learned W compare.

minimise 1/2 E||W h'_fine - h'_coarse||^2 + FIT_L1 sum W,  W >= 0,  with h' = h / rms(h).

That is the composition loss with both codes detached, at its optimum. Only moments of the codes are needed.

Shapes: F coarse latents, G fine latents, N tokens of a batch.
"""

import torch
from torch import Tensor

from hsae.eval.hierarchy.maps import CodeScale, LevelMap

FIT_L1 = 0.01
STEPS = 300
TOLERANCE = 1e-5  # largest change of an entry in a step at which fitting ends


class CodeMoments:
    """Second moments of two neighbouring levels' codes: G * (F + G) float32 numbers, however many tokens."""

    def __init__(self, coarse: int, fine: int, device: str) -> None:
        self.tokens = 0
        self.cross_FG = torch.zeros(coarse, fine, device=device)
        self.fine_GG = torch.zeros(fine, fine, device=device)
        self.square_F = torch.zeros(coarse, dtype=torch.float64, device=device)

    def add(self, fine_NG: Tensor, coarse_NF: Tensor) -> None:
        """Take in the codes of one batch."""
        self.tokens += len(fine_NG)
        self.cross_FG += coarse_NF.T @ fine_NG
        self.fine_GG += fine_NG.T @ fine_NG
        self.square_F += coarse_NF.square().sum(0)

    def scale(self) -> CodeScale:
        """Root mean squares of both codes."""
        tokens = max(1, self.tokens)
        return CodeScale(
            coarse_F=(self.square_F / tokens).sqrt().float(), fine_G=(self.fine_GG.diagonal() / tokens).sqrt()
        )

    def fit(self) -> LevelMap:
        """The non-negative map with the least penalised error."""
        scale, tokens = self.scale(), max(1, self.tokens)
        inverse_G = torch.where(scale.fine_G > 0, 1 / scale.fine_G, 0.0)
        inverse_F = torch.where(scale.coarse_F > 0, 1 / scale.coarse_F, 0.0)
        cross_FG = self.cross_FG / tokens * inverse_F[:, None] * inverse_G
        return LevelMap.of_contributions(
            nonnegative(self.fine_GG / tokens * inverse_G[:, None] * inverse_G, cross_FG), scale
        )

    def best_single(self) -> LevelMap:
        """The map with one entry a row: the one fine latent, and its weight, that leave the least squared error."""
        scale = self.scale()
        square_G = self.fine_GG.diagonal()
        explained_FG = torch.where(square_G > 0, self.cross_FG.square() / square_G, 0.0)
        best_F1 = explained_FG.argmax(1, keepdim=True)
        weight_F1 = torch.where(square_G[best_F1] > 0, self.cross_FG.gather(1, best_F1) / square_G[best_F1], 0.0)
        weight_FG = torch.zeros_like(self.cross_FG).scatter(1, best_F1, weight_F1)
        return LevelMap(contributions_FG=scale.contributions(weight_FG), weight_FG=weight_FG)


def nonnegative(moments_GG: Tensor, cross_FG: Tensor, l1: float = FIT_L1) -> Tensor:
    """[F, G] argmin over W >= 0 of 1/2 tr(W M W') - tr(W N') + l1 sum W, by FISTA with restarts."""
    curvature = 1.02 * _largest_eigenvalue(moments_GG)
    weight_FG = previous_FG = torch.zeros_like(cross_FG)
    ahead_FG, momentum = weight_FG, 1.0
    for _ in range(STEPS if curvature > 0 else 0):
        weight_FG = (ahead_FG - (ahead_FG @ moments_GG - cross_FG + l1) / curvature).clamp_min(0)
        moved_FG = weight_FG - previous_FG
        if float(moved_FG.abs().max()) < TOLERANCE:
            break
        if float(((ahead_FG - weight_FG) * moved_FG).sum()) > 0:
            momentum = 1.0  # the step went back: begin to accelerate anew
        following = (1 + (1 + 4 * momentum**2) ** 0.5) / 2
        ahead_FG = weight_FG + (momentum - 1) / following * moved_FG
        previous_FG, momentum = weight_FG, following
    return weight_FG


def _largest_eigenvalue(moments_GG: Tensor) -> float:
    """Of a symmetric matrix without negative entries, by power iteration from a positive vector."""
    vector_G, value = torch.ones(len(moments_GG), device=moments_GG.device), 0.0
    for _ in range(100):
        vector_G = moments_GG @ (vector_G / vector_G.norm().clamp_min(1e-30))
        value = float(vector_G.norm())
    return value
