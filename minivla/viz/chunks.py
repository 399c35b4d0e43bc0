"""Action chunks: each dimension over the horizon, and the gripper's path over the table."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from torch import Tensor

from minivla.viz import palette
from minivla.viz.pictures import as_array, as_picture, gaps

PREDICTED, EXPERT = palette.KIND_COLOURS["action"], palette.INK
# Named paths: vermilion, blue, green, mauve, which colour-blind eyes tell apart; then the same, dashed.
PATHS = tuple(palette.KIND_COLOURS[kind] for kind in ("action", "image", "state", "time"))
DASHES = ("-", (0, (3, 1.5)), (0, (1, 1.2)))


def plot_chunk(
    normalised: Tensor | np.ndarray,
    robot_units: Tensor | np.ndarray | None = None,
    *,
    names: Sequence[str] | None = None,
    units: Sequence[str] | None = None,
    expert: Tensor | np.ndarray | None = None,
    valid: Tensor | np.ndarray | None = None,
    n_action_steps: int | None = None,
    sample: int = 0,
    title: str | None = None,
    dimension: int | None = None,
    ax: Axes | None = None,
) -> Figure:
    """A predicted chunk, one panel a dimension: robot units on the left axis, normalised on the right.

    normalised, robot_units (B, H, A) or (H, A), the same chunk twice; without robot_units everything is
    normalised, the expert too. expert, in robot units, and valid (B, H) likewise. Steps that are not valid
    are padding: hatched, and no expert is drawn there. n_action_steps marks where the policy looks again.
    Values that are not finite leave a gap, and the title counts them. dimension: only this one; ax: draw it
    there (the first one, if `dimension` is None).
    Raises ValueError for shapes that do not match, a wrong number of names and a dimension out of range.
    """
    scaled = _one(normalised, sample, 2, "normalised")
    chunk = scaled if robot_units is None else _one(robot_units, sample, 2, "robot_units")
    units = ["normalised"] * chunk.shape[1] if robot_units is None and units is None else units
    shown = None if expert is None else _one(expert, sample, 2, "expert")
    for what, other in (("normalised", scaled), ("expert", shown)):
        if other is not None and other.shape != chunk.shape:
            raise ValueError(
                f"{what} has shape {other.shape} (H, A), robot_units {chunk.shape}; expected the same"
            )
    horizon, size = chunk.shape
    real = np.ones(horizon, bool) if valid is None else _one(valid, sample, 1, "valid").astype(bool)
    if len(real) != horizon:
        raise ValueError(f"valid has {len(real)} steps, the chunk {horizon}; expected one for each step")
    names, units = _labels(names, size, "names", "action"), _labels(units, size, "units", "")
    with palette.style():
        told = [f"{name}\n({unit})" if unit else name for name, unit in zip(names, units, strict=True)]
        drawn = _dimensions(dimension, size, alone=ax is not None)
        figure, axes, tall = _sheet([told[i] for i in drawn], ax)
        for i, panel in zip(drawn, axes, strict=True):
            _draw_dimension(panel, chunk[:, i], None if shown is None else shown[:, i], real)
            panel.set_ylabel(palette.wrapped(told[i], tall, palette.FONT, "normal"))
            _second_scale(panel, chunk[:, i], scaled[:, i])
            if n_action_steps is not None and n_action_steps < horizon:
                _mark_replanning(panel, n_action_steps, first=panel is axes[0])
        _finish(axes, shown is not None, len(drawn))
        found = chunk_title(scaled, chunk, shown, real, names) if title is None else title
        palette.entitle(axes[0], found, own=ax is None)
    return figure


def _dimensions(dimension: int | None, size: int, *, alone: bool) -> list[int]:
    """Which dimensions get a panel. Raises ValueError for one that the chunk has not."""
    if dimension is None:
        return [0] if alone else list(range(size))
    if not 0 <= dimension < size:
        raise ValueError(f"dimension is {dimension}; the chunk has {size}: expected 0 to {size - 1}")
    return [dimension]


def chunk_title(
    normalised: np.ndarray,
    chunk: np.ndarray,
    expert: np.ndarray | None,
    valid: np.ndarray,
    names: Sequence[str],
) -> str:
    """The finding: values that are not finite, else which dimension is furthest from the expert, judged in
    normalised units.
    """
    horizon = f"{palette.counted(len(chunk), 'action')} from one look"
    if not (np.isfinite(chunk) & np.isfinite(normalised)).all():
        lost = int((~(np.isfinite(chunk) & np.isfinite(normalised))).sum())
        return f"{horizon}; {lost} of {palette.counted(chunk.size, 'value')} not finite"
    if expert is None or not valid.any() or not np.isfinite(expert[valid]).all():
        return horizon
    slopes = [_affine(chunk[:, i], normalised[:, i]) for i in range(chunk.shape[1])]
    error = np.abs(chunk - expert)[valid].mean(axis=0)
    if any(slope is None for slope in slopes):
        worst = int(error.argmax())
        return f"{horizon}; {names[worst]} is off by {error[worst]:.2g} on average"
    worst = int((error * [abs(slope[0]) for slope in slopes if slope]).argmax())
    return f"{horizon}; {names[worst]} strays furthest from the expert"


def plot_gripper_path(
    image: Any,
    paths: Tensor | np.ndarray | Sequence[Any],
    *,
    driven: Tensor | np.ndarray | None = None,
    expert: Tensor | np.ndarray | None = None,
    labels: Sequence[str] | None = None,
    title: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Where the gripper is told to go, over the table camera's picture.

    image (3, H, W) or (H, W, 3), the whole table; paths (N, 2) or several of them, oldest first, in table
    widths: x to the right, y up, both in [0, 1]. Older paths fade, unless `labels` names each: then all are
    strong and differ in colour and dash. `driven` (N, 2) is the way really taken, `expert` (N, 2) the
    demonstrator's. Raises ValueError for other shapes, and for labels that are not one a path.
    """
    many = _paths(paths)
    if labels is not None and len(labels) != len(many):
        raise ValueError(f"labels has {len(labels)} entries for {len(many)} paths; expected one a path")
    with palette.style():
        own = ax is None
        figure, ax = palette.panel(ax, 3.9, width=5.2)
        ax.imshow(as_picture(image), extent=(0, 1, 0, 1), interpolation="nearest", alpha=0.85)
        if expert is not None:
            _draw_path(ax, _paths(expert)[0], palette.INK, "expert", linestyle=(0, (4, 2)), linewidth=1.3)
        if driven is not None:
            _draw_path(ax, _paths(driven)[0], palette.INK, "driven", linewidth=2.2)
        _draw_looks(ax, many, labels)
        ax.set(xlim=(0, 1), ylim=(0, 1), aspect="equal", xlabel="x (table widths)", ylabel="y (table widths)")
        ax.set(xticks=[0, 0.5, 1], yticks=[0, 0.5, 1])
        _name_paths(ax, beside=own)
        text = _path_title(many, labels) if title is None else title
        if own:
            ax.set_title(text)
        else:
            palette.entitle(ax, text, own=False)
    return figure


