"""What a key/value cache saves: which tokens each run of a network computes, reads and writes."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from minivla.recorder import Pass
from minivla.viz import palette

READ, KEPT, FORGOTTEN = (
    palette.KIND_COLOURS["padding"],
    palette.KIND_COLOURS["image"],
    palette.KIND_COLOURS["action"],
)
SMALL = palette.FONT - 1
MEGABYTE = 1e6


def plot_cache(passes: Sequence[Pass], *, title: str | None = None, ax: Axes | None = None) -> Figure:
    """One bar a run of the network: what it reads from the cache, and on top what it computes.

    Blue stays in the cache and is read by all that come after, vermilion is forgotten at once. The scale on
    the right is the cache's size, of one sample. Runs whose cache is not that of the run before start anew.
    Raises ValueError when there is no run.
    """
    if not passes:
        raise ValueError(
            "no run of a decoder was recorded: trace predict_action_chunk or a loss of a policy that has one "
            "(π0, π0.5, π0-FAST)"
        )
    with palette.style():
        own = ax is None
        figure, ax = palette.panel(ax, 2.9)
        for i, run in enumerate(passes):
            _draw_run(ax, i, run)
        most = max(run.read + run.computed for run in passes)
        ax.set(xlim=(-0.6, len(passes) - 0.4), ylim=(0, 1.28 * most))
        ax.set_xlabel("run of the network")
        ax.set_ylabel("tokens")
        ax.xaxis.set_major_locator(MaxNLocator(10, integer=True))
        _scale_of_bytes(ax, passes[0].token)
        _name_colours(ax, passes)
        palette.entitle(ax, cache_title(passes) if title is None else title, own=own)
    return figure


def cache_savings(passes: Sequence[Pass]) -> tuple[int, int]:
    """Tokens computed, and how many it would have been without a cache."""
    return sum(run.computed for run in passes), sum(run.read + run.computed for run in passes)


def cache_title(passes: Sequence[Pass]) -> str:
    """The finding: how many tokens are computed, and how many without a cache."""
    computed, without = cache_savings(passes)
    runs = palette.counted(len(passes), "run")
    if computed == without:
        return f"{palette.counted(computed, 'token')} in {runs}, and nothing is read from a cache"
    return f"{computed:,} tokens computed in {runs}; without the cache it would be {without:,}"


def _draw_run(ax: Axes, i: int, run: Pass) -> None:
    """What is read below, what is computed above: kept, or forgotten and hatched."""
    look: dict[str, Any] = {"linewidth": 0.8, "zorder": 2}  # an edge, so that one token is seen
    ax.add_patch(Rectangle((i - 0.4, 0), 0.8, run.read, facecolor=READ, linewidth=0, gid="read"))
    for start, count, colour, name in (
        (run.read, run.written, KEPT, "written"),
        (run.read + run.written, run.computed - run.written, FORGOTTEN, "forgotten"),
    ):
        if count:
            box = Rectangle(
                (i - 0.4, start), 0.8, count, facecolor=colour, edgecolor=colour, gid=name, **look
            )
            ax.add_patch(box)


def _scale_of_bytes(ax: Axes, token: int) -> None:
    right = ax.secondary_yaxis(
        "right",
        functions=(lambda n: np.asarray(n) * token / MEGABYTE, lambda b: np.asarray(b) * MEGABYTE / token),
    )
    right.yaxis.set_major_locator(MaxNLocator(5))
    right.set_ylabel("keys and values (MB)", color=palette.MUTED, fontsize=SMALL)
    right.spines["right"].set_visible(True)
    right.tick_params(labelcolor=palette.MUTED, labelsize=SMALL)


def _name_colours(ax: Axes, passes: Sequence[Pass]) -> None:
    """A legend in words, of what there is."""
    kept, forgotten = sum(run.written for run in passes), sum(run.computed - run.written for run in passes)
    told = [
        (f"computed and kept: {kept:,}", KEPT, kept),
        (f"computed and forgotten: {forgotten:,}", FORGOTTEN, forgotten),
        (
            f"read from the cache: {sum(run.read for run in passes):,}",
            palette.MUTED,
            sum(run.read for run in passes),
        ),
    ]
    for line, (text, colour, _) in enumerate(entry for entry in told if entry[2]):
        palette.say(ax, line, text, colour)
