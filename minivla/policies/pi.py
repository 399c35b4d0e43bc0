"""π0 and π0.5: a language model that sees, and a smaller expert that turns noise into actions beside it.

Papers: Black et al. 2024, "π0: A Vision-Language-Action Flow Model for General Robot Control" (arXiv
2410.24164); Physical Intelligence 2025, "π0.5: a VLA with Open-World Generalization" (arXiv 2504.16054).
Upstream: LeRobot 0.6 `policies/{pi0,pi05}/modeling_*.py`; openpi `models/pi0.py`, the authors' JAX code.

                    prefix: PaliGemma                   suffix: the action expert
    π0     [patches, camera 1] … [prompt]             [state] [action × H]
    π0.5   [patches, camera 1] … [prompt with state]          [action × H]
    block           0 (all see all)                      1         2 (1 in π0.5)

What is special here:
- Two sets of weights, one attention. A token sees its own block and lower ones: the prefix sees nothing of
  the suffix, so it is run once, its keys and values are kept, and each step of the flow runs the expert
  alone.
- Time 1 is noise and time 0 the action: the code does the reverse of the paper. Training dwells on the noisy
  end, since what a picture asks for is decided there.
- π0 adds the time to each action token and has a token for the state. π0.5 writes the state into the prompt,
  as numbers, and lets the time steer every norm of the expert (adaRMS): scale, shift and a gate per branch.
- Of the language stream's last layer only keys and values matter; upstream computes the rest all the same.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from minivla import recorder
from minivla.actions import flow
from minivla.actions.realtime import RTCConfig, guide
from minivla.data.features import ACTION, OBS_STATE, NormalizationMode
from minivla.data.steps import Step, register
from minivla.nn.decoder import Cache, DecoderConfig, valid_positions
from minivla.nn.masks import segment_mask
from minivla.nn.paligemma import PALIGEMMA_NAMES, PaliGemma, Prefix
from minivla.nn.positions import sine_time
from minivla.policies.base import AnyStats, Batch, Draw, Policy, PolicyConfig, Rng
from minivla.policies.vla import (
    StatePrompt,
    VLAConfig,
    before_tokens,
    clean,
    compile_decoder,
    expect_key,
    freeze,
    keeps_padding,
    look,
    one_group,
    pad,
    prompt,
    relative_steps,
    set_precision,
    tokenize,
    unused_by_suffix,
)
from minivla.policies.vla_files import EMBEDDING, EXPERT_HEAD, LM_HEAD, modern_name
from minivla.segments import Segment, arrange

UNUSED = "no effect: the words are only read, never written"


@dataclass
class PI0Config(VLAConfig):
    """LeRobot's PI0Config; what is not told here is in `VLAConfig`.

    action_expert_variant, num_inference_steps: the expert's size; steps of the flow
    time_sampling_…: training times are scale · Beta(alpha, beta) + offset
    min_period, max_period: of the codes of time
    freeze_vision_encoder, train_expert_only: what learns
    expert_size: numbers that replace those of the expert's variant (minivla only)
    noise_draws: noises and times that training draws for each observation (minivla only)
    """

    type: ClassVar[str] = "pi0"
    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = (*VLAConfig.MINIVLA_FIELDS, "expert_size", "noise_draws")

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    tokenizer_max_length: int = 48
    num_inference_steps: int = 10
    time_sampling_beta_alpha: float = 1.5
    time_sampling_beta_beta: float = 1.0
    time_sampling_scale: float = 0.999
    time_sampling_offset: float = 0.001
    min_period: float = 4e-3
    max_period: float = 4.0
    freeze_vision_encoder: bool = False
    train_expert_only: bool = False
    expert_size: dict[str, Any] = field(default_factory=dict)
    noise_draws: int = 1

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_least(noise_draws=1, num_inference_steps=1)
        if self.expert.width % 2:
            raise ValueError(
                f"the expert's width is {self.expert.width}, expected an even one: sines, cosines"
            )

    @property
    def expert(self) -> DecoderConfig:
        """The action expert's shape."""
        return self.decoder(self.action_expert_variant, self.expert_size)

    def arrange_steps(self, before: list[Step], after: list[Step]) -> tuple[list[Step], list[Step]]:
        """The instruction ends with a new line, and becomes tokens, before anything is scaled."""
        first, device, scale = before_tokens(before)
        relative, absolute = relative_steps(self)
        return [*first, *self.text_steps(), *device, relative, scale], [after[0], absolute, *after[1:]]

    def text_steps(self) -> list[Step]:
        """The prompt, and its tokens."""
        openpi = self.upstream == "openpi"
        return [NewLine(cleaned=openpi), tokenize(self, ending="\n" if openpi else "")]


