"""One recipe a shipped checkpoint: the world it learns in, the policy's sizes, how long it trains."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from minivla.actions.fast import FastTokenizer
from minivla.data.features import ACTION, OBS_STATE, NormalizationMode, features_of
from minivla.data.normalize import Stats
from minivla.data.stats import compute_stats
from minivla.data.steps import Tokenize
from minivla.data.text import train_tokenizer
from minivla.data.windows import window_indices
from minivla.policies.act import ACT, ACTConfig
from minivla.policies.base import Policy
from minivla.policies.diffusion import INSTRUCTION_WIDTH, DiffusionConfig, DiffusionPolicy
from minivla.policies.pi import PI0, PI05, PI0Config, PI05Config
from minivla.policies.pi0_fast import PI0Fast, PI0FastConfig
from minivla.policies.vla import StatePrompt, look, prompt
from minivla.policies.vqbet import VQBeT, VQBeTConfig
from minivla.training.latency import STRATEGIES
from minivla.world import VOCABULARY, spec
from minivla.zoo.grounding import random_scenes, teach_to_point, teach_to_see


@dataclass(frozen=True)
class Recipe:
    """What it takes to train a shipped checkpoint.

    tasks, episodes, data_seed  the demonstrations; `noise` as in `minivla.world.demonstrations`
    make                        builds the policy from the demonstrations (and from the policy `start` names)
    before                      teaches a fresh policy, in place, before it sees an action
    training                    options of `minivla.train`
    whole                       options of a second training, of all that the first one left frozen too
    corrected, again            rounds of corrections: how many episodes of which task it then begins and the
                                expert ends (`minivla.world.corrections`); and options of the training that
                                follows each round, with all of those so far
    start                       the checkpoint whose eyes and words it begins with, if any
    aim, missed                 the success rate it is meant to reach on each task; tasks where it does not
    differs                     in what the run that shipped was not this recipe
    experiments                 other ways of running the checkpoint (`minivla.zoo.measuring.experiment`)
    """

    name: str
    make: Callable[..., Policy]
    tasks: tuple[str, ...] = ("pick_place",)
    episodes: int = 800
    data_seed: int = 0
    noise: float = 0.15
    before: Callable[[Any, Any], None] | None = None
    training: Mapping[str, Any] = field(default_factory=dict)
    whole: Mapping[str, Any] = field(default_factory=dict)
    corrected: tuple[Mapping[str, int], ...] = ()
    again: Mapping[str, Any] = field(default_factory=dict)
    start: str = ""
    aim: float = 0.95
    missed: tuple[str, ...] = ()
    differs: str = ""
    experiments: tuple[Mapping[str, Any], ...] = ()


def _act(dataset: Any) -> Policy:
    """A small ACT that reads the instruction: 0.4 M parameters, 64 × 64 pixels from two cameras."""
    inputs, outputs = features_of(dataset)
    config = ACTConfig(
        input_features=inputs,
        output_features=outputs,
        chunk_size=16,
        n_action_steps=8,
        compact_vision=True,
        vocabulary=VOCABULARY,
        pretrained_backbone_weights=None,
        dim_model=96,
        n_heads=4,
        dim_feedforward=192,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=8,
        dropout=0.0,
        optimizer_lr=1e-3,
        optimizer_lr_backbone=1e-3,
    )
    return ACT(config, stats=dataset.stats)


def _diffusion(dataset: Any) -> Policy:
    """A small Diffusion Policy that reads the instruction: 1.7 M parameters, two observations, 16 actions."""
    inputs, outputs = features_of(dataset)
    config = DiffusionConfig(
        input_features=inputs,
        output_features=outputs,
        n_obs_steps=2,
        horizon=16,
        n_action_steps=4,  # training does not know it: how often one looks again is decided when acting
        drop_n_last_frames=0,  # what is seen near the end is seen when acting too
        compact_vision=True,
        vocabulary=VOCABULARY,
        pretrained_backbone_weights=None,
        down_dims=(64, 128),
        diffusion_step_embed_dim=64,
        noise_scheduler_type="DDIM",
        num_inference_steps=10,
        optimizer_lr=1e-3,
    )
    return DiffusionPolicy(config, stats=dataset.stats)


def _vqbet(dataset: Any, seeing: Any) -> Policy:
    """A small VQ-BeT that reads the instruction: two observations, chunks of 5, two levels of 16 codes.

    As upstream's, it looks through one camera, and does not learn to see from nothing: there a ResNet comes
    from ImageNet, here the encoders of picture and instruction from `seeing`, a Diffusion Policy. All of it
    is trained.
    """
    inputs, outputs = features_of(dataset)
    (camera,) = seeing.encoders[0].cameras
    config = VQBeTConfig(
        input_features={key: feature for key, feature in inputs.items() if key in (camera, OBS_STATE)},
        output_features=outputs,
        normalization_mapping=seeing.config.normalization_mapping,
        n_obs_steps=2,
        crop_shape=None,
        compact_vision=True,
        vocabulary=VOCABULARY,
        pretrained_backbone_weights=None,
        n_vqvae_training_steps=3_000,
        vqvae_embedding_dim=64,
        gpt_input_dim=INSTRUCTION_WIDTH,
        gpt_hidden_dim=128,
        gpt_output_dim=128,
        gpt_n_layer=4,
        gpt_n_head=4,
        gpt_block_size=16,
        dropout=0.0,
        sequentially_select=True,
        teach_codes=True,
        offset_loss_weight=10.0,
        optimizer_lr=1e-3,
    )
    policy = VQBeT(config, stats=dataset.stats)
    policy.rgb_encoder.load_state_dict(seeing.encoders[0].state_dict())
    policy.instruction.load_state_dict(seeing.instruction.state_dict())
    return policy


def _pi0(dataset: Any) -> Policy:
    """A small π0: 1.0 M parameters, two streams of four layers, chunks of 16 actions.

    What it looks at once serves four draws of noise.
    """
    tokenizer = train_tokenizer([*dataset.tasks, PROMPT])
    config = PI0Config(**_small(dataset, tokenizer), **_expert(), tokenizer_max_length=32)
    policy = PI0(config, stats=dataset.stats)
    return _with_tokenizer(policy, tokenizer)


def _pi05(dataset: Any, grounded: Any) -> Policy:
    """A small π0.5 on π0's PaliGemma: 1.2 M parameters, for steering a norm takes a matrix;
    its prompt is longer, for the state stands in it.
    """
    tokenizer = train_tokenizer([*dataset.tasks, PROMPT])
    config = PI05Config(**_small(dataset, tokenizer), **_expert(), tokenizer_max_length=44)
    policy = _with_tokenizer(PI05(config, stats=_whole_stats(dataset)), tokenizer)
    _lend(grounded, policy)
    return policy


@torch.no_grad()
def _lend(grounded: Any, policy: Any) -> None:
    """Give a policy another one's PaliGemma; words that only it has keep their rows."""
    known = {k: v for k, v in grounded.paligemma.state_dict().items() if ".suffix." not in k}
    words = known.pop("embedding.weight")
    missing, unexpected = policy.paligemma.load_state_dict(known, strict=False)
    if unexpected or (lacking := [k for k in missing if k != "embedding.weight" and ".suffix." not in k]):
        raise ValueError(f"the two PaliGemmas differ: {', '.join(unexpected or lacking)}")
    old, new = (_tokenize(each).tokenizer.get_vocab() for each in (grounded, policy))
    if moved := [word for word, row in old.items() if new.get(word) != row]:
        raise ValueError(f"the two tokenizers differ in {len(moved)} words, {moved[0]!r} among them")
    policy.paligemma.embedding.weight[: len(words)] = words


