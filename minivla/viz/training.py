"""Pictures of training: the loss, what normalisation does to a feature, windows at an episode's end."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Patch, Rectangle
from matplotlib.ticker import LogLocator, MaxNLocator, NullLocator, StrMethodFormatter
from torch import Tensor

from minivla.data.features import NormalizationMode
from minivla.data.normalize import STATISTICS, normalize
from minivla.viz import palette

if TYPE_CHECKING:
    from minivla.training.evaluation import Evaluation

REACH = 4.0  # normalised values further out are counted, not drawn


def plot_loss(
    log: Sequence[Mapping[str, Any]] | str | os.PathLike[str],
    *,
    key: str = "loss",
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """The loss against the step, raw and smoothed; where the log holds evaluations, the success rate below.

    log: records with "step" and `key`, as `TrainResult.log`, or the path of a run's log.jsonl. The scale is
    logarithmic when all losses are positive. With `ax` only the loss is drawn. Raises FileNotFoundError for
    an absent file, ValueError for a log without losses or with a line that is not JSON.
    """
    records = read_log(log)
    losses = [r for r in records if key in r and "step" in r]
    if not losses:
        found = sorted({name for r in records for name in r})
        raise ValueError(
            f"no record has step and {key!r}; the log's records have {', '.join(found) or 'nothing'}"
        )
    step, loss = np.array([r["step"] for r in losses]), np.array([r[key] for r in losses], dtype=float)
    rounds = [] if ax is not None else [r for r in records if "success" in r]
    with palette.style():
        if rounds:
            figure = palette.sheet(4.3)
            ax, below = figure.subplots(2, 1, sharex=True, height_ratios=(3, 2))
            _draw_success(below, rounds)
        else:
            figure, ax = palette.panel(ax, 2.9)
        _draw_loss(ax, step, loss, key)
        if not rounds:
            ax.set_xlabel("training step")
        ax.set_title(_loss_title(step, smoothed(loss), key) if title is None else title)
    return figure


def read_log(log: Sequence[Mapping[str, Any]] | str | os.PathLike[str]) -> list[Mapping[str, Any]]:
    """The records of a run, from themselves or from a file with one JSON object a line."""
    if not isinstance(log, (str, os.PathLike)):
        return list(log)
    path = Path(log)
    if not path.is_file():
        raise FileNotFoundError(
            f"no log at {path}; expected the log.jsonl in the folder given as train(…, output=folder)"
        )
    try:
        return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
    except json.JSONDecodeError as error:
        raise ValueError(f"{path} is not JSON lines ({error}); expected one JSON object a line") from error


def smoothed(values: np.ndarray) -> np.ndarray:
    """The running mean over a twentieth of the values around each; windows are cut at both ends."""
    half = len(values) // 40
    total = np.concatenate(([0.0], np.cumsum(values)))
    at = np.arange(len(values))
    low, high = np.maximum(at - half, 0), np.minimum(at + half + 1, len(values))
    return (total[high] - total[low]) / (high - low)


def plot_success(
    results: Mapping[str, Evaluation], *, title: str | None = None, ax: Axes | None = None
) -> Figure:
    """Success rates side by side: a dot for each share, and Wilson's 95 % interval as a range, top to bottom.

    results: {name: what `minivla.evaluate` returned}. Two rates whose ranges overlap may be the same. Raises
    ValueError when there are none.
    """
    if not results:
        raise ValueError("there are no results to draw; expected {name: minivla.evaluate(policy, …)}")
    y = np.arange(len(results))
    share, low, high = np.array([(r.success, r.low, r.high) for r in results.values()]).T
    with palette.style():
        own = ax is None
        figure, ax = palette.panel(ax, 0.85 + 0.3 * len(results))
        ax.hlines(y, 0, 1, color=palette.FAINT, linewidth=1, zorder=0)
        ax.hlines(
            y, low, high, color=palette.KIND_COLOURS["state"], linewidth=4.5, alpha=0.45, gid="interval"
        )
        ax.plot(share, y, "o", color=palette.KIND_COLOURS["state"], markersize=6.5, gid="success")
        for i, result in enumerate(results.values()):
            told = f"{palette.percent(result.success)} of {result.episodes}"
            ax.text(1.03, i, told, va="center", fontsize=palette.FONT - 1)
        ax.set_yticks(y, list(results))
        ax.set(xlim=(-0.02, 1.02), ylim=(len(results) - 0.5, -0.5), xlabel="success rate (range: 95 %)")
        ax.set_xticks(np.linspace(0, 1, 5), ["0", "25 %", "50 %", "75 %", "100 %"])
        ax.tick_params(axis="y", length=0)
        ax.spines["left"].set_visible(False)
        palette.entitle(ax, success_title(results) if title is None else title, own=own)
    return figure


def success_title(results: Mapping[str, Evaluation]) -> str:
    """The finding: whether the best is apart from the next by more than chance."""
    ranked = sorted(results, key=lambda name: -results[name].success)
    best = results[ranked[0]]
    told = f"{ranked[0]} succeeds in {palette.percent(best.success)} of {best.episodes} episodes"
    if len(ranked) == 1:
        return told
    if best.low > results[ranked[1]].high:
        return f"{told}, more than the rest"
    equal = [name for name in ranked[1:] if results[name].high >= best.low]
    return f"{told}; {palette.listed(equal)} may be as good"


def plot_normalisation(
    x: Tensor | np.ndarray,
    modes: Sequence[NormalizationMode | str] = tuple(NormalizationMode),
    stats: Mapping[str, Any] | None = None,
    *,
    name: str = "value",
    unit: str = "robot units",
    title: str | None = None,
) -> Figure:
    """One dimension as the dataset holds it, and as each normalisation mode hands it to the network.

    x (N,); stats {"mean", "std", "min", "max", "q01", …}, one number each, those of x when None: statistics
    of other data show what goes wrong. Values beyond ±4 are counted at the edge. Raises ValueError for
    other shapes or no values, KeyError when a mode lacks its statistics.
    """
    values = torch.as_tensor(x).detach().cpu().double().squeeze()
    if values.ndim != 1 or values.numel() < 2:
        raise ValueError(
            f"x has shape {tuple(torch.as_tensor(x).shape)}; expected (N,), one dimension: x[:, i]"
        )
    wanted = [NormalizationMode(mode) for mode in modes if mode != NormalizationMode.IDENTITY]
    table = (
        _statistics(values)
        if stats is None
        else {k: torch.as_tensor(v).double().squeeze() for k, v in stats.items()}
    )
    with palette.style():
        figure = palette.sheet(0.95 + 0.72 * (len(wanted) + 1))
        axes = figure.subplots(len(wanted) + 1, 1, squeeze=False)[:, 0]
        axes[0].hist(values.numpy(), bins=60, color=palette.MUTED)
        axes[0].set_xlabel(f"{name} ({unit})")
        _name_row(axes[0], "IDENTITY\nas recorded")
        for ax, mode in zip(axes[1:], wanted, strict=True):
            ax.sharex(axes[1])
            _draw_mode(ax, normalize(values, mode, table).numpy(), mode)
        axes[-1].set_xlabel("what the network sees (no unit; grey: −1 to 1)")
        for ax in axes[1:-1]:
            ax.tick_params(labelbottom=False)
        palette.headline(figure, _normalisation_title(values, wanted, table) if title is None else title)
    return figure


def plot_windows(
    indices: Tensor | np.ndarray,
    is_pad: Tensor | np.ndarray,
    *,
    observations: tuple[Tensor | np.ndarray, Tensor | np.ndarray] | None = None,
    current: Sequence[int] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Windows at an episode's end: one row a frame, one cell an action, padding hatched.

    indices, is_pad (rows, H), as `minivla.data.window_indices` gives them for consecutive deltas; a padded
    cell stands where its frame would be and tells which frame is repeated there.
    observations: the same pair for the observation window, drawn above each row.
    current: the frame each row belongs to, where it is not the last observation or else the first action.

    Raises ValueError when shapes differ or a row is all padding.
    """
    frames, pad = _window(indices, is_pad)
    seen = None if observations is None else _window(*observations)
    if seen is not None and len(seen[0]) != len(frames):
        raise ValueError(
            f"observations has {len(seen[0])} rows, the actions {len(frames)}; expected the same windows"
        )
    with palette.style():
        figure, ax = palette.panel(ax, 1.05 + (0.32 if seen is None else 0.48) * len(frames))
        thick = 0.72 if seen is None else 0.46
        _draw_cells(ax, frames, pad, "action", 0.0 if seen is None else 0.2, thick)
        if seen is not None:
            _draw_cells(ax, *seen, "state", -0.29, 0.36)
            named = (("state", "observations"), ("action", "actions"))
            marks = [Patch(color=palette.KIND_COLOURS[kind], label=name) for kind, name in named]
            size: dict[str, Any] = {"handlelength": 1, "handleheight": 1, "fontsize": palette.FONT - 1}
            ax.legend(handles=marks, loc="lower left", **size)
        _window_axes(ax, frames, pad, seen, current)
        ax.set_title(
            f"{int(pad.sum())} of {pad.size} actions in these windows are padding" if title is None else title
        )
    return figure


