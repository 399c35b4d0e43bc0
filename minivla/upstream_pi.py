"""LeRobot's π0 and π0.5, looked into: what its attention, its norms and its sampler compute.

LeRobot runs most parts of these networks without calling them as modules, where hooks do not reach. So a few
functions are stood in for while a trace is open: the attention of transformers' Gemma, and four methods of
the policy's network. Sites, segments and hidden states are named as by `minivla.policies.pi`.
Upstream: LeRobot 0.6 `policies/{pi0,pi05}/modeling_*.py`, `policies/pi_gemma.py`; transformers
`models/{gemma,siglip}`.
"""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from typing import Any

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.segments import Segment, arrange, camera_names

GEMMA, ATTENTION = "transformers.models.gemma.modeling_gemma", "eager_attention_forward"
PROMPT = "observation.language.tokens"


def pi_sites(policy: Any) -> list[str]:
    """Where LeRobot's π0 and π0.5 attend: in SigLIP, for each camera, and where the streams meet."""
    eyes, names = _vision(policy).encoder.layers, camera_names(policy.config.image_features).values()
    seen = [f"vision.{name}.{i}" for name in names for i in range(len(eyes))]
    return [*seen, *(f"joint.{i}" for i in range(len(_streams(policy)["prefix"].layers)))]


def pi_inert(policy: Any) -> tuple[str, ...]:
    """How the names of tensors end that change nothing: heads for words that nobody says, and of the last
    language layer all but the keys and values that the expert sees."""
    last = len(_streams(policy)["prefix"].layers) - 1
    parts = (
        "self_attn.q_proj", "self_attn.o_proj", "post_attention_layernorm",
        "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj",
    )  # fmt: skip
    layer = tuple(f"language_model.layers.{last}.{part}.weight" for part in parts)
    return (*layer, "language_model.norm.weight", "lm_head.weight")


def hook_pi(policy: Any) -> list[Any]:
    """Put eyes into a policy; call `remove` of each that is returned to take them out."""
    model, streams = policy.model, _streams(policy)
    attentions = [layer.self_attn for stream in streams.values() for layer in stream.layers]
    handles: list[Any] = [_gemma.watch(attentions), *_hook_vision(policy)]
    for name, stream in streams.items():
        handles += _hook_stream(name, stream)
    if hasattr(model, "time_mlp_out"):
        keep = lambda module, args, out: recorder.keep("condition", F.silu(out))  # noqa: E731
        handles.append(model.time_mlp_out.register_forward_hook(keep))
    size = policy.config.output_features["action"].shape[0]
    real = lambda module, args, out: recorder.keep("denoised", out[..., :size])  # noqa: E731
    handles.append(model.action_out_proj.register_forward_hook(real))
    handles.append(_StandIn(model.paligemma_with_expert, "forward", _passing(streams)))
    handles.append(_StandIn(model, "denoise_step", _step))
    handles += [_StandIn(model, method, _telling(policy, size)) for method in ("sample_actions", "forward")]
    return handles


def _streams(policy: Any) -> dict[str, Any]:
    both = policy.model.paligemma_with_expert
    return {"prefix": both.paligemma.model.language_model, "suffix": both.gemma_expert.model}


def _vision(policy: Any) -> Any:
    return policy.model.paligemma_with_expert.paligemma.model.vision_tower.vision_model


class _StandIn:
    """What stands in the place of one object's method: `around(own, *args, **options)`."""

    def __init__(self, owner: Any, method: str, around: Callable[..., Any]) -> None:
        self.owner, self.method = owner, method
        own = getattr(owner, method)
        vars(owner)[method] = lambda *args, **options: around(own, *args, **options)

    def remove(self) -> None:
        """Leave the object as it was found."""
        vars(self.owner).pop(self.method, None)


