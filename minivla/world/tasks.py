"""Tasks: which scene an episode starts with and what the instruction asks.

| task | the robot has to | on the table |
|---|---|---|
| reach | bring a gripper to a block | 2 blocks, 2 goals |
| push | push a block onto a goal with closed fingers | 2 blocks, 2 goals |
| pick_place | pick a block up, put it on a goal and let go | 2 blocks, 2 goals |
| detour | carry the block it holds round an obstacle, either side, to a goal | 1 block, 2 goals, 1 obstacle |
| sort | put one block on a goal, then another one on another | 3 blocks, 3 goals |

No two blocks of a scene share a colour, nor do two goals: the colour in an instruction tells which is meant.
"""

from collections.abc import Callable

import numpy as np

from minivla.world import language, spec
from minivla.world.embodiments import Embodiment, Rectangle
from minivla.world.scene import Block, Goal, Gripper, Part, Scene, distance, distance_to_segment

MAX_STEPS = {"reach": 40, "push": 80, "pick_place": 80, "detour": 80, "sort": 160}
APART = 0.19  # least distance between the centres of things on the table


def reach(rng: np.random.Generator, body: Embodiment, split: str) -> Scene:
    """Bring a gripper to the block named."""
    while True:
        scene = _draw_things(rng, body, _table(body), blocks=2, goals=2)
        _scatter_grippers(scene, body, rng)
        if min(distance(g.position, b.position) for g in scene.grippers for b in scene.blocks) > 0.12:
            return _instruct(scene, rng, "reach", split)


def push(rng: np.random.Generator, body: Embodiment, split: str) -> Scene:
    """Push the block named onto the goal named; nothing else stands in the block's way, nor where the finger
    starts."""
    while True:
        area = int(rng.integers(len(body.areas)))
        scene = _draw_things(rng, body, body.areas[area], blocks=2, goals=2)
        _scatter_grippers(scene, body, rng)
        scene.grippers[area].opening = 0.0
        if _can_push(scene, body.areas[area]):
            return _instruct(scene, rng, "push", split)


def pick_place(rng: np.random.Generator, body: Embodiment, split: str) -> Scene:
    """Put the block named on the goal named; with two grippers, half the time neither reaches both."""
    scene = _draw_things(rng, body, _table(body), blocks=2, goals=2)
    hand_over = len(scene.grippers) > 1 and rng.random() < 0.5
    while hand_over and any(_reaches_both(gripper, scene) for gripper in scene.grippers):
        scene = _draw_things(rng, body, _table(body), blocks=2, goals=2)
    _scatter_grippers(scene, body, rng)
    return _instruct(scene, rng, "place", split)


def sort(rng: np.random.Generator, body: Embodiment, split: str) -> Scene:
    """Put a block on a goal, then another on another; a third of each is left alone."""
    scene = _draw_things(rng, body, _table(body), blocks=3, goals=3)
    _scatter_grippers(scene, body, rng)
    return _instruct(scene, rng, "place", split, parts=2)


def detour(rng: np.random.Generator, body: Embodiment, split: str) -> Scene:
    """Carry the block already held to the goal named; the obstacle is in the middle of the straight way."""
    area = int(rng.integers(len(body.areas)))
    (left, low), (right, high) = body.areas[area]
    middle = np.array([left + right, low + high]) / 2 + rng.uniform(-0.02, 0.02, 2)
    angle = rng.uniform(0, 2 * np.pi)
    ahead = np.array([np.cos(angle), np.sin(angle)])
    start, end = middle - 0.29 * ahead, middle + 0.29 * ahead
    scene = _draw_things(rng, body, _table(body), blocks=1, goals=2)
    while min(distance(scene.goals[1].position, p) for p in (start, end, middle)) < 0.24:
        scene.goals[1].position = _points(rng, _table(body), 1)[0]
    _scatter_grippers(scene, body, rng)
    while any(distance(g.position, start) < 0.2 for i, g in enumerate(scene.grippers) if i != area):
        _scatter_grippers(scene, body, rng)
    scene.obstacle, scene.goals[0].position, scene.blocks[0].position = middle, end, start
    gripper = scene.grippers[area]
    gripper.position, gripper.holds, gripper.opening = start.copy(), 0, spec.HOLDING
    return _instruct(scene, rng, "carry", split)


