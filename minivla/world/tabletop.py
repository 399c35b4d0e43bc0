"""Tabletop as a `gymnasium.Env`."""

from collections.abc import Iterable
from typing import Any

import gymnasium
import numpy as np
from gymnasium import spaces

from minivla.data.features import OBS_ENV_STATE, OBS_IMAGES, OBS_STATE
from minivla.world import language, spec
from minivla.world.embodiments import EMBODIMENTS
from minivla.world.render import WIDTHS, Camera
from minivla.world.scene import Scene, detour_passed, detour_side, distance
from minivla.world.tasks import MAX_STEPS, TASKS

SCREEN = 384  # pixels along a side of what `render` shows


class Tabletop(gymnasium.Env[dict[str, np.ndarray], np.ndarray]):
    """A table seen from above, a gripper, coloured blocks and goals, and a sentence that says what to do.

    task: one of `TASKS`.
    embodiment: one of `EMBODIMENTS`.
    size: pixels along a picture's side.
    cameras: any of "table", "wrist" and, of two grippers, "wrist_right", possibly none.
    environment_state: also observe where everything is.
    max_steps: steps until truncation (the task's own when None).
    split: which instructions to draw, "train", "test" (combinations held out) or "all".

    Observations are a dict with LeRobot's keys: `observation.state` float32 (S,),
    `observation.images.<camera>` uint8 (size, size, 3), `observation.environment_state` float32 (E,):
    positions of the current part's block and goal, then of the others. `info` has `task` (the instruction),
    `subtask` (its current part), `is_success` and, where there is an obstacle, `side`: None until the gripper
    has come round it, then "left" or "right" as seen from the obstacle, looking at the goal. The reward is 1
    on the step that finishes the task, which ends the episode, else 0. Actions are described by
    `action_spec`. Raises ValueError for unknown names and numbers out of range, TypeError for arguments of
    the wrong kind.
    """

    metadata = {"render_modes": ["rgb_array", "human"], "render_fps": spec.FPS}  # noqa: RUF012
    fps = spec.FPS
    action_space: spaces.Box
    observation_space: spaces.Dict  # type: ignore[assignment]

    def __init__(
        self,
        task: str = "pick_place",
        embodiment: str = "cartesian",
        size: int = 64,
        cameras: tuple[str, ...] = ("table", "wrist"),
        environment_state: bool = False,
        max_steps: int | None = None,
        split: str = "train",
        render_mode: str | None = None,
    ) -> None:
        _known("task", task, TASKS)
        _known("embodiment", embodiment, EMBODIMENTS)
        _known("split", split, language.SPLITS)
        _known("render_mode", render_mode, (None, *self.metadata["render_modes"]))
        _whole(size=size, **({} if max_steps is None else {"max_steps": max_steps}))
        if isinstance(cameras, str):
            raise TypeError(f"cameras={cameras!r}; expected a tuple of names. Write cameras=({cameras!r},).")
        if size < 16 or (max_steps is not None and max_steps < 1):
            raise ValueError(
                f"size={size}, max_steps={max_steps}; expected size ≥ 16, max_steps ≥ 1 or None."
            )
        self.task, self.split, self.size, self.render_mode = task, split, size, render_mode
        self.embodiment = EMBODIMENTS[embodiment]
        self.action_spec = self.embodiment.action_spec
        self.cameras = {f"{OBS_IMAGES}.{name}": self._camera(name) for name in cameras}
        self.environment_state = environment_state
        self.max_steps = max_steps or MAX_STEPS[task]
        self.action_space = spaces.Box(
            self.embodiment.action_low, self.embodiment.action_high, dtype=np.float32
        )
        self.observation_space = self._observation_space()
        self.scene = Scene([], [], [])
        self.elapsed = 0
        self._side: str | None = None
        self._window: Any = None

    def _camera(self, name: str) -> Camera:
        _known("camera", name, WIDTHS)
        camera = Camera(name, self.size)
        if (camera.follows or 0) >= len(self.embodiment.grippers()):
            raise ValueError(
                f"{self.embodiment.name!r} has one gripper; its cameras are 'table' and 'wrist'."
            )
        return camera

    def _observation_space(self) -> spaces.Dict:
        body = self.embodiment
        parts: dict[str, spaces.Space[Any]] = {
            OBS_STATE: spaces.Box(body.state_low, body.state_high, dtype=np.float32)
        }
        for key in self.cameras:
            parts[key] = spaces.Box(0, 255, (self.size, self.size, 3), np.uint8)
        if self.environment_state:
            scene = TASKS[self.task](np.random.default_rng(0), body, self.split)
            parts[OBS_ENV_STATE] = spaces.Box(0, 1, _where(scene).shape, np.float32)
        return spaces.Dict(parts)

    def reset(
        self, *, seed: int | None = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
        """Start an episode; the same seed gives the same one."""
        super().reset(seed=seed)
        self.scene = TASKS[self.task](self.np_random, self.embodiment, self.split)
        self.embodiment.settle(self.scene)
        self.elapsed, self._side = 0, None
        for camera in self.cameras.values():
            camera.prepare(self.scene)
        return self._observe(), self._info(False)

    def step(self, action: np.ndarray) -> tuple[dict[str, np.ndarray], float, bool, bool, dict[str, Any]]:
        """Carry out an action (A,) of floats; values beyond the bounds are clipped.

        Raises ValueError for a wrong shape, NaN or infinity, TypeError for anything but floats, RuntimeError
        before the first reset.
        """
        if not self.scene.parts:
            raise RuntimeError("There is no episode to step through: call env.reset(seed=…) first.")
        action = self._check(action)
        self.embodiment.apply(self.scene, np.clip(action, self.action_space.low, self.action_space.high))
        self.elapsed += 1
        success = self.scene.advance()
        if self.render_mode == "human":
            self.render()
        truncated = not success and self.elapsed >= self.max_steps
        return self._observe(), float(success), success, truncated, self._info(success)

    def render(self) -> np.ndarray | None:
        """The table as uint8 (384, 384, 3); with render_mode "human" it is shown in a window instead."""
        if self.render_mode is None:
            return None
        screen = Camera("table", SCREEN)
        screen.prepare(self.scene)
        picture = screen.picture(self.scene)
        if self.render_mode == "human":
            self._show(picture)
            return None
        return picture

    def _show(self, picture: np.ndarray) -> None:
        import matplotlib.pyplot as plt

        if self._window is None:
            _, axes = plt.subplots(num="Tabletop", figsize=(4, 4))
            axes.set_axis_off()
            self._window = axes.imshow(picture)
        self._window.set_data(picture)
        self._window.axes.set_title(self.scene.instruction, fontsize=9)
        plt.pause(1 / self.fps)

    def close(self) -> None:
        """Close the window, if there is one."""
        if self._window is not None:
            import matplotlib.pyplot as plt

            plt.close(self._window.figure)
            self._window = None

    def _check(self, action: np.ndarray) -> np.ndarray:
        shape, names = self.action_space.shape, ", ".join(self.action_spec.names)
        array = np.asarray(action)
        if array.shape != shape:
            raise ValueError(
                f"The action has shape {array.shape}, {self.embodiment.name} takes {shape}: ({names}). "
                "Pass one action, not a batch or a chunk."
            )
        if not np.issubdtype(array.dtype, np.floating):
            raise TypeError(
                f"The action has dtype {array.dtype}, a float array is expected: use .astype('float32')."
            )
        if not np.isfinite(array).all():
            raise ValueError(
                f"The action ({names}) = {array.tolist()} holds NaN or infinity: check the policy's output."
            )
        return array

    def _observe(self) -> dict[str, np.ndarray]:
        observation = {OBS_STATE: self.embodiment.state(self.scene)}
        observation |= {key: camera.picture(self.scene) for key, camera in self.cameras.items()}
        if self.environment_state:
            observation[OBS_ENV_STATE] = _where(self.scene)
        return observation

    def _info(self, success: bool) -> dict[str, Any]:
        scene = self.scene
        info = {"task": scene.instruction, "subtask": scene.part.text, "is_success": success}
        if scene.obstacle is None:
            return info
        carried = scene.blocks[scene.part.block].position
        carrier = min(scene.grippers, key=lambda gripper: distance(gripper.position, carried))
        if self._side is None and detour_passed(scene, carrier):
            self._side = detour_side(scene, carrier)
        return info | {"side": self._side}


def _where(scene: Scene) -> np.ndarray:
    """Positions of everything, the current part's block and goal first: float32 (E,)."""
    part = scene.part
    blocks = [b.position for i, b in enumerate(scene.blocks) if i != part.block]
    goals = [g.position for i, g in enumerate(scene.goals) if i != part.goal]
    points = [scene.blocks[part.block].position, scene.goals[part.goal].position, *blocks, *goals]
    points += [scene.obstacle] if scene.obstacle is not None else []
    return np.concatenate(points).astype(np.float32)


def _whole(**numbers: int) -> None:
    for name, value in numbers.items():
        if isinstance(value, bool) or not isinstance(value, int | np.integer):
            raise TypeError(f"{name}={value!r}; expected a whole number, without quotation marks or point.")


def _known(what: str, name: str | None, names: Iterable[str | None]) -> None:
    if name not in list(names):  # a list, so that what cannot be hashed is refused by name as well
        raise ValueError(f"Unknown {what} {name!r}. Known: {', '.join(str(known) for known in names)}.")
