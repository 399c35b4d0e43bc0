"""What the explorer shows beside the tokens: the chunk on its way, the pictures, what the network was told.

A call that has no token sequence (the U-Net of Diffusion Policy) is explored by these alone.
"""

from __future__ import annotations

import base64
import io
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from PIL import Image

from minivla.data.features import OBS_ENV_STATE, OBS_STATE
from minivla.recorder import Call
from minivla.segments import Segment, camera_names
from minivla.viz.flow import spread_over
from minivla.viz.pictures import as_array, as_picture

Robot = Callable[[Any], Any]
Encoders = Mapping[str, Any]
"""By camera, the `minivla.nn.image_vector.ImageVector` it is seen through: says where keypoints lie."""

POINTS = "keypoints."


def has_scene(call: Call) -> bool:
    """Is there anything to look at beside tokens?"""
    return call.flow is not None or call.chunk is not None or bool(seen_cameras(call))


def seen_cameras(call: Call) -> list[str]:
    """Cameras that were made into keypoints and are in the batch, in the order of the network."""
    names = (name.removeprefix(POINTS) for name in call.hidden if name.startswith(POINTS))
    return [key for key in names if key in call.batch]


def describe_scene(call: Call) -> str:
    """What a call without tokens is about, in a few words."""
    if call.flow is not None:
        steps, _, horizon, _ = call.flow.x.shape
        return f"from noise to {horizon} actions in {steps - 1} step{'s' * (steps != 2)}"
    if call.chunk is not None:
        return f"a chunk of {call.chunk.shape[1]} actions"
    return f"what is seen of {', '.join(camera_names(seen_cameras(call)).values())}"


def sampler_steps(call: Call, most: int | None) -> list[int]:
    """Which points of the sampler's path are embedded: all, or at most so many, evenly spread."""
    count = 0 if call.flow is None else len(call.flow.x)
    return spread_over(count, count if most is None else most) if count else []


def chunk_steps(
    call: Call, *, sample: int, robot: Robot | None, names: Any, most: int | None = None
) -> dict[str, Any] | None:
    """The chunk at the sampler's steps, (steps, H, A) in normalised and in robot units; None without one.

    A sampler that runs on more dimensions than the chunk has (π pads its actions) is cut to the chunk's; one
    that runs on more steps (Diffusion Policy) is not, and "returned" says where the chunk lies in its path.
    """
    times, kept = None, [0]
    if call.flow is not None:
        across = call.flow.x.shape[-1] if call.chunk is None else call.chunk.shape[-1]
        kept = sampler_steps(call, most)
        if len(call.flow.times) != len(call.flow.x):
            raise ValueError(
                f"the flow has {len(call.flow.times)} times and {len(call.flow.x)} points; expected as many "
                "(N + 1)"
            )
        moving, times = call.flow.x[kept, sample, :, :across], as_array(call.flow.times)[kept]
    elif call.chunk is not None:
        moving = call.chunk[sample : sample + 1]
    else:
        return None
    size = moving.shape[-1]
    if names is not None and len(names) != size:
        raise ValueError(
            f"names has {len(names)} entries ({', '.join(map(str, names))}), the chunk {size} dimensions; "
            "give one for each"
        )
    return {
        "names": [str(name) for name in names] if names is not None else [f"action {i}" for i in range(size)],
        "times": None if times is None else rounded(times),
        "steps": kept,
        "of": 0 if call.flow is None else len(call.flow.x) - 1,
        "returned": _returned(call, moving[-1], sample),
        "units": {unit: rounded(values) for unit, values in _in_units(moving, robot).items()},
    }


def _in_units(chunks: Any, robot: Robot | None) -> dict[str, np.ndarray]:
    """Chunks (N, H, A), normalised, and in robot units where these are known."""
    units = {"normalised": as_array(chunks)}
    if robot is not None:
        units["robot"] = np.stack([as_array(robot(chunk[None]))[0] for chunk in chunks])
        if units["robot"].shape != tuple(chunks.shape):
            raise ValueError(
                f"robot turned a chunk of shape {tuple(chunks.shape[1:])} into {units['robot'].shape[1:]}; "
                "expected the same shape, as policy.postprocess gives"
            )
    return units


