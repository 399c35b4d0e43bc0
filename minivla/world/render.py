"""Pictures of a scene, drawn in numpy and equal to the last bit on every machine.

A thing is drawn as a *sprite*: its outline is tested on a grid finer than the pixels (`SUB` points along each
side of a pixel), and a pixel's coverage is the number of points inside. Positions are rounded to that fine
grid first, so a sprite is one of few and can be kept: drawing is then a table look-up and one integer blend
over the few pixels it covers. A camera looks at a *backdrop*, the table with what never moves on it, drawn
once an episode at the camera's own resolution; a picture is a crop of it with blocks and grippers blended on
top. Only an arm's links, which turn, are drawn afresh each time.
"""

import math
from collections.abc import Callable
from functools import lru_cache

import numpy as np
from einops import reduce

from minivla.world import spec
from minivla.world.scene import Scene

Colour = tuple[int, int, int]
Inside = Callable[
    [np.ndarray, np.ndarray], np.ndarray
]  # which points (x, y), in table widths from a thing's centre
Layer = tuple[Inside, Colour]
Thing = tuple[str, tuple[int, ...]]  # a name in `DRAWINGS` and its arguments

RGB: tuple[Colour, ...] = ((214, 48, 39), (38, 101, 200), (22, 158, 98), (242, 196, 34))
TABLE, LINES, FLOOR = (240, 237, 230), (231, 227, 218), (120, 115, 109)
DARK, FINGERS, LINK = (38, 40, 46), ((128, 134, 146), (196, 176, 222)), (158, 163, 173)
WIDTHS = {"table": 1.0, "wrist": 0.375, "wrist_right": 0.375}  # of what a camera shows, in table widths
SUB = 4
_GRID = 1024  # positions are first rounded to this share of the table
_LINK_HALF = 0.014


def _shade(colour: Colour, toward: Colour, share: float) -> Colour:
    mixed = [round(a + (b - a) * share) for a, b in zip(colour, toward, strict=True)]
    return mixed[0], mixed[1], mixed[2]


def _box(half_x: float, half_y: float, x0: float = 0.0, y0: float = 0.0) -> Inside:
    return lambda x, y: (abs(x - x0) <= half_x) & (abs(y - y0) <= half_y)


def _disc(radius: float) -> Inside:
    return lambda x, y: x * x + y * y <= radius * radius


def _triangle(half: float) -> Inside:
    return lambda x, y: (y >= -half) & (2 * abs(x) + y <= half)


def _block(colour: int, shape: int) -> list[Layer]:
    fill = RGB[colour]
    edge, face = _shade(fill, (0, 0, 0), 0.45), _shade(fill, (255, 255, 255), 0.14)
    make: Callable[[float], Inside] = (lambda half: _box(half, half), _disc, _triangle)[shape]
    half = spec.BLOCK_HALF * (1.0, 1.12, 1.15)[shape]
    return [(make(half), edge), (make(half * 0.8), fill), (make(half * 0.5), face)]


def _goal(colour: int) -> list[Layer]:
    half, tint = spec.GOAL_HALF, _shade(RGB[colour], TABLE, 0.72)
    return [(_box(half, half), RGB[colour]), (_box(half * 0.8, half * 0.8), tint)]


def _obstacle() -> list[Layer]:
    radius = spec.OBSTACLE_RADIUS
    return [
        (_disc(radius), DARK),
        (_disc(radius * 0.88), (84, 86, 92)),
        (_disc(radius * 0.55), (104, 106, 112)),
    ]


def _gripper(index: int, opening: int) -> list[Layer]:
    """Two fingers and the palm that carries them, seen from above; opening in tenths."""
    finger, palm = 0.018 + 0.072 * opening / 10, 0.068
    bars = [(0.016, 0.060, -finger, 0.008), (0.016, 0.060, finger, 0.008), (finger + 0.016, 0.015, 0.0, palm)]
    outline = [(_box(*bar), DARK) for bar in bars]
    return outline + [
        (_box(half_x - 0.006, half_y - 0.006, x, y), FINGERS[index]) for half_x, half_y, x, y in bars
    ]


