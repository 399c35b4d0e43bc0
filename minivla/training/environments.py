"""Environments by name, made so that a policy can see in them what it was trained on."""

from __future__ import annotations

import contextlib
import warnings
from collections.abc import Callable, Iterator
from importlib import import_module
from typing import Any

from minivla.data.features import OBS_ENV_STATE, OBS_IMAGE, FeatureType
from minivla.training.spec import parse_spec

# A gymnasium id names the package that registers it, "gym_pusht/PushT-v0", unless it stands here.
PACKAGES = {"minivla": "minivla.world"}
INSTALL = {"gym_pusht": "pip install 'minivla[envs]'"}


@contextlib.contextmanager
def environments(env: Any, count: int, *, policy: Any = None, rendered: bool = False) -> Iterator[list[Any]]:
    """Up to `count` environments to step together; those made here are closed afterwards.

    env       as `minivla.evaluate` takes it
    policy    for which they are made, where a name leaves something open (`fitting`)
    rendered  whether `render` will be asked for pictures
    """
    import gymnasium

    single = env if isinstance(env, gymnasium.Env) else None
    if single is not None and single.spec is None:
        yield [single]
        return
    make = _maker(single.spec if single is not None else env, policy, rendered)
    envs: list[Any] = []
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "pkg_resources is deprecated")  # of pygame, on its own affairs
            for _ in range(count):
                envs.append(make())
        yield envs
    finally:
        for each in envs:
            each.close()


def _maker(env: Any, policy: Any, rendered: bool) -> Callable[[], Any]:
    import gymnasium

    mode: dict[str, Any] = {"render_mode": "rgb_array"} if rendered else {}
    if isinstance(env, str):
        name, given = parse_env(env)
        arguments = fitting(name, policy) | given | mode
        return lambda: gymnasium.make(name, disable_env_checker=True, **arguments)
    if isinstance(env, gymnasium.envs.registration.EnvSpec):
        return lambda: gymnasium.make(env, disable_env_checker=True, **mode)
    if callable(env):
        return env
    raise TypeError(
        f"env is a {type(env).__name__}; expected a gymnasium id, an environment, or a function making one"
    )


def parse_env(text: str) -> tuple[str, dict[str, Any]]:
    """A gymnasium id and the arguments for it, out of "id?key=value&…" or "tabletop:task?key=value&…".

    An unknown id "package/Name" has its package imported, which registers it, as LeRobot does
    (`lerobot/envs/configs.py`, create_envs). Raises ModuleNotFoundError where there is none.

    >>> parse_env("tabletop:reach?embodiment=arm2&size=96")
    ('minivla/Tabletop-v0', {'task': 'reach', 'embodiment': 'arm2', 'size': 96})
    """
    name, arguments = parse_spec(text)
    if name.startswith("tabletop:"):
        arguments = {"task": name.removeprefix("tabletop:")} | arguments
        name = "minivla/Tabletop-v0"
    _register(name)
    return name, arguments


def _register(name: str) -> None:
    import gymnasium

    namespace, slash, _ = name.partition("/")
    if not slash or ":" in namespace or name in gymnasium.registry:  # gymnasium imports "module:id" itself
        return
    package = PACKAGES.get(namespace, namespace)
    try:
        import_module(package)
    except ModuleNotFoundError as error:
        if error.name != package:
            raise
        command = INSTALL.get(package, f"pip install {package.replace('_', '-')}, if that is its name")
        raise ModuleNotFoundError(
            f"environment {name!r} comes with the package {package!r}, which is not installed; {command}",
            name=package,
        ) from error


def fitting(name: str, policy: Any) -> dict[str, Any]:
    """The arguments with which an environment shows a policy what it was trained on; {} for most.

    PushT is made as LeRobot makes it (`lerobot/envs/configs.py`, PushtEnv): picture and agent's position, or
    for a policy that asks for observation.environment_state the T's eight corners in place of the picture.
    Only the picture has the size of the policy's camera, where LeRobot's always has 96 × 96 pixels.
    """
    if not name.rpartition(":")[2].startswith("gym_pusht/PushT"):
        return {}
    inputs = getattr(getattr(policy, "config", None), "input_features", {})
    cameras = {key: f.shape for key, f in inputs.items() if f.type == FeatureType.VISUAL}
    film = {"visualization_width": 384, "visualization_height": 384}
    if OBS_ENV_STATE in inputs and not cameras:
        return {"obs_type": "environment_state_agent_pos", **film}
    renamed = getattr(getattr(policy, "preprocessor", None), "rename_map", {})
    shape = cameras.get(renamed.get(OBS_IMAGE, OBS_IMAGE)) or next(iter(cameras.values()), (3, 96, 96))
    size = {"observation_height": shape[1], "observation_width": shape[2]}
    return {"obs_type": "pixels_agent_pos", **film, **size}
