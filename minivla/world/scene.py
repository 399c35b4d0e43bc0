"""The things on the table and how grippers move them.

The physics is kinematic and deterministic. Grippers move with bounded speed, above the blocks. Fingers that
close around a free block catch and centre it; a caught block is lifted and follows the gripper; fingers that
open let go. Fingers closed on nothing push the blocks they touch. Nothing gets through the obstacle: a move
that would enter it is not made.
"""

from dataclasses import dataclass, field

import numpy as np

from minivla.world import spec


@dataclass
class Block:
    """A coloured block. colour and shape index `spec.COLOURS` and `spec.SHAPES`; position (2,)."""

    colour: int
    shape: int
    position: np.ndarray


@dataclass
class Goal:
    """A coloured pad on the table. colour indexes `spec.COLOURS`; position (2,)."""

    colour: int
    position: np.ndarray


@dataclass
class Gripper:
    """A gripper that can be anywhere in the rectangle from `low` (2,) to `high` (2,).

    position (2,); home (2,), where it waits; opening in [0, 1]; holds, the index of the block it holds or
    None.
    """

    home: np.ndarray
    low: np.ndarray
    high: np.ndarray
    opening: float = 1.0
    holds: int | None = None
    position: np.ndarray = field(init=False)

    def __post_init__(self) -> None:
        self.position = self.home.copy()

    def clamp(self, point: np.ndarray) -> np.ndarray:
        """The point (2,) the gripper can be at that is nearest to `point`."""
        return np.minimum(np.maximum(point, self.low), self.high)

    def reaches(self, point: np.ndarray) -> bool:
        """Whether the gripper can be at `point` (2,)."""
        return distance(self.clamp(point), point) == 0


@dataclass
class Part:
    """One thing to do: verb ("reach", "push" or "place") a block, by index, to a goal, by index, as the
    sentence `text` says."""

    verb: str
    block: int
    goal: int
    text: str


