"""Where an image encoder says that things are: the keypoints of its spatial softmax, on the pictures it saw.

A keypoint is the mean position under the softmax of one channel's map, no detection: a map that is bright
nowhere, or at two places, has its mean somewhere between. Which thing a keypoint goes with shows only over
several pictures, so each has a number and a colour of its own, the same in every figure.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from minivla.data.features import MissingKey
from minivla.nn.image_vector import ImageVector
from minivla.recorder import Call, NotKept
from minivla.segments import camera_names
from minivla.viz import palette
from minivla.viz.pictures import as_array, as_picture
from minivla.viz.scene import pictures_seen

PREFIX = "keypoints."  # of the hidden state's name, before the camera
COLOURS = ("#0072B2", "#C04A00", "#00734F", "#9C4A7C", palette.INK, "#7A5C00")  # each 4.5 to 1 on paper
TOGETHER = 0.05  # of the picture's width: keypoints that are nearer count as one place
MARGIN, GAP, TOP = 0.62, 0.12, 0.62  # inches
LINE, SMALL = 0.125, 7.0  # inches and points, of a line of numbers
THREE = 3  # numbers a line


def plot_keypoints(
    pictures: Any,
    points: Any,
    *,
    follow: Collection[int] = (),
    title: str | None = None,
    camera: str | None = None,
    ax: Axes | None = None,
) -> Figure:
    """Keypoints on the pictures they were found in, with their numbers.

    pictures, points: an image (3, H, W) or (H, W, 3) and its keypoints (K, 2), x and y in pixels, (0, 0)
    the middle of the upper left one; or both by camera, {key: …}. Keypoints that sit on one place are ringed
    and share a line to their numbers.
    follow: only these are numbered, and the others are faint.
    ax, camera: draw one camera there (the first, if `camera` is None), numbers inside the picture.

    Raises KeyError for a camera that is not there, ValueError for points of another shape, and for a number
    to follow that there is not.
    """
    found = _by_camera(pictures, points)
    _expect_numbers(follow, found)
    if camera is not None and camera not in found:
        raise MissingKey(f"no camera is called {camera!r}; there are {', '.join(found)}")
    told = _title(found, follow) if title is None else title
    with palette.style():
        if ax is not None:
            figure, ax = palette.panel(ax, 0)
            _draw(ax, *found[camera or next(iter(found))], follow, inside=True)
            palette.entitle(ax, told, own=False)
            return figure
        chosen = list(found) if camera is None else [camera]
        side = min(3.4, (palette.WIDTH - 0.2 + GAP) / len(chosen[:2]) - GAP - 2 * MARGIN)
        rows = -(-len(chosen) // 2)
        wide = palette.WIDTH if len(chosen) > 1 else 0.2 + side + 2 * MARGIN
        figure = palette.sheet(TOP - 0.2 + rows * (side + 0.4), width=wide, layout=None)
        for i, key in enumerate(chosen):
            left = 0.1 + MARGIN + i % 2 * (side + 2 * MARGIN + GAP)
            panel = palette.axes_at(figure, left, TOP + i // 2 * (side + 0.4), side, side)
            _draw(panel, *found[key], follow)
            panel.set_title(key, loc="center", fontsize=palette.FONT, fontweight="normal", pad=4)
        palette.headline(figure, told)
    return figure


def keypoints_of(
    policy: Any, call: Call, *, sample: int = 0, ago: int = 0
) -> tuple[dict[str, np.ndarray], dict[str, np.ndarray]]:
    """What `plot_keypoints` draws of a traced call, by camera: pictures (H, W, 3) in [0, 1], points (K, 2).

    ago: which observation of the history, 0 the newest. The pictures are the batch's with the policy's
    normalisation undone; without statistics they are stretched from their darkest to their brightest value.

    Raises ValueError for a call without keypoints, a sample or an age out of range, and a training pass with
    a random crop, since nobody knows where it was.
    """
    kept = {name.removeprefix(PREFIX): v for name, v in call.hidden.items() if name.startswith(PREFIX)}
    if not kept:
        raise NotKept(
            f"this call of {type(policy).__name__} has no keypoints: they come from a spatial softmax behind "
            "the image encoder, as Diffusion Policy and VQ-BeT have it. ACT's patches are tokens: "
            "trace.plot_attention shows what is looked at"
        )
    size, steps = next(iter(kept.values())).shape[:2]
    for what, value, count in (("sample", sample, size), ("ago", ago, steps)):
        if not 0 <= value < count:
            raise ValueError(f"{what} is {value}; the call has {count}: expected 0 to {count - 1}")
    names, moment = camera_names(kept), steps - 1 - ago
    pictures = {names[key]: pictures_seen(policy, call.batch, key, sample)[moment] for key in kept}
    points = {}
    for key, found in kept.items():
        encoder = _encoder(policy, key)
        if call.method == "forward" and encoder.crop is not None and encoder.random_crop:
            raise ValueError(
                "this call was a training pass, whose random crop was not kept, so that nobody knows where "
                "in the picture its keypoints lie; trace policy.predict_action_chunk(batch), whose crop is "
                "the middle"
            )
        shape = call.batch[key].shape
        points[names[key]] = as_array(encoder.pixels(found[sample, moment].float(), (shape[-2], shape[-1])))
    return pictures, points


def places(points: Any, near: float) -> list[list[int]]:
    """Which keypoints (K, 2) sit together: lists of their numbers, largest first; none is further than `near`
    from the middle of its place.
    """
    spots = as_array(points).astype(float)
    groups = [[i] for i in range(len(spots))]
    while True:
        pairs = [
            (_reach(spots[one + other]), a, b)
            for a, one in enumerate(groups)
            for b, other in enumerate(groups[:a])
        ]
        reach, a, b = min(pairs, default=(np.inf, 0, 0))
        if not reach <= near:
            return sorted((sorted(group) for group in groups), key=lambda group: (-len(group), group))
        groups[b] += groups.pop(a)


def _reach(spots: np.ndarray) -> float:
    return float(np.linalg.norm(spots - spots.mean(0), axis=1).max())


def _encoder(policy: Any, camera: str) -> ImageVector:
    """The encoder that looks through a camera. Raises TypeError for a policy that is not minivla's."""
    found = [m for m in policy.modules() if isinstance(m, ImageVector) and camera in m.cameras]
    if not found:
        raise TypeError(
            f"{type(policy).__name__} looks through {camera!r} with no ImageVector of minivla's, so that the "
            "pixels are not known; expected a policy of minivla's: minivla.load(folder) opens LeRobot's"
        )
    return found[0]