def gripper_path(start: Tensor | np.ndarray, actions: Tensor | np.ndarray, max_step: float) -> np.ndarray:
    """The way that a Cartesian chunk commands, (H + 1, 2) in table widths.

    start (2,): the gripper now; actions (H, A) in robot units, whose first two are dx and dy as shares of
    `max_step`, clipped to [-1, 1] as the world does. The table's edge and the obstacle, which may stop the
    real gripper, are not known here.
    """
    moves = np.clip(as_array(actions)[:, :2], -1, 1) * max_step
    return np.concatenate((as_array(start)[None, :2], as_array(start)[:2] + moves.cumsum(axis=0)))


def _one(value: Any, sample: int, dimensions: int, what: str) -> np.ndarray:
    """One sample of a batch, or the value itself when it is not batched."""
    array = as_array(value)
    if array.ndim == dimensions + 1:
        if not 0 <= sample < len(array):
            raise ValueError(f"sample is {sample}; {what} holds {len(array)}: expected 0 to {len(array) - 1}")
        array = array[sample]
    if array.ndim != dimensions:
        wanted = "(B, H, A) or (H, A)" if dimensions == 2 else "(B, H) or (H,)"
        raise ValueError(f"{what} has shape {as_array(value).shape}; expected {wanted}")
    return array