def _draw_loss(ax: Axes, step: np.ndarray, loss: np.ndarray, key: str) -> None:
    ax.plot(step, loss, color=palette.KIND_COLOURS["image"], alpha=0.3, linewidth=0.8, gid="raw")
    ax.plot(step, smoothed(loss), color=palette.KIND_COLOURS["image"], linewidth=1.9, gid="smoothed")
    if (loss > 0).all():
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_locator(NullLocator())
    ax.xaxis.set_major_formatter(StrMethodFormatter("{x:,.0f}"))
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    ax.set_ylabel(f"{key} (log scale)" if (loss > 0).all() else key)
    ax.set_xlim(min(0, step.min()), step.max() * 1.015)


def _draw_success(ax: Axes, rounds: Sequence[Mapping[str, Any]]) -> None:
    at, rate = [r["step"] for r in rounds], np.array([r["success"] for r in rounds])
    low, high = (np.array([r.get(side, r["success"]) for r in rounds]) for side in ("low", "high"))
    style: dict[str, Any] = {"marker": "o", "markersize": 3.5, "capsize": 2.5}
    ax.errorbar(at, rate, [rate - low, high - rate], color=palette.KIND_COLOURS["state"], **style)
    ax.set(ylim=(-0.03, 1.03), ylabel="success rate\n(bar: 95 %)", xlabel="training step")


