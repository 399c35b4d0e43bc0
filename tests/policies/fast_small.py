"""π0-FAST at a size that computes in milliseconds, with tokenizers as small; LeRobot's at the same size."""

from __future__ import annotations

import functools
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from minivla.actions.fast import FastTokenizer
from minivla.policies.pi0_fast import PI0Fast, PI0FastConfig
from tests.parity import redraw, their_features
from tests.policies.pi_small import (
    EVERYTHING,
    SETTINGS,
    SIDE,
    VISION,
    WORDS,
    Case,
    at_tiny_size,
    features,
    make_batch,
)

HORIZON, ACTION, SKIP = SETTINGS["chunk_size"], 4, 8
FAST_OPTIONS: dict[str, Any] = SETTINGS | {
    "fast_skip_tokens": SKIP,
    "max_action_tokens": 32,
    "max_decoding_steps": 12,
    "validate_action_token_prefix": False,
}


@functools.cache
def words() -> Any:
    """A Gemma tokenizer of WORDS tokens: letters, "Action", and names for the ids that are left."""
    from transformers import GemmaTokenizer

    special = ["<pad>", "<eos>", "<bos>", "<unk>", "<mask>"]
    letters = ["▁", "\n", *map(chr, range(ord("!"), ord("~") + 1))]
    pieces = ["Action"[:end] for end in range(2, 7)]
    known = [*special, *letters, *pieces]
    names = [*known, *(f"<f{i}>" for i in range(WORDS - len(known)))]
    merges = [("Action"[:end], "Action"[end]) for end in range(1, 6)]
    return GemmaTokenizer(
        vocab={name: i for i, name in enumerate(names)},
        merges=merges,
        add_bos_token=True,
        padding_side="right",
    )


def chunks(count: int, seed: int = 0) -> Tensor:
    """Smooth chunks (count, H, A), about as large as normalised ones."""
    generator = torch.Generator().manual_seed(seed)
    start, way = torch.randn(2, count, 1, ACTION, generator=generator) / 2
    noise = torch.randn(count, HORIZON, ACTION, generator=generator) / 10
    return start + way * torch.linspace(0, 1, HORIZON)[None, :, None] + noise


@functools.cache
def fast() -> FastTokenizer:
    """80 FAST tokens."""
    return FastTokenizer.fit(chunks(400), scale=3, vocab_size=80)


def tiny_config(case: Case = EVERYTHING, **settings: Any) -> PI0FastConfig:
    inputs, outputs = features(case)
    sizes = {"vision_size": VISION, "language_size": case.language, "vocab_size": WORDS}
    options: dict[str, Any] = FAST_OPTIONS | sizes | case.settings | settings
    return PI0FastConfig(input_features=inputs, output_features=outputs, **options)


def statistics() -> dict[str, dict[str, Tensor]]:
    return {
        key: {"mean": torch.full((size,), 0.1), "std": torch.full((size,), 0.5)}
        for key, size in (("observation.state", 5), ("action", ACTION))
    }


def tiny_fast(case: Case = EVERYTHING, *, stats: Any = None, **settings: Any) -> PI0Fast:
    """Ours, with every weight redrawn, and tokenizers at hand."""
    policy = PI0Fast(tiny_config(case, **settings), stats)
    redraw(policy)
    policy.use_tokenizers(text=words(), fast=fast())
    return policy


def fast_batch(policy: PI0Fast, case: Case = EVERYTHING, seed: int = 1) -> dict[str, Tensor]:
    """A normalised batch with its actions as tokens."""
    batch = make_batch(case, seed) | {"action": chunks(len(case.prompts), seed)}
    (step,) = (step for step in policy._steps() if step.registry_name == "action_tokenizer_processor")
    return step(batch)


# --- LeRobot's ---------------------------------------------------------------------------------------------


@functools.cache
def their_fast() -> Any:
    """The same FAST tokenizer in LeRobot's hands."""
    import lerobot.policies.molmoact2.molmoact2_hf_model.action_tokenizer as module

    own = fast()
    text = module.PreTrainedTokenizerFast(tokenizer_object=own.bpe, clean_up_tokenization_spaces=False)
    return module.UniversalActionProcessor(text, own.scale, own.vocab_size, own.min_token)


def their_words(name: str, **options: Any) -> Any:
    """The same tokenizer of words, as `AutoTokenizer.from_pretrained` would give it with these options."""
    from transformers import GemmaTokenizer

    own = words()
    settings = {k: v for k, v in options.items() if k.startswith("add_")} or {"add_bos_token": True}
    return GemmaTokenizer(vocab=own._vocab, merges=own._merges, padding_side="right", **settings)


def in_their_hands(module: Any) -> Any:
    """Inside, LeRobot's module finds our small tokenizers in place of those on the hub."""
    return mock.patch.multiple(
        module,
        AutoProcessor=SimpleNamespace(from_pretrained=lambda name, **_: their_fast()),
        AutoTokenizer=SimpleNamespace(from_pretrained=their_words),
    )


def _pictures_of(size: int, module: Any) -> Any:
    """Inside, its eyes are made for pictures of this size; upstream, `image_resolution` does not do so."""
    made = module.PaliGemmaForConditionalGenerationWithPiGemma

    def build(config: Any) -> Any:
        config.vision_config.image_size = size
        return made(config=config)

    return mock.patch.object(module, "PaliGemmaForConditionalGenerationWithPiGemma", build)


def make_theirs(case: Case = EVERYTHING, **settings: Any) -> Any:
    """LeRobot's policy, with every weight redrawn."""
    import lerobot.policies.pi0_fast.modeling_pi0_fast as module

    inputs, outputs = their_features(*features(case))
    options = FAST_OPTIONS | case.settings | settings
    config = module.PI0FastConfig(input_features=inputs, output_features=outputs, device="cpu", **options)
    with at_tiny_size(module, case), in_their_hands(module), _pictures_of(SIDE, module):
        policy = module.PI0FastPolicy(config)
    redraw(policy)
    return policy


def make_ours(theirs: Any, case: Case = EVERYTHING, **settings: Any) -> PI0Fast:
    """Ours with LeRobot's weights."""
    ours = PI0Fast(tiny_config(case, **settings))
    ours.use_tokenizers(text=words(), fast=fast())
    state = theirs.state_dict()
    names = {name: ours.upstream_name(name) for name in ours.state_dict()}
    ours.load_state_dict({name: state[upstream] for name, upstream in names.items()}, strict=True)
    assert set(state) == set(names.values()), "a tensor of upstream's is left over"
    return ours


GOLDEN = Path(__file__).parents[1] / "golden" / "pi"
