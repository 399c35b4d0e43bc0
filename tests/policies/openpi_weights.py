"""openpi's weights under our names: its JAX parameters, flat and with '/' in their names, one by one.

JAX stores a Linear's kernel as (in, out), all layers of a stack in one tensor, attention with its heads as an
axis of their own, and the two halves of a gated MLP together. `_1` marks the second expert's.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

from einops import rearrange
from torch import Tensor

Named = Iterator[tuple[str, Tensor]]
STREAMS = {"": "prefix", "_1": "suffix"}


def from_openpi(params: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """All of π0's or π0.5's parameters ("PaliGemma/img/…", "PaliGemma/llm/…", "action_in_proj/kernel", …)."""
    out = dict(siglip(_below(params, "PaliGemma/img/"), "paligemma.vision.", "paligemma.projector."))
    language = _below(params, "PaliGemma/llm/")
    out["paligemma.embedding.weight"] = language["embedder/input_embedding"]
    out |= gemma(language, "paligemma.decoder.")
    heads = {name.split("/")[0] for name in params if not name.startswith("PaliGemma/")}
    for head in sorted(heads):
        out |= dict(_linear(params, head, head))
    return out


def siglip(params: Mapping[str, Tensor], vision: str = "vision.", head: str = "projector.") -> Named:
    """The image encoder ("embedding", "pos_embedding", "Transformer/…", "head")."""
    yield (
        f"{vision}patch_embedding.weight",
        rearrange(params["embedding/kernel"], "y x given out -> out given y x"),
    )
    yield f"{vision}patch_embedding.bias", params["embedding/bias"]
    yield f"{vision}position_embedding.weight", params["pos_embedding"][0]
    yield from _norm(params, "Transformer/encoder_norm", f"{vision}norm")
    block = "Transformer/encoderblock/"
    for i in range(len(params[f"{block}LayerNorm_0/scale"])):
        one = {name: value[i] for name, value in _below(params, block).items()}
        yield from _siglip_layer(one, f"{vision}layers.{i}.")
    yield from _linear(params, "head", head.removesuffix("."))


def _siglip_layer(params: Mapping[str, Tensor], ours: str) -> Named:
    for j in (0, 1):
        yield from _norm(params, f"LayerNorm_{j}", f"{ours}norm{j + 1}")
        yield from _linear(params, f"MlpBlock_0/Dense_{j}", f"{ours}fc{j + 1}")
    attention = "MultiHeadDotProductAttention_0"
    for theirs, name in (("query", "q_proj"), ("key", "k_proj"), ("value", "v_proj")):
        kernel = params[f"{attention}/{theirs}/kernel"]
        yield f"{ours}{name}.weight", rearrange(kernel, "given heads width -> (heads width) given")
        yield f"{ours}{name}.bias", params[f"{attention}/{theirs}/bias"].flatten()
    kernel = params[f"{attention}/out/kernel"]
    yield f"{ours}o_proj.weight", rearrange(kernel, "heads width out -> out (heads width)")
    yield f"{ours}o_proj.bias", params[f"{attention}/out/bias"]


def gemma(params: Mapping[str, Tensor], ours: str = "") -> dict[str, Tensor]:
    """The streams of the decoder that are there ("layers/…", "final_norm", and the same with `_1`)."""
    out: dict[str, Tensor] = {}
    for mark, stream in STREAMS.items():
        if f"layers/attn/q_einsum{mark}/w" in params:
            out |= dict(_gemma_stream(params, mark, f"{ours}streams.{stream}."))
    return out


def _gemma_stream(params: Mapping[str, Tensor], mark: str, ours: str) -> Named:
    yield from _rms_norm(params, f"final_norm{mark}", f"{ours}norm")
    for i in range(len(params[f"layers/attn/q_einsum{mark}/w"])):
        layer = {name: value[i] for name, value in _below(params, "layers/").items()}
        name = f"{ours}layers.{i}."
        yield from _rms_norm(layer, f"pre_attention_norm{mark}", f"{name}input_norm")
        yield from _rms_norm(layer, f"pre_ffw_norm{mark}", f"{name}post_norm")
        flat = "heads given width -> (heads width) given"
        yield f"{name}q_proj.weight", rearrange(layer[f"attn/q_einsum{mark}/w"], flat)
        for j, which in enumerate(("k_proj", "v_proj")):
            yield f"{name}{which}.weight", rearrange(layer[f"attn/kv_einsum{mark}/w"][j], flat)
        out = layer[f"attn/attn_vec_einsum{mark}/w"]
        yield f"{name}o_proj.weight", rearrange(out, "heads width out -> out (heads width)")
        for j, which in enumerate(("gate_proj", "up_proj")):
            yield f"{name}{which}.weight", layer[f"mlp{mark}/gating_einsum"][j].T
        yield f"{name}down_proj.weight", layer[f"mlp{mark}/linear"].T


def _below(params: Mapping[str, Tensor], folder: str) -> dict[str, Tensor]:
    return {name.removeprefix(folder): value for name, value in params.items() if name.startswith(folder)}


def _linear(params: Mapping[str, Tensor], theirs: str, ours: str) -> Named:
    yield f"{ours}.weight", params[f"{theirs}/kernel"].T
    yield f"{ours}.bias", params[f"{theirs}/bias"]


def _norm(params: Mapping[str, Tensor], theirs: str, ours: str) -> Named:
    yield f"{ours}.weight", params[f"{theirs}/scale"]
    yield f"{ours}.bias", params[f"{theirs}/bias"]


def _rms_norm(params: Mapping[str, Tensor], theirs: str, ours: str) -> Named:
    """A plain norm's scale, or an adaptive norm's Linear."""
    if f"{theirs}/scale" in params:
        yield f"{ours}.weight", params[f"{theirs}/scale"]
    else:
        yield from _linear(params, f"{theirs}/Dense_0", f"{ours}.dense")