@dataclass
class PI05Config(PI0Config):
    """LeRobot's PI05Config: π0's fields; quantiles for the state, and room for it in the prompt."""

    type: ClassVar[str] = "pi05"

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.QUANTILES,
            "ACTION": NormalizationMode.QUANTILES,
        }
    )
    tokenizer_max_length: int = 200

    def arrange_steps(self, before: list[Step], after: list[Step]) -> tuple[list[Step], list[Step]]:
        """The state is scaled first, then written into the prompt."""
        first, device, scale = before_tokens(before)
        relative, absolute = relative_steps(self)
        return [*first, relative, scale, *self.text_steps(), *device], [after[0], absolute, *after[1:]]

    def text_steps(self) -> list[Step]:
        """The prompt with the state in it, and its tokens."""
        return [StatePrompt(max_state_dim=self.max_state_dim), tokenize(self)]


@register
@dataclass(repr=False)
class NewLine(Step):
    """An instruction ends with a new line, PaliGemma's sign that the prompt is over.

    `cleaned` is openpi's way: one line without underscores, and the new line is encoded by itself, later.
    Source: LeRobot `policies/pi0/processor_pi0.py`; openpi `models/tokenizer.py`, PaligemmaTokenizer.
    """

    registry_name: ClassVar[str] = "pi0_new_line_processor"
    cleaned: bool = False

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """What is no text is left as it is."""
        task = batch.get("task")
        if task is None:
            return batch
        texts = [task] if isinstance(task, str) else task
        if self.cleaned:
            return {**batch, "task": [clean(text) for text in texts]}
        return {**batch, "task": [text if text.endswith("\n") else f"{text}\n" for text in texts]}

    def describe(self) -> list[str]:
        """One line."""
        return ["task on one line, as openpi" if self.cleaned else "task ends with a new line"]

    def to_json(self) -> dict[str, Any]:
        """LeRobot has no settings; ours only where it is not LeRobot's way."""
        return {"cleaned": True} if self.cleaned else {}


@dataclass
class Suffix:
    """The expert's tokens (B, L, D), what they are, and the vector (B, D) that steers its norms, if any."""

    tokens: Tensor
    segments: list[Segment]
    condition: Tensor | None = None