def _by_camera(pictures: Any, points: Any) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """{camera: (picture, points)}, in the order of the pictures."""
    if not isinstance(pictures, Mapping):
        pictures, points = {"": pictures}, {"": points}
    if not isinstance(points, Mapping) or set(points) != set(pictures):
        told = list(points) if isinstance(points, Mapping) else type(points).__name__
        raise MissingKey(f"pictures are of {list(pictures)}, points of {told}; expected the same cameras")
    found = {key: (as_picture(image), as_array(points[key]).astype(float)) for key, image in pictures.items()}
    for key, (_, spots) in found.items():
        if spots.ndim != 2 or spots.shape[1] != 2:
            raise ValueError(f"the points {key} have shape {spots.shape}; expected (K, 2), x and y in pixels")
    return found


def _expect_numbers(follow: Collection[int], found: Mapping[str, tuple[np.ndarray, np.ndarray]]) -> None:
    fewest = min(len(spots) for _, spots in found.values())
    if wrong := [number for number in follow if not 0 <= number < fewest]:
        raise ValueError(f"follow has {wrong}; the keypoints are numbered from 0 to {fewest - 1}")


def _title(found: Mapping[str, tuple[np.ndarray, np.ndarray]], follow: Collection[int]) -> str:
    """The finding: at how many places the keypoints are."""
    if follow:
        count = len(next(iter(found.values()))[1])
        return f"Keypoint{'s' * (len(follow) > 1)} {palette.listed([str(n) for n in follow], 9)} of {count}"
    told = []
    for key, (picture, spots) in found.items():
        count = len(places(spots, TOGETHER * picture.shape[1]))
        told.append(f"{palette.counted(count, 'place')}{f' of {key}' if key else ''}")
    return f"{len(next(iter(found.values()))[1])} keypoints sit on {palette.listed(told)}"


def _draw(
    ax: Axes, picture: np.ndarray, spots: np.ndarray, follow: Collection[int], *, inside: bool = False
) -> None:
    """A picture, its keypoints, and their numbers beside it, or inside where there is no room beside."""
    height, width = picture.shape[:2]
    ax.imshow(picture, interpolation="nearest", alpha=0.8)
    ax.set(xlim=(-0.5, width - 0.5), ylim=(height - 0.5, -0.5), xticks=[], yticks=[])
    ax.spines[:].set_visible(False)
    numbered = sorted(follow) or list(range(len(spots)))
    for i, spot in enumerate(spots):
        strong = i in numbered
        look: dict[str, Any] = {"markersize": 5.5 if strong else 4, "alpha": 1.0 if strong else 0.35}
        ax.plot(*spot, "o", color=_colour(i), markeredgecolor="white", gid=f"keypoint {i}", zorder=3, **look)
    near = TOGETHER * width
    groups = [[numbered[i] for i in group] for group in places(spots[numbered], near)]
    for group in groups:
        if len(group) > 1:
            middle, reach = spots[group].mean(0), _reach(spots[group]) + 0.022 * width
            for colour, line in (("white", 2.2), (palette.INK, 0.9)):
                ring = np.linspace(0, 2 * np.pi, 60)
                around = (middle[0] + reach * np.cos(ring), middle[1] + reach * np.sin(ring))
                ax.plot(*around, color=colour, linewidth=line, zorder=4, gid="place")
    (_name_inside if inside else _name_beside)(ax, spots, groups, height, width)