def _loss_title(step: np.ndarray, loss: np.ndarray, key: str) -> str:
    if len(loss) < 2:
        return f"{key}: {loss[-1]:.2g} at step {step[-1]:,}"
    verb = "fell" if loss[-1] < loss[0] else "rose"
    return f"The {key.replace('_', ' ')} {verb} from {loss[0]:.2g} to {loss[-1]:.2g} in {step[-1]:,} steps"


def _statistics(x: Tensor) -> dict[str, Tensor]:
    levels = {"q01": 0.01, "q10": 0.1, "q90": 0.9, "q99": 0.99}
    quantiles = {key: torch.quantile(x, level) for key, level in levels.items()}
    return {"mean": x.mean(), "std": x.std(correction=0), "min": x.min(), "max": x.max(), **quantiles}


def _draw_mode(ax: Axes, values: np.ndarray, mode: NormalizationMode) -> None:
    ax.axvspan(-1, 1, color=palette.FAINT, zorder=0, linewidth=0)
    ax.hist(values, bins=np.linspace(-REACH, REACH, 97).tolist(), color=palette.KIND_COLOURS["state"])
    for side in (-1, 1):
        if share := float((side * values > REACH).mean()):
            _count_beyond(ax, side, share)
    ax.set_xlim(-REACH, REACH)
    low, high = STATISTICS[mode]
    _name_row(ax, f"{mode.value}\n{low}, {high}")


def _count_beyond(ax: Axes, side: int, share: float) -> None:
    colour = palette.KIND_COLOURS["action"]
    style: dict[str, Any] = {"color": colour, "fontsize": palette.FONT - 1, "fontweight": "bold"}
    ax.annotate(
        f"{palette.percent(share, 1)} beyond",
        xy=(side * REACH, 0),
        xytext=(side * 0.985 * REACH, 0.55),
        textcoords=("data", "axes fraction"),
        ha="left" if side < 0 else "right",
        arrowprops={"arrowstyle": "->", "color": colour},
        **style,
    )


