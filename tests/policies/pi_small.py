"""π0 and π0.5 at a size that computes in milliseconds, LeRobot's networks at the same size, and batches."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.pi import PI0, PI05, PI0Config, PI05Config
from tests.parity import redraw, their_features

FAMILIES: dict[str, tuple[type[PI0], type[PI0Config]]] = {"pi0": (PI0, PI0Config), "pi05": (PI05, PI05Config)}
VISION = {"width": 48, "layers": 2, "heads": 4, "mlp": 96, "patch": 14}
LANGUAGE = {"width": 64, "layers": 3, "mlp": 128, "heads": 8, "kv_heads": 1, "head_dim": 16}
EXPERT = LANGUAGE | {"width": 32, "mlp": 96}
WORDS = 200
SIDE = 28
SETTINGS: dict[str, Any] = {"image_resolution": (SIDE, SIDE), "chunk_size": 6, "n_action_steps": 4}
CAMERAS = ("observation.images.front", "observation.images.left", "observation.images.right")


@dataclass(frozen=True)
class Case:
    """What a batch holds: (rows, columns) of each camera's images, None where the camera is absent; how many
    tokens of each prompt are real; key/value heads; further settings.
    """

    name: str
    images: tuple[tuple[int, int] | None, ...] = ((SIDE, SIDE),) * 3
    prompts: tuple[int, ...] = (9, 9, 9)
    kv_heads: int = 1
    settings: dict[str, Any] = field(default_factory=dict, hash=False)

    @property
    def language(self) -> dict[str, int]:
        return LANGUAGE | {"kv_heads": self.kv_heads}

    @property
    def expert(self) -> dict[str, int]:
        return EXPERT | {"kv_heads": self.kv_heads}


EVERYTHING = Case("every camera, every token", prompts=(9, 5, 1))


def features(case: Case = EVERYTHING) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    inputs = {
        camera: PolicyFeature(FeatureType.VISUAL, (3, *(size or (SIDE, SIDE))))
        for camera, size in zip(CAMERAS, case.images, strict=True)
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (5,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (4,))}


def tiny_config(family: str, case: Case = EVERYTHING, **settings: Any) -> PI0Config:
    inputs, outputs = features(case)
    sizes: dict[str, Any] = {
        "vision_size": VISION,
        "language_size": case.language,
        "expert_size": case.expert,
        "vocab_size": WORDS,
    }
    options = SETTINGS | sizes | case.settings | settings
    return FAMILIES[family][1](input_features=inputs, output_features=outputs, **options)


def redraw_pi(policy: Any) -> None:
    """Every weight anew. Gemma's norms scale by 1 + weight, and an adaptive norm's Linear is no scale at all:
    `redraw` centres both on one, here they lie around zero, so that attention is not all but hard.
    """
    redraw(policy)
    for name, parameter in policy.named_parameters():
        gemma = any(part in name for part in ("language_model", "gemma_expert", "decoder."))
        if gemma and "norm" in name and name.endswith("weight"):
            parameter.data.sub_(1.0)


def tiny_pi(family: str, case: Case = EVERYTHING, **settings: Any) -> PI0:
    """Ours, with every weight redrawn."""
    policy = FAMILIES[family][0](tiny_config(family, case, **settings))
    redraw_pi(policy)
    return policy


def make_batch(case: Case = EVERYTHING, seed: int = 1) -> dict[str, Tensor]:
    """A normalised batch, one sample for each prompt."""
    generator = torch.Generator().manual_seed(seed)
    size, longest = len(case.prompts), max(case.prompts)
    batch = {
        camera: torch.rand(size, 3, *shape, generator=generator)
        for camera, shape in zip(CAMERAS, case.images, strict=True)
        if shape is not None
    }
    batch["observation.state"] = torch.randn(size, 5, generator=generator)
    batch["action"] = torch.randn(size, SETTINGS["chunk_size"], 4, generator=generator)
    ids = torch.randint(0, WORDS, (size, longest), generator=generator)
    valid = torch.arange(longest)[None] < torch.tensor(case.prompts)[:, None]
    return batch | {"observation.language.tokens": ids, "observation.language.attention_mask": valid}


def observation(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "action"}


def draws(case: Case = EVERYTHING) -> tuple[Tensor, Tensor]:
    """Noise (B, H, 32) and times (B,) for a batch."""
    size = len(case.prompts)
    noise = torch.randn(size, SETTINGS["chunk_size"], 32, generator=torch.Generator().manual_seed(2))
    return noise, torch.tensor([0.9, 0.3, 0.05])[:size]


# --- LeRobot's ---------------------------------------------------------------------------------------------


def their_module(family: str) -> Any:
    if family == "pi0":
        import lerobot.policies.pi0.modeling_pi0 as module
    else:
        import lerobot.policies.pi05.modeling_pi05 as module
    return module


@contextmanager
def at_size(
    module: Any, vision: dict[str, int], language: dict[str, int], expert: dict[str, int], words: int
) -> Iterator[None]:
    """Inside, LeRobot builds its networks in our sizes, where it has none of its own to set."""
    made, mapping = module.PaliGemmaForConditionalGenerationWithPiGemma, module.CONFIG_MAPPING
    order = ("width", "layers", "mlp", "heads", "kv_heads", "head_dim")

    def shape(variant: str) -> Any:
        sizes = language if variant == "gemma_2b" else expert
        return module.GemmaConfig(*(sizes[name] for name in order))

    def paligemma(config: Any) -> Any:
        eyes = config.vision_config
        eyes.hidden_size, eyes.intermediate_size = vision["width"], vision["mlp"]
        eyes.num_hidden_layers, eyes.num_attention_heads = vision["layers"], vision["heads"]
        eyes.projection_dim = language["width"]
        config.text_config.vocab_size = config._vocab_size = words
        return made(config=config)

    class FewWords:
        def __getitem__(self, kind: str) -> Any:
            return lambda **settings: mapping[kind](**settings | ({"vocab_size": words} if settings else {}))

    with (
        mock.patch.object(module, "get_gemma_config", shape),
        mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", paligemma),
        mock.patch.object(module, "CONFIG_MAPPING", FewWords()),
    ):
        yield


def at_tiny_size(module: Any, case: Case) -> AbstractContextManager[None]:
    """`at_size` for a case."""
    return at_size(module, VISION, case.language, case.expert, WORDS)


def make_theirs(family: str, case: Case = EVERYTHING, **settings: Any) -> Any:
    """LeRobot's policy, with every weight redrawn."""
    module = their_module(family)
    config_class, policy_class = (
        (module.PI0Config, module.PI0Policy) if family == "pi0" else (module.PI05Config, module.PI05Policy)
    )
    inputs, outputs = their_features(*features(case))
    options = SETTINGS | case.settings | settings
    config = config_class(input_features=inputs, output_features=outputs, device="cpu", **options)
    with at_tiny_size(module, case):
        policy = policy_class(config)
    redraw_pi(policy)
    return policy


UNUSED = {
    "model.paligemma_with_expert.paligemma.lm_head.weight",
    "model.paligemma_with_expert.gemma_expert.lm_head.weight",
}


def make_ours(family: str, theirs: Any, case: Case = EVERYTHING, **settings: Any) -> PI0:
    """Ours with LeRobot's weights."""
    ours = FAMILIES[family][0](tiny_config(family, case, **settings))
    state = theirs.state_dict()
    names = {name: ours.upstream_name(name) for name in ours.state_dict()}
    ours.load_state_dict({name: state[upstream] for name, upstream in names.items()}, strict=True)
    assert set(state) - set(names.values()) == UNUSED, "a tensor of upstream's is left over"
    return ours