def _labels(given: Sequence[str] | None, size: int, what: str, default: str) -> list[str]:
    if given is None:
        return [f"{default} {i}" if default else "" for i in range(size)]
    if len(given) != size:
        raise ValueError(
            f"{what} has {len(given)} entries ({', '.join(given)}), the chunk {size} dimensions; "
            "give one for each"
        )
    return list(given)


def _sheet(labels: Sequence[str], ax: Axes | None) -> tuple[Figure, list[Axes], float]:
    """Panels one above the other, from eight on in two columns, and how long a line of a label may be."""
    if ax is not None:
        figure, ax = palette.panel(ax, 0)
        return figure, [ax], ax.get_window_extent().height / figure.dpi
    size = len(labels)
    columns = 1 if size < 8 else 2
    rows = math.ceil(size / columns)
    tall = max(0.72, *(palette.text_width(word) for label in labels for word in label.split()))
    figure = palette.sheet(0.75 + (tall + 0.23) * rows)
    axes = figure.subplots(rows, columns, sharex=True, squeeze=False).T.flatten()
    for ax in axes[size:]:
        ax.set_axis_off()
    return figure, list(axes[:size]), tall


def _draw_dimension(ax: Axes, chunk: np.ndarray, expert: np.ndarray | None, valid: np.ndarray) -> None:
    steps, chunk = np.arange(len(chunk)), gaps(chunk)
    for step in steps[~valid]:
        ax.axvspan(step - 0.5, step + 0.5, **palette.PADDING, zorder=0)
    if expert is not None:
        dots: dict[str, Any] = {"linewidth": 1.1, "linestyle": (0, (3, 2)), "marker": "o", "markersize": 2.6}
        ax.plot(steps, np.where(valid, gaps(expert), np.nan), color=EXPERT, **dots, gid="expert")
    thin: dict[str, Any] = {"marker": "o", "markersize": 2.5, "linewidth": 1, "alpha": 0.5}
    ax.plot(steps, chunk, color=PREDICTED, **thin, gid="predicted")
    real = np.where(valid, chunk, np.nan)
    ax.plot(steps, real, color=PREDICTED, marker="o", markersize=3, gid="predicted, real")
    ax.set_xlim(-0.5, len(chunk) - 0.5)
    ax.margins(y=0.15)
    ax.yaxis.set_major_locator(MaxNLocator(3))


def _affine(x: np.ndarray, y: np.ndarray) -> tuple[float, float] | None:
    """(a, b) with y = a x + b, or None when the points do not lie on one line or are all the same."""
    known = np.isfinite(x) & np.isfinite(y)
    x, y = x[known], y[known]
    if len(x) < 2 or np.ptp(x) < 1e-9 or np.ptp(y) < 1e-9:
        return None
    a, b = np.polyfit(x.astype(float), y.astype(float), 1)
    return (float(a), float(b)) if np.abs(a * x + b - y).max() < 1e-2 * np.ptp(y) else None


def _second_scale(ax: Axes, chunk: np.ndarray, scaled: np.ndarray) -> None:
    line = _affine(chunk, scaled)
    if line is None or np.allclose(chunk, scaled, equal_nan=True):
        return
    a, b = line
    right = ax.secondary_yaxis(
        "right", functions=(lambda x: a * np.asarray(x) + b, lambda y: (np.asarray(y) - b) / a)
    )
    right.yaxis.set_major_locator(MaxNLocator(3))
    right.set_ylabel("normalised", color=palette.MUTED, fontsize=palette.FONT - 1)
    right.yaxis.set_label_coords(1.08, 0.5, transform=ax.transAxes)
    right.spines["right"].set_visible(True)
    right.tick_params(labelcolor=palette.MUTED, labelsize=palette.FONT - 1)


