"""π0 and π0.5 beside LeRobot's: a chunk, a training step, the memory of one; and what a chunk must cost.

Two sizes fit two cores in reasonable time. "Small" is near the shipped checkpoints (two 64 × 64 cameras, four
layers). "Middle" keeps the published shape of the work (three cameras of 224 × 224 pixels, 256 patches each,
the prompt's full length, 50 actions, ten steps, one key/value head) at a sixth of the depth and a quarter of
the width. LeRobot has no settings for its sizes: they are patched in while it builds
(`tests.policies.pi_small`).

What dominates is the prefix: hundreds of tokens go once through the language model, 51 go ten times through
an expert an eighth its size. Ours leaves out padding and the language stream's last attention output and MLP,
which nobody looks at, and lets a fused kernel attend where LeRobot writes out the scores.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from benchmarks import anatomy
from benchmarks.act import training_step
from benchmarks.pairs import Call, chunk_race, observation, threads
from benchmarks.timing import Row, fresh_race, race
from minivla.data.features import FeatureType, PolicyFeature
from minivla.nn.decoder import DecoderConfig
from minivla.nn.paligemma import VARIANTS
from minivla.nn.vit import ViTConfig
from minivla.policies.pi import PI0, PI0Config
from tests.parity import their_features
from tests.policies.pi_small import FAMILIES, at_size, redraw_pi, their_module

WORDS = 1_000


@dataclass(frozen=True)
class Size:
    """How large: the networks, as fields of our configs; pixels; tokens of the prompt by family."""

    name: str
    cameras: int
    pixels: int
    vision: dict[str, int]
    language: dict[str, int]
    expert: dict[str, int]
    chunk_size: int
    prompts: dict[str, int]
    real: int  # tokens of the prompt that are not padding


SMALL = Size(
    "small", 2, 112,
    {"width": 96, "layers": 3, "heads": 4, "mlp": 192, "patch": 14},
    {"width": 96, "layers": 4, "mlp": 192, "heads": 8, "kv_heads": 1, "head_dim": 16},
    {"width": 96, "layers": 4, "mlp": 192, "heads": 8, "kv_heads": 1, "head_dim": 16},
    16, {"pi0": 32, "pi05": 44}, 20,
)  # fmt: skip
MIDDLE = Size(
    "middle", 3, 224,
    {"width": 288, "layers": 5, "heads": 4, "mlp": 1076, "patch": 14},
    {"width": 512, "layers": 3, "mlp": 4096, "heads": 8, "kv_heads": 1, "head_dim": 64},
    {"width": 256, "layers": 3, "mlp": 1024, "heads": 8, "kv_heads": 1, "head_dim": 64},
    50, {"pi0": 48, "pi05": 200}, 20,
)  # fmt: skip
SIZES = {size.name: size for size in (SMALL, MIDDLE)}
SAMPLES = {"small": 8, "middle": 1}


def features(size: Size) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    """Cameras, a state of 8 numbers, actions of 7."""
    image = PolicyFeature(FeatureType.VISUAL, (3, size.pixels, size.pixels))
    inputs = {f"observation.images.camera{i}": image for i in range(size.cameras)}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (8,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (7,))}


def _settings(size: Size) -> dict[str, Any]:
    side = (size.pixels, size.pixels)
    return {"image_resolution": side, "chunk_size": size.chunk_size, "n_action_steps": size.chunk_size}


def make_ours(family: str, size: Size) -> PI0:
    """Our policy with random weights."""
    policy_class, config_class = FAMILIES[family]
    inputs, outputs = features(size)
    config: PI0Config = config_class(
        input_features=inputs, output_features=outputs, vision_size=size.vision, language_size=size.language,
        expert_size=size.expert, vocab_size=WORDS, **_settings(size),
    )  # fmt: skip
    policy = policy_class(config)
    redraw_pi(policy)
    return policy


def make_theirs(family: str, size: Size) -> Any:
    """LeRobot's, the same."""
    module = their_module(family)
    name = {"pi0": "PI0", "pi05": "PI05"}[family]
    inputs, outputs = their_features(*features(size))
    config = getattr(module, f"{name}Config")(
        input_features=inputs, output_features=outputs, device="cpu", **_settings(size)
    )
    with at_size(module, size.vision, size.language, size.expert, WORDS):
        policy = getattr(module, f"{name}Policy")(config)
    redraw_pi(policy)
    return policy