class _Gemma:
    """The attention that all of Gemma's layers in transformers share, stood in for while any is watched."""

    def __init__(self) -> None:
        self.watched: list[set[int]] = []
        self.own: Any = None

    def watch(self, attentions: list[nn.Module]) -> _Watched:
        """Tell the trace what these modules attend to."""
        gemma = sys.modules[GEMMA]
        if not self.watched:
            self.own = getattr(gemma, ATTENTION)
            setattr(gemma, ATTENTION, self)
        self.watched.append({id(module) for module in attentions})
        return _Watched(self, self.watched[-1])

    def __call__(
        self, module: Any, query: Tensor, key: Tensor, value: Tensor, mask: Any, *a: Any, **o: Any
    ) -> Any:
        call = recorder.current()
        if call is not None and any(id(module) in known for known in self.watched):
            seen = None if mask is None else mask[:, 0, :, : key.shape[-2]] == 0
            start = key.shape[-2] - query.shape[-2]
            scale = o.get("scaling", a[0] if a else None)
            call.record_attention(f"joint.{module.layer_idx}", query, key, seen, start=start, scale=scale)
        return self.own(module, query, key, value, mask, *a, **o)

    def forget(self, known: set[int]) -> None:
        """These modules are no longer watched; after the last, transformers is as it was found."""
        self.watched = [other for other in self.watched if other is not known]
        if not self.watched:
            setattr(sys.modules[GEMMA], ATTENTION, self.own)


class _Watched:
    def __init__(self, gemma: _Gemma, known: set[int]) -> None:
        self.gemma, self.known = gemma, known

    def remove(self) -> None:
        """No longer watched."""
        self.gemma.forget(self.known)


_gemma = _Gemma()


def _hook_stream(name: str, stream: Any) -> Iterator[Any]:
    """What leaves layer i is what enters the first norm of the next; and what steers adaptive norms."""
    norms = [layer.input_layernorm for layer in stream.layers] + [stream.norm]
    for i, norm in enumerate(norms[1:]):
        yield norm.register_forward_pre_hook(_keep_input(f"{name}.{i}"))
    yield stream.norm.register_forward_hook(lambda m, args, out: recorder.keep(name, out[0]))
    steered = {f"{name}.norm": stream.norm}
    for i, layer in enumerate(stream.layers):
        steered |= {f"{name}.{i}.input_norm": layer.input_layernorm}
        steered |= {f"{name}.{i}.post_norm": layer.post_attention_layernorm}
    for place, norm in steered.items():
        if getattr(norm, "dense", None) is not None:
            yield norm.dense.register_forward_hook(_steering(place))


def _keep_input(name: str) -> Callable[..., None]:
    return lambda module, args: recorder.keep(name, args[0])


def _steering(place: str) -> Callable[[nn.Module, Any, Tensor], None]:
    def hook(module: nn.Module, args: Any, out: Tensor) -> None:
        for part, value in zip(("scale", "shift", "gate"), out.chunk(3, dim=-1), strict=True):
            recorder.keep_step(f"{place}.{part}", value)

    return hook


def _hook_vision(policy: Any) -> Iterator[Any]:
    """LeRobot looks at one camera after the other, absent ones last, which are black and seen by nobody."""
    eyes, shape = _vision(policy), _image_segments(policy)

    def begins(module: nn.Module, args: Any, options: Any) -> None:
        if (call := recorder.current()) is not None:
            present = [s for s in shape if s.image in call.batch]
            seen = sum(f"vision.{s.name}" in call.hidden for s in present)
            call.pictures = present[seen : seen + 1]
            for s in call.pictures:
                call.lay_out(f"vision.{s.name}.*", arrange([s]), arrange([s]))

    def ends(module: nn.Module, args: Any, out: Any) -> None:
        if (call := recorder.current()) is not None:
            call.pictures = []

    yield eyes.register_forward_pre_hook(begins, with_kwargs=True)
    for i, layer in enumerate(eyes.encoder.layers):
        yield layer.self_attn.register_forward_pre_hook(_looks(f"vision.{i}"), with_kwargs=True)
        yield layer.register_forward_hook(_keep_picture(f"vision.{i}"))
    yield eyes.post_layernorm.register_forward_hook(_keep_picture("vision"))
    yield eyes.register_forward_hook(ends)


def _keep_picture(name: str) -> Callable[[nn.Module, Any, Any], None]:
    def hook(module: nn.Module, args: Any, out: Any) -> None:
        if (call := recorder.current()) is not None and call.pictures:
            recorder.keep(name, out[0] if isinstance(out, tuple) else out)

    return hook


