"""How one call of a discrete policy chose its chunk: what each code was worth, which were drawn, what they
stand for, and what the offset made of it.
"""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patheffects import withStroke
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla.data.features import OBS_STATE
from minivla.recorder import Call, NotKept
from minivla.viz import palette
from minivla.viz.codebook import has_units, robot_chunks, vqvae_of
from minivla.viz.pictures import as_array
from minivla.viz.plane import Meaning, Plane, draw_path
from minivla.viz.scene import observed, table_picture

CHOSEN, CODE = palette.KIND_COLOURS["action"], palette.INK
LIKELY = 0.02  # probability from which on another code of the first level is drawn
SMALL = palette.FONT - 1
TOP = 0.85  # inches above the panels
WINDOW = 0.5  # of the table: so much of its picture is shown, at least


def plot_choice(
    policy: Any,
    call: Call,
    meaning: Meaning = None,
    *,
    sample: int = 0,
    query: int | None = None,
    camera: str | None = "table",
    title: str | None = None,
) -> Figure:
    """One call's choice of codes: left, each level's probabilities, the drawn code strong; right, the chunk
    that the drawn codes stand for, and with an arrow for each step what it is with the offset.

    policy, call     of a trace; `trace.plot_codes` gives both
    meaning          as in `plot_codebook`
    sample, query    which of the batch, and which prediction (None: the current step's, n_obs_steps - 1)
    camera           that sees the whole table, by key or short name: where `meaning` has table widths its
                     picture lies under the paths, which start at the state's first two numbers (None: not)

    Probabilities are the softmax of logits / temperature as the policy draws; the outline is the same at
    temperature 1. Faint paths are the other codes of the first level that had 2 % or more, as this level
    alone decodes them. Raises NotKept for a call without codes, ValueError for a sample, a query or
    dimensions out of range, and as `plot_codebook` does.
    """
    codes, logits, decoded, offsets = _kept(policy, call, sample, query)
    vqvae_of(policy)
    chances = chances_of(logits, policy.code_head.temperature)
    of_codes, with_offset = _robot(policy, decoded), _robot(policy, decoded + offsets)
    plane = Plane.of(meaning, with_offset.shape[-1])
    others = [c for c in np.flatnonzero(chances[0] >= LIKELY).tolist() if c != codes[0]]
    with palette.style():
        figure, bars, ax = _sheet(len(codes))
        for level, panel in enumerate(bars):
            _draw_chances(panel, chances[level], chances_of(logits[level], 1.0), int(codes[level]), level + 1)
        bars[-1].set_xlabel("code")
        _name_temperatures(bars[0], policy.code_head.temperature)
        if others:
            coarse = robot_chunks(policy, torch.tensor(others)[:, None])
            for code, chunk in zip(others, coarse, strict=True):
                _draw_other(ax, code, chances[0, code], plane.path(chunk))
        _draw_offset(ax, plane, of_codes, with_offset)
        ax.margins(0.2)
        ax.set_aspect("equal", adjustable="datalim")
        if camera is not None and has_units(policy):
            _lay_table(ax, policy, call, meaning, camera, sample)
        unit = plane.unit if has_units(policy) else "normalised"
        _finish(ax, unit, plane.gripper is not None)
        moved = np.linalg.norm(plane.path(with_offset)[-1] - plane.path(of_codes)[-1])
        told = _title(codes[0], chances[0], float(moved), unit) if title is None else title
        palette.headline(figure, told)
    return figure


def chances_of(logits: Tensor, temperature: float) -> np.ndarray:
    """The probabilities of codes (..., C) by their logits, as they are drawn."""
    return as_array((logits.float() / temperature).softmax(-1))


def _kept(
    policy: Any, call: Call, sample: int, query: int | None
) -> tuple[list[int], Tensor, Tensor, Tensor]:
    """Of one prediction: codes (G,), logits (G, C), decoded and offsets (H, A), normalised."""
    names = ("codes", "logits", "decoded", "offsets")
    if any(name not in call.hidden for name in names):
        raise NotKept(
            f"this call of {type(policy).__name__} chose no codes; trace policy.predict_action_chunk(batch) "
            "of a VQ-BeT. While its VQ-VAE is trained (phase 1), forward chooses none"
        )
    size, queries = call.hidden["codes"].shape[:2]
    query = policy.config.n_obs_steps - 1 if query is None else query
    for what, value, count in (("sample", sample, size), ("query", query, queries)):
        if not 0 <= value < count:
            raise ValueError(f"{what} is {value}; the call has {count}: expected 0 to {count - 1}")
    codes, *rest = (call.hidden[name][sample, query] for name in names)
    return [int(code) for code in codes], rest[0], rest[1], rest[2]


def _robot(policy: Any, chunk: Tensor) -> np.ndarray:
    return as_array(policy.postprocess(chunk) if has_units(policy) else chunk)


def _sheet(levels: int) -> tuple[Figure, list[Axes], Axes]:
    step = max(1.0, 3.3 / levels)
    figure = palette.sheet(TOP + levels * step + 0.25, layout=None)
    bars = [palette.axes_at(figure, 0.55, TOP + i * step, 2.4, step - 0.25) for i in range(levels)]
    for ax in bars[:-1]:
        ax.tick_params(labelbottom=False)
    return figure, bars, palette.axes_at(figure, 3.7, TOP, 2.68, levels * step - 0.25)


