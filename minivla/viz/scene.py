"""What a policy was shown, in robot units again, and what its chunks command there."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import Any

import numpy as np
import torch
from matplotlib.axes import Axes
from torch import Tensor

from minivla.data.features import OBS_STATE, FeatureType
from minivla.data.steps import Normalize, Unnormalize
from minivla.segments import camera_names
from minivla.viz import palette
from minivla.viz.pictures import as_array, as_picture
from minivla.viz.plane import Meaning, Plane


def scales_of(policy: Any) -> list[Normalize]:
    """The steps of a policy's preprocessor that hold statistics; none for a policy without."""
    steps = getattr(getattr(policy, "preprocessor", None), "steps", ())
    return [step for step in steps if isinstance(step, Normalize) and step.stats]


def observed(policy: Any, batch: Mapping[str, Any], keys: Collection[str]) -> dict[str, Tensor]:
    """Observations of a normalised batch with the normalisation undone, where the policy has statistics."""
    values = {key: batch[key].float() for key in keys}
    for step in scales_of(policy):
        features = {key: step.features[key] for key in keys}
        values = Unnormalize(features, step.norm_map, step.stats, step.eps, allow_constant=True)(values)
    return values


def pictures_seen(policy: Any, batch: Mapping[str, Any], key: str, sample: int) -> list[np.ndarray]:
    """A camera's pictures of one sample (H, W, 3) in [0, 1], oldest first; without statistics each is
    stretched from its darkest to its brightest value.
    """
    film = observed(policy, batch, [key])[key][sample]
    known = bool(scales_of(policy))
    film = film if film.ndim == 4 else film[None]
    return [as_picture(image.clamp(0, 1)) if known else as_picture(image, rescale=True) for image in film]


def table_picture(
    policy: Any, batch: Mapping[str, Any], meaning: Meaning, camera: str, sample: int = 0
) -> np.ndarray | None:
    """The newest picture of the camera of that key or short name; None where there is none, and where paths
    are not in table widths, so that they would not fit it.
    """
    visual = [key for key, f in policy.config.input_features.items() if f.type == FeatureType.VISUAL]
    found = next((key for key, name in camera_names(visual).items() if camera in (key, name)), None)
    if found is None or Plane.of(meaning, policy.config.action_feature.shape[0]).unit != "table widths":
        return None
    return pictures_seen(policy, batch, found, sample)[-1]


def same_scene(batch: Mapping[str, Any], sample: int) -> list[int]:
    """The samples of a batch that were shown exactly what `sample` was, itself first."""
    seen = [v for k, v in batch.items() if k.startswith("observation.") and isinstance(v, Tensor)]
    texts = batch.get("task") or [""] * len(seen[0])
    same = torch.stack([(v == v[sample]).flatten(1).all(1) for v in seen]).all(0).tolist()
    others = [i for i, alike in enumerate(same) if alike and i != sample and texts[i] == texts[sample]]
    return [sample, *others]


def commanded_paths(
    policy: Any, batch: Mapping[str, Any], chunks: Tensor, meaning: Meaning, *, sample: int = 0
) -> np.ndarray:
    """Where normalised chunks (…, H, A) lead the gripper in one sample's scene, from the current action on.

    Of a history's chunk that are H - n_obs_steps + 1 actions. Moves start where the state's first two numbers
    say that the gripper is. Returns (…, L, 2), in the units of `meaning`. Raises ValueError for a policy
    without statistics.
    """
    if not scales_of(policy):
        raise ValueError(
            f"this {type(policy).__name__} has no statistics, so that paths in robot units are not known; "
            "load it with minivla.load(folder, stats=dataset.stats), or leave out `meaning`"
        )
    plane = Plane.of(meaning, chunks.shape[-1])
    state = observed(policy, batch, [OBS_STATE])[OBS_STATE][sample]
    start = 0.0 if plane.absolute else as_array(state if state.ndim == 1 else state[-1])[:2]
    actions = as_array(policy.postprocess(chunks.float()))[..., policy.config.n_obs_steps - 1 :, :]
    paths = [start + plane.path(chunk) for chunk in actions.reshape(-1, *actions.shape[-2:])]
    return np.stack(paths).reshape(*actions.shape[:-2], *paths[0].shape)


def draw_table(ax: Axes, picture: Any) -> None:
    """Axes without ticks: the table, x and y from 0 to 1, or without its picture whatever the paths need."""
    ax.set(aspect="equal", xticks=[], yticks=[])
    ax.spines[:].set_visible(picture is None)
    if picture is not None:
        ax.imshow(as_picture(picture), extent=(0, 1, 0, 1), interpolation="nearest", alpha=0.6)
        ax.set(xlim=(0, 1), ylim=(0, 1))


def draw_way(ax: Axes, path: np.ndarray, colour: str, carried: int | None, *, strong: bool = True) -> None:
    """A path (L, 2): the first `carried` steps thick, the others thin; a dot where a strong one starts."""
    part = path if carried is None else path[: carried + 1]
    wide, look = (
        1.9 if strong else 0.8,
        dict[str, Any](alpha=1.0 if strong else 0.45, zorder=4 if strong else 2),
    )
    if strong:
        ax.plot(*part.T, color="white", linewidth=wide + 1.6, zorder=3)
        ax.plot(*path[0], "o", color=palette.INK, markersize=4.5, markeredgecolor="white", zorder=5)
    ax.plot(*path.T, color=colour, linewidth=0.55 * wide, gid="path" if strong else "companion", **look)
    ax.plot(*part.T, color=colour, linewidth=wide, gid="carried", **look)
