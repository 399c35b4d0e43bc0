"""Small π0 and π0.5 with random weights, and a tokenizer of words."""

from __future__ import annotations

from typing import Any

import torch

from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.pi import PI0, PI05, PI0Config, PI05Config

VISION = {"width": 32, "layers": 2, "heads": 4, "mlp": 48, "patch": 16}
LANGUAGE = {"width": 48, "layers": 3, "mlp": 64, "heads": 4, "kv_heads": 1, "head_dim": 8}
EXPERT = LANGUAGE | {"width": 32, "mlp": 48}
POLICIES: dict[str, tuple[type[PI0], type[PI0Config]]] = {"pi0": (PI0, PI0Config), "pi05": (PI05, PI05Config)}


class WordTokenizer:
    """Words, numbers and line ends as tokens, as SentencePiece writes them; ids are made as words come."""

    pad_token_id, eos_token_id, bos_token_id, unk_token_id = range(4)

    def __init__(self) -> None:
        self.words = ["<pad>", "<eos>", "<bos>", "<unk>"]

    def __len__(self) -> int:
        return len(self.words)

    def __call__(self, texts: list[str], *, max_length: int, **options: Any) -> dict[str, torch.Tensor]:
        begin = [2] if options.get("add_special_tokens", True) else []
        rows = [[*begin, *map(self.number, self.split(text))][:max_length] for text in texts]
        size = max_length if options.get("padding") == "max_length" else max(map(len, rows))
        ids = torch.tensor([row + [0] * (size - len(row)) for row in rows])
        return {"input_ids": ids, "attention_mask": (ids != 0).long()}

    @staticmethod
    def split(text: str) -> list[str]:
        return [
            w
            for line in text.splitlines(keepends=True)
            for w in (*(f"▁{w}" for w in line.split()), *"\n" * line.endswith("\n"))
        ]

    def number(self, word: str) -> int:
        if word not in self.words:
            self.words.append(word)
        return self.words.index(word)

    def convert_ids_to_tokens(self, number: int) -> str:
        return self.words[number]


def features(state: int = 5, action: int = 4, size: int = 64) -> dict[str, Any]:
    """Two cameras, a state and an action."""
    cameras = {
        f"observation.images.{name}": PolicyFeature(FeatureType.VISUAL, (3, size, size))
        for name in ("table", "wrist")
    }
    return {
        "input_features": {**cameras, "observation.state": PolicyFeature(FeatureType.STATE, (state,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (action,))},
    }


def redrawn(policy: torch.nn.Module, seed: int = 0) -> Any:
    """Random weights everywhere, also where training starts from zero: norms differ, gates are open."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in policy.parameters():
            fan = parameter.shape[-1] if parameter.ndim > 1 else 25
            parameter.copy_(torch.randn(parameter.shape, generator=generator) * fan**-0.5)
    return policy


def tiny_pi(name: str = "pi05", stats: Any = None, **settings: Any) -> Any:
    """A π0 or π0.5 of 2 × 16 patches, with the tokenizer of words where it has `stats`."""
    policy_class, config_class = POLICIES[name]
    options: dict[str, Any] = {
        **features(), "image_resolution": (64, 64), "chunk_size": 6, "n_action_steps": 3,
        "max_state_dim": 8, "max_action_dim": 7, "tokenizer_max_length": 24, "vision_size": VISION,
        "language_size": LANGUAGE, "expert_size": EXPERT, "vocab_size": 400, "num_inference_steps": 4,
    }  # fmt: skip
    policy = redrawn(policy_class(config_class(**options | settings), stats))
    for step in getattr(policy.preprocessor, "steps", ()):
        if hasattr(step, "tokenizer"):
            step.tokenizer = WordTokenizer()
    return policy


def statistics(state: int = 5, action: int = 4) -> dict[str, dict[str, torch.Tensor]]:
    """Of a made-up dataset."""
    kinds = {"mean": 0.1, "std": 0.5, "min": -1.2, "max": 1.4, "q01": -1.0, "q99": 1.2}
    return {
        key: {kind: torch.full((size,), value) for kind, value in kinds.items()}
        for key, size in (("observation.state", state), ("action", action))
    }


def tiny_raw(
    samples: int = 2, state: int = 5, action: int = 4, horizon: int = 6, size: int = 64
) -> dict[str, Any]:
    """A raw batch, of which each sample has another instruction."""
    generator = torch.Generator().manual_seed(1)
    tasks = ["push the red block to the left", "pick up the green cube and put it on the blue plate", "wait"]
    return {
        **{
            f"observation.images.{c}": torch.rand(samples, 3, size, size, generator=generator)
            for c in ("table", "wrist")
        },
        "observation.state": torch.randn(samples, state, generator=generator) * 0.4,
        "action": torch.randn(samples, horizon, action, generator=generator) * 0.4,
        "action_is_pad": torch.arange(horizon).expand(samples, horizon) >= horizon - 1,
        "task": [tasks[i % 3] for i in range(samples)],
    }
