"""π0 and π0.5 are openpi's, the authors' JAX code: stored vectors, whose tolerances stand beside each number.

`tests/golden/pi` holds what openpi computed in small sizes from random weights, and those weights. Tolerances
are absolute: two libraries, two orders of summation, and a code of time that multiplies rounding by 1571.
"""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from einops import rearrange
from safetensors.torch import load_file
from torch import Tensor, nn

import minivla
from minivla.data.features import FeatureType, NormalizationMode, PolicyFeature
from minivla.data.normalize import normalize, unnormalize
from minivla.data.processors import make_pipelines
from minivla.data.steps import Tokenize
from minivla.nn.decoder import Cache, DecoderConfig, rotate, rotation, valid_positions
from minivla.nn.images import resize_with_pad
from minivla.nn.masks import segment_mask
from minivla.nn.paligemma import PaliGemma
from minivla.nn.positions import sine_time
from minivla.nn.vit import ViT, ViTConfig
from minivla.policies.pi import PI0
from minivla.policies.vla import state_bins
from minivla.segments import Segment, arrange
from tests.policies.openpi_weights import from_openpi, gemma, siglip
from tests.policies.pi_small import EXPERT, FAMILIES, LANGUAGE, VISION

GOLDEN = Path(__file__).parent.parent / "golden" / "pi"
PARTS = 1.5e-5  # SigLIP and the mixture of experts
LOSS = 2e-4  # velocities and the loss
SAMPLE = 1e-4  # ten steps, the time's code in float32
EYES = ViTConfig(**VISION, image_size=28)


def golden(name: str) -> dict[str, Tensor]:
    return load_file(GOLDEN / f"{name}.safetensors")


def weights(stored: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name.removeprefix("params/"): x for name, x in stored.items() if name.startswith("params/")}


def same(ours: Tensor, theirs: Tensor, tolerance: float) -> None:
    torch.testing.assert_close(ours, theirs, atol=tolerance, rtol=0)


def channels_first(image: Tensor) -> Tensor:
    return rearrange(image, "batch y x color -> batch color y x")


def cached(layers: list[Tensor]) -> Tensor:
    """Keys or values of all layers, (B, heads, L, d), as openpi stacks them: (layers, B, L, heads, d)."""
    return rearrange(torch.stack(layers), "layer batch heads token d -> layer batch token heads d")


# --- blocks ------------------------------------------------------------------------------------------------


def test_siglip_block_by_block():
    stored = golden("siglip")
    named = dict(siglip(weights(stored), "", "head."))
    eyes, head = ViT(EYES), nn.Linear(VISION["width"], LANGUAGE["width"])
    head.load_state_dict({n.removeprefix("head."): x for n, x in named.items() if n.startswith("head.")})
    eyes.load_state_dict({name: x for name, x in named.items() if not name.startswith("head.")})
    seen: dict[str, Tensor] = {}
    eyes.patch_embedding.register_forward_hook(lambda _, inputs, out: seen.update(stem=out))
    eyes.layers[0].register_forward_pre_hook(lambda _, inputs: seen.update(with_posemb=inputs[0]))
    for i, layer in enumerate(eyes.layers):
        layer.norm2.register_forward_pre_hook(
            lambda _, inputs, i=i: seen.update({f"block{i:02}/after_attn": inputs[0]})
        )
        layer.register_forward_hook(lambda _, inputs, out, i=i: seen.update({f"block{i:02}/after_mlp": out}))
    seen["encoded"] = eyes(channels_first(stored["inputs/image"]))
    seen["tokens"] = head(seen["encoded"])
    seen["stem"] = rearrange(seen["stem"], "batch width y x -> batch y x width")
    outcomes = {name.removeprefix("outputs/"): x for name, x in stored.items() if name.startswith("outputs/")}
    assert set(outcomes) == set(seen)
    for name, value in outcomes.items():
        same(seen[name], value, PARTS)


