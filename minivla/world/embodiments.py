"""Bodies: what an action means, what the robot feels, and how a wish becomes an action.

| name | action | state |
|---|---|---|
| cartesian | dx, dy: shares of the largest step, in [-1, 1]; grip | x, y, opening |
| arm2 | joint_1, joint_2: angles to turn to, in radians; grip | joint_1, joint_2, opening |
| bimanual | dx, dy, grip of the left gripper, then those of the right | x, y, opening of each |

Every body does every task. In all of them a grip command above zero closes the fingers.
"""

import math
from typing import Protocol

import numpy as np

from minivla.world import spec
from minivla.world.scene import Gripper, Scene
from minivla.world.spec import ActionSpec

Rectangle = tuple[tuple[float, float], tuple[float, float]]


class Embodiment(Protocol):
    """What Tabletop asks of a body.

    areas: rectangles (low, high) to put things in; all that lies in one of them is in reach of one gripper,
    and of the gripper of the same index where there are several.
    """

    name: str
    action_spec: ActionSpec
    action_low: np.ndarray
    action_high: np.ndarray
    state_names: tuple[str, ...]
    state_low: np.ndarray
    state_high: np.ndarray
    areas: tuple[Rectangle, ...]

    def grippers(self) -> list[Gripper]:
        """Open grippers, at home."""

    def settle(self, scene: Scene) -> None:
        """Bring the body's own variables in line with the grippers' positions."""

    def apply(self, scene: Scene, action: np.ndarray) -> None:
        """Carry out one step; action (A,) within bounds."""

    def state(self, scene: Scene) -> np.ndarray:
        """Proprioception, float32 (S,)."""

    def action_for(self, scene: Scene, moves: list[np.ndarray], grips: list[float]) -> np.ndarray:
        """The action, float32 (A,), for wishes: gripper i to move by `moves[i]` (2,), fingers to do
        `grips[i]`.

        A move that is too long for one step is cut short.
        """


class Cartesian:
    """Grippers moved along x and y, three numbers for each.

    arms: what the names of their numbers start with. homes, areas: one for each.
    """

    def __init__(
        self,
        name: str,
        arms: tuple[str, ...],
        homes: tuple[tuple[float, float], ...],
        areas: tuple[Rectangle, ...],
    ) -> None:
        self.name, self.homes, self.areas = name, homes, areas
        n = len(arms)
        self.action_spec = ActionSpec(
            names=tuple(f"{arm}{axis}" for arm in arms for axis in ("dx", "dy", "grip")),
            units=("table widths", "table widths", "opening") * n,
            absolute=(False, False, True) * n,
            max_step=(spec.MAX_STEP, spec.MAX_STEP, spec.GRIP_STEP) * n,
            gripper=tuple(range(2, 3 * n, 3)),
            gripper_closes=1,
            frame="table",
        )
        self.action_low, self.action_high = -np.ones(3 * n, np.float32), np.ones(3 * n, np.float32)
        self.state_names = tuple(f"{arm}{axis}" for arm in arms for axis in ("x", "y", "opening"))
        self.state_low, self.state_high = np.zeros(3 * n, np.float32), np.ones(3 * n, np.float32)

    def grippers(self) -> list[Gripper]:
        """One for each arm."""
        # What an arm can put down anywhere in its area it must also reach past, by the width of a pad or so.
        reach = [
            (max(low[0] - 0.08, spec.EDGE), min(high[0] + 0.08, 1 - spec.EDGE)) for low, high in self.areas
        ]
        return [
            Gripper(np.array(home), np.array([left, spec.EDGE]), np.array([right, 1 - spec.EDGE]))
            for home, (left, right) in zip(self.homes, reach, strict=True)
        ]

    def settle(self, scene: Scene) -> None:
        """Nothing to do: the grippers' positions are all there is."""

    def apply(self, scene: Scene, action: np.ndarray) -> None:
        """Move each gripper, then its fingers."""
        for i, gripper in enumerate(scene.grippers):
            dx, dy, grip = (float(value) for value in action[3 * i : 3 * i + 3])
            scene.move(i, gripper.position + np.array([dx * spec.MAX_STEP, dy * spec.MAX_STEP]))
            scene.grip(i, grip)

    def state(self, scene: Scene) -> np.ndarray:
        """x, y, opening of each gripper."""
        return np.array([value for g in scene.grippers for value in (*g.position, g.opening)], np.float32)

    def action_for(self, scene: Scene, moves: list[np.ndarray], grips: list[float]) -> np.ndarray:
        """Moves as shares of the largest step."""
        pairs = zip(moves, grips, strict=True)
        values = [value for move, grip in pairs for value in (*(move / spec.MAX_STEP), grip)]
        return np.clip(np.array(values, np.float32), -1, 1)