def _looks(site: str) -> Callable[[Any, Any, Any], None]:
    def hook(module: Any, args: Any, options: Any) -> None:
        if (call := recorder.current()) is None or not call.pictures:
            return
        tokens = args[0] if args else options["hidden_states"]
        split = "batch token (heads width) -> batch heads token width"
        query, key = (
            rearrange(p(tokens), split, width=module.head_dim) for p in (module.q_proj, module.k_proj)
        )
        call.record_attention(site, query, key, None)

    return hook


def _image_segments(policy: Any) -> list[Segment]:
    """The cameras' patches, in the config's order."""
    grid = (policy.config.image_resolution[0] // _vision(policy).embeddings.patch_size,) * 2
    names = camera_names(policy.config.image_features)
    return [Segment(name, "image", grid[0] * grid[1], grid=grid, image=key) for key, name in names.items()]


def _passing(streams: dict[str, Any]) -> Callable[..., Any]:
    """Both streams, or one of them, go through all layers."""
    c = streams["prefix"].config
    values = 2 * c.num_hidden_layers * c.num_key_value_heads * c.head_dim

    def around(own: Any, *, inputs_embeds: list[Any], past_key_values: Any = None, **options: Any) -> Any:
        found = {n: x for n, x in zip(streams, inputs_embeds, strict=True) if x is not None}
        computed = sum(x.shape[1] for x in found.values())
        read = 0 if past_key_values is None else past_key_values.get_seq_length()
        written = computed if options.get("use_cache") else 0
        token = values * next(iter(found.values())).element_size()
        recorder.passed(recorder.Pass(tuple(found), computed, read, written, token))
        given = [
            None if x is None else recorder.enter(n, x) for n, x in zip(streams, inputs_embeds, strict=True)
        ]
        return own(inputs_embeds=given, past_key_values=past_key_values, **options)

    return around


def _step(own: Any, **given: Any) -> Tensor:
    """One step of the sampler: where it stands, when, and the velocity there."""
    velocity: Tensor = own(**given)
    if (call := recorder.current()) is not None:
        recorder.keep_step("time", given["timestep"][:1])
        call.told.setdefault(PATH, []).append(torch.stack((given["x_t"], velocity)).detach())
    return velocity


PATH = "path"


def _telling(policy: Any, size: int) -> Callable[..., Any]:
    """A chunk or a loss: at its end the sequence is described as it was masked, and the sampler's path."""

    def around(own: Any, *args: Any, **options: Any) -> Any:
        result = own(*args, **options)
        if (call := recorder.current()) is not None:
            _describe(policy, call)
            if path := call.told.pop(PATH, []):
                _draw_path(call, torch.stack(path), result, size)
        return result

    return around


def _draw_path(call: recorder.Call, path: Tensor, result: Tensor, size: int) -> None:
    """The flow of N steps: path (N, 2, B, H, max_action_dim), where it stood and the velocity."""
    x, velocity = torch.cat((path[:, 0], result.detach()[None])), path[:, 1]
    times = torch.cat((*call.told["time"], torch.zeros_like(call.told["time"][0])))
    recorder.keep("noise", x[0])
    call.flow = recorder.Flow(times, x[..., :size], velocity[..., :size])


def _describe(policy: Any, call: recorder.Call) -> None:
    """Segments in LeRobot's order, and the mask that the first layer was given."""
    ids, pictures = call.batch[PROMPT], _image_segments(policy)
    pictures.sort(key=lambda s: s.image not in call.batch)
    state = [Segment("state", "state", 1, block=1)] * hasattr(policy.model, "state_proj")
    prompt = Segment("prompt", "language", ids.shape[1])
    chunk = Segment("actions", "action", policy.config.chunk_size, block=1 + len(state))
    segments = arrange([*pictures, prompt, *state, chunk])
    recorder.spell("prompt", ids)
    call.lay_out("joint.*", segments, segments)
    mask, _ = call.whole("joint.0")
    call.describe(segments, mask[0], stacks=("prefix", "suffix"))
