"""What the policies on a PaliGemma share: sizes, cameras that may be absent, prompts, what is frozen.

π0 and π0.5 (`pi.py`) and π0-FAST (`pi0_fast.py`) look at the same pictures and read the same kind of prompt.
Upstream keeps a copy of all this in each policy: LeRobot 0.6 `policies/{pi0,pi05,pi0_fast}`.
"""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterable, Mapping
from dataclasses import dataclass, field, fields, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from minivla import recorder
from minivla.actions.flow import expect_one_of
from minivla.actions.realtime import RTCConfig
from minivla.data.features import (
    ACTION,
    OBS_IMAGES,
    OBS_LANGUAGE,
    OBS_STATE,
    FeatureType,
    MissingKey,
    PolicyFeature,
)
from minivla.data.relative import AbsoluteActions, RelativeActions
from minivla.data.steps import AddBatch, Normalize, Rename, Step, Tokenize, register
from minivla.nn.decoder import DecoderConfig
from minivla.nn.images import resize_with_pad
from minivla.nn.paligemma import VARIANTS, VOCABULARY, PaliGemma
from minivla.nn.vit import ViTConfig
from minivla.policies.base import Batch, Policy, PolicyConfig, group
from minivla.policies.vla_files import STEP_FIELDS, modern_fields

STATE_BINS = 256
UPSTREAMS = ("lerobot", "openpi")
TOKENIZER = "google/paligemma-3b-pt-224"