@dataclass
class Scene:
    """Everything an episode consists of.

    `parts` are done in order; `stage` counts those done. A body with an arm keeps its joint angles in
    `joints` and the ends of its links, for the pictures, in `links`. `seed` is for whoever acts here and has
    a choice to make.
    """

    blocks: list[Block]
    goals: list[Goal]
    grippers: list[Gripper]
    parts: list[Part] = field(default_factory=list)
    instruction: str = ""
    obstacle: np.ndarray | None = None
    stage: int = 0
    joints: np.ndarray = field(default_factory=lambda: np.zeros(0))
    links: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    seed: int = 0

    @property
    def part(self) -> Part:
        """The part to do now; the last one when all are done."""
        return self.parts[min(self.stage, len(self.parts) - 1)]

    def held(self, block: int) -> bool:
        """Whether some gripper holds that block."""
        return any(gripper.holds == block for gripper in self.grippers)

    def is_done(self, part: Part) -> bool:
        """Whether a part is done: reached, pushed onto its goal, or placed there and let go with open
        fingers."""
        block = self.blocks[part.block].position
        if part.verb == "reach":
            return any(distance(gripper.position, block) <= spec.REACH_RADIUS for gripper in self.grippers)
        on_goal = distance(block, self.goals[part.goal].position) <= spec.PLACE_RADIUS
        if part.verb == "push":
            return on_goal
        clear = all(
            g.opening > 0.99 or distance(g.position, block) > 2 * spec.BLOCK_HALF for g in self.grippers
        )
        return on_goal and clear and not self.held(part.block)

    def advance(self) -> bool:
        """Tick off the parts that are done; True when the whole instruction is."""
        while self.stage < len(self.parts) and self.is_done(self.part):
            self.stage += 1
        return self.stage == len(self.parts)

    def move(self, index: int, target: np.ndarray) -> bool:
        """Move gripper `index` to `target` (2,), with what it holds; False when something is in the way."""
        gripper = self.grippers[index]
        target = gripper.clamp(target)
        if self._blocked(index, target):
            return False
        gripper.position = target
        if gripper.holds is not None:
            self.blocks[gripper.holds].position = target.copy()
        elif gripper.opening < spec.HOLDING:
            self._push(target)
        return True

    def grip(self, index: int, command: float) -> None:
        """Close the fingers of gripper `index` one step when command > 0, open them one step otherwise."""
        gripper = self.grippers[index]
        if command <= 0:
            gripper.holds = None
            gripper.opening = min(1.0, round(gripper.opening + spec.GRIP_STEP, 6))
        elif gripper.holds is None:
            was_around = gripper.opening > spec.HOLDING
            gripper.opening = max(0.0, round(gripper.opening - spec.GRIP_STEP, 6))
            if was_around and gripper.opening <= spec.HOLDING:
                self._catch(gripper)

    def _catch(self, gripper: Gripper) -> None:
        free = [i for i in range(len(self.blocks)) if not self.held(i)]
        gaps = {i: distance(self.blocks[i].position, gripper.position) for i in free}
        nearest = min(gaps, key=gaps.__getitem__, default=None)
        if nearest is not None and gaps[nearest] <= spec.GRASP_RADIUS:
            gripper.holds, gripper.opening = nearest, spec.HOLDING
            self.blocks[nearest].position = gripper.position.copy()

    def _blocked(self, index: int, target: np.ndarray) -> bool:
        walls = [(self.obstacle, spec.OBSTACLE_RADIUS + spec.CLEARANCE)] if self.obstacle is not None else []
        walls += [(g.position, spec.GRIPPER_GAP) for i, g in enumerate(self.grippers) if i != index]
        here = self.grippers[index].position
        return any(distance(wall, target) < min(gap, distance(wall, here)) for wall, gap in walls)

    def _push(self, finger: np.ndarray) -> None:
        reach = spec.FINGER_RADIUS + spec.BLOCK_HALF
        for i, block in enumerate(self.blocks):
            gap = distance(block.position, finger)
            if gap < reach and not self.held(i):
                away = (block.position - finger) / gap if gap > 1e-6 else np.array([0.0, 1.0])
                block.position = np.clip(finger + away * reach, spec.EDGE, 1 - spec.EDGE)


def distance(a: np.ndarray, b: np.ndarray) -> float:
    """Euclidean distance between two points (2,)."""
    dx, dy = float(a[0] - b[0]), float(a[1] - b[1])
    return (dx * dx + dy * dy) ** 0.5


def distance_to_segment(point: np.ndarray, start: np.ndarray, end: np.ndarray) -> float:
    """Distance of a point (2,) from the straight way between two others."""
    along = end - start
    share = float((point - start) @ along) / max(float(along @ along), 1e-12)
    return distance(point, start + min(max(share, 0.0), 1.0) * along)


def detour_side(scene: Scene, gripper: Gripper) -> str:
    """On which side of the line from the obstacle to the goal a gripper is, "left" or "right".

    Raises ValueError where there is no obstacle.
    """
    ahead, offset = _detour(scene, gripper)
    return "left" if float(ahead[0] * offset[1] - ahead[1] * offset[0]) > 0 else "right"


def detour_passed(scene: Scene, gripper: Gripper) -> bool:
    """Whether a gripper is beside the obstacle or beyond it, on the way to the goal.

    Raises ValueError where there is no obstacle.
    """
    ahead, offset = _detour(scene, gripper)
    return float(ahead @ offset) >= 0


def _detour(scene: Scene, gripper: Gripper) -> tuple[np.ndarray, np.ndarray]:
    """From the obstacle to the goal, and to the gripper, both (2,)."""
    if scene.obstacle is None:
        raise ValueError("The scene has no obstacle to be beside; detour's scenes have.")
    return scene.goals[scene.part.goal].position - scene.obstacle, gripper.position - scene.obstacle