def _pi0fast(dataset: Any, grounded: Any) -> Policy:
    """A small π0-FAST on `grounded`, a π0, whose eyes, words and language model it begins with.

    LeRobot decodes as many steps as are carried out, so both are 8. Actions lie in [-1, 1] as they are.
    """
    fast = FastTokenizer.fit(_chunks(dataset, 8), scale=5, vocab_size=512)
    tokenizer = train_tokenizer([*dataset.tasks, PROMPT], reserved=fast.vocab_size)
    settings = _small(dataset, tokenizer) | {"chunk_size": 8, "n_action_steps": 8}
    config = PI0FastConfig(
        **settings,
        tokenizer_max_length=44,
        max_action_tokens=40,
        max_decoding_steps=40,
        fast_skip_tokens=0,
        validate_action_token_prefix=False,
        normalization_mapping={
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.QUANTILES,
            "ACTION": NormalizationMode.IDENTITY,
        },
    )
    policy = PI0Fast(config, stats=_whole_stats(dataset))
    policy.use_tokenizers(text=tokenizer, fast=fast)
    _lend(grounded, policy)
    policy.requires_grad_(False)  # the new words come first
    policy.lm_head.requires_grad_(True)
    policy.paligemma.embedding.requires_grad_(True)
    return policy


def _chunks(dataset: Any, horizon: int) -> Tensor:
    """The actions (N, H, A) that follow every seventh frame; an episode's last action goes on."""
    frames, starts = torch.arange(0, len(dataset), 7), torch.from_numpy(dataset.starts)
    episode = torch.from_numpy(dataset.columns["episode_index"])[frames]
    ahead, _ = window_indices(frames, starts[episode], starts[episode + 1], range(horizon))
    return torch.from_numpy(dataset.columns[ACTION])[ahead]