@dataclass
class VLAConfig(PolicyConfig):
    """LeRobot's fields that π0, π0.5 and π0-FAST have in common; defaults are upstream's.

    paligemma_variant: the language model's size
    dtype: "float32", or "bfloat16" for the decoder's matrices and the table of words
    chunk_size H, n_action_steps: actions predicted, and carried out before looking again
    max_state_dim, max_action_dim: shorter vectors are padded with zeros up to these
    image_resolution, empty_cameras: what SigLIP is shown; cameras added that are always absent
    tokenizer_max_length: places for the prompt
    use_relative_actions, relative_exclude_joints, action_feature_names: actions as differences to the state
    rtc_config: settings of real-time chunking (`minivla.actions.realtime`), or None
    gradient_checkpointing: memory for time
    compile_model, compile_mode: whether the decoder is compiled, and torch.compile's mode; padding then stays
    where it is, so that what is compiled meets one shape
    optimizer_…, scheduler_…: how upstream trains

    Only in minivla: vision_size, language_size, vocab_size replace numbers of the variant, for small worlds;
    compact_vision puts a few convolutions in SigLIP's place; `upstream` says whose side to take where LeRobot
    and openpi differ.

    Raises ValueError for an unknown variant or type, and for settings that contradict each other.
    """

    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = (
        "vision_size", "language_size", "vocab_size", "compact_vision", "upstream",
    )  # fmt: skip

    paligemma_variant: str = "gemma_2b"
    action_expert_variant: str = "gemma_300m"
    dtype: str = "float32"
    chunk_size: int = 50
    n_action_steps: int = 50
    max_state_dim: int = 32
    max_action_dim: int = 32
    use_relative_actions: bool = False
    relative_exclude_joints: tuple[str, ...] = ("gripper",)
    action_feature_names: tuple[str, ...] | None = None
    rtc_config: dict[str, Any] | None = None
    image_resolution: tuple[int, int] = (224, 224)
    empty_cameras: int = 0
    tokenizer_max_length: int = 200
    gradient_checkpointing: bool = False
    compile_model: bool = False
    compile_mode: str = "max-autotune"
    optimizer_lr: float = 2.5e-5
    optimizer_betas: tuple[float, float] = (0.9, 0.95)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 0.01
    optimizer_grad_clip_norm: float = 1.0
    scheduler_warmup_steps: int = 1_000
    scheduler_decay_steps: int = 30_000
    scheduler_decay_lr: float = 2.5e-6
    vision_size: dict[str, Any] = field(default_factory=dict)
    language_size: dict[str, Any] = field(default_factory=dict)
    vocab_size: int = VOCABULARY
    compact_vision: bool = False
    upstream: str = "lerobot"

    def __post_init__(self) -> None:
        expect_one_of("paligemma_variant", self.paligemma_variant, VARIANTS)
        expect_one_of("action_expert_variant", self.action_expert_variant, VARIANTS)
        expect_one_of("dtype", self.dtype, ("float32", "bfloat16"))
        expect_one_of("upstream", self.upstream, UPSTREAMS)
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, expected 1 to chunk_size = {self.chunk_size}: "
                "no more actions can be carried out than were predicted"
            )
        if self.image_resolution[0] != self.image_resolution[1]:
            raise ValueError(f"image_resolution is {self.image_resolution}; SigLIP expects a square")
        if self.vision_size.get("image_size", self.image_resolution[0]) != self.image_resolution[0]:
            raise ValueError(
                f"vision_size has image_size {self.vision_size['image_size']}, image_resolution is "
                f"{self.image_resolution}; leave image_size out, it follows"
            )
        if self.rtc_config is not None:
            self.rtc_config = RTCConfig.from_json(self.rtc_config).to_json()
        self.warned = set[str]()  # what this config has warned of; no field, so it is not saved
        self._add_features()

    def expect_least(self, **least: float) -> None:
        """Raises ValueError for a field below the number given."""
        for name, low in least.items():
            if getattr(self, name) < low:
                raise ValueError(f"{name} is {getattr(self, name)}, expected {low} or more")

    def _add_features(self) -> None:
        """Empty cameras; and, as upstream, a state and an action of the full width where none is told."""
        self.input_features, self.output_features = dict(self.input_features), dict(self.output_features)
        for i in range(self.empty_cameras):
            shape = (3, *self.image_resolution)
            self.input_features.setdefault(
                f"{OBS_IMAGES}.empty_camera_{i}", PolicyFeature(FeatureType.VISUAL, shape)
            )
        self.input_features.setdefault(OBS_STATE, PolicyFeature(FeatureType.STATE, (self.max_state_dim,)))
        self.output_features.setdefault(ACTION, PolicyFeature(FeatureType.ACTION, (self.max_action_dim,)))
        expect_room(OBS_STATE, self.input_features[OBS_STATE].shape[0], self.max_state_dim)
        expect_room(ACTION, self.output_features[ACTION].shape[0], self.max_action_dim)

    def text_steps(self) -> list[Step]:
        """What makes tokens of an instruction, freshly made."""
        raise NotImplementedError

    def follow(self, steps: Iterable[Step], changed: Collection[str]) -> None:
        """Let stored steps of text do as this config says where `changed` fields were overridden; and where
        LeRobot's files do not say it at all."""
        fresh = {step.registry_name: step for step in self.text_steps()}
        wanted = {"fast_skip_tokens", *changed} & STEP_FIELDS.keys()
        places = [
            (step, attribute)
            for step in steps
            for name in wanted
            for attribute in STEP_FIELDS[name].get(step.registry_name, ())
        ]
        for step, attribute in places:
            setattr(step, attribute, getattr(fresh[step.registry_name], attribute))

    @classmethod
    def modernise(cls, content: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
        """LeRobot's settings from before 0.4, and openpi's, in today's fields; and what became of each.

        Raises ValueError for one that today's code, ours or LeRobot's, cannot follow.
        """
        return modern_fields(content)

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk: now and the next H - 1 steps."""
        return list(range(self.chunk_size))

    @property
    def vision(self) -> ViTConfig:
        """SigLIP's shape."""
        return resized(ViTConfig(image_size=self.image_resolution[0]), self.vision_size)

    @property
    def language(self) -> DecoderConfig:
        """The language model's shape."""
        return self.decoder(self.paligemma_variant, self.language_size)

    def decoder(self, variant: str, size: dict[str, Any]) -> DecoderConfig:
        """The shape of a variant, with some numbers replaced, and LeRobot's slip in bfloat16."""
        return replace(resized(VARIANTS[variant], size), rope_rounds=self.upstream == "lerobot")


def resized[Shape: (ViTConfig, DecoderConfig)](shape: Shape, size: Mapping[str, Any]) -> Shape:
    """A network's shape with some numbers replaced. Raises ValueError for one that it does not have."""
    known = [f.name for f in fields(shape)]
    if unknown := [name for name in size if name not in known]:
        raise ValueError(f"a size names {', '.join(unknown)}; expected some of {', '.join(known)}")
    return replace(shape, **size)


# --- what is seen ------------------------------------------------------------------------------------------


def look(config: VLAConfig, batch: Batch, *, absent_is: str = "masked") -> dict[str, Tensor | None]:
    """The cameras' images (B, 3, h, w) in [-1, 1] and of SigLIP's size; None for one the batch lacks.

    Warns of an absent camera, once for each policy, unless it is one of the `empty_cameras`; the warning says
    that what stands for it `absent_is`. Raises ValueError when all are absent, and when one is and the batch
    has another that the policy does not know.
    """
    images = {camera: batch.get(camera) for camera in config.image_features}
    absent = [camera for camera, image in images.items() if image is None]
    dark = [camera for camera in absent if ".empty_camera_" not in camera]
    unknown = [
        key
        for key in batch
        if key.startswith(f"{OBS_IMAGES}.") and not key.endswith("_is_pad") and key not in images
    ]
    if len(absent) == len(images):
        raise ValueError(
            f"the batch has {', '.join(batch)} and none of the policy's cameras "
            f"({', '.join(images) or 'it has none'}); at least one is needed: rename yours, or list it in "
            "input_features"
        )
    if dark and unknown:
        raise ValueError(
            f"the batch has {', '.join(unknown)}, which the policy does not know, and no {', '.join(dark)}: "
            "rename yours (policy.preprocessor.rename_map.update({yours: the policy's})), or take it out of "
            "the batch"
        )
    if dark:
        _warn_once(
            config,
            f"no {', '.join(dark)} in the batch: its picture is {absent_is}. If it should be there, rename "
            "the one you have",
        )
    return {
        camera: None if image is None else resize_with_pad(image, *config.image_resolution) * 2 - 1
        for camera, image in images.items()
    }


def _warn_once(config: VLAConfig, message: str) -> None:
    if message not in config.warned:
        config.warned.add(message)
        warnings.warn(message, stacklevel=4)


def prompt(batch: Batch) -> tuple[Tensor, Tensor]:
    """The prompt's token ids (B, L) and which are real (B, L) bool. Raises KeyError when there are none."""
    keys = (f"{OBS_LANGUAGE}.tokens", f"{OBS_LANGUAGE}.attention_mask")
    if missing := [key for key in keys if key not in batch]:
        raise MissingKey(
            f"the batch has no {' and no '.join(missing)}; the policy reads tokens: give "
            "policy.preprocess(raw), with the instruction as raw['task']"
        )
    return batch[keys[0]], batch[keys[1]].bool()


def pad(vector: Tensor, size: int, name: str) -> Tensor:
    """Zeros behind a vector (…, n) up to (…, size). Raises ValueError when it is longer."""
    expect_room(name, vector.shape[-1], size)
    return F.pad(vector, (0, size - vector.shape[-1]))


def expect_room(key: str, numbers: int, most: int) -> None:
    """Raises ValueError for a state or an action of more numbers than the policy has room for."""
    if numbers > most:
        raise ValueError(
            f"{key} has {numbers} numbers, the policy takes {most} at most; raise "
            f"max_{'action' if key == ACTION else 'state'}_dim (published weights have 32)"
        )


def expect_key(batch: Batch, key: str) -> Tensor:
    """A tensor of the batch. Raises KeyError, saying what there is, without it."""
    if batch.get(key) is None:
        raise MissingKey(
            f"no '{key}' in the batch, which holds {', '.join(batch)}; give policy.preprocess(raw), with "
            f"raw['{key}']"
        )
    value: Tensor = batch[key]
    return value


# --- what is read ------------------------------------------------------------------------------------------


def clean(text: str) -> str:
    """An instruction on one line: no space around it, underscores and line ends as spaces."""
    return text.strip().replace("_", " ").replace("\n", " ")


def state_bins(state: Tensor) -> Tensor:
    """Normalised numbers (B, S) as integers: 0 to 255 for [-1, 1), 255 above, -1 below.

    Nothing is clipped first: -1 and 255 are how upstream's bins end (both openpi and LeRobot).
    """
    edges = torch.linspace(-1, 1, STATE_BINS + 1, dtype=torch.float64)[:-1]
    return torch.bucketize(state.detach().cpu().double().contiguous(), edges, right=True) - 1


@register
@dataclass(repr=False)
class StatePrompt(Step):
    """Instruction and normalised state as one text, which π0.5 reads in place of a state token.

    The state is not padded: as many integers as the robot has numbers (`max_state_dim` changes nothing, as
    upstream). Source: LeRobot `policies/pi05/processor_pi05.py`; openpi `models/tokenizer.py`.
    """

    registry_name: ClassVar[str] = "pi05_prepare_state_tokenizer_processor_step"
    ending: ClassVar[str] = ";\nAction: "
    max_state_dim: int = 32
    task_key: str = "task"

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Raises KeyError without a state or an instruction."""
        for key in (OBS_STATE, self.task_key):
            if batch.get(key) is None:
                raise MissingKey(
                    f"no '{key}' in the batch, which holds {', '.join(batch)}; the prompt needs it"
                )
        text = batch[self.task_key]
        texts = [self.clean(task) for task in ([text] if isinstance(text, str) else text)]
        numbers = state_bins(batch[OBS_STATE]).tolist()
        prompts = [
            f"Task: {task}, State: {' '.join(map(str, row))}{self.ending}"
            for task, row in zip(texts, numbers, strict=True)
        ]
        return {**batch, self.task_key: prompts}

    def clean(self, text: str) -> str:
        """The instruction as the prompt has it."""
        return clean(text)

    def describe(self) -> list[str]:
        """One line."""
        return [f"'Task: …, State: 0…255{self.ending!r}' from task and state"]


def before_tokens(before: list[Step]) -> tuple[list[Step], list[Step], Step]:
    """A fresh preprocessor's steps apart: (rename and batch axis, device, normalise)."""
    first: list[Step] = [step for step in before if isinstance(step, Rename | AddBatch)]
    (scale,) = (step for step in before if isinstance(step, Normalize))
    return first, [step for step in before if step not in (*first, scale)], scale


def tokenize(config: VLAConfig, ending: str = "") -> Tokenize:
    """The step from text to token ids, with PaliGemma's tokenizer unless another is given."""
    return Tokenize(TOKENIZER, max_length=config.tokenizer_max_length, ending=ending)


def relative_steps(config: VLAConfig) -> tuple[RelativeActions, AbsoluteActions]:
    """Actions as differences to the state, and back: two steps, which are there when disabled, too."""
    names = None if config.action_feature_names is None else list(config.action_feature_names)
    excluded = list(config.relative_exclude_joints)
    before = RelativeActions(config.use_relative_actions, exclude_joints=excluded, action_names=names)
    return before, AbsoluteActions(config.use_relative_actions, before)


# --- what is trained ---------------------------------------------------------------------------------------


def set_precision(policy: nn.Module, dtype: str) -> None:
    """bfloat16 for the decoder's matrices and the table; vision, norms and projections stay in float32.

    Source: LeRobot `policies/pi0/modeling_pi0.py`, to_bfloat16_for_selected_params.
    """
    if dtype == "float32":
        return
    for name, parameter in policy.named_parameters():
        if name.startswith("paligemma.") and not any(
            part in name for part in ("vision", "projector", "norm")
        ):
            parameter.data = parameter.data.to(torch.bfloat16)


def compile_decoder(paligemma: PaliGemma, config: VLAConfig, *, graphs: bool) -> None:
    """Compile it if the config says so; without CUDA `graphs` where no two calls have one shape.

    LeRobot compiles all of sampling and of the loss; what is not compiled here is little beside the decoder.
    """
    plain = {"max-autotune": "max-autotune-no-cudagraphs", "reduce-overhead": "default"}
    if config.compile_model:
        mode = config.compile_mode if graphs else plain.get(config.compile_mode, config.compile_mode)
        paligemma.decoder.compile(mode=mode)


def keeps_padding(config: VLAConfig) -> bool:
    """Whether the prompt's padding stays: a trace is shown it, and compiled code wants one shape."""
    return recorder.current() is not None or config.compile_model


def one_group(policy: Policy) -> dict[str, Any]:
    """All that learns as one group for AdamW, with upstream's betas."""
    c: Any = policy.config
    trainable = (p for p in policy.parameters() if p.requires_grad)
    adam = {"betas": c.optimizer_betas, "eps": c.optimizer_eps}
    return group(trainable, c.optimizer_lr, c.optimizer_weight_decay) | adam


def freeze(paligemma: PaliGemma, *, vision: bool, language: bool) -> None:
    """No gradient for SigLIP (`vision`), or for all of PaliGemma (`language`): the expert alone learns."""
    frozen: list[nn.Module] = [paligemma.vision] if vision or language else []
    if language:
        frozen += [paligemma.projector, paligemma.embedding, paligemma.decoder.stream("prefix")]
    for module in frozen:
        module.requires_grad_(False)


def unused_by_suffix(config: DecoderConfig) -> dict[str, str]:
    """What of the language stream's last layer nobody looks at: the suffix sees its keys and values only."""
    last = f"paligemma.decoder.streams.prefix.layers.{config.layers - 1}."
    parts = ("q_proj", "o_proj", "post_norm", "gate_proj", "up_proj", "down_proj")
    names = [*(f"{last}{part}.weight" for part in parts), "paligemma.decoder.streams.prefix.norm.weight"]
    return dict.fromkeys(names, "no effect: of the last layer the suffix sees keys and values only")
