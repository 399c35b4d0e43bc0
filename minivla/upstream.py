"""LeRobot's own policies, looked into through the same window: hooks record what its attention computes.

    with minivla.trace(lerobot_policy) as t:
        lerobot_policy.select_action(batch)

The sites, segments and hidden states have the names that minivla's policy of the same family gives them.
Upstream: LeRobot 0.6 `policies/act/modeling_act.py`. Nothing of LeRobot is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any

import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.policies.act import STATES, describe_act, describe_vae
from minivla.segments import Segment, arrange, camera_names

# ACT: attention modules below policy.model, and the sites they are.
ACT_SITES = (
    (r"^(vae_encoder|encoder)\.layers\.(\d+)\.self_attn$", r"\1.\2"),
    (r"^decoder\.layers\.(\d+)\.self_attn$", r"decoder.\1.self"),
    (r"^decoder\.layers\.(\d+)\.multihead_attn$", r"decoder.\1.cross"),
)


def is_lerobot(policy: Any) -> bool:
    """Is this one of LeRobot's policies, or a subclass of one?"""
    return any(cls.__module__.split(".")[0] == "lerobot" for cls in type(policy).__mro__)


def sites(policy: Any) -> list[str]:
    """Where one of LeRobot's policies attends."""
    return list(act_sites(policy)) if getattr(policy, "name", "") == "act" else []


def open_eyes(policy: Any) -> Callable[[], None]:
    """Put hooks into one of LeRobot's policies; call what is returned to take them out.

    Raises TypeError for a family whose inside is not mapped.
    """
    family = getattr(policy, "name", type(policy).__name__)
    if family not in FAMILIES:
        raise TypeError(
            f"LeRobot's {family!r} policy cannot be looked into yet, only {', '.join(FAMILIES)}; save it "
            "with policy.save_pretrained(folder) and trace minivla.load(folder)"
        )
    handles = FAMILIES[family](policy)

    def close() -> None:
        for handle in handles:
            handle.remove()

    return close


def _hook_act(policy: Any) -> list[Any]:
    model, config = policy.model, policy.config
    handles = []
    for site, attention in act_sites(policy).items():
        handles.append(attention.register_forward_pre_hook(_attention_hook(site), with_kwargs=True))

    def saw(module: nn.Module, args: Any, out: Any) -> None:
        if (call := recorder.current()) is not None:
            seen = sum(name.startswith("backbone.") for name in call.hidden)
            recorder.keep(f"backbone.{list(config.image_features)[seen]}", out["feature_map"])

    def ended(module: nn.Module, args: Any, out: Any) -> None:
        if (call := recorder.current()) is not None:
            describe_act(call, _act_segments(call, config), config.chunk_size)
            describe_vae(call, config.chunk_size, has_state=bool(config.robot_state_feature))

    if config.image_features:
        handles.append(model.backbone.register_forward_hook(saw))
    for stack in ("vae_encoder", "encoder", "decoder"):
        if (module := getattr(model, stack, None)) is not None:
            handles.append(module.register_forward_pre_hook(_enter_stack(stack)))
            handles.append(module.register_forward_hook(_keep_stack(stack)))
    return [*handles, model.register_forward_hook(ended)]


FAMILIES: dict[str, Callable[[Any], list[Any]]] = {"act": _hook_act}


def act_sites(policy: Any) -> dict[str, nn.MultiheadAttention]:
    """The attentions of LeRobot's ACT, by site; "_orig_mod" is what `torch.compile` puts into names."""
    found = {
        name.replace("_orig_mod.", ""): module
        for name, module in policy.model.named_modules()
        if isinstance(module, nn.MultiheadAttention)
    }
    return {
        next(re.sub(p, site, name) for p, site in ACT_SITES if re.match(p, name)): module
        for name, module in found.items()
    }


def _enter_stack(stack: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    def hook(module: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        tokens = recorder.enter(stack, rearrange(args[0], "token batch width -> batch token width"))
        return (rearrange(tokens, "batch token width -> token batch width"), *args[1:])

    return hook


def _keep_stack(stack: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        recorder.keep(stack, rearrange(out, "token batch width -> batch token width"))

    return hook


def _attention_hook(site: str) -> Callable[[nn.MultiheadAttention, tuple[Tensor, ...], dict[str, Any]], None]:
    """Before torch's attention runs, tell the trace its queries and keys. LeRobot's inputs are (L, B, D), its
    padding mask is True where a key is padding.
    """

    def hook(module: nn.MultiheadAttention, args: tuple[Tensor, ...], options: dict[str, Any]) -> None:
        if (call := recorder.current()) is None:
            return
        given = dict(zip(("query", "key", "value", "key_padding_mask"), args, strict=False)) | options
        weights, biases = module.in_proj_weight.chunk(3), module.in_proj_bias.chunk(3)
        query, key = (
            rearrange(
                F.linear(given[name], weights[i], biases[i]),
                "token batch (heads width) -> batch heads token width",
                heads=module.num_heads,
            )
            for i, name in enumerate(("query", "key"))
        )
        is_pad = given.get("key_padding_mask")
        call.record_attention(site, query, key, None if is_pad is None else ~is_pad[:, None])

    return hook


def _act_segments(call: recorder.Call, config: Any) -> list[Segment]:
    """What the encoder's tokens are: the same list as minivla's ACT makes."""
    segments = [Segment("latent", "latent", 1)]
    segments += [
        Segment(name, "state", 1) for key, (name, _) in STATES.items() if key in config.input_features
    ]
    for key, camera in camera_names(config.image_features).items():
        rows, columns = call.hidden[f"backbone.{key}"].shape[-2:]
        segments.append(Segment(camera, "image", rows * columns, grid=(rows, columns), image=key))
    return arrange(segments)
