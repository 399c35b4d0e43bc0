"""A U-Net over the chunk: convolutions along time, told by FiLM what was seen and how noisy it still is.

Source: Chi et al. 2023, section 3.1 (from Janner et al. 2022, Diffuser); LeRobot 0.6
`policies/diffusion/modeling_diffusion.py`, DiffusionConditionalUnet1d, whose parameter names are kept. As
there, stages are one more than halvings, and the first stage's skip is not used.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from minivla import recorder
from minivla.nn.positions import sine_timesteps


class Conv1d(nn.Conv1d):
    """torch's convolution, padded by half its kernel; with wide weights and no gradient asked for, a matrix
    product on a CPU.

    The chunk is short and the weights are wide. torch's own lays the weights out anew at each call, which
    there takes longer than to read them once: 2.3 times at 2048 channels and one chunk. From WIDE weights on
    the product is faster.
    """

    WIDE: ClassVar[int] = 2**16

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H). Returns (B, outputs, H / stride)."""
        if x.device.type != "cpu" or torch.is_grad_enabled() or self.weight.numel() < self.WIDE:
            return super().forward(x)
        kernel, stride = self.kernel_size[0], self.stride[0]
        if kernel > 1:  # (B, inputs · kernel, H / stride)
            x = F.unfold(x[:, :, None], (1, kernel), padding=(0, kernel // 2), stride=(1, stride))
        windows = x.transpose(1, 2)
        if len(x) > 1:
            windows = windows.contiguous()
        return F.linear(windows, self.weight.flatten(1), self.bias).transpose(1, 2)


class ConvBlock(nn.Module):
    """Convolution along time that keeps the length, group norm, Mish. (B, inputs, H) → (B, outputs, H)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, groups: int) -> None:
        super().__init__()
        self.block = nn.Sequential(
            Conv1d(inputs, outputs, kernel, padding=kernel // 2),
            nn.GroupNorm(groups, outputs),
            nn.Mish(),
        )

    def forward(self, x: Tensor) -> Tensor:
        """x (B, inputs, H). Returns (B, outputs, H)."""
        out: Tensor = self.block(x)
        return out


class FilmBlock(nn.Module):
    """Two convolutions on a residual path; between them each channel is scaled and shifted (FiLM).

    `condition` is the width of what FiLM is told; without `scale` it only shifts.
    """

    def __init__(
        self, inputs: int, outputs: int, condition: int, *, kernel: int, groups: int, scale: bool
    ) -> None:
        super().__init__()
        self.scale = scale
        self.conv1 = ConvBlock(inputs, outputs, kernel, groups)
        self.cond_encoder = nn.Sequential(nn.Mish(), nn.Linear(condition, outputs * (1 + scale)))
        self.conv2 = ConvBlock(outputs, outputs, kernel, groups)
        same = inputs == outputs
        self.residual_conv = nn.Identity() if same else Conv1d(inputs, outputs, kernel_size=1)

    @property
    def film(self) -> nn.Linear:
        """The layer that turns a condition into scales and shifts."""
        layer = self.cond_encoder[1]
        assert isinstance(layer, nn.Linear)
        return layer

    def forward(self, x: Tensor, film: Tensor) -> Tensor:
        """x (B, inputs, H), film (B, outputs), or (B, 2 outputs), scales first. Returns (B, outputs, H)."""
        out = self.conv1(x)
        film = film[..., None]
        if self.scale:
            scale, shift = film.chunk(2, dim=1)
            out = torch.addcmul(shift, scale, out)
        else:
            out = out + film
        return self.conv2(out) + self.residual_conv(x)


class Observed(NamedTuple):
    """What stays the same while one chunk is made: for all blocks' scales and shifts, D in all, one after the
    other. Where a gradient is asked for, only what was seen.
    """

    seen: Tensor  # (B, C), activated
    film: Tensor | None = None  # (B, D), the observations' share
    of_time: Tensor | None = None  # (D, time_width), the weights of the timestep's


class ConditionalUnet1d(nn.Module):
    """Predicts, for a noisy chunk and its timestep, what `minivla.actions.diffusion` wants predicted.

    actions A; condition C, the width of all that was observed; widths of the stages, each half as long as
    the one before; `time_width` of the timestep's code; scale: FiLM also scales; remember: False recomputes
    the blocks in the backward pass to save memory. H must be a multiple of 2^(stages - 1).

    What FiLM is told is [timestep's code, observation]; its layer is linear, so the observation's share is
    computed once a chunk (`observe`), the timestep's at every step of the sampler, for all blocks at once.
    Training tells both together.
    """

    def __init__(
        self,
        actions: int,
        condition: int,
        *,
        widths: Sequence[int] = (512, 1024, 2048),
        kernel: int = 5,
        groups: int = 8,
        time_width: int = 128,
        scale: bool = True,
        remember: bool = True,
    ) -> None:
        super().__init__()
        self.time_width, self.remember = time_width, remember
        self.diffusion_step_encoder = nn.Sequential(
            nn.Identity(),  # upstream's code of sines stands here
            nn.Linear(time_width, 4 * time_width),
            nn.Mish(),
            nn.Linear(4 * time_width, time_width),
        )

        def pair(inputs: int, outputs: int) -> list[nn.Module]:
            return [
                FilmBlock(start, outputs, time_width + condition, kernel=kernel, groups=groups, scale=scale)
                for start in (inputs, outputs)
            ]

        down = list(zip((actions, *widths[:-1]), widths, strict=True))
        halve = [*(Conv1d(width, width, 3, stride=2, padding=1) for width in widths[:-1]), nn.Identity()]
        self.down_modules = nn.ModuleList(
            nn.ModuleList([*pair(*stage), shorten]) for stage, shorten in zip(down, halve, strict=True)
        )
        self.mid_modules = nn.ModuleList(pair(widths[-1], widths[-1]))
        self.up_modules = nn.ModuleList(
            nn.ModuleList([*pair(2 * wide, narrow), nn.ConvTranspose1d(narrow, narrow, 4, 2, 1)])
            for narrow, wide in reversed(down[1:])
        )
        # Upstream leaves this block's groups at 8, whatever n_groups is.
        self.final_conv = nn.Sequential(
            ConvBlock(widths[0], widths[0], kernel, groups=8), Conv1d(widths[0], actions, kernel_size=1)
        )
        self.blocks = [module for module in self.modules() if isinstance(module, FilmBlock)]  # as they run

    def observe(self, seen: Tensor) -> Observed:
        """The observations' share of every block's FiLM. seen (B, T, C / T)."""
        seen = F.mish(rearrange(seen, "b t c -> b (t c)"))
        if torch.is_grad_enabled():  # in training each is needed once, and weights in halves cost copies
            return Observed(seen)
        weight = torch.cat([block.film.weight for block in self.blocks])
        bias = torch.cat([block.film.bias for block in self.blocks])
        of_time, of_seen = weight.tensor_split([self.time_width], dim=1)
        return Observed(seen, F.linear(seen, of_seen, bias), of_time)

    def forward(self, x: Tensor, timestep: Tensor, observed: Observed) -> Tensor:
        """x (B, H, A); timestep (B,) or (1,); observed from `observe`. Returns (B, H, A)."""
        films = iter(self.modulate(timestep, observed))
        x = rearrange(x, "b h a -> b a h")
        skips = []
        for i, stage in enumerate(self.down_modules):
            first, second, halve = stage.children()
            x = self.run(second, self.run(first, x, next(films)), next(films))
            recorder.keep(f"down.{i}", x)
            skips.append(x)
            x = halve(x)
        for block in self.mid_modules:
            x = self.run(block, x, next(films))
        recorder.keep("mid", x)
        for i, stage in enumerate(self.up_modules):
            first, second, double = stage.children()
            x = torch.cat((x, skips.pop()), dim=1)
            x = self.run(second, self.run(first, x, next(films)), next(films))
            recorder.keep(f"up.{i}", x)
            x = double(x)
        return rearrange(self.final_conv(x), "b a h -> b h a")

    def modulate(self, timestep: Tensor, observed: Observed) -> tuple[Tensor, ...]:
        """Every block's scales and shifts: what the timestep says on top of what was observed."""
        code = sine_timesteps(timestep, self.time_width).to(observed.seen.dtype)
        code = F.mish(self.diffusion_step_encoder(code))
        if observed.film is None or observed.of_time is None:
            rows = max(len(code), len(observed.seen))
            told = torch.cat([part.expand(rows, -1) for part in (code, observed.seen)], dim=-1)
            return tuple(block.film(told) for block in self.blocks)
        film = observed.film + F.linear(code, observed.of_time)
        return film.split([block.film.out_features for block in self.blocks], dim=1)

    def run(self, block: nn.Module, x: Tensor, film: Tensor) -> Tensor:
        """One block, its activations remembered for the backward pass or not."""
        if self.training and not self.remember:
            out: Tensor = checkpoint(block, x, film, use_reentrant=False)
        else:
            out = block(x, film)
        return out
