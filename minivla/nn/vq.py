"""Vector quantisation: a vector is replaced by the nearest entry of a codebook, which follows the data.

No gradient passes through "the nearest". So the decoder's gradient is handed to the encoder as if nothing had
been replaced (straight through), a commitment loss draws vectors to their entries, and each entry is a moving
average of the vectors that chose it. A residual quantiser repeats this on what is left over: C codes at each
of G levels name C^G vectors.

Sources: van den Oord et al. 2017 (arXiv 1711.00937), section 3 and appendix A.1; Zeghidour et al. 2021 (arXiv
2107.03312), algorithm 1. Upstream: LeRobot 0.6 `policies/vqbet/vqbet_utils.py`, from lucidrains'
vector-quantize-pytorch.
"""

from __future__ import annotations

from typing import Any

import torch
import torch.distributed
import torch.nn.functional as F
from torch import Tensor, nn

KMEANS_ROUNDS = 10


class VectorQuantizer(nn.Module):
    """One codebook: `size` entries C of `width` D, in buffers, which training moves and evaluation does not.

    decay, eps            of the moving averages; `eps` keeps an entry that nobody chooses from dividing by 0
    kmeans_init           the first training batch's cluster centres are the first entries (else: random)
    dead_code_threshold   entries chosen by fewer vectors a batch, on average, are replaced by vectors of the
                          batch (0: never); a dead entry is far from all data and would stay so

    Both options draw from torch's global generator. The buffers' shapes are upstream's: (1, C, D), (1, C).
    Raises ValueError for a size or width below 1.
    """

    initted: Tensor
    cluster_size: Tensor
    embed_avg: Tensor
    embed: Tensor

    def __init__(
        self,
        width: int,
        size: int,
        *,
        decay: float = 0.8,
        eps: float = 1e-5,
        kmeans_init: bool = False,
        dead_code_threshold: float = 0.0,
    ) -> None:
        super().__init__()
        if width < 1 or size < 1:
            raise ValueError(f"the codebook has {size} entries of width {width}; expected at least 1 of each")
        self.decay, self.eps = decay, eps
        self.kmeans_init, self.dead_code_threshold = kmeans_init, dead_code_threshold
        entries = torch.zeros(1, size, width)
        if not kmeans_init:
            nn.init.kaiming_uniform_(entries)
        self.register_buffer("initted", torch.tensor([float(not kmeans_init)]))
        self.register_buffer("cluster_size", torch.zeros(1, size))
        self.register_buffer("embed_avg", entries.clone())
        self.register_buffer("embed", entries)

    @property
    def codebook(self) -> Tensor:
        """The entries, (C, D) float32."""
        return self.embed[0].float()

    def forward(self, x: Tensor, *, frozen: bool = False) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D) float32. Returns (quantised (N, D), codes (N,), commitment loss ()).

        In evaluation the loss is 0, as upstream. In training the codebook is moved afterwards, unless
        `frozen`.
        """
        if self.training and self.kmeans_init and not self.initted:
            self.start(x.detach())
        codes = self.nearest(x)
        entries = self.codebook[codes]
        if not self.training:
            return entries, codes, x.new_zeros(())
        if not frozen:
            self.update(x.detach(), codes)
        return x + (entries - x).detach(), codes, F.mse_loss(x, entries)

    @torch.no_grad()
    def nearest(self, x: Tensor) -> Tensor:
        """The codes (N,) of the entries nearest to x (N, D), in Euclidean distance."""
        entries = self.codebook
        # |x - e|² without |x|², which is the same for all entries
        return (entries.square().sum(-1) - 2 * x @ entries.T).argmin(-1)

    @torch.no_grad()
    def update(self, x: Tensor, codes: Tensor) -> None:
        """Move each entry towards the mean of the x (N, D) that chose it, a ratio of moving averages."""
        count, total = _tally(x, codes, self.embed.shape[1])
        self.cluster_size[0].lerp_(_over_processes(count), 1 - self.decay)
        self.embed_avg[0].lerp_(_over_processes(total), 1 - self.decay)
        share = (self.cluster_size + self.eps) / (self.cluster_size + self.eps).sum()
        self.embed.copy_(self.embed_avg / (share * self.cluster_size.sum())[..., None])
        if self.dead_code_threshold:
            self.revive(x)

    @torch.no_grad()
    def revive(self, x: Tensor) -> None:
        """Put vectors of x (N, D), drawn at random, in the place of entries that are hardly chosen."""
        dead = self.cluster_size < self.dead_code_threshold
        if not dead.any():  # else nothing would still be drawn, and move the generator
            return
        drawn = _draw(x, int(dead.sum()))
        self.embed[dead], self.embed_avg[dead] = drawn, drawn * self.dead_code_threshold
        self.cluster_size[dead] = self.dead_code_threshold

    @torch.no_grad()
    def start(self, x: Tensor) -> None:
        """Begin with the centres of x (N, D) that k-means finds (Lloyd 1982)."""
        entries = _draw(x, self.embed.shape[1])
        for _ in range(KMEANS_ROUNDS):
            count, total = _tally(x, torch.cdist(x, entries).argmin(-1), len(entries))
            entries = torch.where(count[:, None] > 0, total / count.clamp(min=1)[:, None], entries)
        self.embed[0], self.embed_avg[0] = entries, entries * count[:, None]
        self.cluster_size[0] = count
        self.initted.fill_(1)


class ResidualVQ(nn.Module):
    """`levels` codebooks G one after another, each for what those before it left over; their sum comes out.

    width D and size C of each; `options` are those of `VectorQuantizer`. While `freeze_codebook` is set, a
    buffer, training moves no codebook. Raises ValueError for fewer than 1 level.
    """

    freeze_codebook: Tensor

    def __init__(self, width: int, size: int, *, levels: int = 2, **options: Any) -> None:
        super().__init__()
        if levels < 1:
            raise ValueError(f"a residual quantiser has {levels} levels; expected at least 1")
        self.layers = nn.ModuleList(VectorQuantizer(width, size, **options) for _ in range(levels))
        self.register_buffer("freeze_codebook", torch.tensor(False))

    @property
    def levels(self) -> list[VectorQuantizer]:
        """The quantisers, coarsest first."""
        return [layer for layer in self.layers if isinstance(layer, VectorQuantizer)]

    @property
    def touched(self) -> bool:
        """Whether a training step has ever moved the codebooks."""
        return any(bool(layer.cluster_size.any()) for layer in self.levels)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """x (N, D). Returns (quantised (N, D) float32, codes (N, G), commitment losses (G,)).

        In float32 whatever the autocast: moving averages of bfloat16 would stand still.
        """
        frozen = self.training and bool(self.freeze_codebook)
        parts, codes, losses = [], [], []
        with torch.autocast(x.device.type, enabled=False):
            residual = x.float()
            for layer in self.levels:
                part, code, loss = layer(residual, frozen=frozen)
                residual = residual - part.detach()
                parts.append(part)
                codes.append(code)
                losses.append(loss)
        return sum(parts[1:], parts[0]), torch.stack(codes, dim=-1), torch.stack(losses)

    @torch.no_grad()
    def encode(self, x: Tensor) -> Tensor:
        """The codes (N, G) of x (N, D); nothing is moved, in training neither."""
        with torch.autocast(x.device.type, enabled=False):
            residual, codes = x.float(), []
            for layer in self.levels:
                codes.append(layer.nearest(residual))
                residual = residual - layer.codebook[codes[-1]]
        return torch.stack(codes, dim=-1)

    def look_up(self, codes: Tensor) -> Tensor:
        """What codes (..., G) stand for: the sum of their entries, (..., D) float32."""
        parts = [layer.codebook[code] for layer, code in zip(self.levels, codes.unbind(-1), strict=True)]
        return sum(parts[1:], parts[0])


def _tally(x: Tensor, codes: Tensor, size: int) -> tuple[Tensor, Tensor]:
    """How many vectors chose each code, (C,), and the sum of these vectors, (C, D)."""
    chosen = F.one_hot(codes, size).to(x.dtype)
    return chosen.sum(0), chosen.T @ x


def _draw(x: Tensor, count: int) -> Tensor:
    """`count` rows of x (N, D) at random, none twice if there are enough."""
    if len(x) >= count:
        return x[torch.randperm(len(x), device=x.device)[:count]]
    return x[torch.randint(0, len(x), (count,), device=x.device)]


def _over_processes(value: Tensor) -> Tensor:
    """The sum over all processes that train together: they keep one codebook."""
    if torch.distributed.is_available() and torch.distributed.is_initialized():
        torch.distributed.all_reduce(value)
    return value
