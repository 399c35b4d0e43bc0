"""Draw the picture of README and of the book's first page: what a policy is given, and what comes of it.

    .venv/bin/python tools/make_readme_picture.py [--seed 3]

The shipped policy drives; where it has not been trained yet, the scripted expert does. The title says which.
"""

import argparse
import sys
from collections.abc import Callable
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

import gymnasium
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

import minivla
import minivla.world
from minivla.viz import palette

TARGET = Path(__file__).resolve().parent.parent / "book" / "_static" / "readme.png"
POLICY = "act-tabletop"
FRAMES = 6
SHARP = 224  # pixels of the pictures that people look at; the policy sees 64
CAMERAS = ("observation.images.table", "observation.images.wrist")

Observation = dict[str, np.ndarray]
Driver = Callable[[Observation, str], np.ndarray]


def driver(env: gymnasium.Env) -> tuple[str, Driver]:
    """Who drives, and how: an observation and an instruction in, an action out."""
    if POLICY in minivla.list_checkpoints():
        policy = minivla.load(POLICY)
        policy.reset()
        return f"ACT ({POLICY})", lambda seen, task: policy.act({**seen, "task": task})[0].numpy()
    expert = minivla.world.expert(env)
    return "The scripted expert", lambda seen, task: expert()


def episode(seed: int) -> tuple[str, str, list[Observation]]:
    """Who drove, the instruction, and the sharp observations of a whole episode that must succeed."""
    small = gymnasium.make("minivla/Tabletop-v0", size=64)
    sharp = gymnasium.make("minivla/Tabletop-v0", size=SHARP)
    (seen, info), (large, _) = small.reset(seed=seed), sharp.reset(seed=seed)
    name, drive = driver(small)
    frames, over = [large], False
    while not over:
        action = drive(seen, info["task"])
        action = np.clip(action, small.action_space.low, small.action_space.high)
        seen, _, terminated, truncated, info = small.step(action)
        frames.append(sharp.step(action)[0])
        over = terminated or truncated
    if not info["is_success"]:
        raise SystemExit(f"{name} did not finish seed {seed}; choose another --seed")
    return name, info["task"], frames


def show(axes: Axes, picture: np.ndarray, caption: str, kind: str) -> None:
    """One picture with a frame in the colour of its kind, and a line beneath."""
    axes.imshow(picture, interpolation="antialiased")
    axes.set_xticks([])
    axes.set_yticks([])
    axes.set_xlabel(caption, color=palette.INK)
    axes.spines[:].set(visible=True, color=palette.KIND_COLOURS[kind], linewidth=1.6)


def draw(name: str, task: str, frames: list[Observation]) -> Figure:
    """The instruction on top, what the policy is given at the left, what it does at the right."""
    figure = palette.sheet(1.9, width=9.5, layout=None)
    grid = figure.add_gridspec(
        1, 2, width_ratios=[2, FRAMES], left=0.012, right=0.988, top=0.76, bottom=0.12, wspace=0.05
    )
    given = grid[0].subgridspec(1, 2, wspace=0.06).subplots()
    done = grid[1].subgridspec(1, FRAMES, wspace=0.06).subplots()
    for axes, camera in zip(given, CAMERAS, strict=True):
        show(axes, frames[0][camera], camera.rpartition(".")[2] + " camera", "image")
    chosen = np.linspace(len(frames) / FRAMES, len(frames) - 1, FRAMES).round().astype(int)
    for axes, step in zip(done, chosen, strict=True):
        show(axes, frames[step][CAMERAS[0]], f"step {step}", "action")
    orange = {"facecolor": palette.KIND_COLOURS["language"], "edgecolor": "none", "boxstyle": "round,pad=0.4"}
    figure.text(0.019, 0.88, f"“{task}”", bbox=orange, va="center", color=palette.INK)
    figure.text(0.988, 0.88, f"{name} carries it out", va="center", ha="right", weight="bold")
    return figure


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--seed", type=int, default=3)
    with palette.style():
        figure = draw(*episode(parser.parse_args().seed))
        TARGET.parent.mkdir(parents=True, exist_ok=True)
        figure.savefig(TARGET, metadata={"Software": None})
    print(f"{TARGET} ({TARGET.stat().st_size / 1e3:.0f} kB)")


if __name__ == "__main__":
    main()