DRAWINGS: dict[str, Callable[..., list[Layer]]] = {
    "block": _block,
    "goal": _goal,
    "obstacle": _obstacle,
    "gripper": _gripper,
}
# Half the side of a square that holds the drawing, in table widths.
EXTENT = {"block": 0.055, "goal": 0.085, "obstacle": 0.125, "gripper": 0.11}


@lru_cache(maxsize=4096)
def _sprite(thing: Thing, scale: float, phase: tuple[int, int]) -> tuple[int, np.ndarray, np.ndarray]:
    """A thing drawn at `scale` pixels a table width, its centre `phase` fine-grid points into a pixel.

    Returns (pixels left of the centre's and above it, what remains of the backdrop (h, w, 1), what is added
    (h, w, 3)), the last two uint16 and in 256ths.
    """
    name, arguments = thing
    extent = int(EXTENT[name] * scale) + 1
    ticks = np.arange(-extent * SUB, (extent + 1) * SUB) + 0.5
    x, y = (ticks - phase[0])[None, :] / (scale * SUB), -(ticks - phase[1])[:, None] / (scale * SUB)
    paint = np.zeros((len(ticks), len(ticks), 4), np.uint32)
    for inside, colour in DRAWINGS[name](*arguments):
        paint[inside(x, y)] = (*colour, 1)
    counts = reduce(paint, "(row sub) (column also) rgba -> row column rgba", "sum", sub=SUB, also=SUB)
    counts *= 256 // SUB**2
    return extent, (256 - counts[..., 3:]).astype(np.uint16), counts[..., :3].astype(np.uint16)


class Camera:
    """Takes pictures of size × size pixels, north up: of the whole table, or of a gripper's surroundings."""

    def __init__(self, name: str, size: int) -> None:
        self.name, self.size = name, size
        self.follows = {"table": None, "wrist": 0, "wrist_right": 1}[name]
        self.scale = size / WIDTHS[name]  # pixels in a table width
        self.margin = 0 if self.follows is None else size // 2 + 1  # pixels of floor around the table
        self.backdrop = _empty_table(self.scale, self.margin)

    def prepare(self, scene: Scene) -> None:
        """Draw the backdrop of an episode: the table, its goals, the obstacle."""
        self.backdrop = _empty_table(self.scale, self.margin).copy()
        for goal in scene.goals:
            self._draw(self.backdrop, ("goal", (goal.colour,)), goal.position)
        if scene.obstacle is not None:
            self._draw(self.backdrop, ("obstacle", ()), scene.obstacle)

    def picture(self, scene: Scene) -> np.ndarray:
        """The scene as uint8 (size, size, 3)."""
        left, top = 0, 0
        if self.follows is not None:
            column, row = self._fine(scene.grippers[self.follows].position)
            left, top = column // SUB - self.size // 2, row // SUB - self.size // 2
        image = self.backdrop[top : top + self.size, left : left + self.size].copy()
        held = [gripper.holds for gripper in scene.grippers if gripper.holds is not None]
        lying = [i for i in range(len(scene.blocks)) if i not in held]
        self._draw_blocks(image, scene, lying, left, top)
        for start, end in scene.links:
            self._draw_link(image, start, end, left, top)
        self._draw_blocks(image, scene, held, left, top)
        for index, gripper in enumerate(scene.grippers):
            self._draw(image, ("gripper", (index, round(gripper.opening * 10))), gripper.position, left, top)
        return image

    def _fine(self, point: np.ndarray) -> tuple[int, int]:
        """A point's (column, row) in the backdrop, in fine-grid points."""
        x, y = math.floor(point[0] * _GRID + 0.5) / _GRID, math.floor((1 - point[1]) * _GRID + 0.5) / _GRID
        unit, shift = self.scale * SUB, self.margin * SUB
        return math.floor(x * unit + 0.5) + shift, math.floor(y * unit + 0.5) + shift

    def _draw_blocks(self, image: np.ndarray, scene: Scene, indices: list[int], left: int, top: int) -> None:
        for block in (scene.blocks[i] for i in indices):
            self._draw(image, ("block", (block.colour, block.shape)), block.position, left, top)

    def _draw(self, image: np.ndarray, thing: Thing, at: np.ndarray, left: int = 0, top: int = 0) -> None:
        """Blend a sprite onto `image`, whose corner is the backdrop's pixel (left, top)."""
        column, row = self._fine(at)
        extent, keep, add = _sprite(thing, self.scale, (column % SUB, row % SUB))
        x, y = column // SUB - left - extent, row // SUB - top - extent
        x0, x1 = max(x, 0), min(x + keep.shape[1], image.shape[1])
        y0, y1 = max(y, 0), min(y + keep.shape[0], image.shape[0])
        if x0 < x1 and y0 < y1:
            cut = slice(y0 - y, y1 - y), slice(x0 - x, x1 - x)
            _blend(image[y0:y1, x0:x1], keep[cut], add[cut])

    def _draw_link(self, image: np.ndarray, start: np.ndarray, end: np.ndarray, left: int, top: int) -> None:
        """Draw a bar with a dark rim and round ends from one point (2,) to another; distance from its axis
        tells coverage."""
        (ax, ay), (bx, by) = (
            (c / SUB - left, r / SUB - top) for c, r in (self._fine(start), self._fine(end))
        )
        half = _LINK_HALF * self.scale
        (x0, x1), (y0, y1) = self._span(ax, bx, half), self._span(ay, by, half)
        if x0 >= x1 or y0 >= y1:
            return
        x, y = np.arange(x0, x1) + (0.5 - ax), np.arange(y0, y1) + (0.5 - ay)
        dx, dy = bx - ax, by - ay
        length = math.sqrt(dx * dx + dy * dy) + 1e-9
        # Few pixels are near the endless axis: only for those is it worth finding how near.
        rows, columns = np.nonzero(np.abs(x * (dy / length) - (y * (dx / length))[:, None]) < half + 0.5)
        x, y = x[columns], y[rows]
        share = np.minimum(np.maximum((x * dx + y * dy) / (length * length), 0), 1)
        x, y = x - share * dx, y - share * dy
        keep, add = _link_profile(half)
        step = np.minimum(np.sqrt(x * x + y * y) * 16, len(keep) - 1).astype(np.intp)
        window = image[y0:y1, x0:x1]
        pixels = window[rows, columns]  # (pixels, 3)
        _blend(pixels, keep[step], add[step])
        window[rows, columns] = pixels

    def _span(self, a: float, b: float, half: float) -> tuple[int, int]:
        """The pixels from a to b and `half` beyond, cut to the picture."""
        ends = min(a, b) - half - 1, max(a, b) + half + 2
        return min(max(int(ends[0]), 0), self.size), min(max(int(ends[1]), 0), self.size)


