"""LeRobot's own policies, looked into through the same window: hooks record what its attention computes.

    with minivla.trace(lerobot_policy) as t:
        lerobot_policy.select_action(batch)

The sites, segments and hidden states have the names that minivla's policy of the same family gives them.
Upstream: LeRobot 0.6 `policies/{act,diffusion,vqbet}/modeling_*.py` and `policies/vqbet/vqbet_utils.py`.
π0's and π0.5's hooks are in `upstream_pi.py`. Nothing of LeRobot is imported here.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from types import SimpleNamespace
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.actions.diffusion import PREDICTIONS
from minivla.nn.image_vector import ImageVector
from minivla.nn.masks import segment_mask
from minivla.policies.act import STATES, describe_act, describe_vae
from minivla.policies.vqbet import segments_of as vqbet_segments
from minivla.segments import Segment, arrange, camera_names
from minivla.upstream_pi import hook_pi, pi_sites

# ACT: attention modules below policy.model, and the sites they are.
ACT_SITES = (
    (r"^(vae_encoder|encoder)\.layers\.(\d+)\.self_attn$", r"\1.\2"),
    (r"^decoder\.layers\.(\d+)\.self_attn$", r"decoder.\1.self"),
    (r"^decoder\.layers\.(\d+)\.multihead_attn$", r"decoder.\1.cross"),
)

VQBET_SIZES = ("n_obs_steps", "n_action_pred_token", "image_features")  # what its sequence follows from


def is_lerobot(policy: Any) -> bool:
    """Is this one of LeRobot's policies, or a subclass of one?"""
    return any(cls.__module__.split(".")[0] == "lerobot" for cls in type(policy).__mro__)


def sites(policy: Any) -> list[str]:
    """Where one of LeRobot's policies attends."""
    family = getattr(policy, "name", "")
    if family == "act":
        return list(act_sites(policy))
    if family in ("pi0", "pi05"):
        return pi_sites(policy)
    return [f"gpt.{i}" for i in range(policy.config.gpt_n_layer)] if family == "vqbet" else []


def encoders(policy: Any) -> dict[str, ImageVector]:
    """By camera, an encoder without weights like the one that a policy of LeRobot's sees it through: it knows
    where keypoints lie (`ImageVector.pixels`). ACT has none.
    """
    c = policy.config
    if not hasattr(c, "spatial_softmax_num_keypoints"):
        return {}
    shapes = {camera: feature.shape for camera, feature in c.image_features.items()}
    options: dict[str, Any] = {
        "backbone": c.vision_backbone,
        "crop": c.crop_shape,
        "random_crop": c.crop_is_random,
    }
    options |= {"resize": getattr(c, "resize_shape", None), "keypoints": c.spatial_softmax_num_keypoints}
    separate = getattr(c, "use_separate_rgb_encoder_per_camera", False)
    with torch.device("meta"):
        groups = [{camera: shapes[camera]} for camera in shapes] if separate else [shapes] * bool(shapes)
        made = [ImageVector(group, **options) for group in groups]
    return {camera: encoder for encoder in made for camera in encoder.cameras}


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


def _hook_diffusion(policy: Any) -> list[Any]:
    model, config = policy.diffusion, policy.config
    unet = getattr(model.unet, "_orig_mod", model.unet)

    def told(module: nn.Module, args: Any, options: Mapping[str, Tensor]) -> None:
        seen = options["global_cond"]
        recorder.keep("condition", rearrange(seen, "b (t c) -> b t c", t=config.n_obs_steps))

    kept = {"mid": unet.mid_modules[-1], "denoised": unet}
    for name in ("down", "up"):
        stages = getattr(unet, f"{name}_modules")
        kept |= {f"{name}.{i}": stage[1] for i, stage in enumerate(stages)}
    handles = [module.register_forward_hook(_keep(name)) for name, module in kept.items()]
    handles.append(unet.register_forward_pre_hook(told, with_kwargs=True))
    if config.image_features:
        several = config.use_separate_rgb_encoder_per_camera
        handles += _hook_cameras(model.rgb_encoder if several else [model.rgb_encoder], config)
    return [*handles, _WatchedSteps(model.noise_scheduler, PREDICTIONS[config.prediction_type])]


class _WatchedSteps:
    """What stands in the place of a noise scheduler's `step`, so that a trace sees the sampler's path."""

    def __init__(self, scheduler: Any, quantity: str) -> None:
        self.scheduler, self.quantity, self.own = scheduler, quantity, scheduler.step
        scheduler.step = self

    def __call__(self, predicted: Tensor, timestep: Any, x: Tensor, **options: Any) -> Any:
        result = self.own(predicted, timestep, x, **options)
        if (call := recorder.current()) is not None:
            start = recorder.Flow(torch.tensor([-1]), x[None], predicted[None][:0], self.quantity)
            flow = call.flow or start
            times = torch.cat((flow.times[:-1], torch.tensor([int(timestep), -1])))  # -1 is the result's
            path = torch.cat((flow.x, result.prev_sample[None])).detach()
            seen = torch.cat((flow.v, predicted[None])).detach()
            call.flow = recorder.Flow(times, path, seen, self.quantity)
            recorder.keep("horizon", result.prev_sample)
        return result

    def remove(self) -> None:
        """Leave the scheduler as it was found."""
        del self.scheduler.step


