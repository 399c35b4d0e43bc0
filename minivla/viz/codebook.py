"""What the codes of a discrete policy stand for, as paths of the gripper.

Reads a policy with an `ActionVQVAE` (`minivla.actions.vq`), as VQ-BeT has. Levels are counted from 1, the
coarsest, codes from 0. What the first levels alone stand for is the decoder's answer to the sum of their
entries, the further levels' left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from einops import rearrange
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from torch import Tensor

from minivla.actions.vq import ActionVQVAE
from minivla.viz import palette
from minivla.viz.codes import code_counts
from minivla.viz.pictures import as_array
from minivla.viz.plane import Meaning, Plane, draw_path

CHOSEN, ALONE, DEAD = palette.KIND_COLOURS["action"], palette.INK, palette.KIND_COLOURS["padding"]
SMALL = palette.FONT - 1
MOST = 64  # codes that are drawn, each in a picture of its own
STANDING = 0.25  # of the longest path's reach: shorter ones have no direction
GRID = 4.1  # inches, the width of the codes' pictures together
GAP, TOP, BELOW = 0.07, 0.56, 0.92  # inches: between pictures, above them, under those that are refined
FANS = 2  # codes that are refined, at most


def plot_codebook(
    policy: Any,
    meaning: Meaning = None,
    *,
    codes: Tensor | np.ndarray | None = None,
    refine: int | Sequence[int] | None = None,
    title: str | None = None,
) -> Figure:
    """What each code of the first level stands for, and how the second level refines two of them.

    policy    with a VQ-VAE of actions: VQ-BeT
    meaning   what an action's numbers mean (`minivla.viz.plane.Meaning`): an `ActionSpec`, the dimensions'
              names or a `Plane`; without, the first two are moves
    codes     (..., G), those of a data set: how often each is used, and which never
    refine    the codes of the first level that are refined, at most two (None: the most used that move;
              without `codes` those that move furthest)

    Each code's picture is the path of the chunk that it decodes to, all to one scale, sorted by the gripper
    and the direction; of more than 64 codes, the most used. Without statistics, actions are normalised.
    Raises TypeError for a policy without codes, ValueError for one whose VQ-VAE is untrained and for codes
    and dimensions out of range.
    """
    vqvae = vqvae_of(policy)
    size, levels = len(vqvae.vq_layer.levels[0].codebook), len(vqvae.vq_layer.levels)
    coarse = robot_chunks(policy, torch.arange(size)[:, None])
    plane = Plane.of(meaning, coarse.shape[-1])
    pairs = None if codes is None else _pair_counts(codes, size, levels)
    uses = None if pairs is None else pairs.reshape(size, -1).sum(axis=1)
    paths, closed = [plane.path(chunk) for chunk in coarse], [plane.closed(chunk) for chunk in coarse]
    refined = _refined(refine, paths, uses) if levels > 1 else []
    order = _shown(by_direction(paths, closed), uses)
    told = _codebook_title(size, len(order), closed, uses) if title is None else title
    with palette.style():
        figure, cells, fans = _board(len(order), len(refined))
        frame = _frame([paths[code] for code in order], plane)
        for cell, code in zip(cells, order, strict=True):
            _draw_code(cell, code, plane, coarse[code], uses, frame)
            if code in refined:
                cell.spines[:].set(color=palette.INK, linewidth=1.5)
        for ax, code in zip(fans, refined, strict=True):
            fine = robot_chunks(policy, torch.tensor([(code, second) for second in range(size)]))
            _draw_fan(ax, paths[code], fine, plane, None if pairs is None else pairs[code])
            ax.set_title(f"Code {code} refined", fontsize=SMALL, pad=4)
        _explain(figure, plane, uses)
        if fans:
            fans[-1].set_xlabel(f"x ({plane.unit if has_units(policy) else 'normalised'})", labelpad=1)
            _explain_fans(figure, fans[-1], uses)
        palette.headline(figure, told)
    return figure


@torch.no_grad()
def robot_chunks(policy: Any, codes: Tensor) -> np.ndarray:
    """The chunks (N, H, A) that codes (N, g) of the first g levels stand for, in robot units.

    Normalised where the policy has no statistics.
    """
    vqvae = vqvae_of(policy)
    parameter = next(vqvae.decoder.parameters())
    levels = vqvae.vq_layer.levels
    entries = [
        level.codebook[code] for level, code in zip(levels, codes.to(parameter.device).T, strict=False)
    ]
    flat = vqvae.decoder(torch.stack(entries).sum(0).to(parameter.dtype))
    chunks = rearrange(flat, "n (h a) -> n h a", h=vqvae.horizon)
    return as_array(policy.postprocess(chunks) if has_units(policy) else chunks)


def by_direction(paths: Sequence[np.ndarray], closed: Sequence[np.ndarray | None]) -> list[int]:
    """The numbers of the paths: an open gripper first, then counter-clockwise from the right; what hardly
    moves comes last of each.
    """
    moves = np.stack([path[-1] - path[0] for path in paths])
    reach = np.linalg.norm(moves, axis=1)
    angle = np.arctan2(moves[:, 1], moves[:, 0]) % (2 * np.pi)
    angle[reach < STANDING * reach.max(initial=0)] = np.inf
    shut = [0.0 if steps is None else float(steps.mean() > 0.5) for steps in closed]
    return [int(i) for i in np.lexsort((angle, shut))]


def vqvae_of(policy: Any) -> ActionVQVAE:
    """The policy's VQ-VAE. Raises TypeError when it has none, ValueError when it is untrained."""
    vqvae = getattr(policy, "vqvae", None)
    if not isinstance(vqvae, ActionVQVAE):
        raise TypeError(
            f"{type(policy).__name__} has no codes of actions; give a policy with a VQ-VAE, such as VQ-BeT: "
            'minivla.load("vqbet-tabletop")'
        )
    if not vqvae.vq_layer.touched:
        raise ValueError(
            "this VQ-VAE is untrained: its codes are random numbers and stand for nothing. Train phase 1 "
            "(n_vqvae_training_steps calls of forward in training), or load a policy whose phase 1 is done"
        )
    return vqvae


