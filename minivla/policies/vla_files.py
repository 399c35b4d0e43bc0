"""What files call things that π0, π0.5 and π0-FAST call by one name: fields, steps and tensors.

Three generations of files are about: LeRobot 0.6's, those from before its 0.4, and openpi's own PyTorch ones.
"""

import re
import warnings
from collections.abc import Mapping
from typing import Any

from minivla.data.stats import LEGACY_KEY

# Former fields of config.json: the fields that take their value today, the values that can be followed (None:
# all), and why. Sources: LeRobot 0.3 `policies/pi0/configuration_pi0.py`; openpi
# `examples/convert_jax_model_to_pytorch.py`, from action_dim on.
FORMER: dict[str, tuple[tuple[str, ...], tuple[Any, ...] | None, str]] = {
    "resize_imgs_with_padding": (("image_resolution",), None, ""),
    "num_steps": (("num_inference_steps",), None, ""),
    "proj_width": ((), (1024,), "the projections are as wide as the expert, 1024 in gemma_300m"),
    "use_cache": ((), None, "the prefix is always run once, which computes the same"),
    "attention_implementation": ((), None, "all of them compute the same"),
    "train_state_proj": ((), None, "the projections always learn; the weights are the same"),
    "adapt_to_pi_aloha": ((), (False,), "turning ALOHA's joints into the authors' is not supported"),
    "use_delta_joint_actions_aloha": (
        (),
        (False,),
        "use_relative_actions does that now, with new statistics",
    ),
    "action_dim": (("max_action_dim", "max_state_dim"), None, ""),
    "action_horizon": (("chunk_size", "n_action_steps"), None, ""),
    "precision": (("dtype",), ("float32", "bfloat16"), "expected float32 or bfloat16: convert the weights"),
}


def modern_fields(content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """LeRobot's settings from before 0.4, and openpi's, in today's fields; and what became of each.

    Raises ValueError for one that today's code, ours or LeRobot's, cannot follow.
    """
    modern, notes = dict(content), list[str]()
    for name in [name for name in FORMER if name in content]:
        today, only, reason = FORMER[name]
        value = modern.pop(name)
        if only is not None and value not in only:
            raise ValueError(f"{name} is {value!r}, a setting of an older upstream; {reason}")
        modern |= {field: value for field in today if field not in content and value is not None}
        notes.append(f"{name}: {'now ' + ', '.join(today) if today else reason}")
    _warn_of_padding(content)
    return modern, notes


def _warn_of_padding(content: Mapping[str, Any]) -> None:
    """Before 0.4 LeRobot put the margin of an image that is not square above and to the left of it."""
    features = (content.get("input_features") or {}).items()
    shapes = {
        key: f.get("shape") for key, f in features if isinstance(f, Mapping) and f.get("type") == "VISUAL"
    }
    if "resize_imgs_with_padding" in content and any(s and s[-1] != s[-2] for s in shapes.values()):
        warnings.warn(
            f"this policy's images ({', '.join(shapes)}) are not square, and the LeRobot of then filled them "
            "up above and on the left, where today's, and minivla, centre them: expect it to see a shifted "
            "picture, or make the images square yourself",
            stacklevel=5,
        )


# What a stored step must be told when a field is overridden: its attributes, by its name in files.
STEP_FIELDS: dict[str, dict[str, tuple[str, ...]]] = {
    "tokenizer_max_length": {"tokenizer_processor": ("max_length",)},
    "upstream": {
        "pi0_new_line_processor": ("cleaned",),
        "tokenizer_processor": ("ending",),
        "pi0_fast_prepare_state_tokenizer_processor_step": ("openpi",),
        "action_tokenizer_processor": ("openpi",),
    },
    "max_action_tokens": {"action_tokenizer_processor": ("max_action_tokens",)},
    "fast_skip_tokens": {"action_tokenizer_processor": ("fast_skip_tokens",)},
    "text_tokenizer_name": {
        "tokenizer_processor": ("tokenizer_name",),
        "action_tokenizer_processor": ("paligemma_tokenizer_name",),
    },
    "action_tokenizer_name": {"action_tokenizer_processor": ("action_tokenizer_name",)},
}

P = "model.paligemma_with_expert."
EMBEDDING = f"{P}paligemma.model.language_model.embed_tokens.weight"
LM_HEAD = f"{P}paligemma.lm_head.weight"
EXPERT_HEAD = f"{P}gemma_expert.lm_head.weight"
_FORMER_NAMES = (
    (r"(\.paligemma)\.language_model\.lm_head\.", r"\1.lm_head."),
    (r"(\.paligemma)\.language_model\.model\.", r"\1.model.language_model."),
    (r"(\.paligemma)\.(vision_tower|multi_modal_projector)\.", r"\1.model.\2."),
)


def modern_name(key: str) -> str:
    """A stored key as LeRobot 0.6 would write it; statistics among the weights keep their names.

    The files published for LeRobot 0.4, and openpi's own, lack "model." in front. Before 0.4 and with
    transformers below 4.52, PaliGemma's parts were nested another way.
    """
    if LEGACY_KEY.match(key):
        return key
    name = key if key.startswith("model.") else f"model.{key}"
    for pattern, replacement in _FORMER_NAMES:
        name = re.sub(pattern, replacement, name)
    return name
