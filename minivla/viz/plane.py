"""Where a chunk of actions takes the gripper over the table, and when it closes: what an action's numbers
mean, and the path that follows from them.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
from matplotlib.axes import Axes

from minivla.viz import palette
from minivla.viz.chunks import gripper_path

if TYPE_CHECKING:
    from minivla.world.spec import ActionSpec

type Meaning = "Plane | ActionSpec | Sequence[str] | None"
"""What an action's numbers mean: an `ActionSpec` (`env.unwrapped.action_spec`), the dimensions' names
(`dataset.features["action"]["names"]`) or a `Plane`; None: the first two are moves along x and y.
"""


@dataclass(frozen=True)
class Plane:
    """Which numbers of an action, in robot units, move the gripper over the table, and how.

    x, y       the dimensions;  absolute: they are places, not moves;  unit, of the path, for the axes
    max_step   moves are shares of it, clipped to [-1, 1] as the world does (None: they are lengths)
    gripper    the dimension that opens and closes the fingers, if there is one; values of the sign `closes`
               close them
    """

    x: int = 0
    y: int = 1
    gripper: int | None = None
    closes: int = 1
    max_step: float | None = None
    absolute: bool = False
    unit: str = "robot units"

    @classmethod
    def of(cls, meaning: Meaning, size: int) -> Plane:
        """From an `ActionSpec`, from the names of `size` action dimensions, or the first two of them.

        Raises ValueError for names or dimensions that do not fit the action.
        """
        if meaning is None:
            meaning = cls()
        if not isinstance(meaning, Plane):
            named = isinstance(meaning, Sequence)
            names = [str(name) for name in (meaning if isinstance(meaning, Sequence) else meaning.names)]
            if len(names) != size:
                raise ValueError(
                    f"{len(names)} dimensions are named ({', '.join(names)}), but the policy's "
                    f"action has {size}; give one name for each"
                )
            meaning = cls._named(names) if named else cls._specified(meaning)
        drawn = [d for d in (meaning.x, meaning.y, meaning.gripper) if d is not None]
        if any(not 0 <= d < size for d in drawn):
            raise ValueError(
                f"dimensions {drawn} are to be drawn, but the policy's action has {size}: expected 0 to "
                f"{size - 1}. Say which ones move the gripper: Plane(x=…, y=…, gripper=…)"
            )
        return meaning

    @classmethod
    def _named(cls, names: Sequence[str]) -> Plane:
        x, y, grip = (_find(names, ends) for ends in (("dx", "x"), ("dy", "y"), ("grip", "gripper")))
        if x is None or y is None:
            raise ValueError(
                f"none of the dimensions {', '.join(names)} is called x and y, or dx and dy; say which ones "
                "move the gripper: Plane(x=…, y=…, gripper=…)"
            )
        moves = any(part in names[x].lower() for part in ("dx", "delta"))
        return cls(x, y, grip, absolute=not moves)

    @classmethod
    def _specified(cls, spec: Any) -> Plane:
        found = cls._named(spec.names)
        absolute, unit = bool(spec.absolute[found.x]), str(spec.units[found.x])
        step = None if absolute else float(spec.max_step[found.x])
        grip = next(iter(spec.gripper), None)
        return cls(found.x, found.y, grip, spec.gripper_closes, step, absolute, unit)

    def path(self, chunk: np.ndarray) -> np.ndarray:
        """Where a chunk (H, A) in robot units leads: (H + 1, 2) from (0, 0) on, or the H places it names."""
        places: np.ndarray = chunk[:, [self.x, self.y]]
        if self.absolute:
            return places
        if self.max_step is not None:
            return gripper_path(np.zeros(2), places, self.max_step)
        return np.concatenate((np.zeros((1, 2)), places.cumsum(axis=0)))

    def closed(self, chunk: np.ndarray) -> np.ndarray | None:
        """At which steps of a chunk (H, A) the fingers are told to close, (H,) bool; None without fingers."""
        return None if self.gripper is None else chunk[:, self.gripper] * self.closes > 0


def draw_path(
    ax: Axes, plane: Plane, chunk: np.ndarray, colour: str, *, name: str = "path", **line: Any
) -> None:
    """The path of a chunk (H, A) with a dot where each step ends: filled where the gripper closes, hollow
    where it opens.
    """
    path, closed = plane.path(chunk), plane.closed(chunk)
    ends = path[-len(chunk) :]
    ax.plot(*path.T, color=colour, gid=name, **{"linewidth": 1.4, "zorder": 2, **line})
    if len(ends) < len(path):
        ax.plot(*path[0], "+", color=palette.INK, markersize=5, markeredgewidth=0.9, zorder=1)
    inside = [colour if closed is None or closed[i] else palette.PAPER for i in range(len(ends))]
    dots: dict[str, Any] = {"s": 11, "edgecolors": colour, "linewidths": 0.9, "zorder": 3}
    ax.scatter(*ends.T, facecolors=inside, gid=f"{name}, steps", **dots)


def _find(names: Sequence[str], ends: tuple[str, ...]) -> int | None:
    """The first dimension whose name is one of `ends`, also behind the name of an arm."""
    parts = [str(name).lower().replace(".", "_").split("_")[-1] for name in names]
    return next((parts.index(end) for end in ends if end in parts), None)