def has_units(policy: Any) -> bool:
    """Whether the policy's statistics are known, which take normalised actions to robot units."""
    return getattr(policy, "postprocessor", None) is not None


def _pair_counts(codes: Tensor | np.ndarray, size: int, levels: int) -> np.ndarray:
    """How often each code, or pair of the first two levels' codes, occurs: (C,) or (C, C)."""
    table = as_array(codes)
    if table.ndim < 1 or table.shape[-1] != levels:
        raise ValueError(
            f"codes has shape {table.shape}; expected (..., {levels}), a code for each of {levels} levels: "
            "policy.vqvae.encode(chunks)"
        )
    for level in range(levels):
        code_counts(table[..., level], size)
    if levels == 1:
        return code_counts(table, size)
    return code_counts(table[..., 0].astype(np.int64) * size + table[..., 1], size * size).reshape(size, size)


def _refined(
    refine: int | Sequence[int] | None, paths: Sequence[np.ndarray], uses: np.ndarray | None
) -> list[int]:
    """The codes to refine: those asked for, or the two most telling."""
    if refine is None:
        reach = np.array([np.linalg.norm(path[-1] - path[0]) for path in paths])
        telling = reach if uses is None else np.where(reach >= STANDING * reach.max(), uses, -1)
        return [int(code) for code in np.argsort(-telling, kind="stable")[:FANS]]
    asked = [refine] if isinstance(refine, int) else list(refine)
    if not 0 < len(asked) <= FANS or any(not 0 <= code < len(paths) for code in asked):
        raise ValueError(
            f"refine is {refine}; the first level has {len(paths)} codes: expected one or two of "
            f"0 to {len(paths) - 1}"
        )
    return asked


def _shown(order: list[int], uses: np.ndarray | None) -> list[int]:
    """The codes that get a picture, in their order: the most used, where there are too many."""
    if len(order) <= MOST:
        return order
    kept = order[:MOST] if uses is None else np.argsort(-uses, kind="stable")[:MOST].tolist()
    return [code for code in order if code in kept]


