"""The way from noise to action: a sampler's path, the field that drives it, and how fast it arrives.

All of it reads a `minivla.recorder.Flow`: times (N + 1,), x (N + 1, B, H, A) from noise x[0] to result x[N],
v (N, B, H, A). Flow matching puts its velocity into v; a diffusion sampler puts what its network predicts
(noise, or the score) and its timesteps into `times`: only the name changes, which `quantity` tells.
Conventions differ in which end of time is noise. Arrows always point the way the sampler goes, that is, v
times the sign of the step in time, and the times are written where the path starts and ends.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator

from minivla.actions.diffusion import PREDICTIONS
from minivla.recorder import Flow
from minivla.viz import palette
from minivla.viz.pictures import as_array, finite, gaps

Field = Callable[[torch.Tensor, float], Any] | tuple[Any, Any]

NOISE, ACTION = palette.MUTED, palette.KIND_COLOURS["action"]
GRID = 15  # arrows of a field along each side
COMPANIONS = 48  # other samples of the batch, at most
SMALL = palette.FONT - 1
ARROWS = {  # what points the way the sampler goes, where the network does not predict a velocity
    PREDICTIONS["epsilon"]: "against the predicted noise",
    PREDICTIONS["sample"]: "to the predicted action",
    PREDICTIONS["v_prediction"]: "against the predicted v",
}


def plot_flow(
    flow: Flow | None,
    *,
    sample: int = 0,
    dimensions: tuple[int, int] = (0, 1),
    step: int | None = 0,
    field: Field | None = None,
    time: float | None = None,
    quantity: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """A sampler's path from noise to action in two dimensions, and beside it how it converges.

    dimensions   the two action dimensions drawn, at chunk step `step`; None draws all steps of the chunk as
                 one line, at a few moments of the sampler
    field        what pushes: a function (points (N, 2), time) -> (N, 2), or stored (points, vectors). For an
                 action of more dimensions it is a slice, and the function fixes the others. Without one, the
                 recorded v are drawn as arrows along the paths.
    time         the moment at which a function `field` is drawn; half way when None

    Other samples of the batch are drawn faintly. What is not finite leaves a gap, and the title says from
    which step on. With `ax` only the path is drawn. Raises ValueError for
    None, shapes that do not fit together, and a sample, dimension or step out of range.
    """
    times, x, v = check_flow(flow, sample, dimensions, step)
    quantity = quantity or str(getattr(flow, "quantity", "velocity"))
    shown = float(times[len(times) // 2]) if time is None else time
    with palette.style():
        own = ax is None
        figure, axes = _sheet(ax)
        plane, pushes = x[..., dimensions], towards_action(times, x, v, quantity)[..., dimensions]
        if step is None:
            _draw_scribbles(axes[0], plane[:, sample], times)
        else:
            frame_square(axes[0], plane[:, :, step])
            if field is None:
                _draw_arrows(axes[0], plane[:-1, :, step], pushes[:, :, step], sample)
                told = f"arrows: {ARROWS.get(quantity, f'recorded {quantity}')}"
            else:
                vectors = draw_field(axes[0], field, shown) if callable(field) else _stored(axes[0], field)
                vectors.set_gid("field")
                told = f"arrows: {quantity}" + (f" at {moment(shown)}" if callable(field) else "")
            draw_paths(axes[0], plane[:, :, step], sample, times)
            axes[0].text(0, 1.01, told, transform=axes[0].transAxes, fontsize=SMALL, color=palette.MUTED)
        _name_plane(axes[0], dimensions, step)
        found = flow_title(x, sample) if title is None else title
        if own:
            _draw_convergence(axes[1], x, v, times, sample, quantity)
        palette.entitle(axes[0], found, own=own)
    return figure


def plot_convergence(
    flow: Flow | None,
    *,
    sample: int = 0,
    quantity: str | None = None,
    ax: Axes | None = None,
    title: str | None = None,
) -> Figure:
    """How far each x[k] is from the result x[N], and how strong v is at each step.

    Both are root mean squares over the chunk, of one sample; the rest of the batch is faint. The numbers
    are those of `convergence`. Raises ValueError as `plot_flow` does.
    """
    times, x, v = check_flow(flow, sample)
    quantity = quantity or str(getattr(flow, "quantity", "velocity"))
    with palette.style():
        own = ax is None
        figure, ax = palette.panel(ax, 2.8)
        _draw_convergence(ax, x, v, times, sample, quantity)
        palette.entitle(ax, _convergence_title(x, sample) if title is None else title, own=own)
    return figure


def convergence(flow: Flow | None) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """How a sampler arrives: (distance (N + 1, B), speed (N, B), detour (B,)).

    distance   root mean square over the chunk of x[k] − x[N]
    speed      the same of v[k]
    detour     length of the way over the straight distance from noise to result: 1 for a straight path

    Raises ValueError as `plot_flow` does.
    """
    _, x, v = check_flow(flow, 0)
    way = _rms(np.diff(x, axis=0)).sum(axis=0)
    distance = _rms(x - x[-1])
    straight = distance[0]
    return distance, _rms(v), np.divide(way, straight, out=np.ones_like(way), where=straight > 0)


def plot_denoising(
    flow: Flow | None,
    *,
    dimension: int = 0,
    sample: int = 0,
    moments: int = 6,
    robot: Callable[[torch.Tensor], Any] | None = None,
    name: str | None = None,
    unit: str | None = None,
    title: str | None = None,
) -> Figure:
    """One dimension of the chunk at several moments of the sampler, side by side, from noise to result.

    moments      how many panels, evenly spread over the sampler's steps, both ends among them
    robot        normalised actions (…, A) to robot units, in which the chunk is then drawn (a policy's
                 `postprocess`)
    name, unit   of the dimension

    The result is dashed in every panel, other samples of the batch are faint. Raises ValueError as
    `plot_flow` does.
    """
    times, x, _ = check_flow(flow, sample, (dimension, dimension))
    drawn = x if robot is None else as_array(robot(torch.as_tensor(x, dtype=torch.float32)))
    chosen = spread_over(len(times), moments)
    rows = -(-len(chosen) // 6)
    with palette.style():
        figure = palette.sheet(0.75 + 1.35 * rows)
        axes = figure.subplots(rows, -(-len(chosen) // rows), sharex=True, sharey=True, squeeze=False)
        for ax, k in zip(axes.flat, chosen, strict=False):
            _draw_moment(ax, drawn[..., dimension], k, sample)
            ax.set_title(f"step {k}, {moment(times[k])}", fontsize=SMALL, fontweight="normal", pad=3)
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        unit = unit or ("normalised" if robot is None else "robot units")
        axes[0, 0].set_ylabel(f"{f'action {dimension}' if name is None else name}\n({unit})")
        figure.supxlabel("step of the chunk (dashed: the result)", fontsize=palette.FONT)
        palette.headline(figure, flow_title(x, sample) if title is None else title)
    return figure


def check_flow(
    flow: Flow | None, sample: int, dimensions: tuple[int, int] = (0, 0), step: int | None = 0
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """times, x, v as float arrays, when they fit together and what is asked for is in them."""
    if flow is None:
        raise ValueError(
            "there is no flow to draw: this call was a loss, or a policy that predicts its chunk in one go "
            "(ACT does). Trace predict_action_chunk of a flow or diffusion policy"
        )
    times, x, v = (gaps(as_array(value).astype(float)) for value in (flow.times, flow.x, flow.v))
    steps = len(times) - 1
    if times.ndim != 1 or steps < 1 or x.ndim != 4 or len(x) != steps + 1 or v.shape != (steps, *x.shape[1:]):
        raise ValueError(
            f"the flow has times {times.shape}, x {x.shape} and v {v.shape}; "
            "expected (N + 1,), (N + 1, B, H, A) and (N, B, H, A) with N ≥ 1"
        )
    asked = [("sample", sample, 1), *(("dimension", d, 3) for d in dimensions)]
    asked += [] if step is None else [("step", step, 2)]
    for what, value, axis in asked:
        if not 0 <= value < x.shape[axis]:
            raise ValueError(
                f"{what} is {value}; the flow has {x.shape[axis]}: expected 0 to {x.shape[axis] - 1}"
            )
    return times, x, v


def flow_title(x: np.ndarray, sample: int) -> str:
    """The finding: how many steps, and how straight the way was, or where it stopped being numbers."""
    steps = palette.counted(len(x) - 1, "step")
    lost = ~np.isfinite(x[:, sample]).all(axis=(-2, -1))
    if lost.any():
        return f"From noise to action in {steps}: not finite from step {int(lost.argmax())} on"
    times, points = torch.arange(len(x)), torch.as_tensor(x)
    detour = convergence(Flow(times, points, points[1:]))[2][sample]
    shape = "along a straight line" if detour < 1.005 else f"on a way {detour:.2f} × the straight line"
    return f"From noise to action in {steps}, {shape}"


def clock(time: float) -> str:
    """A moment of the sampler: whole numbers as they are (diffusion counts to 1000), two digits of others."""
    return f"{time:.0f}" if abs(time) >= 10 or float(time).is_integer() else f"{time:.2g}"


def moment(time: float) -> str:
    """A moment of the sampler in words; -1 is where diffusion ends, after its last timestep."""
    return f"time {clock(time)}" if time >= 0 else "no noise left"


def draw_paths(ax: Axes, paths: np.ndarray, sample: int, times: np.ndarray, *, named: bool = True) -> None:
    """Paths (k + 1, B, 2) with grey starts and vermilion ends; one strong, the rest of the batch faint."""
    others = [i for i in range(paths.shape[1]) if i != sample][:COMPANIONS]
    for i in others:
        ax.plot(*paths[:, i].T, color=ACTION, linewidth=0.7, alpha=0.3, gid="companion", zorder=2)
    ax.plot(*paths[0, others].T, "o", color=NOISE, markersize=2.5, alpha=0.6, zorder=2)
    ax.plot(*paths[-1, others].T, "o", color=ACTION, markersize=3, alpha=0.6, zorder=2)
    path = paths[:, sample]
    ax.plot(*path.T, color=palette.PAPER, linewidth=3.6, zorder=3)
    ax.plot(*path.T, color=ACTION, linewidth=1.8, marker="o", markersize=2.6, gid="path", zorder=3)
    for end, colour, name in ((0, NOISE, "noise"), (-1, ACTION, "action")):
        ax.plot(*path[end], "o", color=colour, markersize=8, markeredgecolor="white", gid=name, zorder=4)
        if named and np.isfinite(path[end]).all():
            text, above = f"{name}, {moment(times[end])}", bool(path[end, 1] >= path[:, 1].mean())
            _name_end(ax, path[end], text, colour, above=above)


def draw_field(ax: Axes, field: Callable[[torch.Tensor, float], Any], time: float) -> Any:
    """The vectors of a field on a grid over the axes, at one time. Returns the arrows."""
    across, up = (np.linspace(*limits, GRID + 2)[1:-1] for limits in (ax.get_xlim(), ax.get_ylim()))
    points = np.stack(np.meshgrid(across, up), axis=-1).reshape(-1, 2)
    vectors = as_array(field(torch.as_tensor(points, dtype=torch.float32), time))
    return quiver(ax, points, vectors, ax.get_xlim()[1] - ax.get_xlim()[0])


def towards_action(times: np.ndarray, x: np.ndarray, v: np.ndarray, quantity: str) -> np.ndarray:
    """What is recorded as vectors (N, B, H, A) that point the way the sampler goes: along a velocity,
    against predicted noise, and from x to a predicted action, which is a place.
    """
    return v - x[:-1] if quantity == PREDICTIONS["sample"] else v * np.sign(times[-1] - times[0])


def spread_over(length: int, most: int) -> list[int]:
    """At most `most` positions evenly spread over `length`, the first and the last among them."""
    return sorted({int(i) for i in np.linspace(0, length - 1, max(1, min(length, most))).round()})


def _rms(chunks: np.ndarray) -> np.ndarray:
    """Root mean square over (H, A), of chunks (…, H, A)."""
    return np.sqrt((chunks**2).mean(axis=(-2, -1)))


def _sheet(ax: Axes | None) -> tuple[Figure, list[Axes]]:
    if ax is not None:
        figure, ax = palette.panel(ax, 0)
        return figure, [ax]
    figure = palette.sheet(3.45)
    return figure, list(figure.subplots(1, 2, width_ratios=(1.25, 1)))


def frame_square(ax: Axes, points: np.ndarray) -> None:
    """Limits of equal extent that hold all points (…, 2), with room for names."""
    flat = points.reshape(-1, 2)
    flat = flat[np.isfinite(flat).all(axis=1)] if np.isfinite(flat).all(axis=1).any() else np.zeros((1, 2))
    middle, half = (flat.max(0) + flat.min(0)) / 2, 0.62 * max(np.ptp(flat, axis=0).max(), 1e-6)
    ax.set(xlim=middle[0] + half * np.array([-1, 1]), ylim=middle[1] + half * np.array([-1, 1]))
    ax.set_aspect("equal")
    for axis in (ax.xaxis, ax.yaxis):
        axis.set_major_locator(MaxNLocator(5))


def _draw_scribbles(ax: Axes, chunks: np.ndarray, times: np.ndarray) -> None:
    """The whole chunk (N + 1, H, 2) as a line through its steps, at five moments from grey to vermilion."""
    frame_square(ax, chunks)
    moments = spread_over(len(chunks), 5)
    for i, k in enumerate(moments):
        share = i / max(1, len(moments) - 1)
        colour = palette.blend(palette.HATCH_INK, ACTION, share)
        last = k == moments[-1]
        ax.plot(*chunks[k].T, color=colour, linewidth=2 if last else 0.9, gid=f"chunk {k}", zorder=2 + share)
    told = ((f"noise, {moment(times[0])}", NOISE), (f"action, {moment(times[-1])}", ACTION))
    for line, (text, ink) in enumerate(told):
        palette.say(ax, line, text, ink, left=True)


def _name_end(ax: Axes, at: Any, text: str, colour: str, *, above: bool) -> None:
    """A name above or below a point, where the path does not run, and towards the middle of the axes."""
    left = at[0] > np.mean(ax.get_xlim())
    box = {"boxstyle": "square,pad=0.1", "facecolor": palette.PAPER, "edgecolor": "none", "alpha": 0.85}
    where: dict[str, Any] = {"ha": "right" if left else "left", "va": "bottom" if above else "top"}
    font: dict[str, Any] = {"color": colour, "fontsize": SMALL, "fontweight": "bold", "bbox": box}
    beside = (6 if left else -6, 7 if above else -7)
    ax.annotate(text, tuple(at), beside, textcoords="offset points", zorder=5, **where, **font)


def _draw_arrows(ax: Axes, points: np.ndarray, vectors: np.ndarray, sample: int) -> None:
    """The recorded vectors (N, B, 2) where they were recorded, on the paths that are drawn."""
    shown = [sample, *(i for i in range(points.shape[1]) if i != sample)][: COMPANIONS + 1]
    side = ax.get_xlim()[1] - ax.get_xlim()[0]
    quiver(ax, points[:, shown].reshape(-1, 2), vectors[:, shown].reshape(-1, 2), side).set_gid("v")


def _stored(ax: Axes, field: tuple[Any, Any]) -> Any:
    points, vectors = (as_array(value).reshape(-1, 2) for value in field)
    return quiver(ax, points, vectors, ax.get_xlim()[1] - ax.get_xlim()[0])


def quiver(ax: Axes, points: np.ndarray, vectors: np.ndarray, side: float) -> Any:
    """Arrows as long as their vectors, the longest a little more than the distance between two of a grid."""
    if vectors.shape != points.shape:
        raise ValueError(
            f"the field gave vectors {vectors.shape} for points {points.shape}; expected one (2,) for each"
        )
    known = np.isfinite(points).all(axis=1) & np.isfinite(vectors).all(axis=1)
    points, vectors = points[known], vectors[known]
    longest = max(float(np.linalg.norm(vectors, axis=1).max(initial=0)), 1e-12)
    style: dict[str, Any] = {"angles": "xy", "scale_units": "xy", "color": palette.HATCH_INK, "zorder": 1}
    scale = longest / (1.3 * side / GRID)
    return ax.quiver(*points.T, *vectors.T, scale=scale, width=0.004, headwidth=4, alpha=0.75, **style)


def _name_plane(ax: Axes, dimensions: tuple[int, int], step: int | None) -> None:
    where = "all steps" if step is None else f"step {step}"
    ax.set(xlabel=f"action {dimensions[0]} at {where} (normalised)", ylabel=f"action {dimensions[1]}")


def _draw_convergence(
    ax: Axes, x: np.ndarray, v: np.ndarray, times: np.ndarray, sample: int, quantity: str
) -> None:
    distance, speed = _rms(x - x[-1]), _rms(v)
    steps = np.arange(len(x))
    for i in [i for i in range(distance.shape[1]) if i != sample][:COMPANIONS]:
        ax.plot(steps, distance[:, i], color=ACTION, linewidth=0.6, alpha=0.3, gid="companion")
    line: dict[str, Any] = {"linewidth": 1.8, "marker": "o", "markersize": 3}
    ax.plot(steps, distance[:, sample], color=ACTION, gid="distance", **line)
    # v is what carries the sampler from x[k] to x[k + 1], so it is drawn between the two.
    ax.stairs(speed[:, sample], steps, baseline=None, color=palette.INK, linewidth=1.3, gid="speed")
    most = max(finite(distance).max(initial=0), finite(speed[:, sample]).max(initial=0))
    ax.set(xlim=(-0.2, len(x) - 0.8), ylim=(0, 1.35 * most if most else 1))
    ax.set_xlabel(f"sampler step ({moment(times[0])} → {moment(times[-1]).removeprefix('time ')})")
    ax.set_ylabel("root mean square over the chunk")
    ax.xaxis.set_major_locator(MaxNLocator(6, integer=True))
    told = (("distance to the result", ACTION), (f"size of the {quantity}", palette.INK))
    for row, (text, colour) in enumerate(told):
        palette.say(ax, row, text, colour)


def _convergence_title(x: np.ndarray, sample: int) -> str:
    """The finding: after which step the sampler is halfway there, or nearer."""
    distance = _rms(x - x[-1])[:, sample]
    if not np.isfinite(distance).all():
        return flow_title(x, sample)
    halfway = int((distance <= (0.5 + 1e-5) * distance[0]).argmax())  # float32 rounds
    return f"Half of the way is done after {halfway} of {palette.counted(len(x) - 1, 'step')}"


def _draw_moment(ax: Axes, values: np.ndarray, k: int, sample: int) -> None:
    """Chunks (N + 1, B, H) of one dimension at sampler step k, and the result of one of them."""
    steps, share = np.arange(values.shape[-1]), k / (len(values) - 1)
    colour = palette.blend(NOISE, ACTION, share)
    for i in [i for i in range(values.shape[1]) if i != sample][:COMPANIONS]:
        ax.plot(steps, values[k, i], color=colour, linewidth=0.6, alpha=0.25)
    ax.plot(steps, values[-1, sample], color=palette.INK, linewidth=0.9, linestyle=(0, (3, 2)))
    mark = "o" if len(steps) == 1 else ""
    ax.plot(steps, values[k, sample], color=colour, linewidth=1.7, marker=mark, gid=f"step {k}")
    ax.xaxis.set_major_locator(MaxNLocator(3, integer=True))