def make_pair(family: str, size: Size) -> tuple[PI0, Any]:
    """Both, on one set of tensors."""
    ours, theirs = make_ours(family, size), make_theirs(family, size)
    state = theirs.state_dict()
    shared = {name: state[ours.upstream_name(name)] for name in ours.state_dict()}
    ours.load_state_dict(shared, strict=True, assign=True)
    return ours, theirs


def make_batch(family: str, size: Size, samples: int) -> dict[str, Tensor]:
    """A random normalised batch, each prompt `real` tokens long."""
    generator, (inputs, outputs) = torch.Generator().manual_seed(0), features(size)
    batch = {key: torch.rand(samples, *f.shape, generator=generator) for key, f in inputs.items()}
    batch["action"] = torch.randn(samples, size.chunk_size, *outputs["action"].shape, generator=generator)
    length = size.prompts[family]
    ids = torch.randint(0, WORDS, (samples, length), generator=generator)
    valid = (torch.arange(length) < size.real).expand(samples, length)
    return batch | {"observation.language.tokens": ids, "observation.language.attention_mask": valid}


def chunks(family: str, size: Size, pair: tuple[PI0, Any]) -> dict[str, Call]:
    """What makes a chunk, ours and LeRobot's; they are checked to be the same chunk."""
    ours, theirs = pair
    seen = observation(make_batch(family, size, 1))
    noise = torch.randn(1, size.chunk_size, 32, generator=torch.Generator().manual_seed(0))
    calls: dict[str, Call] = {
        "minivla": lambda: ours.predict_action_chunk(seen, noise=noise),
        "LeRobot": lambda: theirs.predict_action_chunk(seen, noise=noise),
    }
    torch.testing.assert_close(*(call() for call in calls.values()), rtol=1e-3, atol=1e-3)
    return calls


def races(family: str, size: Size, *, rounds: int) -> list[Row]:
    """A chunk of ten steps, and an optimiser step, with torch's default of threads and with one."""
    what, pair = f"{family} {size.name}", make_pair(family, size)
    calls = chunks(family, size, pair)
    rows = chunk_race(f"{what}, 10 steps", *calls.values(), rounds=rounds)
    batch = make_batch(family, size, SAMPLES[size.name])
    ours, theirs = (training_step(policy, batch) for policy in pair)
    for count in (None, 1):
        with threads(count) as suffix:
            name = f"{what}: training step, batch {SAMPLES[size.name]}{suffix}"
            rows.append(race(name, ours, theirs, rounds=rounds))
    return rows


def peak(who: str, family: str, size: str) -> float:
    """Megabytes at the peak of two training steps, above those after the imports; in a process of its own."""
    import psutil

    from benchmarks.act import peak_memory

    their_module(family)
    before = psutil.Process().memory_info().rss / 1e6
    policy = (make_ours if who == "ours" else make_theirs)(family, SIZES[size])
    step = training_step(policy, make_batch(family, SIZES[size], SAMPLES[size]))
    step(), step()
    return peak_memory() - before


def memory(family: str, size: Size, *, rounds: int) -> Row:
    """The peak of a training step."""
    code = f"from benchmarks.pi import peak; print(peak('{{who}}', {family!r}, {size.name!r}))"
    ours, theirs = (code.format(who=who) for who in ("ours", "theirs"))
    name = f"{family} {size.name}: training step, batch {SAMPLES[size.name]}, peak memory"
    return fresh_race(name, "MB", ours, theirs, rounds=rounds)


def where(family: str, size: Size, rounds: int) -> str:
    """Where the time goes."""
    pair = make_pair(family, size)
    ours = pair[0]
    parts = {"SigLIP": ours.paligemma.vision, "decoder, all calls": ours.paligemma.decoder}
    batch = make_batch(family, size, SAMPLES[size.name])
    calls = chunks(family, size, pair)
    return anatomy.describe(f"{family}, {size.name}", ours, parts, calls, batch, rounds=rounds)