def _name_row(ax: Axes, text: str) -> None:
    ax.set_yticks([])
    ax.spines["left"].set_visible(False)
    ax.set_ylabel(text, rotation=0, ha="right", va="center", fontsize=palette.FONT - 1)


def _normalisation_title(x: Tensor, modes: Sequence[NormalizationMode], table: Mapping[str, Any]) -> str:
    """The finding: how wide the bulk of the values is for the network, at the least and at the most."""
    bulk = torch.quantile(x, torch.tensor([0.1, 0.9], dtype=x.dtype))
    width = {mode: float(normalize(bulk, mode, table).diff().abs()) for mode in modes}
    low, high = min(width, key=lambda m: width[m]), max(width, key=lambda m: width[m])
    return f"The middle 80 % spans {width[low]:.2g} under {low}, {width[high]:.2g} under {high}"


def _window(indices: Any, is_pad: Any) -> tuple[np.ndarray, np.ndarray]:
    frames, pad = np.atleast_2d(np.asarray(indices)), np.atleast_2d(np.asarray(is_pad)).astype(bool)
    if frames.shape != pad.shape or frames.ndim != 2:
        raise ValueError(
            f"indices have shape {frames.shape}, is_pad {pad.shape}; expected the same (rows, H)"
        )
    if pad.all(axis=1).any():
        raise ValueError("a window is all padding, so its place is unknown; leave that row out")
    return frames, pad


def _places(frames: np.ndarray, pad: np.ndarray) -> np.ndarray:
    """The frame each cell would be, were the episode long enough: counted from the row's first real cell."""
    first = (~pad).argmax(axis=1)
    start = frames[np.arange(len(frames)), first] - first
    return start[:, None] + np.arange(frames.shape[1])


def _draw_cells(
    ax: Axes, frames: np.ndarray, pad: np.ndarray, kind: str, offset: float, thick: float
) -> None:
    places, small = _places(frames, pad), frames.shape[1] <= 20
    for row, column in np.ndindex(frames.shape):
        x, y, padded = places[row, column], row + offset, pad[row, column]
        colour = palette.KIND_COLOURS["padding" if padded else kind]
        look = palette.PADDING if padded else {"facecolor": colour, "linewidth": 0}
        gid = "padding" if padded else kind
        ax.add_patch(Rectangle((x - 0.46, y - thick / 2), 0.92, thick, **look, gid=gid))
        if small:
            ink, paper = (palette.INK, colour) if padded else (palette.text_on(colour), "none")
            box = {"boxstyle": "round,pad=0.1", "facecolor": paper, "edgecolor": "none"}
            middle: dict[str, Any] = {"ha": "center", "va": "center", "fontsize": palette.FONT - 2}
            ax.text(x, y, str(frames[row, column]), color=ink, bbox=box, **middle)


def _window_axes(
    ax: Axes,
    frames: np.ndarray,
    pad: np.ndarray,
    seen: tuple[np.ndarray, np.ndarray] | None,
    current: Sequence[int] | None,
) -> None:
    places = [_places(frames, pad)] + ([] if seen is None else [_places(*seen)])
    left, right = min(p.min() for p in places), max(p.max() for p in places)
    last = frames[~pad].max()
    ended = bool((frames[pad] == last).any())
    if ended:
        ax.axvline(last + 0.5, color=palette.INK, linewidth=1.2)
        ax.text(last + 0.65, -0.9, "the episode has ended", fontsize=palette.FONT - 1, va="center")
    now = current if current is not None else places[0][:, 0] if seen is None else places[1][:, -1]
    ax.set_yticks(range(len(frames)), [str(int(frame)) for frame in now])
    ax.set(xlim=(left - 0.6, right + 0.6), ylim=(len(frames) - 0.45, -1.2 if ended else -0.6))
    ax.xaxis.set_major_locator(MaxNLocator(12, integer=True))
    ax.tick_params(axis="y", length=0)
    ax.set(xlabel="frame of the episode", ylabel="the window of frame")