def _whole_stats(dataset: Any) -> Stats:
    """Statistics of all frames as one long episode, so that quantiles are those of the whole.

    LeRobot's are averages over episodes: a third of our states lie outside those, and read -1 or 255.
    """
    numbers = {key: column for key, column in dataset.columns.items() if key in (OBS_STATE, ACTION)}
    features = {key: dataset.features[key] for key in numbers}
    return {**dataset.stats, **compute_stats([numbers], features)}


def _small(dataset: Any, tokenizer: Any) -> dict[str, Any]:
    """Settings that π0, π0.5 and π0-FAST have in common on Tabletop."""
    inputs, outputs = features_of(dataset)
    return {
        "input_features": inputs,
        "output_features": outputs,
        "chunk_size": 16,
        "n_action_steps": 2,  # training does not know it; with more, blocks slip away while one does not look
        "max_state_dim": 3,
        "max_action_dim": 3,
        "image_resolution": (64, 64),
        "compact_vision": True,
        "vision_size": {"width": 96, "image_size": 64},
        "language_size": STREAM,
        "vocab_size": len(tokenizer),
        "optimizer_lr": 1e-3,
    }


def _expert() -> dict[str, Any]:
    """Settings of the action expert, of the language model's size; it learns before all the rest does."""
    return {"expert_size": STREAM, "noise_draws": 4, "train_expert_only": True}


def _with_tokenizer(policy: Policy, tokenizer: Any) -> Policy:
    _tokenize(policy).tokenizer = tokenizer
    return policy


def _tokenize(policy: Policy) -> Tokenize:
    """The step that makes tokens of the prompt."""
    assert policy.preprocessor is not None
    (step,) = (step for step in policy.preprocessor.steps if isinstance(step, Tokenize))
    return step


def _ground(policy: Any, dataset: Any) -> None:
    """What PaliGemma brings along: eyes learn what is where and what it is called, then eyes and language
    model what a sentence speaks of; at last also where a state stands beside it, for π0.5 and π0-FAST."""
    scenes, tokenizer = random_scenes(8_000, seed=7), _tokenize(policy).tokenizer
    colours = [tokenizer.encode(f" {colour}")[-1] for colour in spec.COLOURS]
    teach_to_see(policy.paligemma, colours, scenes, steps=2_000)
    stated, turn = _pi05(dataset, policy), itertools.cycle((0, 1))

    def plain(raw: Any) -> Any:
        return policy.embed_prefix(policy.preprocess(raw))

    def either(raw: Any) -> Any:
        read = prompt((stated if next(turn) else policy).preprocess(raw))
        return policy.paligemma.embed_prefix(look(policy.config, raw), *read)

    teach_to_point(policy.paligemma, plain, scenes, steps=4_000)
    more = random_scenes(12_000, seed=8)
    teach_to_point(policy.paligemma, either, more, steps=4_000, batch_size=16)