def _board(count: int, fans: int) -> tuple[Figure, list[Axes], list[Axes]]:
    """A sheet with a small square for each code, and beside them axes for those that are refined."""
    columns = max(4, math.ceil(math.sqrt(count)))
    rows = math.ceil(count / columns)
    whole = GRID if fans else palette.WIDTH - 0.2
    step = (whole + GAP) / columns
    bottom = max(TOP + rows * step - GAP, TOP + 3.0 if fans else 0)
    figure = palette.sheet(bottom + 0.1, layout=None)
    places = [(0.1 + i % columns * step, TOP + i // columns * step) for i in range(count)]
    cells = [palette.axes_at(figure, *place, step - GAP, step - GAP) for place in places]
    if not fans:
        return figure, cells, []
    left, tall = 0.1 + GRID + 0.5, (bottom - TOP - BELOW + 0.45) / fans
    wide = palette.WIDTH - left - 0.1
    return (
        figure,
        cells,
        [palette.axes_at(figure, left, TOP + i * tall, wide, tall - 0.45) for i in range(fans)],
    )


def _frame(paths: Sequence[np.ndarray], plane: Plane) -> tuple[float, float, float]:
    """The middle and half the side of a square that holds all paths, to which all of them are drawn."""
    points = np.concatenate(paths)
    low, high = points.min(axis=0), points.max(axis=0)
    if not plane.absolute:  # the start in the middle, so that a picture is read as a direction
        return 0.0, 0.0, 1.18 * max(float(np.abs(points).max()), 1e-9)
    half = 0.59 * max(float((high - low).max()), 1e-9)
    return float((low + high)[0] / 2), float((low + high)[1] / 2), half


def _draw_code(
    ax: Axes,
    code: int,
    plane: Plane,
    chunk: np.ndarray,
    uses: np.ndarray | None,
    frame: tuple[float, float, float],
) -> None:
    x, y, half = frame
    ax.set(xlim=(x - half, x + half), ylim=(y - half, y + half), xticks=[], yticks=[], aspect="equal")
    ax.spines[:].set(visible=True, color=palette.HATCH_INK, linewidth=0.6)
    ax.set_gid(f"code {code}")
    dead = uses is not None and uses[code] == 0
    closed = plane.closed(chunk)
    shut = closed is not None and closed.mean() > 0.5
    ax.set_facecolor(DEAD if dead else palette.blend(palette.PAPER, CHOSEN, 0.1 * shut))
    draw_path(ax, plane, chunk, palette.MUTED if dead else CHOSEN)
    font: dict[str, Any] = {"transform": ax.transAxes, "fontsize": 7, "va": "top"}
    ax.text(0.04, 0.96, str(code), fontweight="bold", **font)
    if uses is None:
        return
    share = uses[code] / uses.sum()
    ax.text(0.96, 0.96, _told(share), ha="right", **font)
    ax.axhspan(y - half, y - 0.93 * half, 0, uses[code] / uses.max(), color=palette.MUTED, lw=0, gid="use")


def _told(share: float) -> str:
    if 0 < share < 0.01:
        return "< 1 %"
    return palette.percent(share) if share else "never"


def _draw_fan(ax: Axes, path: np.ndarray, fine: np.ndarray, plane: Plane, uses: np.ndarray | None) -> None:
    """The chunks (C, H, A) of one code of the first level with each of the second, round its own path: the
    more used, the stronger.
    """
    share = np.full(len(fine), 0.5) if uses is None else uses / max(1, uses.max())
    for second in np.argsort(share, kind="stable"):
        dead = uses is not None and uses[second] == 0
        colour = (
            palette.HATCH_INK if dead else palette.blend(palette.PAPER, CHOSEN, 0.45 + 0.55 * share[second])
        )
        dash: Any = (0, (1, 1.2)) if dead else "-"
        way, shut = plane.path(fine[second]), plane.closed(fine[second])
        ax.plot(
            *way.T, color=colour, linestyle=dash, linewidth=0.8 + 1.3 * share[second], gid=f"with {second}"
        )
        inside = colour if shut is None or shut[-1] else palette.PAPER
        ax.plot(*way[-1], "o", color=colour, markerfacecolor=inside, markersize=3)
    ax.plot(*path.T, color=ALONE, linewidth=1.6, linestyle=(0, (3, 1.4)), gid="level 1 alone")
    ax.set_aspect("equal", adjustable="datalim")
    ax.margins(0.08)
    ax.locator_params(nbins=4)


def _explain(figure: Figure, plane: Plane, uses: np.ndarray | None) -> None:
    """What the marks mean, above the pictures."""
    told = ["dot: a step"] if plane.gripper is None else ["● gripper closes", "○ opens"]
    told = told if plane.absolute else ["+ start", *told]
    told += [] if uses is None else ["bar: share of the data set"]
    wide, tall = figure.get_size_inches()
    style: dict[str, Any] = {"fontsize": SMALL, "color": palette.MUTED, "va": "bottom"}
    figure.text(0.1 / wide, 1 - (TOP - 0.06) / tall, "    ".join(told), **style)


def _explain_fans(figure: Figure, ax: Axes, uses: np.ndarray | None) -> None:
    """What the lines mean, under the refined codes."""
    lines = "dashed: level 1 alone\nlines: with each code of level 2"
    lines += "" if uses is None else ",\nstrong where often used,\ndotted where never"
    box, (wide, tall) = ax.get_position(), figure.get_size_inches()
    style: dict[str, Any] = {"fontsize": SMALL, "color": palette.MUTED, "va": "top"}
    figure.text(1 - (palette.WIDTH - GRID - 0.25) / wide, box.y0 - 0.36 / tall, lines, **style)


def _codebook_title(
    size: int, shown: int, closed: Sequence[np.ndarray | None], uses: np.ndarray | None
) -> str:
    """The finding: what the codes are shared out among, and how many are dead."""
    what = f"{size:,} codes" if shown == size else f"{shown} of {size:,} codes"
    states = [bool(steps.mean() > 0.5) for steps in closed if steps is not None]
    told = f"{what}, each a small movement"
    if states:
        told = f"{what}: {states.count(False)} with the gripper open, {states.count(True)} closed"
    if uses is not None:
        dead = int((uses == 0).sum())
        told += f"; {dead} never used" if dead else "; all are used"
    return told
