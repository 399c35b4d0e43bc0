"""The layouts in which π's weights were published, at their real sizes: headers of files, and no weights.

LeRobot builds its network on the meta device, which gives names and shapes; each layout is that table,
renamed. Nothing here was downloaded: `source` says where the layout is known from.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from minivla.policies.vla_files import EMBEDDING, LM_HEAD

Shapes = dict[str, tuple[int, ...]]
Change = Callable[[dict[str, Any]], dict[str, Any]]
CAMERAS = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
STATISTICS = (
    "normalize_inputs.buffer_observation_state",
    "normalize_targets.buffer_action",
    "unnormalize_outputs.buffer_action",
)
FORMER_SETTINGS = {
    "resize_imgs_with_padding": [224, 224], "adapt_to_pi_aloha": False, "proj_width": 1024,
    "use_delta_joint_actions_aloha": False, "num_steps": 10, "use_cache": True,
    "attention_implementation": "eager", "train_state_proj": True,
}  # fmt: skip
LATER_SETTINGS = (
    "paligemma_variant", "action_expert_variant", "dtype", "num_inference_steps", "min_period", "max_period",
    "time_sampling_beta_alpha", "time_sampling_beta_beta", "time_sampling_scale", "time_sampling_offset",
    "use_relative_actions", "relative_exclude_joints", "action_feature_names", "rtc_config",
    "image_resolution", "gradient_checkpointing", "compile_model", "compile_mode",
    "optimizer_grad_clip_norm", "use_peft",
)  # fmt: skip


@dataclass(frozen=True)
class Layout:
    """A way in which files were written: what to do to today's tensors and to today's config."""

    name: str
    source: str
    families: tuple[str, ...]
    tensors: Change
    config: Change = dict


def same(tensors: dict[str, Any]) -> dict[str, Any]:
    return dict(tensors)


def without_prefix(tensors: dict[str, Any]) -> dict[str, Any]:
    """The network alone, not the policy around it."""
    return {key.removeprefix("model."): value for key, value in tensors.items()}


def head_alone(tensors: dict[str, Any]) -> dict[str, Any]:
    """As a file that was saved while table and head were one: the first of their names is kept."""
    one = {key: tensors[EMBEDDING] if key == LM_HEAD else value for key, value in tensors.items()}
    return {key: value for key, value in one.items() if key != EMBEDDING}


def base_file(tensors: dict[str, Any]) -> dict[str, Any]:
    return without_prefix(head_alone(tensors))


def other_time(tensors: dict[str, Any]) -> dict[str, Any]:
    """The other policy's name for the MLP of time."""
    swap = {".action_time_mlp": ".time_mlp", ".time_mlp": ".action_time_mlp"}
    return {re.sub(r"\.(action_)?time_mlp", lambda m: swap[m[0]], k): value for k, value in tensors.items()}


def former_nesting(tensors: dict[str, Any]) -> dict[str, Any]:
    """PaliGemma as transformers below 4.52 nested it."""
    out = {}
    for key, value in head_alone(tensors).items():
        name = re.sub(r"(paligemma)\.model\.language_model\.", r"\1.language_model.model.", key)
        name = re.sub(r"(paligemma)\.lm_head\.", r"\1.language_model.lm_head.", name)
        out[re.sub(r"(paligemma)\.model\.(vision_tower|multi_modal)", r"\1.\2", name)] = value
    return out


def with_statistics(change: Change) -> Change:
    """Mean and standard deviation of a state and an action among the weights."""

    def changed(tensors: dict[str, Any]) -> dict[str, Any]:
        names = [f"{place}.{name}" for place in STATISTICS for name in ("mean", "std")]
        return change(tensors) | dict.fromkeys(names, (32,))

    return changed


def former_config(content: dict[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in content.items() if key not in LATER_SETTINGS} | FORMER_SETTINGS


def openpi_config(content: dict[str, Any]) -> dict[str, Any]:
    """openpi's own, and a type, which it lacks."""
    return {
        "type": content["type"], "action_dim": 32, "action_horizon": 50, "paligemma_variant": "gemma_2b",
        "action_expert_variant": "gemma_300m", "precision": "bfloat16",
    }  # fmt: skip


LOADER, EVERY, FLOW = (
    "LeRobot 0.6.1, _fix_pytorch_state_dict_keys",
    ("pi0", "pi05", "pi0_fast"),
    ("pi0", "pi05"),
)
LAYOUTS = [
    Layout("as LeRobot 0.6 saves", "LeRobot 0.6.1's network on the meta device", EVERY, same),
    Layout("base files: no prefix, head alone", f"{LOADER} and from_pretrained", EVERY, base_file),
    Layout("table and head stored once", f"{LOADER}; safetensors' save_model", EVERY, head_alone),
    Layout("time's MLP under the other name", LOADER, FLOW, other_time),
    Layout(
        "openpi's PyTorch files",
        "openpi 15a9616a, examples/convert_jax_model_to_pytorch.py",
        FLOW,
        base_file,
        openpi_config,
    ),
    Layout(
        "LeRobot before 0.4: statistics inside",
        "LeRobot 0.3, paligemma_with_expert.py and _transform_state_dict_keys; the config of lerobot/pi0 as "
        "quoted in LeRobot's pull request 3358",
        ("pi0",),
        with_statistics(former_nesting),
        former_config,
    ),
    Layout(
        "the same with transformers 4.52 or later",
        "LeRobot 0.3, _transform_state_dict_keys",
        ("pi0",),
        with_statistics(head_alone),
        former_config,
    ),
]


def their_network(family: str) -> tuple[Shapes, dict[str, Any]]:
    """Names and shapes of LeRobot's tensors at the published size, and its config.json, without memory."""
    from importlib import import_module

    from lerobot.configs import FeatureType, PolicyFeature

    module = import_module(f"lerobot.policies.{family}.modeling_{family}")
    kind = {"pi0": "PI0", "pi05": "PI05", "pi0_fast": "PI0Fast"}[family]
    cameras = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, 224, 224)) for name in CAMERAS
    }
    inputs = {**cameras, "observation.state": PolicyFeature(FeatureType.STATE, (32,))}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (32,))}
    config = getattr(module, f"{kind}Config")(input_features=inputs, output_features=outputs, device="cpu")
    with torch.device("meta"):
        network = _network(module, kind, config)
    return {f"model.{key}": tuple(value.shape) for key, value in network.state_dict().items()}, _json(config)


def _network(module: Any, kind: str, config: Any) -> Any:
    """Without the policy around it, which wants tokenizers."""
    return getattr(module, f"{kind}Pytorch")(config)


def _json(config: Any) -> dict[str, Any]:
    import tempfile

    with tempfile.TemporaryDirectory() as folder:
        config._save_pretrained(Path(folder))
        return dict(json.loads((Path(folder) / "config.json").read_text()))


def write_folder(folder: Path, shapes: Shapes, config: dict[str, Any], layout: Layout) -> Path:
    """config.json and the header of a safetensors file, float32."""
    folder.mkdir(parents=True)
    entries, end = {}, 0
    for key, shape in sorted(layout.tensors(shapes).items()):
        start, end = end, end + 4 * torch.Size(shape).numel()
        entries[key] = {"dtype": "F32", "shape": list(shape), "data_offsets": [start, end]}
    header = json.dumps(entries).encode()
    (folder / "model.safetensors").write_bytes(len(header).to_bytes(8, "little") + header)
    (folder / "config.json").write_text(json.dumps(layout.config(config)))
    return folder