def _colour(number: int) -> str:
    return COLOURS[number % len(COLOURS)]


def _name_inside(ax: Axes, spots: np.ndarray, groups: list[list[int]], height: int, width: int) -> None:
    """Numbers next to their places, towards the middle of the picture."""
    box = {"boxstyle": "square,pad=0.12", "facecolor": palette.PAPER, "edgecolor": "none", "alpha": 0.8}
    for group in groups:
        middle = spots[group].mean(0)
        left = middle[0] > width / 2
        text = " ".join(map(str, group[:4])) + (" …" if len(group) > 4 else "")
        look: dict[str, Any] = {"ha": "right" if left else "left", "va": "center", "bbox": box, "zorder": 5}
        font: dict[str, Any] = {"color": _colour(group[0]), "fontsize": SMALL, "fontweight": "bold"}
        beside = (-8 if left else 8, 0)
        ax.annotate(text, tuple(middle), beside, textcoords="offset points", **look, **font)


def _name_beside(ax: Axes, spots: np.ndarray, groups: list[list[int]], height: int, width: int) -> None:
    """Numbers in the two margins, each place's with a line to it; the lines of a margin do not cross much,
    since its numbers stand in the order of their places.
    """
    scale = width / palette.inches(ax)  # pixels an inch
    ordered = sorted(groups, key=lambda group: spots[group].mean(0)[0])
    lines = np.cumsum([-(-len(group) // THREE) for group in ordered])
    half = int(np.searchsorted(lines, lines[-1] / 2)) + 1 if len(ordered) > 1 else 1
    for some, edge, sign in ((ordered[:half], -0.5, -1), (ordered[half:], width - 0.5, 1)):
        some = sorted(some, key=lambda group: spots[group].mean(0)[1])
        tall = [LINE * scale * -(-len(group) // THREE) + 0.03 * scale for group in some]
        for group, y in zip(some, _apart([spots[g].mean(0)[1] for g in some], tall, height), strict=True):
            at, end = spots[group].mean(0), edge + sign * 0.1 * scale
            elbow = ([at[0], edge, end], [at[1], y, y])
            ax.plot(*elbow, color="white", linewidth=2.0, clip_on=True, zorder=2)
            ax.plot(*elbow, color=palette.MUTED, linewidth=0.7, clip_on=False, zorder=2, gid="leader")
            _write_numbers(ax, group, end + sign * 0.03 * scale, y, sign, scale)


def _write_numbers(ax: Axes, group: list[int], x: float, y: float, sign: int, scale: float) -> None:
    """Numbers in their colours, three a line, the block's near edge at x and its middle at y."""
    rows = [group[i : i + THREE] for i in range(0, len(group), THREE)]
    step = scale * (palette.text_width("88", SMALL, "bold") + 0.035)
    for line, row in enumerate(rows):
        down = y + (line - (len(rows) - 1) / 2) * LINE * scale
        for place, number in enumerate(row):
            along = place if sign > 0 else len(row) - 1 - place
            font: dict[str, Any] = {"color": _colour(number), "fontsize": SMALL, "fontweight": "bold"}
            where: dict[str, Any] = {"ha": "left" if sign > 0 else "right", "va": "center_baseline"}
            ax.text(x + sign * along * step, down, str(number), gid=f"number {number}", **where, **font)


def _apart(wanted: list[float], tall: list[float], height: int) -> list[float]:
    """Places along a margin, in order, as near as is simple to those wanted, and no two on one another."""
    if not wanted:
        return []
    squeeze = min(1.0, height / sum(tall))
    half = [squeeze * t / 2 for t in tall]
    at, floor = list(wanted), -0.5
    for i, h in enumerate(half):
        at[i] = max(at[i], floor + h)
        floor = at[i] + h
    ceiling = height - 0.5
    for i in reversed(range(len(at))):
        at[i] = min(at[i], ceiling - half[i])
        ceiling = at[i] - half[i]
    return at