@lru_cache(maxsize=16)
def _link_profile(half: float) -> tuple[np.ndarray, np.ndarray]:
    """Across a link `half` pixels wide on either side: what remains (n, 1) and is added (n, 3) at each 16th
    of a pixel.

    uint16, in 256ths; the last entry is beyond the rim, where nothing changes.
    """
    gap = (np.arange(int((half + 0.5) * 16) + 2) + 0.5)[:, None] / 16
    rim, inner = (
        (np.clip(radius + 0.5 - gap, 0, 1) * 256).astype(np.uint16) for radius in (half, half * 0.6)
    )
    inner = np.minimum(inner, rim)
    rim[-1] = inner[-1] = 0
    return 256 - rim, (rim - inner) * np.array(DARK, np.uint16) + inner * np.array(LINK, np.uint16)


def _blend(window: np.ndarray, keep: np.ndarray, add: np.ndarray) -> None:
    """window (…, 3) uint8 becomes (window · keep + add) / 256, in place; keep (…, 1) and add (…, 3) are
    uint16."""
    mixed = window * keep
    mixed += add
    mixed >>= 8
    window[...] = mixed


@lru_cache(maxsize=16)
def _empty_table(scale: float, margin: int) -> np.ndarray:
    """The table with nothing on it but faint lines, `margin` pixels of floor around: uint8 (side, side,
    3)."""
    width = math.ceil(scale)
    image = np.full((width + 2 * margin, width + 2 * margin, 3), FLOOR, np.uint8)
    table = image[margin : margin + width, margin : margin + width]
    table[:] = TABLE
    thick = max(1, round(scale / 100))
    for i in range(1, 8):
        at = math.floor(scale * i / 8) - thick // 2
        table[:, at : at + thick] = LINES
        table[at : at + thick] = LINES
    return image