def _hook_vqbet(policy: Any) -> list[Any]:
    model, config = policy.vqbet, policy.config
    gpt, steps = model.policy, config.n_obs_steps

    def starts(module: nn.Module, args: Any) -> None:
        if (call := recorder.current()) is not None:
            told: Any = SimpleNamespace(
                vocabulary=(), **{name: getattr(config, name) for name in VQBET_SIZES}
            )
            segments = arrange(vqbet_segments(told))
            call.lay_out("gpt.*", segments, segments)
            call.describe(segments, segment_mask(segments)[0], stacks=("gpt",))

    def said(module: nn.Module, args: Any, out: dict[str, Tensor]) -> None:
        size = len(args[0])
        chunks = out["predicted_action"].unflatten(-1, (config.action_chunk_size, -1))
        decoded = out["decoded_action"].unflatten(0, (size, -1))
        recorder.keep("codes", out["sampled_centers"].unflatten(0, (size, -1)))
        recorder.keep("logits", out["cbet_logits"].unflatten(0, (size, -1)))
        recorder.keep("decoded", decoded)
        recorder.keep("offsets", chunks - decoded)

    def saw(module: nn.Module, args: Any, out: Tensor) -> None:
        recorder.keep("image_features", rearrange(out, "(b t) d -> b t d", t=steps))

    handles = _hook_cameras([model.rgb_encoder], config)
    for i, block in enumerate(gpt.transformer.h):
        handles.append(block.attn.register_forward_pre_hook(_fused_hook(f"gpt.{i}")))
    first, last = gpt.transformer.h[0], gpt.transformer.ln_f
    handles += [
        first.register_forward_pre_hook(_enter_batched("gpt")),
        last.register_forward_hook(_keep("gpt")),
    ]
    handles += [gpt.register_forward_pre_hook(starts), model.action_head.register_forward_hook(said)]
    return [*handles, model.rgb_encoder.register_forward_hook(saw)]


def _hook_cameras(seeing: Any, config: Any) -> list[Any]:
    """Keep keypoints and, since LeRobot's queues hand its model more than the call was given, the pictures.

    seeing: one encoder for all cameras, or one for each; images are stacked (batch, time, camera).
    """
    steps, cameras, handles = config.n_obs_steps, list(config.image_features), []

    def pictures(own: list[str]) -> Callable[[nn.Module, Any], None]:
        def hook(module: nn.Module, args: Any) -> None:
            if (call := recorder.current()) is not None:
                images = rearrange(args[0], "(b t n) c y x -> n b t c y x", t=steps, n=len(own))
                call.batch = {**call.batch, **dict(zip(own, images, strict=True))}

        return hook

    def points(own: list[str]) -> Callable[[nn.Module, Any, Tensor], None]:
        def hook(module: nn.Module, args: Any, out: Tensor) -> None:
            found = rearrange(out, "(b t n) k xy -> n b t k xy", t=steps, n=len(own))
            for camera, kept in zip(own, found, strict=True):
                recorder.keep(f"keypoints.{camera}", kept)

        return hook

    for i, encoder in enumerate(seeing):
        own = cameras if len(seeing) == 1 else [cameras[i]]
        handles.append(encoder.register_forward_pre_hook(pictures(own)))
        handles.append(encoder.pool.register_forward_hook(points(own)))
    return handles


FAMILIES: dict[str, Callable[[Any], list[Any]]] = {
    "act": _hook_act,
    "diffusion": _hook_diffusion,
    "vqbet": _hook_vqbet,
    "pi0": hook_pi,
    "pi05": hook_pi,
}


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


def _keep(name: str) -> Callable[[nn.Module, Any, Tensor], None]:
    return lambda module, args, out: recorder.keep(name, out)


def _enter_batched(stack: str) -> Callable[[nn.Module, tuple[Tensor, ...]], tuple[Tensor, ...]]:
    return lambda module, args: (recorder.enter(stack, args[0]), *args[1:])


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


def _fused_hook(site: str) -> Callable[[Any, tuple[Tensor, ...]], None]:
    """The same for VQ-BeT's GPT, where one layer makes queries, keys and values; its mask is a buffer."""

    def hook(module: Any, args: tuple[Tensor, ...]) -> None:
        if (call := recorder.current()) is None:
            return
        query, key, _ = (
            rearrange(part, "batch token (heads width) -> batch heads token width", heads=module.gpt_n_head)
            for part in module.c_attn(args[0]).chunk(3, dim=-1)
        )
        length = args[0].shape[1]
        call.record_attention(site, query, key, module.bias[0, :, :length, :length] != 0)

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
