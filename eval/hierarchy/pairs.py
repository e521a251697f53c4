"""What one pass over text tells of two neighbouring levels: co-firing, composition errors, and each child's concept.

Memory does not grow with the text: G * (F + G) counts, and of each map its F x G weights and a few sums. Codes are
sparse, so a map is applied to the active latents of a token only.

Shapes: N tokens of a batch, F coarse latents (level l), G fine latents (level l-1), D residual width, K active fine
latents of a token, P pairs of a token and an active coarse latent, B rows of a batch.
"""

from itertools import chain

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from hsae.eval.harness.estimates import ResampledSums, Resampler
from hsae.eval.hierarchy.maps import LevelMap

CONTRIBUTES = 0.05  # a fine latent takes part in a coarse one's value where w_ij h_j exceeds this share of h_i
GATHERED = 1 << 22  # products held at once while such latents are counted


class ActiveCodes:
    """The codes of one batch, and their active fine latents as lists."""

    def __init__(self, fine_NG: Tensor, coarse_NF: Tensor) -> None:
        self.fine_NG, self.coarse_NF = fine_NG, coarse_NF
        on_NG = fine_NG != 0
        self.indices = on_NG.nonzero()[:, 1]
        self.values = fine_NG[on_NG]
        counts_N = on_NG.sum(1)
        self.offsets_N = counts_N.cumsum(0) - counts_N
        most = max(1, int(counts_N.max())) if len(counts_N) else 1
        self.places_NK = fine_NG.abs().topk(min(most, fine_NG.shape[1]), dim=1).indices
        self.top_NK = fine_NG.gather(1, self.places_NK)
        self.tokens_P, self.coarse_P = (coarse_NF > 0).nonzero().unbind(1)

    def mixed(self, rows_GF: Tensor) -> Tensor:
        """[N, F] fine code @ rows."""
        return embedding_bag(self.indices, rows_GF, self.offsets_N, mode="sum", per_sample_weights=self.values)

    def any_of(self, edges_GF: Tensor) -> Tensor:
        """[N, F] whether any fine latent with an edge to the coarse one is active."""
        return embedding_bag(self.indices, edges_GF, self.offsets_N, mode="sum") > 0

    def contributing(self, weight_FG: Tensor) -> Tensor:
        """[N] number of pairs (i, j) with h_i > 0 and w_ij h_j > CONTRIBUTES h_i."""
        counts_P = torch.zeros(len(self.coarse_P), device=weight_FG.device)
        step = max(1, GATHERED // self.top_NK.shape[1])
        for start in range(0, len(counts_P), step):
            tokens, coarse = self.tokens_P[start : start + step], self.coarse_P[start : start + step]
            brought_PK = weight_FG[coarse[:, None], self.places_NK[tokens]] * self.top_NK[tokens]
            needed_P = CONTRIBUTES * self.coarse_NF[tokens, coarse]
            counts_P[start : start + step] = (brought_PK > needed_P[:, None]).sum(1).float()
        return torch.zeros(len(self.fine_NG), device=weight_FG.device).index_add_(0, self.tokens_P, counts_P)


class MapSums:
    """Of one map its error, how many fine latents take part, and the firing of the OR of a parent's children."""

    COLUMNS = ("error", "energy", "mixture", "contributing", "coarse_firings")

    def __init__(self, part: LevelMap, resampler: Resampler | None) -> None:
        self.weight_GF = part.weight_FG.T.contiguous()
        self.map = LevelMap(contributions_FG=part.contributions_FG, weight_FG=self.weight_GF.T)  # no second copy
        self.edges_GF = part.edges_FG.T.contiguous().float()
        coarse = part.weight_FG.shape[0]
        self.or_F = torch.zeros(coarse, dtype=torch.float64, device=part.weight_FG.device)
        self.both_F = torch.zeros_like(self.or_F)
        self.sums = ResampledSums(resampler, len(self.COLUMNS)) if resampler is not None else None
        self.totals_C = torch.zeros(len(self.COLUMNS), dtype=torch.float64, device=part.weight_FG.device)

    def add(self, codes: ActiveCodes, start: int, row_N: Tensor, rows: int) -> None:
        """Take in one batch whose token n lies in row `start` + `row_N[n]` of the phase."""
        mixture_NF = codes.mixed(self.weight_GF)
        on_NF = codes.coarse_NF > 0
        columns_NC = torch.stack(
            [
                (mixture_NF - codes.coarse_NF).double().square().sum(1),
                codes.coarse_NF.double().square().sum(1),
                mixture_NF.double().square().sum(1),
                codes.contributing(self.map.weight_FG).double(),
                on_NF.sum(1).double(),
            ],
            dim=1,
        )
        self.totals_C += columns_NC.sum(0)
        if self.sums is not None:
            by_row_BC = torch.zeros(rows, len(self.COLUMNS), dtype=torch.float64, device=columns_NC.device)
            self.sums.add(start, by_row_BC.index_add_(0, row_N, columns_NC))
        or_NF = codes.any_of(self.edges_GF)
        self.or_F += or_NF.sum(0)
        self.both_F += (or_NF & on_NF).sum(0)

    def columns(self) -> dict[str, Tensor]:
        """Each sum over all tokens, [1], or of the data and every resample, [1 + S]."""
        sums_SC = self.totals_C[None] if self.sums is None else self.sums.sums_SC
        return dict(zip(self.COLUMNS, sums_SC.unbind(1), strict=True))


class PairCounts:
    """Firings, co-firings and mean residuals of two neighbouring levels, and the sums of every map between them."""

    def __init__(self, coarse: int, fine: int, d_model: int, maps: dict[str, list[MapSums]], device: str) -> None:
        self.tokens = 0
        self.maps = maps
        self.cross_FG = torch.zeros(coarse, fine, dtype=torch.int32, device=device)
        self.fine_GG = torch.zeros(fine, fine, dtype=torch.int32, device=device)
        self.fires_F = torch.zeros(coarse, dtype=torch.int64, device=device)
        self.fires_G = torch.zeros(fine, dtype=torch.int64, device=device)
        self.x_GD = torch.zeros(fine, d_model, dtype=torch.float64, device=device)
        self.x_D = torch.zeros(d_model, dtype=torch.float64, device=device)

    def add(self, x_ND: Tensor, fine_NG: Tensor, coarse_NF: Tensor, start: int, row_N: Tensor, rows: int) -> None:
        """Take in the tokens of `rows` rows from row `start` of the phase; token n lies in row `start` + `row_N[n]`."""
        self.tokens += len(x_ND)
        fine_on_NG, coarse_on_NF = (fine_NG > 0).float(), (coarse_NF > 0).float()
        self.cross_FG += (coarse_on_NF.T @ fine_on_NG).int()
        self.fine_GG += (fine_on_NG.T @ fine_on_NG).int()
        self.fires_F += coarse_on_NF.sum(0).long()
        self.fires_G += fine_on_NG.sum(0).long()
        self.x_GD += fine_on_NG.T @ x_ND
        self.x_D += x_ND.double().sum(0)
        codes = ActiveCodes(fine_NG, coarse_NF)
        for part in chain.from_iterable(self.maps.values()):
            part.add(codes, start, row_N, rows)

    def concept_GD(self) -> Tensor:
        """[G, D] E[x | fine latent on] - E[x]; zero for one that never fires."""
        mean_GD = self.x_GD / self.fires_G.clamp_min(1)[:, None]
        return torch.where(self.fires_G[:, None] > 0, mean_GD - self.x_D / max(1, self.tokens), 0.0).float()