# --- the roofline ------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Cost:
    """Multiplications and additions of matrix products, and bytes of weights read, for one part."""

    part: str
    flops: float
    bytes: float


def _products(config: DecoderConfig, tokens: int, keys: int) -> float:
    """Of all layers."""
    c = config
    attention = 4 * tokens * keys * c.heads * c.head_dim
    return c.layers * attention + 2 * tokens * _weights(config)


def _prefix_products(config: DecoderConfig, tokens: int) -> float:
    """Of a prefix whose last layer only lends its keys and values."""
    c = config
    last = 2 * tokens * c.width * c.head_dim * 2 * c.kv_heads
    return _products(config, tokens, tokens) * (c.layers - 1) / c.layers + last


def _weights(config: DecoderConfig) -> float:
    c = config
    return c.layers * (c.width * c.head_dim * (2 * c.heads + 2 * c.kv_heads) + 3 * c.width * c.mlp)


def cost_of_chunk(
    eyes: ViTConfig,
    language: DecoderConfig,
    expert: DecoderConfig,
    *,
    cameras: int,
    prompt: int,
    horizon: int,
    steps: int,
) -> list[Cost]:
    """What a chunk of π0.5 must compute and read, in bfloat16, counted from its shapes."""
    patches = eyes.grid[0] * eyes.grid[1]
    per_layer = 4 * eyes.width**2 + 2 * eyes.width * eyes.mlp
    seeing = eyes.layers * (2 * patches * per_layer + 4 * patches**2 * eyes.width)
    prefix = cameras * patches + prompt
    # Adaptive norms are a matrix each, but of one vector: bytes, hardly FLOPs.
    modulation = (2 * expert.layers + 1) * 3 * expert.width**2
    cache = 2 * language.layers * prefix * language.kv_heads * language.head_dim
    acting = _weights(expert) + modulation + cache
    return [
        Cost("SigLIP", cameras * seeing, 2 * eyes.layers * per_layer),
        Cost("prefix", _prefix_products(language, prefix), 2 * _weights(language)),
        Cost(f"{steps} steps", steps * _products(expert, horizon, prefix + horizon), 2 * steps * acting),
    ]


PUBLISHED = (ViTConfig(), VARIANTS["gemma_2b"], VARIANTS["gemma_300m"])
# name: (dense bfloat16 FLOP/s, bytes/s), from the makers' data sheets
DEVICES = {"H200": (989e12, 4.8e12), "RTX 4090": (165e12, 1.008e12)}


def roofline() -> str:
    """The least time a chunk takes, part by part: its FLOPs or its bytes, whichever takes longer."""
    lines = [
        "**π0.5, published size, 3 cameras, bfloat16: the least a chunk can cost**, counted from its shapes",
        "",
        "| part | GFLOP | GB of weights and cache | " + " | ".join(f"{d}, ms" for d in DEVICES) + " |",
        "|---|---|---|" + "---|" * len(DEVICES),
    ]
    for prompt in (200, 20):
        total = [0.0] * len(DEVICES)
        for cost in cost_of_chunk(*PUBLISHED, cameras=3, prompt=prompt, horizon=50, steps=10):
            times = [1e3 * max(cost.flops / f, cost.bytes / b) for f, b in DEVICES.values()]
            total = [t + new for t, new in zip(total, times, strict=True)]
            told = " | ".join(f"{t:.2f}" for t in times)
            numbers = f"{cost.flops / 1e9:,.0f} | {cost.bytes / 1e9:.2f} | {told}"
            lines.append(f"| {cost.part}, prompt {prompt} | {numbers} |")
        lines.append(f"| together | – | – | {' | '.join(f'{t:.1f}' for t in total)} |")
    return "\n".join(lines)


def rows() -> list[Row]:
    """All of the rows of π0 and π0.5."""
    return [
        row
        for family in ("pi0", "pi05")
        for row in (
            *races(family, SMALL, rounds=12),
            *races(family, MIDDLE, rounds=5),
            memory(family, MIDDLE, rounds=2),
        )
    ]


def notes() -> list[str]:
    """Where the time goes; what the published size must cost."""
    return [where("pi05", MIDDLE, 3), where("pi0", SMALL, 5), roofline()]