class PI0(Policy):
    """π0. What π0.5 changes: `state`, `embed_suffix`, and what these need, `_add_time`, `condition_width`."""

    name: ClassVar[str] = "pi0"
    config_class: ClassVar[type[PolicyConfig]] = PI0Config
    resizes_images: ClassVar[bool] = True
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = (
        *PALIGEMMA_NAMES,
        (
            r"^(state_proj|action_in_proj|action_out_proj|(action_)?time_mlp_in|(action_)?time_mlp_out)\.",
            r"model.\1.",
        ),
    )
    IGNORED_KEYS: ClassVar[dict[str, str]] = {
        re.escape(EXPERT_HEAD): UNUSED,
        re.escape(LM_HEAD): UNUSED,
        r".*\.gemma_expert\.model\.embed_tokens\.weight": "no effect: the expert reads no words",
    }
    STAND_INS: ClassVar[dict[str, str]] = {EMBEDDING: LM_HEAD}
    FORMER_TIME: ClassVar[tuple[str, str]] = (r"^model\.time_mlp_", "model.action_time_mlp_")

    def __init__(
        self, config: PI0Config, stats: AnyStats | None = None, *, allow_constant: bool = False
    ) -> None:
        super().__init__(config, stats, allow_constant=allow_constant)
        expert = replace(config.expert, condition=self.condition_width(config.expert.width))
        self.paligemma = PaliGemma(
            config.vision, {"prefix": config.language, "suffix": expert},
            vocabulary=config.vocab_size, compact_vision=config.compact_vision,
        )  # fmt: skip
        self.action_in_proj = nn.Linear(config.max_action_dim, expert.width)
        self.action_out_proj = nn.Linear(expert.width, config.max_action_dim)
        self._add_time(config.max_state_dim, expert.width)
        self.paligemma.decoder.checkpointing = config.gradient_checkpointing
        compile_decoder(self.paligemma, config, graphs=True)
        set_precision(self, config.dtype)
        freeze(self.paligemma, vision=config.freeze_vision_encoder, language=config.train_expert_only)

    @classmethod
    def canonical_names(cls, keys: Iterable[str]) -> dict[str, str]:
        """Files of openpi, and of LeRobot before 0.4 and since; time's MLP may have the other one's name."""
        return {key: re.sub(*cls.FORMER_TIME, modern_name(key)) for key in keys}

    def extra_tensors(self) -> dict[str, Tensor]:
        """The heads that would write words, which LeRobot's networks have: tied to the table, and zeros.

        None where LeRobot will not read the folder anyway.
        """
        if self.config.unusual():
            return {}
        table, expert = self.paligemma.embedding.weight, self.paligemma.decoder.stream("suffix")
        zero = torch.zeros((), dtype=expert.dtype)
        return {LM_HEAD: table, EXPERT_HEAD: zero.expand(len(table), expert.config.width)}

    @staticmethod
    def condition_width(width: int) -> int:
        """How wide the vector is that steers the expert's norms: 0 for none."""
        return 0

    def _add_time(self, state: int, width: int) -> None:
        self.state_proj = nn.Linear(state, width)
        self.action_time_mlp_in = nn.Linear(2 * width, width)
        self.action_time_mlp_out = nn.Linear(width, width)

    @property
    def inert(self) -> dict[str, str]:
        """The last layer of the language stream, but for its keys and values."""
        return unused_by_suffix(self.config.language)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Cameras may be absent: their tokens are masked."""
        return tuple(self.config.image_features)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group, with upstream's betas."""
        return [one_group(self)]

    def forward(
        self, batch: Batch, *, noise: Draw = None, time: Draw = None, generator: Rng = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of the velocity, over the robot's own action dimensions.

        noise (B, H, max_action_dim), time (B,) in [0, 1], 1 = noise; drawn if not given. With `upstream`
        "openpi" the padded dimensions count too. Steps that are padding (`action_is_pad`) count, as upstream.
        With several `noise_draws` B counts these, sample by sample: what is seen is looked at once for all.
        Given ones may be of any such number. Raises KeyError for a batch without an action, ValueError for
        shapes that do not fit and times out of range.
        """
        c, action = self.config, pad(expect_key(batch, ACTION), self.config.max_action_dim, ACTION)
        self._expect_chunk(ACTION, action, len(prompt(batch)[0]))
        draws = self._draws(len(action), time if noise is None else noise)
        action = action.to(self.action_in_proj.weight.dtype)
        action, state = (x.repeat_interleave(draws, dim=0) for x in (action, self.state(batch)))
        noise = flow.draw_noise(action.shape, action, generator) if noise is None else noise.to(action)
        self._expect_chunk("noise", noise, len(action))
        if time is not None:
            _expect_times(time, len(action))
        time = (self.draw_time(len(action), generator) if time is None else time).to(action)
        x = flow.interpolate(action, noise, time, flow.PI)
        target = flow.velocity_target(action, noise, flow.PI)
        velocity = self.velocity(self._joint(self.embed_prefix(batch), self.embed_suffix(state, x, time)))
        recorder.keep_step("time", time)
        for name, value in (("noisy", x), ("target", target)):
            recorder.keep(name, self.real(value))
        error = F.mse_loss(velocity, target, reduction="none")
        error = error if c.upstream == "openpi" else self.real(error)
        loss = error.mean()
        return loss, {"loss": loss.item()}

    def _draws(self, samples: int, given: Tensor | None) -> int:
        """How many noises and times there are for each sample: the config's number, or as many as given."""
        if given is None:
            return self.config.noise_draws
        if len(given) % samples:
            raise ValueError(
                f"noise and time have {len(given)} rows, the batch {samples} samples; expected one row for "
                "each sample, or the same number for each"
            )
        return len(given) // samples

    def _expect_chunk(self, name: str, chunk: Tensor, samples: int) -> None:
        """Raises ValueError unless a chunk is (samples, H, max_action_dim)."""
        shape = (samples, self.config.chunk_size, self.config.max_action_dim)
        if tuple(chunk.shape) != shape:
            raise ValueError(
                f"{name} has shape {tuple(chunk.shape)}, expected {shape}: (B, chunk_size, max_action_dim)"
            )

    def _joint(self, prefix: Prefix, suffix: Suffix) -> Tensor:
        """The suffix's last hidden states (B, L, D), beside its prefix or, n to one, behind what it left."""
        decoder, n = self.paligemma.decoder, len(suffix.tokens) // len(prefix.tokens)
        mask, positions = self.lay_out(prefix, suffix)
        both, conditions = {"prefix": prefix.tokens, "suffix": suffix.tokens}, _conditions(suffix)
        if n == 1:
            return decoder(both, mask, positions, conditions=conditions, outcome=("suffix",))["suffix"]
        cache, length = self._remembered(prefix, mask, positions), prefix.tokens.shape[1]
        again = Cache(*([x.repeat_interleave(n, dim=0) for x in kept] for kept in (cache.keys, cache.values)))
        mask, positions = (x[:, length:].repeat_interleave(n, dim=0) for x in (mask, positions))
        return decoder(
            {"suffix": suffix.tokens}, mask, positions, conditions=conditions, cache=again, keep=False
        )["suffix"]

    def _remembered(self, prefix: Prefix, mask: Tensor, positions: Tensor) -> Cache:
        """The prefix's keys and values; mask and positions are those of all, prefix and suffix."""
        cache, length = Cache(), prefix.tokens.shape[1]
        self.paligemma.decoder(
            {"prefix": prefix.tokens}, mask[:, :length, :length], positions[:, :length],
            cache=cache, outcome=(),
        )  # fmt: skip
        return cache

    @torch.no_grad()
    def predict_action_chunk(
        self,
        batch: Batch,
        *,
        noise: Draw = None,
        steps: int | None = None,
        generator: Rng = None,
        inference_delay: int | None = None,
        prev_chunk_left_over: Tensor | None = None,
        execution_horizon: int | None = None,
    ) -> Tensor:
        """The chunk (B, H, A), normalised, from noise (B, H, max_action_dim) in `steps` steps of Euler.

        The last three are LeRobot's arguments of real-time chunking: control steps that pass while this runs,
        what is left of the chunk before (B, ≤ H, A), and how far to keep to it (`minivla.actions.realtime`).
        Without an `rtc_config`, or where it is not enabled, they have no effect, as upstream. Raises
        ValueError for fewer than one step and for noise of another shape.
        """
        self.eval()
        c = self.config
        state, prefix = self.state(batch), self.embed_prefix(batch)
        if noise is None:
            shape = (len(prefix.tokens), c.chunk_size, c.max_action_dim)
            noise = flow.draw_noise(shape, self.action_in_proj.weight, generator)
        self._expect_chunk("noise", noise := noise.to(self.action_in_proj.weight), len(prefix.tokens))
        recorder.keep("noise", noise)
        mask, positions = self.lay_out(prefix, self.embed_suffix(state, noise, noise.new_ones(1)))
        cache, length = self._remembered(prefix, mask, positions), prefix.tokens.shape[1]
        if c.compile_model:  # a CUDA graph that runs again writes over what it once gave
            cache = Cache(*([x.clone() for x in kept] for kept in (cache.keys, cache.values)))

        def velocity(x: Tensor, time: Tensor) -> Tensor:
            suffix = self.embed_suffix(state, x, time)
            recorder.keep_step("time", time)
            out = self.paligemma.decoder(
                {"suffix": suffix.tokens}, mask[:, length:], positions[:, length:],
                conditions=_conditions(suffix), cache=cache, keep=False,
            )  # fmt: skip
            return self.velocity(out["suffix"])

        field: flow.Field = velocity
        if c.rtc_config is not None:
            field = guide(
                velocity, prev_chunk_left_over, inference_delay or 0, RTCConfig.from_json(c.rtc_config),
                flow.PI, execution_horizon=execution_horizon,
            )  # fmt: skip
        chunk = flow.euler(field, noise, c.num_inference_steps if steps is None else steps, flow.PI)
        if (call := recorder.current()) is not None and call.flow is not None:
            call.flow = replace(call.flow, x=self.real(call.flow.x), v=self.real(call.flow.v))
        return self.real(chunk)

    def embed_prefix(self, batch: Batch) -> Prefix:
        """What is seen and read; a trace is shown the padding too, which nobody looks at."""
        prefix = self.paligemma.embed_prefix(look(self.config, batch), *prompt(batch))
        return prefix if keeps_padding(self.config) else prefix.without_padding()

    def state(self, batch: Batch) -> Tensor:
        """The robot's state, padded (B, max_state_dim)."""
        return pad(expect_key(batch, OBS_STATE), self.config.max_state_dim, OBS_STATE)

    def embed_suffix(self, state: Tensor, noisy: Tensor, time: Tensor) -> Suffix:
        """State, noisy chunk (B, H, max_action_dim), time (B,) or (1,) as tokens (B, 1 + H, D)."""
        action = self.action_in_proj(noisy.to(self.action_in_proj.weight.dtype))
        code = repeat(self.time_code(time), "b width -> b h width", h=action.shape[1]).expand_as(action)
        mixed = F.silu(self.action_time_mlp_in(torch.cat((action, code), dim=-1)))
        first = rearrange(self.state_proj(state.to(self.state_proj.weight.dtype)), "b width -> b 1 width")
        segments = [Segment("state", "state", 1, block=1), self._chunk_segment(block=2)]
        return Suffix(torch.cat((first, self.action_time_mlp_out(mixed)), dim=1), segments)

    def _chunk_segment(self, block: int) -> Segment:
        return Segment("actions", "action", self.config.chunk_size, block=block)

    def time_code(self, time: Tensor) -> Tensor:
        """Sines and cosines of a time (B,). Returns (B, D)."""
        c, width = self.config, self.action_in_proj.out_features
        dtype = torch.float32 if c.upstream == "openpi" else torch.float64
        code = sine_time(time, width, shortest=c.min_period, longest=c.max_period, dtype=dtype)
        return code.to(self.action_in_proj.weight.dtype)

    def lay_out(self, prefix: Prefix, suffix: Suffix) -> tuple[Tensor, Tensor]:
        """Mask (B, L, L) and positions (B, L) of prefix and suffix; a trace is told what the tokens are."""
        segments = arrange([*prefix.segments, *suffix.segments])
        valid = F.pad(prefix.valid, (0, suffix.tokens.shape[1]), value=True)
        mask = segment_mask(segments, valid)
        if (call := recorder.current()) is not None:
            call.lay_out("joint.*", segments, segments)
            call.describe(segments, mask[0], stacks=("prefix", "suffix"))
        return mask, valid_positions(valid)

    def velocity(self, out: Tensor) -> Tensor:
        """The expert's last hidden states (B, L, D) as the velocity of the chunk (B, H, max_action_dim)."""
        last = out[:, -self.config.chunk_size :].to(self.action_out_proj.weight.dtype)
        velocity: Tensor = self.action_out_proj(last)
        recorder.keep("denoised", self.real(velocity))
        return velocity

    def real(self, chunk: Tensor) -> Tensor:
        """The robot's own dimensions of a padded chunk (…, max_action_dim)."""
        return chunk[..., : self.config.action_feature.shape[0]]

    def draw_time(self, size: int, generator: Rng) -> Tensor:
        """Training times (B,), more often near 1, the noise."""
        c = self.config
        return flow.beta_time(
            size, c.time_sampling_beta_alpha, c.time_sampling_beta_beta,
            c.time_sampling_scale, c.time_sampling_offset, generator,
        )  # fmt: skip


class PI05(PI0):
    """π0.5: the state stands in the prompt, and the time steers the expert's norms."""

    name: ClassVar[str] = "pi05"
    config_class: ClassVar[type[PolicyConfig]] = PI05Config
    IGNORED_KEYS: ClassVar[dict[str, str]] = {
        **PI0.IGNORED_KEYS,
        r"model\.state_proj\.(weight|bias)": "π0's: here the state is read",
        r".*\.gemma_expert\.model\.(layers\.\d+\.\w+layernorm|norm)\.weight": "π0's: here time steers them",
    }
    FORMER_TIME: ClassVar[tuple[str, str]] = (r"^model\.action_time_mlp_", "model.time_mlp_")

    @staticmethod
    def condition_width(width: int) -> int:
        """As wide as the expert."""
        return width

    def _add_time(self, state: int, width: int) -> None:
        self.time_mlp_in, self.time_mlp_out = nn.Linear(width, width), nn.Linear(width, width)

    def state(self, batch: Batch) -> Tensor:
        """Nothing, (B, 0): the state was read."""
        words = prompt(batch)[0]
        return words.new_empty(len(words), 0)

    def embed_suffix(self, state: Tensor, noisy: Tensor, time: Tensor) -> Suffix:
        """Noisy chunk (B, H, max_action_dim) as tokens (B, H, D), time (B,) or (1,) as the condition (B, D).

        The state is not looked at: it was read.
        """
        condition = F.silu(self.time_mlp_out(F.silu(self.time_mlp_in(self.time_code(time)))))
        recorder.keep("condition", condition)
        tokens = self.action_in_proj(noisy.to(self.action_in_proj.weight.dtype))
        return Suffix(tokens, [self._chunk_segment(block=1)], condition)


def _expect_times(time: Tensor, samples: int) -> None:
    if tuple(time.shape) != (samples,) or not ((time >= 0) & (time <= 1)).all():
        raise ValueError(
            f"time has shape {tuple(time.shape)} and lies in [{time.min():.3g}, {time.max():.3g}], expected "
            f"({samples},), a number in [0, 1] for each row of noise"
        )


def _conditions(suffix: Suffix) -> dict[str, Tensor]:
    return {} if suffix.condition is None else {"suffix": suffix.condition}
