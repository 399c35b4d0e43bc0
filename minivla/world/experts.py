"""Scripted experts: closed loops that look at the scene and say what to do next.

They keep no plan, so that after a disturbance they go on from wherever things are, and so that what they do
can be learnt from what is seen. One thing is left to chance: on which side the obstacle is passed, as long as
the gripper is on neither. A wish is a move (2,) in table widths and a grip command, for one gripper; the
embodiment makes an action of the wishes.
"""

import math
from collections.abc import Callable

import numpy as np

from minivla.world import spec
from minivla.world.scene import Scene, distance, distance_to_segment
from minivla.world.tabletop import Tabletop

OPEN, CLOSE = -1.0, 1.0
NEAR = 0.012  # near enough to a block or goal to close or open the fingers
GAIN = 0.5  # share of the remaining way that one step covers, once that is less than the largest step
Wish = tuple[np.ndarray, float]


def expert(env: object, seed: int = 0) -> Callable[[], np.ndarray]:
    """The scripted expert of a Tabletop environment, wrapped or not; each call gives the next action (A,).

    It reads the scene behind `env.unwrapped`, not the pictures. Where it has a choice (the side of a detour)
    the scene's own seed and `seed` decide: another `seed` may choose otherwise in the same scene. Raises
    TypeError for other environments.
    """
    tabletop = getattr(env, "unwrapped", env)
    if not isinstance(tabletop, Tabletop):
        raise TypeError(
            f"The expert knows Tabletop only, not {type(tabletop).__name__}: make minivla/Tabletop-v0."
        )

    def act() -> np.ndarray:
        scene = tabletop.scene
        wishes = _wishes(scene, seed)
        moves, grips = [move for move, _ in wishes], [grip for _, grip in wishes]
        return tabletop.embodiment.action_for(scene, moves, grips)

    return act


def _wishes(scene: Scene, seed: int) -> list[Wish]:
    """What each gripper should do: one works at the current part, the other goes home."""
    part = scene.part
    goal = scene.goals[part.goal].position
    worker = _worker(scene)
    wishes = [(_toward(gripper.position, gripper.home), OPEN) for gripper in scene.grippers]
    if part.verb == "reach":
        wishes[worker] = _toward(scene.grippers[worker].position, scene.blocks[part.block].position), OPEN
    elif part.verb == "push":
        move = _push(scene.grippers[worker].position, scene.blocks[part.block].position, goal)
        wishes[worker] = move, CLOSE
    else:
        within = scene.grippers[worker].reaches(goal)
        wishes[worker] = _place(scene, worker, goal if within else _hand_over_spot(scene, goal), seed)
    return wishes


def _worker(scene: Scene) -> int:
    """The index of the gripper whose turn it is.

    Of those that hold the block, or else reach it, one that reaches the goal too; if all do, the one on the
    block's side.
    """
    block, goal = scene.blocks[scene.part.block].position, scene.goals[scene.part.goal].position
    if scene.part.verb == "push":
        return min(range(len(scene.grippers)), key=lambda i: scene.grippers[i].opening)

    def rank(i: int) -> tuple[bool, bool, bool, float]:
        gripper = scene.grippers[i]
        delivers = scene.part.verb == "reach" or gripper.reaches(goal)
        holds = gripper.holds == scene.part.block
        return not holds, not gripper.reaches(block), not delivers, abs(float(gripper.home[0] - block[0]))

    return min(range(len(scene.grippers)), key=rank)


def _toward(here: np.ndarray, there: np.ndarray) -> np.ndarray:
    """A move (2,) in a straight line, slower as the end comes near."""
    gap = distance(here, there)
    return (there - here) * (min(spec.MAX_STEP, GAIN * gap) / max(gap, 1e-9))


def _place(scene: Scene, index: int, goal: np.ndarray, seed: int) -> Wish:
    """Fetch the current part's block with gripper `index` and let go of it at `goal` (2,)."""
    gripper, block = scene.grippers[index], scene.part.block
    there = goal if gripper.holds == block else scene.blocks[block].position
    gap = distance(gripper.position, there)
    move = _toward(gripper.position, _around_obstacle(scene, gripper.position, there, seed))
    if gripper.holds == block:
        return move, OPEN if gap < NEAR else CLOSE
    closing = spec.HOLDING < gripper.opening < 1
    around = gripper.opening > spec.HOLDING and gap < (spec.GRASP_RADIUS if closing else NEAR)
    return move, CLOSE if around and distance(there, goal) > spec.PLACE_RADIUS else OPEN


def _hand_over_spot(scene: Scene, goal: np.ndarray) -> np.ndarray:
    """A free place (2,) halfway across the table, where both grippers reach, as near the goal as may be."""
    others = [b.position for i, b in enumerate(scene.blocks) if i != scene.part.block]
    spots = [np.array([0.5, y]) for y in np.linspace(0.15, 0.85, 15)]
    free = [spot for spot in spots if all(distance(spot, other) > 0.13 for other in others)]
    return min(free, key=lambda spot: distance(spot, goal))


def _push(finger: np.ndarray, block: np.ndarray, goal: np.ndarray) -> np.ndarray:
    """A move (2,) that pushes the block on when the finger is behind it, else goes there without a touch."""
    contact = spec.FINGER_RADIUS + spec.BLOCK_HALF
    ahead = (goal - block) / max(distance(goal, block), 1e-9)
    offset = finger - block
    along = float(offset @ ahead)
    aside = offset - along * ahead
    if along < -0.6 * contact and distance(aside, np.zeros(2)) < 0.02:
        way = max(-along - contact, 0.0) + min(0.75 * spec.MAX_STEP, GAIN * distance(goal, block))
        return _bounded(ahead * way - 0.8 * aside)
    ring = contact + 0.035
    behind = block - ahead * ring
    if distance_to_segment(block, finger, behind) > contact + 0.005:
        return _toward(finger, behind)
    left = np.array([-ahead[1], ahead[0]])
    angle = math.atan2(float(offset @ left), -along)  # 0 is behind the block
    angle -= min(max(angle, -0.9), 0.9)
    return _toward(finger, block + ring * (left * math.sin(angle) - ahead * math.cos(angle)))


def _bounded(move: np.ndarray) -> np.ndarray:
    return move * min(1.0, spec.MAX_STEP / max(distance(move, np.zeros(2)), 1e-9))


def _around_obstacle(scene: Scene, here: np.ndarray, there: np.ndarray, seed: int) -> np.ndarray:
    """Where to head for (2,): `there` when the way is clear, else a point beside the obstacle."""
    wall = scene.obstacle
    radius = spec.OBSTACLE_RADIUS + spec.CLEARANCE
    if wall is None or distance_to_segment(wall, here, there) > min(
        radius + 0.012, distance(wall, there) - 0.005
    ):
        return there
    ahead = (there - wall) / distance(there, wall)
    left = np.array([-ahead[1], ahead[0]])
    lean = float((here - wall) @ left)
    by_chance = np.random.default_rng([scene.seed, seed]).random() < 0.5
    side = lean > 0 if abs(lean) > 0.05 else by_chance
    return wall + (left if side else -left) * (radius + 0.08)