STREAM = {"width": 96, "layers": 4, "mlp": 192, "heads": 4, "kv_heads": 1, "head_dim": 48}
PROMPT = f"Task: , State: {StatePrompt.ending}"
ALL_TASKS = ("reach", "push", "pick_place", "detour", "sort")
TWO_TASKS = ("detour", "pick_place")
SAMPLERS: tuple[Mapping[str, Any], ...] = (
    *({"noise_scheduler_type": "DDPM", "num_inference_steps": steps} for steps in (100, 25, 10)),
    *({"noise_scheduler_type": "DDIM", "num_inference_steps": steps} for steps in (25, 10, 5, 2, 1)),
)
LOOKING_AGAIN: tuple[Mapping[str, Any], ...] = tuple(
    {"n_action_steps": steps} for steps in (1, 2, 4, 8, 12, 15)
)
COMMON = {"warmup_steps": 200, "ema": 0.999, "grad_clip": 1.0}
LEARNING = {"steps": 4_000, "batch_size": 32, "schedule": "constant", **COMMON}
WHOLE = {"steps": 5_000, "batch_size": 16, "lr": 5e-4, **COMMON}
SPELLING = COMMON | {
    "steps": 400,
    "batch_size": 16,
    "schedule": "constant",
    "warmup_steps": 50,
    "ema": 0.99,
}
SPEAKING = COMMON | {"steps": 13_000, "batch_size": 16, "lr": 7e-4, "warmup_steps": 300}
CORRECTED = {"push": 1_500, "sort": 900, "detour": 250, "pick_place": 250}
CORRECTED_AGAIN = {"push": 1_000, "sort": 1_000}
AGAIN = WHOLE | {"steps": 8_000}
SHIPPED = (
    "the first training was stopped at step 4,000 of a cosine over 8,000 and took two draws of noise, not "
    "four; the second one's cosine was over 6,000 steps until step 1,400"
)
CORRECTING = "; where it was corrected it took five steps of the flow"
STEPS: tuple[Mapping[str, Any], ...] = tuple(
    {"num_inference_steps": steps, "tasks": TWO_TASKS} for steps in (1, 2, 5, 10)
)
WAITING: tuple[Mapping[str, Any], ...] = (
    {"delay": 0, "strategy": "asynchronous", "tasks": ("detour",)},
    *(
        {"delay": delay, "strategy": strategy, "tasks": ("detour",)}
        for delay in (2, 4)
        for strategy in STRATEGIES
    ),
    *({"delay": d, "strategy": "rtc", "execution_horizon": 4, "tasks": ("detour",)} for d in (2, 4)),
)
CHOOSING: tuple[Mapping[str, Any], ...] = (
    *({"bet_softmax_temperature": temperature} for temperature in (0.1, 0.5, 1.0)),
    *({"change": change} for change in ("no offsets", "first level only")),
)

RECIPES: dict[str, Recipe] = {
    "act-tabletop": Recipe(
        name="act-tabletop",
        make=_act,
        training={"steps": 5_000, "batch_size": 32, "warmup_steps": 200, "ema": 0.999},
    ),
    "diffusion-tabletop": Recipe(
        name="diffusion-tabletop",
        make=_diffusion,
        tasks=TWO_TASKS,
        episodes=1_600,
        training={"steps": 12_000, "batch_size": 64, "warmup_steps": 500, "ema": 0.999},
        experiments=SAMPLERS + LOOKING_AGAIN,
    ),
    "vqbet-tabletop": Recipe(
        name="vqbet-tabletop",
        make=_vqbet,
        tasks=TWO_TASKS,
        episodes=1_600,
        training={"steps": 15_000, "batch_size": 64, "warmup_steps": 500, "ema": 0.999},
        start="diffusion-tabletop",
        aim=0.9,
        missed=("detour",),
        experiments=CHOOSING,
    ),
    "pi0-tabletop": Recipe(
        name="pi0-tabletop",
        make=_pi0,
        tasks=ALL_TASKS,
        episodes=4_000,
        before=_ground,
        training=LEARNING,
        whole=WHOLE,
        corrected=(CORRECTED, CORRECTED_AGAIN),
        again=AGAIN,
        aim=0.9,
        missed=("sort",),
        differs=SHIPPED + CORRECTING + ", and in the first round looked again after four actions",
        experiments=STEPS + WAITING,
    ),
    "pi05-tabletop": Recipe(
        name="pi05-tabletop",
        make=_pi05,
        tasks=ALL_TASKS,
        episodes=4_000,
        start="pi0-tabletop",
        training=LEARNING,
        whole=WHOLE,
        corrected=(CORRECTED, {"push": 1_800, "sort": 1_500}),
        again=WHOLE | {"steps": 7_000},
        aim=0.9,
        missed=("push", "sort"),
        differs=SHIPPED + CORRECTING + "; the episodes of its first round, and a thousand of `push` and of "
        "`sort` in its second, are those that pi0-tabletop began",
        experiments=STEPS,
    ),
    "pi0fast-tabletop": Recipe(
        name="pi0fast-tabletop",
        make=_pi0fast,
        tasks=ALL_TASKS,
        episodes=4_000,
        start="pi0-tabletop",
        training=SPELLING,
        whole=SPEAKING,
        corrected=(CORRECTED,),
        again=WHOLE,
        aim=0.8,
        missed=("push", "detour", "sort"),
        differs="it began with a pi0-tabletop from before that one was corrected, and the corrected episodes "
        "are those that pi0-tabletop began",
    ),
}


def recipe_of(name: str) -> Recipe:
    """A recipe by name. Raises ValueError for an unknown one."""
    if name not in RECIPES:
        raise ValueError(f"no recipe is called {name!r}; there are {', '.join(RECIPES)}")
    return RECIPES[name]