def mixture(name: str, stored: dict[str, Tensor]) -> PaliGemma:
    size = {"heads": 6, "kv_heads": 2, "layers": 2} if name.endswith("gqa") else {}
    first, second = LANGUAGE | size, EXPERT | size
    condition = EXPERT["width"] if name.endswith("adarms") else 0
    streams = {"prefix": DecoderConfig(**first), "suffix": DecoderConfig(**second, condition=condition)}
    model = PaliGemma(EYES, streams, vocabulary=128)
    params = weights(stored)
    model.decoder.load_state_dict(gemma(params), strict=True)
    model.embedding.load_state_dict({"weight": params["embedder/input_embedding"]})
    return model


@pytest.mark.parametrize("name", ["gemma_mixture", "gemma_mixture_adarms", "gemma_mixture_gqa"])
def test_two_experts_together_the_prefix_alone_and_the_suffix_on_its_cache(name):
    stored = golden(name)
    model = mixture(name, stored)
    given = {n.removeprefix("inputs/"): x for n, x in stored.items() if n.startswith("inputs/")}
    out = {n.removeprefix("outputs/"): x for n, x in stored.items() if n.startswith("outputs/")}
    mask, positions, valid = given["attn_mask"], given["positions"].long(), given["input_mask"]
    told = {"suffix": given["expert1_cond"]} if "expert1_cond" in given else {}
    words, length = model.embed_tokens(given["token_ids"]), given["token_ids"].shape[1]
    same(words, out["expert0_embeddings"], PARTS)
    both = {"prefix": words, "suffix": given["expert1_embeddings"]}
    cache = Cache()
    joint = model.decoder(both, mask, positions, conditions=told, cache=cache)
    same(joint["prefix"][valid[:, :length]], out["expert0"][valid[:, :length]], PARTS)
    same(joint["suffix"][valid[:, length:]], out["expert1"][valid[:, length:]], PARTS)
    for ours, theirs in ((cache.keys, out["k"]), (cache.values, out["v"])):
        same(cached(ours)[:, valid], theirs[:, valid], PARTS)
    cache = Cache()
    alone = model.decoder({"prefix": words}, mask[:, :length, :length], positions[:, :length], cache=cache)
    same(alone["prefix"][valid[:, :length]], out["prefix_only/expert0"][valid[:, :length]], PARTS)
    for ours, theirs in ((cache.keys, out["prefix_only/k"]), (cache.values, out["prefix_only/v"])):
        same(cached(ours)[:, valid[:, :length]], theirs[:, valid[:, :length]], PARTS)
    later = model.decoder(
        {"suffix": given["expert1_embeddings"]}, mask[:, length:], positions[:, length:],
        conditions=told, cache=cache, keep=False,
    )  # fmt: skip
    same(later["suffix"][valid[:, length:]], out["suffix_with_cache/expert1"][valid[:, length:]], PARTS)


CASES = ("causal", "prefix_lm", "four_blocks", "pi0_layout", "pi05_layout", "fast_layout", "random")


@pytest.mark.parametrize("case", CASES)
def test_masks_and_positions(case):
    """openpi's rows of padding see nothing, ours keep their open places: rows of real tokens are equal."""
    stored = golden("masks_posemb_rope")
    valid, starts = stored[f"mask/{case}/input_mask"], stored[f"mask/{case}/mask_ar"]
    segments = arrange(Segment("token", "query", 1, block=b) for b in starts.cumsum(0).tolist())
    assert torch.equal(segment_mask(segments, valid)[valid], stored[f"mask/{case}/out"][valid])
    assert torch.equal(valid_positions(valid), stored[f"mask/{case}/positions"].long())