def _returned(call: Call, whole: Any, sample: int) -> list[int] | None:
    """[first, count] of the steps that the policy returned, when the sampler made more of them."""
    if call.chunk is None or len(whole) <= call.chunk.shape[1]:
        return None
    part, count = as_array(call.chunk[sample]), call.chunk.shape[1]
    whole = as_array(whole)
    starts = range(len(whole) - count + 1)
    found = [start for start in starts if np.array_equal(whole[start : start + count], part, equal_nan=True)]
    return [found[0], count] if found else None


def answers(
    call: Call, segments: Sequence[Segment], *, sample: int, robot: Robot | None
) -> dict[str, Any] | None:
    """What each query of a policy with codes (VQ-BeT) said: its codes, its chunk with the offset and without.

    None for others. "of" is the query whose chunk the policy returned.
    """
    names = ("codes", "logits", "decoded", "offsets")
    tokens = [t for s in segments if s.kind == "query" for t in range(s.start, s.stop)]
    if call.chunk is None or not all(name in call.hidden for name in names):
        return None
    codes, logits, decoded, offsets = (call.hidden[name][sample].detach() for name in names)
    if len(codes) != len(tokens):
        return None
    chunks = decoded + offsets
    distance = (chunks - call.chunk[sample]).abs().flatten(1).amax(1)
    return {
        "tokens": tokens,
        "of": int(distance.nan_to_num(math.inf).argmin()),
        "codes": codes.tolist(),
        "shares": rounded(logits.float().softmax(-1)),
        "units": {unit: rounded(values) for unit, values in _in_units(chunks, robot).items()},
        "decoded": {unit: rounded(values) for unit, values in _in_units(decoded, robot).items()},
    }


def images(batch: Mapping[str, Any], keys: Sequence[str], sample: int, side: int) -> dict[str, Any]:
    """Pictures of cameras, the newest of a history, stretched for display."""
    return {key: _displayed(_history(batch[key], sample)[-1], side) for key in sorted(set(keys))}


def views(
    call: Call, segments: Sequence[Segment], *, sample: int, side: int, encoders: Encoders | None
) -> list[dict[str, Any]]:
    """Each picture that was made into keypoints or into one token: cameras, and in each the oldest first.

    "points" are keypoints as shares of width and height; "token" the picture's place in the main sequence;
    "encoder" is the same number where pictures go through the same network; with "drawn", a crop was drawn
    and not kept, so that nobody knows where its keypoints lie.
    """
    single = [s for s in segments if s.kind == "image" and s.grid is None and s.image in call.batch]
    keys = list(dict.fromkeys([*seen_cameras(call), *(s.image for s in single if s.image)]))
    names, found = camera_names(keys), []
    own = {id(encoder): i for i, encoder in enumerate((encoders or {}).values())}
    for key in keys:
        history = _history(call.batch[key], sample)
        tokens = [s.start for s in single if s.image == key]
        encoder = (encoders or {}).get(key)
        pixels = _pixels(call, key, encoder, sample)
        size = np.array([history.shape[-1], history.shape[-2]])
        for i, picture in enumerate(history):
            found.append(
                {
                    "camera": names[key],
                    "ago": len(history) - 1 - i,
                    "token": tokens[i] if len(tokens) == len(history) else None,
                    # Pixel 0 is the middle of the first one.
                    "points": None if pixels is None else rounded((pixels[i - len(history)] + 0.5) / size),
                    "encoder": own.get(id(encoder)),
                    "drawn": _crop_drawn(call, encoder),
                    **_displayed(picture, side),
                }
            )
    return found


