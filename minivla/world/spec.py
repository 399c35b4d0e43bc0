"""What Tabletop is made of: colours, shapes, sizes and speeds, and the card that describes an action space.

Lengths are table widths: the table is the square [0, 1] × [0, 1], x to the right, y up (away from the
person). A step is one tenth of a second.
"""

from dataclasses import dataclass

FPS = 10
COLOURS = ("red", "blue", "green", "yellow")
SHAPES = ("cube", "disc", "triangle")

BLOCK_HALF = 0.045  # half the width of a block
GOAL_HALF = 0.08  # half the width of a goal pad
OBSTACLE_RADIUS = 0.12
FINGER_RADIUS = 0.03  # of the disc that closed fingers push with

MAX_STEP = 0.04  # the farthest a gripper moves along x or y in one step
MAX_TURN = 0.1  # radians that a joint of arm2 turns in one step, at most
ARM_LINK = 0.6  # length of each of arm2's links
ARM_BASE = (0.5, 0.0)  # where arm2 is mounted
GRIP_STEP = 0.2  # how far the fingers open or close in one step, of 1
HOLDING = 0.6  # opening at which the fingers meet a block between them
GRASP_RADIUS = 0.045  # a block whose centre is this near the gripper's is between the fingers
PLACE_RADIUS = 0.06  # a block this near a goal's centre lies on the goal
REACH_RADIUS = 0.04  # a gripper this near a block's centre has reached it
EDGE = 0.04  # grippers and blocks keep this far from the table's edge
CLEARANCE = 0.04  # grippers keep this far from the obstacle's wall
GRIPPER_GAP = 0.12  # two grippers keep this far from one another


@dataclass(frozen=True)
class ActionSpec:
    """What the numbers of an action mean.

    names, units, absolute: one entry for each action dimension; `absolute` is False where the number is a
    change.
    max_step: the farthest each dimension can take the robot in one step, in its units. Where `absolute` is
    False the action is a share of it, in [-1, 1]; where True the action is a place to be, approached by at
    most this much.
    gripper: the indices of the gripper commands. Above zero closes, zero and below opens: `gripper_closes` is
    the sign.
    frame: the coordinate frame of the motion.
    """

    names: tuple[str, ...]
    units: tuple[str, ...]
    absolute: tuple[bool, ...]
    max_step: tuple[float, ...]
    gripper: tuple[int, ...]
    gripper_closes: int
    frame: str