TASKS: dict[str, Callable[[np.random.Generator, Embodiment, str], Scene]] = {
    "reach": reach,
    "push": push,
    "pick_place": pick_place,
    "detour": detour,
    "sort": sort,
}


def _table(body: Embodiment) -> Rectangle:
    return body.areas[0][0], body.areas[-1][1]


def _points(rng: np.random.Generator, area: Rectangle, count: int) -> list[np.ndarray]:
    """`count` random points (2,) in an area, each `APART` from the others; starts again when there is no room
    left."""
    points: list[np.ndarray] = []
    tries = 0
    while len(points) < count:
        point = rng.uniform(*area)
        tries += 1
        if all(distance(point, other) >= APART for other in points):
            points.append(point)
        elif tries > 50 * count:
            points, tries = [], 0
    return points


def _draw_things(
    rng: np.random.Generator, body: Embodiment, area: Rectangle, blocks: int, goals: int
) -> Scene:
    """Things in random places; what colour and shape they have is for `_instruct` to say."""
    points = _points(rng, area, blocks + goals)
    return Scene(
        blocks=[Block(0, 0, point) for point in points[:blocks]],
        goals=[Goal(0, point) for point in points[blocks:]],
        grippers=body.grippers(),
    )


def _scatter_grippers(scene: Scene, body: Embodiment, rng: np.random.Generator) -> None:
    """A random start for each gripper; where there are two, in the part of its area that the other does not
    share."""
    for i, gripper in enumerate(scene.grippers):
        (left, low), (right, high) = body.areas[i]
        others = [area for j, area in enumerate(body.areas) if j != i]
        left = max([left, *(area[1][0] for area in others if area[0][0] < left)])
        right = min([right, *(area[0][0] for area in others if area[1][0] > right)])
        gripper.position = rng.uniform((left, low), (right, high))


def _instruct(scene: Scene, rng: np.random.Generator, kind: str, split: str, parts: int = 1) -> Scene:
    """Colour the things and say what to do: block i belongs on goal i, for each of the parts."""
    options = language.combinations(kind, split)
    template = options[rng.integers(len(options))][2]
    chosen: list[tuple[int, int]] = []
    for _ in range(parts):
        used = [colour for colour, _ in chosen]
        looks = [(colour, shape) for colour, shape, t in options if t == template and colour not in used]
        chosen.append(looks[rng.integers(len(looks))])
    rest = [int(colour) for colour in rng.permutation(len(spec.COLOURS)) if colour not in dict(chosen)]
    chosen += [(colour, int(rng.integers(len(spec.SHAPES)))) for colour in rest]
    for block, (colour, shape) in zip(scene.blocks, chosen, strict=False):
        block.colour, block.shape = colour, shape
    for goal, colour in zip(scene.goals, rng.permutation(len(spec.COLOURS)), strict=False):
        goal.colour = int(colour)
    verb = "place" if kind == "carry" else kind
    for i in range(parts):
        text = language.sentence(kind, template, chosen[i], scene.goals[i].colour, rng)
        scene.parts.append(Part(verb, i, i, text))
    scene.instruction = language.JOIN.join(part.text for part in scene.parts)
    scene.seed = int(rng.integers(2**31))
    return scene


def _reaches_both(gripper: Gripper, scene: Scene) -> bool:
    return gripper.reaches(scene.blocks[0].position) and gripper.reaches(scene.goals[0].position)


def _can_push(scene: Scene, area: Rectangle) -> bool:
    """Whether there is a way to push, room to get behind the block, and nothing that would be pushed
    along."""
    block, goal = scene.blocks[0].position, scene.goals[0].position
    behind = block + 0.13 * (block - goal) / distance(block, goal)
    room = all(
        low - 0.04 <= at <= high + 0.04 for low, at, high in zip(area[0], behind, area[1], strict=True)
    )
    clear = distance_to_segment(scene.blocks[1].position, behind, goal) > 0.15
    starts = [distance(g.position, b.position) for g in scene.grippers for b in scene.blocks]
    return distance(block, goal) > 0.25 and room and clear and min(starts) > 0.12