def _mark_replanning(ax: Axes, step: int, *, first: bool) -> None:
    ax.axvline(step - 0.5, color=palette.MUTED, linewidth=0.9)
    if first:
        font: dict[str, Any] = {"fontsize": palette.FONT - 1, "color": palette.MUTED}
        ax.text(step - 0.4, 1.02, "looks again", transform=ax.get_xaxis_transform(), **font)


def _finish(axes: Sequence[Axes], has_expert: bool, size: int) -> None:
    rows = math.ceil(size / (1 if size < 8 else 2))
    for i, ax in enumerate(axes):
        if i % rows == rows - 1 or i == size - 1:
            ax.set_xlabel("step of the chunk")
            ax.tick_params(labelbottom=True)
            ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    where: dict[str, Any] = {"xycoords": "axes fraction", "textcoords": "offset points", "ha": "right"}
    font: dict[str, Any] = {"va": "bottom", "fontsize": palette.FONT - 1, "fontweight": "bold"}
    axes[0].annotate("predicted", (1, 1), (-42 if has_expert else 0, 2), color=PREDICTED, **where, **font)
    if has_expert:
        axes[0].annotate("expert", (1, 1), (0, 2), color=EXPERT, **where, **font)


def _paths(paths: Any) -> list[np.ndarray]:
    several = isinstance(paths, (list, tuple)) and np.ndim(paths[0]) == 2
    many = [as_array(path) for path in paths] if several else [*as_array(paths)]
    many = [as_array(paths)] if np.ndim(many[0]) == 1 else many
    if not many or any(p.ndim != 2 or p.shape[1] != 2 for p in many):
        raise ValueError(
            f"paths have shapes {[np.shape(p) for p in many]}; expected (N, 2) or several of them"
        )
    return many


def _draw_path(ax: Axes, path: np.ndarray, colour: str, name: str | None, **line: Any) -> None:
    """A path on a thin light border, to be seen on blocks of its own colour; a dot where it starts."""
    border = {**line, "linewidth": line["linewidth"] + 1.6, "linestyle": "-"}
    ax.plot(*path.T, color="white", **border)
    label = name if len(path) > 1 else None  # a single point is a place, and only its dot is drawn
    ax.plot(*path.T, color=colour, label=label, gid=name or "earlier", **line)
    ax.plot(
        *path[0], "o", color=colour, markersize=4.5, alpha=line.get("alpha", 1.0), markeredgecolor="white"
    )


def _draw_looks(ax: Axes, many: Sequence[np.ndarray], labels: Sequence[str] | None) -> None:
    """The commanded paths, oldest first: told apart by name, or the older the fainter."""
    for age, path in enumerate(reversed(many)):
        if labels is None:
            alpha = 1.0 if len(many) == 1 else 1 - 0.75 * age / (len(many) - 1)
            name = "predicted" if age == 0 else "earlier looks" if age == 1 else None
            _draw_path(ax, path, PREDICTED, name, linewidth=1.9 - 0.5 * (age > 0), alpha=alpha)
    for i, (path, label) in enumerate(zip(many, labels or (), strict=False)):
        dash = DASHES[i // len(PATHS) % len(DASHES)]
        _draw_path(ax, path, PATHS[i % len(PATHS)], label, linewidth=1.9, linestyle=dash)


def _name_paths(ax: Axes, *, beside: bool) -> None:
    """The names of the paths: beside the picture on a sheet of its own, else where it covers least."""
    outside: dict[str, Any] = {"loc": "upper left", "bbox_to_anchor": (1.01, 1.0)}
    inside = {"loc": "best", "frameon": True, "facecolor": palette.PAPER, "edgecolor": "none"}
    if ax.get_legend_handles_labels()[0]:
        ax.legend(**(outside if beside else inside), handlelength=1.4, fontsize=palette.FONT - 1)


def _path_title(many: Sequence[np.ndarray], labels: Sequence[str] | None) -> str:
    steps = len(many[-1]) - 1
    if len(many) == 1:
        return f"One look commands {palette.counted(steps, 'step')}"
    if labels is not None:
        return f"{palette.counted(len(many), 'chunk')} of {palette.counted(steps, 'step')}"
    return f"{len(many)} looks, {palette.counted(steps, 'step')} each: the last is strongest"