@pytest.mark.parametrize("case", range(3))
def test_the_code_of_time_is_openpis_in_float32_and_another_in_float64(case):
    stored = golden("masks_posemb_rope")
    code, (shortest, longest) = stored[f"posemb/{case}/out"], stored[f"posemb/{case}/min_max_period"].tolist()
    settings = {"width": code.shape[1], "shortest": round(shortest, 6), "longest": round(longest, 6)}
    narrow, wide = (
        sine_time(stored[f"posemb/{case}/pos"], **settings, dtype=dtype)
        for dtype in (torch.float32, torch.float64)
    )
    same(narrow, code, 3e-5)  # one rounding of an angle of 1571
    assert (wide - code).abs().max() > 1.5 * (narrow - code).abs().max()
    same(wide, code, 2e-4)


def test_rotary_positions():
    stored = golden("masks_posemb_rope")
    turn = rotation(stored["rope/positions"], stored["rope/x"].shape[-1], 10_000.0, torch.float32)
    ours = rotate(stored["rope/x"].transpose(1, 2), turn).transpose(1, 2)
    same(ours, stored["rope/out"], 1e-6)


# --- the policies ------------------------------------------------------------------------------------------

CAMERAS = [f"observation.images.{name}" for name in ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")]


def openpi(family: str, stored: dict[str, Tensor]) -> tuple[PI0, dict[str, Tensor]]:
    """Our policy with openpi's weights, and the batch it was given.

    There a camera may be absent from one sample and not from another: the mask of what is seen is put in.
    """
    policy_class, config_class = FAMILIES[family]
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, (3, 28, 28)) for camera in CAMERAS}
    config = config_class(
        input_features=inputs | {"observation.state": PolicyFeature(FeatureType.STATE, (8,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (8,))},
        vision_size=VISION, language_size=LANGUAGE, expert_size=EXPERT, vocab_size=128,
        image_resolution=(28, 28), chunk_size=6, n_action_steps=6, max_state_dim=8, max_action_dim=8,
        upstream="openpi",
    )  # fmt: skip
    policy = policy_class(config)
    policy.load_state_dict(from_openpi(weights(stored)), strict=True)
    images = {
        camera: rearrange(
            stored[f"inputs/image/{camera.split('.')[-1]}"], "batch y x color -> batch color y x"
        )
        for camera in CAMERAS
    }
    batch = {camera: (image + 1) / 2 for camera, image in images.items()}
    batch["observation.state"], batch["action"] = stored["inputs/state"], stored["inputs/actions"]
    batch["observation.language.tokens"] = stored["inputs/tokenized_prompt"]
    batch["observation.language.attention_mask"] = stored["inputs/tokenized_prompt_mask"]
    plain = policy.embed_prefix
    policy.embed_prefix = lambda batch: replace(plain(batch), valid=stored["loss/prefix_mask"])  # type: ignore[method-assign]
    return policy, batch


@pytest.mark.parametrize("family", FAMILIES)
def test_every_term_of_the_loss(family):
    stored = golden(family)
    policy, batch = openpi(family, stored)
    valid = stored["loss/prefix_mask"]
    noise, time = stored["inputs/noise"], stored["inputs/time"]
    with minivla.trace(policy) as t:
        loss, _ = policy.train()(batch, noise=noise, time=time)
        prefix = policy.embed_prefix(batch)
        suffix = policy.embed_suffix(policy.state(batch), stored["loss/x_t"], time)
        mask, positions = policy.lay_out(prefix, suffix)
    same(t.hidden["noisy"], stored["loss/x_t"], 1e-6)
    same(t.hidden["target"], stored["loss/u_t"], 1e-6)
    same(prefix.tokens, stored["loss/prefix_tokens"], PARTS)
    same(suffix.tokens, stored["loss/suffix_tokens"], PARTS * 2)  # the time's code is 2e-5 off
    if family == "pi05":
        same(suffix.condition, stored["loss/adarms_cond"], PARTS)
    every = F.pad(valid, (0, suffix.tokens.shape[1]), value=True)
    assert torch.equal(mask[every], stored["loss/attn_mask"][every])
    assert torch.equal(positions, stored["loss/positions"].long())
    same(t.hidden["prefix"][valid], stored["loss/prefix_out"][valid], PARTS)
    same(t.hidden["suffix"], stored["loss/suffix_out"], LOSS)
    same(t.hidden["denoised"], stored["loss/v_t"], LOSS)
    same(loss.detach(), stored["loss/loss"].mean(), LOSS)


@pytest.mark.parametrize("steps", [10, 4])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_step_of_the_sampler(family, steps):
    stored = golden(family)
    policy, batch = openpi(family, stored)
    valid, caches = stored["loss/prefix_mask"], []
    policy.paligemma.decoder.register_forward_pre_hook(
        lambda _, inputs, options: caches.append(options.get("cache")), with_kwargs=True
    )
    with minivla.trace(policy) as t:
        chunk = policy.predict_action_chunk(batch, noise=stored["sample/noise"], steps=steps)
    for ours, theirs in ((caches[0].keys, "prefix_k"), (caches[0].values, "prefix_v")):
        same(cached(ours)[:, valid], stored[f"sample/{theirs}"][:, valid], PARTS)
    path = {name.split("/")[-1]: x for name, x in stored.items() if f"/steps{steps}/" in name}
    same(t.flow.times[:-1], path["time"], 2e-7)  # openpi adds up steps of 1 / 10 in float32
    same(t.flow.v, path["v_t"], 3e-4)  # of which most is that: the code of time multiplies it by 1571
    same(t.flow.x[1:], path["x_t"], SAMPLE)
    same(chunk, path["actions"], SAMPLE)
    points = torch.cat((stored["sample/noise"][None], path["x_t"][:-1]))
    for x, time, velocity in zip(points, path["time"], path["v_t"], strict=True):
        same(velocity_at(policy, batch, x, time), velocity, 4e-5)  # at openpi's own points and times


@torch.no_grad()
def velocity_at(policy: PI0, batch: dict[str, Tensor], x: Tensor, time: Tensor) -> Tensor:
    prefix = policy.embed_prefix(batch)
    suffix = policy.embed_suffix(policy.state(batch), x, time[None])
    told = {} if suffix.condition is None else {"suffix": suffix.condition}
    tokens = {"prefix": prefix.tokens, "suffix": suffix.tokens}
    out = policy.paligemma.decoder(tokens, *policy.lay_out(prefix, suffix), conditions=told)
    return policy.velocity(out["suffix"])


# --- before the network ------------------------------------------------------------------------------------


class Characters:
    """A stand-in tokenizer, a character a token, that keeps what it was asked to encode."""

    pad_token_id = 0

    def __init__(self) -> None:
        self.asked: list[dict[str, Any]] = []

    def __call__(
        self, texts: list[str], *, add_special_tokens: bool = True, padding: Any = False, **options: Any
    ) -> dict[str, Any]:
        self.asked += [{"text": text, "bos": add_special_tokens, "eos": False} for text in texts]
        rows = [[2] * add_special_tokens + [10 + ord(letter) for letter in text] for text in texts]
        if not padding:
            return {"input_ids": rows}
        ids = torch.zeros(len(rows), options["max_length"], dtype=torch.long)
        for i, row in enumerate(rows):
            ids[i, : len(row)] = torch.tensor(row)
        return {"input_ids": ids, "attention_mask": ids != 0}


PROMPTS = json.loads((GOLDEN / "preprocessing.json").read_text())["prompt_cases"]


@pytest.mark.parametrize("family", FAMILIES)
def test_prompts_are_encoded_in_the_same_calls_character_by_character(family):
    stored = golden("preprocessing")
    config = FAMILIES[family][1](
        input_features={"observation.state": PolicyFeature(FeatureType.STATE, (4,))},
        normalization_mapping={},
        upstream="openpi",
    )
    before, _ = make_pipelines(config, None)
    (step,) = (step for step in before.steps if isinstance(step, Tokenize))
    cases = [case for case in PROMPTS if case["kind"] == family]
    assert len(cases) == 4
    for case in cases:
        step.tokenizer = Characters()
        state = stored[f"digitize/{case['state_case']}/state"]
        out = before({"task": [case["prompt"]], "observation.state": state[None]})
        assert sorted(map(str, step.tokenizer.asked)) == sorted(map(str, case["encode_calls"]))
        ids, valid = (out[f"observation.language.{name}"][0] for name in ("tokens", "attention_mask"))
        told = "".join(call["text"] for call in case["encode_calls"])
        assert ids[valid].tolist() == [2, *(10 + ord(letter) for letter in told)]
        assert valid.sum() == case["n_valid"] and len(ids) == case["length"]


def test_the_state_falls_into_the_same_bins():
    stored = golden("preprocessing")
    for case in range(4):
        assert torch.equal(
            state_bins(stored[f"digitize/{case}/state"]), stored[f"digitize/{case}/bins"].long()
        )


def test_normalised_numbers_are_openpis_but_for_its_epsilon():
    """openpi adds 1e-6 to every deviation and span, both ways; LeRobot, and we, add 1e-8 to a deviation, on
    the way in, and nothing to a span that is not 0. With openpi's put into the statistics, all are equal.
    """
    stored = {name.removeprefix("norm/"): x for name, x in golden("preprocessing").items()}
    x, epsilon = stored["x"], 1e-6
    names = ("mean", "std", "q01", "q99")
    plain = {name: stored[name] for name in names}
    theirs = plain | {"std": plain["std"] + epsilon, "q99": plain["q99"] + epsilon}
    modes = {"zscore": NormalizationMode.MEAN_STD, "quantile": NormalizationMode.QUANTILES}
    for name, mode in modes.items():
        same(normalize(x, mode, theirs, eps=0.0), stored[name], 1e-12)
        off = (normalize(x, mode, plain) - stored[name]).abs().max()
        assert 1e-9 < off < 3 * epsilon * stored[name].abs().max() / plain["std"].min()
    same(unnormalize(stored["zscore"], modes["zscore"], theirs), stored["zscore_inverse_out"], 1e-12)
    wide, out = stored["quantile_inverse_padded_in"], stored["quantile_inverse_padded_out"]
    same(unnormalize(wide[:, :4], modes["quantile"], theirs), out[:, :4], 1e-12)
    assert torch.equal(wide[:, 4:], out[:, 4:])  # padded dimensions pass through


def test_images_are_resized_as_openpis_where_they_grow():
    stored = {name: channels_first(x) for name, x in golden("preprocessing").items() if "resize" in name}
    ours = resize_with_pad((stored["resize/float_in"] + 1) / 2, 28, 28) * 2 - 1
    same(ours, stored["resize/float_out_jax_28"], 2e-6)
    ours = resize_with_pad(stored["resize/uint8_in"] / 255, 28, 28) * 255
    same(ours, stored["resize/uint8_out_pil_28"].float(), 1.0)  # PIL rounds to whole grey levels


def test_where_images_shrink_openpi_smooths_and_the_ports_do_not():
    """The very same picture with antialiasing is openpi's, JAX's and PIL's; without, as in both PyTorch ports
    and here, it is another.
    """
    stored = {name: channels_first(x) for name, x in golden("preprocessing").items() if "resize" in name}
    real, whole = stored["resize/float_in"], stored["resize/uint8_in"]
    jax, pil = stored["resize/float_out_jax_8"], stored["resize/uint8_out_pil_8"]
    smooth = [F.interpolate(x, size=(4, 8), mode="bilinear", antialias=True) for x in (real, whole)]
    same(F.pad(smooth[0], (0, 0, 2, 2), value=-1.0), jax, 1e-6)
    assert torch.equal(F.pad(smooth[1], (0, 0, 2, 2)), pil)
    assert 0.5 < (resize_with_pad((real + 1) / 2, 8, 8) * 2 - 1 - jax).abs().max() < 1.0
    assert 50 < (resize_with_pad(whole / 255, 8, 8) * 255 - pil.float()).abs().max() < 128