def newest_keypoints(
    call: Call, sample: int, encoders: Encoders | None
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """By camera, the newest picture (H, W, 3) in [0, 1] and its keypoints (K, 2) in pixels, where known."""
    found = {}
    for key, name in camera_names(seen_cameras(call)).items():
        picture = _history(call.batch[key], sample)[-1]
        if (pixels := _pixels(call, key, (encoders or {}).get(key), sample)) is not None:
            found[name] = as_picture(picture, rescale=True), pixels[-1]
    return found


def _pixels(call: Call, key: str, encoder: Any, sample: int) -> np.ndarray | None:
    """Keypoints of a camera's history (T, K, 2), x and y in pixels; None where they are not known."""
    kept = call.hidden.get(POINTS + key)
    if encoder is None or kept is None or _crop_drawn(call, encoder):
        return None
    height, width = call.batch[key].shape[-2:]
    return as_array(encoder.pixels(kept[sample].float(), (height, width)))


def _crop_drawn(call: Call, encoder: Any) -> bool:
    """Was the picture cropped at a place that nobody kept? A loss may be computed in evaluation too."""
    return bool(call.method == "forward" and encoder and encoder.crop and encoder.random_crop)


def condition(call: Call, sample: int) -> list[dict[str, Any]]:
    """What the denoiser was told, as named parts of "condition" (B, T, C), with their values (T, width).

    The parts stand in the order in which `DiffusionPolicy.see` joins them; the instruction is what is left.
    """
    told = call.hidden.get("condition")
    if told is None or told.ndim != 3:  # π0.5's is the code of a time
        return []
    values, parts = as_array(told[sample]), [("state", call.batch.get(OBS_STATE))]
    parts += [
        (name, call.hidden[POINTS + key].flatten(-2))
        for key, name in camera_names(seen_cameras(call)).items()
    ]
    parts.append(("environment state", call.batch.get(OBS_ENV_STATE)))
    widths = {name: part.shape[-1] for name, part in parts if part is not None}
    rest = values.shape[-1] - sum(widths.values())
    widths = widths if rest >= 0 else {"condition": values.shape[-1]}
    if rest > 0:
        widths["instruction" if "task" in call.batch else "others"] = rest
    edges = np.cumsum([0, *widths.values()])
    return [
        {"name": name, "values": rounded(values[:, start:stop])}
        for name, start, stop in zip(widths, edges[:-1], edges[1:], strict=True)
    ]


def _history(stack: Any, sample: int) -> Any:
    """Pictures (T, 3, H, W) of one sample, from (B, T, 3, H, W) or (B, 3, H, W)."""
    return stack[sample] if stack.ndim == 5 else stack[sample][None]


def _displayed(picture: Any, side: int) -> dict[str, Any]:
    """A picture at most `side` pixels long, stretched for display."""
    pixels = as_picture(picture, rescale=True)
    image = Image.fromarray(np.round(pixels * 255).astype(np.uint8))
    small = min(1.0, side / max(image.size))
    if small < 1:
        image = image.resize(
            (max(1, round(image.width * small)), max(1, round(image.height * small))),
            Image.Resampling.LANCZOS,
        )
    return {"width": image.width, "height": image.height, "source": _shortest(image)}


def _shortest(image: Image.Image) -> str:
    """A data address of the picture: PNG, or JPEG where that is much shorter."""
    png, jpeg = io.BytesIO(), io.BytesIO()
    image.save(png, "PNG", optimize=True)
    image.save(jpeg, "JPEG", quality=85, optimize=True)
    kind, data = (
        ("png", png.getvalue())
        if len(png.getvalue()) < max(12_000, 1.5 * len(jpeg.getvalue()))
        else ("jpeg", jpeg.getvalue())
    )
    return f"data:image/{kind};base64,{base64.b64encode(data).decode('ascii')}"


def instruction(batch: Mapping[str, Any], sample: int) -> str | None:
    """The instruction of one sample, if the batch holds one in words."""
    task = batch.get("task")
    if isinstance(task, str):
        return task
    found = task[sample] if isinstance(task, (list, tuple)) and sample < len(task) else None
    return found if isinstance(found, str) else None


def rounded(values: Any) -> Any:
    """Numbers, in lists of lists, with four significant digits; None for what JSON cannot hold."""
    return _rounded(as_array(values).tolist())


def _rounded(value: Any) -> Any:
    if isinstance(value, list):
        return [_rounded(each) for each in value]
    return float(f"{value:.4g}") if math.isfinite(value) else None