def _draw_chances(ax: Axes, chances: np.ndarray, plain: np.ndarray, drawn: int, level: int) -> None:
    """A bar a code, the drawn one strong; as an outline, what a temperature of 1 would make of them."""
    colours = [palette.blend(palette.PAPER, CHOSEN, 1.0 if c == drawn else 0.4) for c in range(len(chances))]
    ax.bar(np.arange(len(chances)), chances, 0.8, color=colours, gid="chances")
    edges = np.arange(len(chances) + 1) - 0.5
    ax.stairs(plain, edges, baseline=None, color=palette.MUTED, linewidth=0.9, gid="at temperature 1")
    ax.set(xlim=(-0.5, len(chances) - 0.5), ylim=(0, 1.0), yticks=[0, 0.5, 1])
    ax.set_yticks([0, 0.5, 1], ["0", "50 %", "100 %"])
    ax.xaxis.set_major_locator(MaxNLocator(8, integer=True))
    told = f"level {level}: {drawn} drawn, had {palette.percent(chances[drawn])}"
    ax.set_title(told, fontsize=SMALL, pad=4)


def _name_temperatures(ax: Axes, temperature: float) -> None:
    told = f"bars: temperature {temperature:g}" + ("" if temperature == 1 else "\noutline: the same at 1")
    style: dict[str, Any] = {"ha": "right", "va": "top", "fontsize": 7, "color": palette.MUTED}
    ax.text(1, 1, told, transform=ax.transAxes, **style)


def _draw_other(ax: Axes, code: int, chance: float, path: np.ndarray) -> None:
    """Another code of the first level, the fainter the less likely, with a light border on dark pictures."""
    colour = palette.blend(palette.PAPER, CHOSEN, 0.4 + 0.5 * float(chance))
    border = withStroke(linewidth=2.4, foreground=palette.PAPER)
    ax.plot(*path.T, color=colour, linewidth=1.2, gid=f"other {code}", zorder=1, path_effects=[border])
    font: dict[str, Any] = {"fontsize": 7, "color": palette.INK, "path_effects": [border], "zorder": 4}
    told = f"{code} · {palette.percent(chance)}"
    ax.annotate(told, tuple(path[-1]), (3, 2), textcoords="offset points", **font)


def _draw_offset(ax: Axes, plane: Plane, decoded: np.ndarray, final: np.ndarray) -> None:
    """The path of the codes, that of the chunk, and an arrow from each step of the one to the other's."""
    before, after = plane.path(decoded), plane.path(final)
    dash: dict[str, Any] = {"linestyle": (0, (3, 1.4)), "linewidth": 1.3}
    draw_path(ax, plane, decoded, CODE, name="decoded", **dash)
    border = withStroke(linewidth=3.6, foreground=palette.PAPER)
    draw_path(ax, plane, final, CHOSEN, name="chunk", linewidth=2.0, path_effects=[border])
    arrows: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "scale": 1, "width": 0.005, "zorder": 1}
    ax.quiver(*before.T, *(after - before).T, color=palette.MUTED, alpha=0.7, gid="offset", **arrows)


def _lay_table(ax: Axes, policy: Any, call: Call, meaning: Meaning, camera: str, sample: int) -> None:
    """The table's picture under paths that begin at (0, 0), and enough of it to see what is about."""
    picture = table_picture(policy, call.batch, meaning, camera, sample)
    if picture is None:
        return
    x, y = as_array(observed(policy, call.batch, [OBS_STATE])[OBS_STATE])[sample, -1, :2]
    box = ax.dataLim
    side = max(WINDOW, 1.3 * box.width, 1.3 * box.height)
    middle = ((box.x0 + box.x1) / 2, (box.y0 + box.y1) / 2)
    ax.imshow(picture, extent=(-x, 1 - x, -y, 1 - y), alpha=0.6, zorder=0, gid="table")
    ax.set(
        xlim=(middle[0] - side / 2, middle[0] + side / 2), ylim=(middle[1] - side / 2, middle[1] + side / 2)
    )
    ax.set_aspect("equal", adjustable="box", anchor="N")


def _finish(ax: Axes, unit: str, fingers: bool) -> None:
    """Axes, and above them which line is which."""
    ax.set_xlabel(f"x ({unit})", labelpad=1)
    ax.set_ylabel("y", labelpad=1)
    ax.locator_params(nbins=4)
    style: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "fontsize": SMALL}
    told = (("- - the codes", CODE, 0), ("— with the offset", CHOSEN, 62))
    for text, colour, right in told:
        ax.annotate(text, (0, 1), (right, 4), color=colour, fontweight="bold", **style)
    marks = "● closes  ○ opens  faint: other codes" if fingers else "faint: other codes"
    ax.annotate(marks, (0, 1), (0, 16), color=palette.MUTED, **style)


def _title(code: int, chances: np.ndarray, moved: float, unit: str) -> str:
    """The finding: how sure the first level was, and how far the offset leads."""
    rivals = int((np.delete(chances, code) >= LIKELY).sum())
    others = (
        f"{palette.counted(rivals, 'other')} had {palette.percent(LIKELY)} or more" if rivals else "no rival"
    )
    told = f"Level 1 drew code {code} ({palette.percent(chances[code])}; {others})"
    return f"{told}; the offset moves the end by {moved:.2g} {unit}"
