"""The chunk at several moments of its sampler: one number over the steps, or the path that it commands.

A chunk of dx and dy says little as it is; added up from where the gripper stands it is a path, and noise a
scribble on the spot. In a batch that repeats one scene the samples differ by their noise alone: their paths
show how many answers the policy has.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from matplotlib.figure import Figure
from torch import Tensor

from minivla.recorder import Call
from minivla.viz import palette
from minivla.viz.flow import ACTION, COMPANIONS, NOISE, SMALL, check_flow, moment, plot_denoising, spread_over
from minivla.viz.pictures import as_array
from minivla.viz.plane import Meaning
from minivla.viz.scene import commanded_paths, draw_table, draw_way, same_scene, table_picture


def plot_denoising_paths(
    paths: Any,
    times: Any,
    *,
    picture: Any = None,
    carried: int | None = None,
    sample: int = 0,
    moments: int = 4,
    title: str | None = None,
) -> Figure:
    """The paths that chunks command, at several moments of the sampler, side by side.

    paths     (N + 1, B, L, 2), x to the right and y up (`minivla.viz.scene.commanded_paths`)
    times     (N + 1,), the sampler's
    picture   (3, H, W) or (H, W, 3), of the table, x and y from 0 to 1 on it, to draw below them
    carried   of the L - 1 steps, how many the robot carries out before it looks again: drawn strong

    `sample` is drawn strong. Raises ValueError for other shapes, and a sample out of range.
    """
    paths, times = as_array(paths), as_array(times)
    if paths.ndim != 4 or paths.shape[-1] != 2 or times.shape != paths.shape[:1]:
        raise ValueError(
            f"paths have shape {paths.shape} and times {times.shape}; expected (N + 1, B, L, 2) and (N + 1,)"
        )
    count = paths.shape[1]
    if not 0 <= sample < count:
        raise ValueError(f"sample is {sample}; there are {count}: expected 0 to {count - 1}")
    chosen = spread_over(len(times), moments)
    rows = -(-len(chosen) // 4)
    columns = -(-len(chosen) // rows)
    side = (palette.WIDTH - 0.2) / columns
    with palette.style():
        figure = palette.sheet(0.35 + rows * (side + 0.2))
        axes = figure.subplots(rows, columns, squeeze=False, sharex=True, sharey=True)
        for ax, k in zip(axes.flat, chosen, strict=False):
            colour = palette.blend(NOISE, ACTION, k / (len(times) - 1))
            draw_table(ax, picture)
            for i in [i for i in range(count) if i != sample][:COMPANIONS]:
                draw_way(ax, paths[k, i], colour, carried, strong=False)
            draw_way(ax, paths[k, sample], colour, carried)
            ax.set_title(f"step {k}, {moment(times[k])}", fontsize=SMALL, fontweight="normal", pad=3)
        for ax in axes.flat[len(chosen) :]:
            ax.set_axis_off()
        steps, what = palette.counted(len(times) - 1, "step"), "a path" if count == 1 else f"{count} paths"
        palette.headline(figure, f"From noise to {what} in {steps}" if title is None else title)
    return figure


def plot_traced(
    policy: Any,
    call: Call,
    *,
    sample: int = 0,
    meaning: Meaning = None,
    camera: str = "table",
    robot: Callable[[Tensor], Tensor] | None = None,
    **options: Any,
) -> Figure:
    """A traced call's chunk at several moments: one dimension of it, or, with `meaning`, where it leads.

    meaning   of an action's numbers (`minivla.viz.plane.Meaning`). Then the other samples that saw the same
              as `sample` are drawn too, over the picture of `camera` if there is one of that name.
    robot     as in `plot_denoising`, whose options or those of `plot_denoising_paths` these are
    """
    times, _, _ = check_flow(call.flow, sample)
    if meaning is None:
        return plot_denoising(call.flow, sample=sample, robot=robot, **options)
    assert call.flow is not None
    chunks = call.flow.x[:, same_scene(call.batch, sample)]
    options = {"carried": policy.config.n_action_steps, **options}
    options.setdefault("picture", table_picture(policy, call.batch, meaning, camera, sample))
    paths = commanded_paths(policy, call.batch, chunks, meaning, sample=sample)
    return plot_denoising_paths(paths, times, **options)