class TwoLinkArm:
    """Two links of equal length in the plane of the table, mounted at its near edge; the elbow bends one way
    only.

    joint_1 is the angle of the first link from the x axis, joint_2 that of the second link from the first,
    both in radians and counter-clockwise.
    """

    name = "arm2"
    areas: tuple[Rectangle, ...] = (((0.12, 0.22), (0.88, 0.88)),)
    action_spec = ActionSpec(
        names=("joint_1", "joint_2", "grip"),
        units=("radians", "radians", "opening"),
        absolute=(True, True, True),
        max_step=(spec.MAX_TURN, spec.MAX_TURN, spec.GRIP_STEP),
        gripper=(2,),
        gripper_closes=1,
        frame="joints",
    )
    action_low: np.ndarray = np.array([-1.4, 0.7, -1], np.float32)
    action_high: np.ndarray = np.array([2.0, 3.0, 1], np.float32)
    state_names: tuple[str, ...] = ("joint_1", "joint_2", "opening")
    state_low: np.ndarray = np.array([-1.4, 0.7, 0], np.float32)
    state_high: np.ndarray = np.array([2.0, 3.0, 1], np.float32)

    def grippers(self) -> list[Gripper]:
        """One, kept off the mount."""
        return [
            Gripper(
                np.array([0.5, 0.5]), np.array([spec.EDGE, 0.1]), np.array([1 - spec.EDGE, 1 - spec.EDGE])
            )
        ]

    def settle(self, scene: Scene) -> None:
        """Bend the joints so that they lead to where the gripper is."""
        tip = scene.grippers[0].position
        scene.joints = joints_of(tip)
        elbow = elbow_of(scene.joints)
        scene.links = [(np.array(spec.ARM_BASE), elbow), (elbow, tip)]

    def apply(self, scene: Scene, action: np.ndarray) -> None:
        """Turn the joints towards the angles asked for; at the table's edge the gripper slides along it."""
        turn = np.clip(np.asarray(action[:2], np.float64) - scene.joints, -spec.MAX_TURN, spec.MAX_TURN)
        scene.move(0, tip_of(scene.joints + turn))
        self.settle(scene)
        scene.grip(0, float(action[2]))

    def state(self, scene: Scene) -> np.ndarray:
        """joint_1, joint_2, opening."""
        return np.array([*scene.joints, scene.grippers[0].opening], np.float32)

    def action_for(self, scene: Scene, moves: list[np.ndarray], grips: list[float]) -> np.ndarray:
        """Inverse kinematics of the moved gripper, slowed down where a joint could not turn that far."""
        turn = joints_of(scene.grippers[0].clamp(scene.grippers[0].position + moves[0])) - scene.joints
        turn *= min(1.0, spec.MAX_TURN / max(float(np.abs(turn).max()), 1e-9))
        return np.clip(
            np.array([*(scene.joints + turn), grips[0]], np.float32), self.action_low, self.action_high
        )


def elbow_of(joints: np.ndarray) -> np.ndarray:
    """Where the elbow (2,) is at joint angles (2,)."""
    angle = float(joints[0])
    return np.array(spec.ARM_BASE) + spec.ARM_LINK * np.array([math.cos(angle), math.sin(angle)])


def tip_of(joints: np.ndarray) -> np.ndarray:
    """Forward kinematics: where the gripper (2,) is at joint angles (2,)."""
    angle = float(joints[0] + joints[1])
    return elbow_of(joints) + spec.ARM_LINK * np.array([math.cos(angle), math.sin(angle)])


def joints_of(tip: np.ndarray) -> np.ndarray:
    """Inverse kinematics: the joint angles (2,) with the gripper at `tip` (2,), joint_2 positive.

    Links, and the line from mount to gripper, make a triangle with two equal sides: half of it has a right
    angle.
    """
    x, y = float(tip[0]) - spec.ARM_BASE[0], float(tip[1]) - spec.ARM_BASE[1]
    half = math.acos(min(math.hypot(x, y) / (2 * spec.ARM_LINK), 1.0))
    return np.array([math.atan2(y, x) - half, 2 * half])


EMBODIMENTS: dict[str, Embodiment] = {
    "cartesian": Cartesian("cartesian", ("",), ((0.5, 0.5),), (((0.12, 0.12), (0.88, 0.88)),)),
    "arm2": TwoLinkArm(),
    "bimanual": Cartesian(
        "bimanual",
        ("left_", "right_"),
        ((0.14, 0.5), (0.86, 0.5)),
        (((0.12, 0.12), (0.64, 0.88)), ((0.36, 0.12), (0.88, 0.88))),
    ),
}
