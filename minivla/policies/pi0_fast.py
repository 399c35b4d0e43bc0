"""π0-FAST: a language model that sees, and says its actions in tokens.

Paper: Pertsch et al. 2025, "FAST: Efficient Action Tokenization for Vision-Language-Action Models" (arXiv
2501.09747). Upstream: LeRobot 0.6 `policies/pi0_fast/modeling_pi0_fast.py`; openpi `models/pi0_fast.py` and
`models/tokenizer.py`, the authors' JAX code.

    [patches, camera 1] … [prompt with state]   [<bos> Action: FAST tokens | <eos>]
    block      0 (all see all)                        1 (each sees itself and earlier ones)

What is special here:
- No action expert and no flow: PaliGemma as it is, trained to say what comes next. `minivla.actions.fast`
  turns a chunk into a few dozen tokens; they take over ids at the end of PaliGemma's vocabulary.
- A chunk is said one token after the other. Keys and values of all before are kept, so each step computes a
  single token; it is the number of steps that makes this policy slow.
- What is said can be nonsense. It is decoded as upstream does, which makes some chunk of it all the same, and
  `policy.malformed` says of which samples, and why.
- LeRobot lets the prompt see <bos> while it decodes, and not in training. It reads a chunk of `chunk_size`
  steps as one of `n_action_steps`, so the two must be equal. Neither is so with `upstream` "openpi", where
  there is no second <bos>, and a position is left out while decoding.
"""

from __future__ import annotations

import warnings
from collections.abc import Iterable
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.actions.fast import FastTokenizer
from minivla.actions.sentences import OPENING, PAD, Marks, Sentences
from minivla.data.features import ACTION, MissingKey, NormalizationMode
from minivla.data.steps import Step, Tokenize, kept_in, load_tokenizer, register
from minivla.nn.decoder import Cache, valid_positions
from minivla.nn.masks import segment_mask
from minivla.nn.paligemma import PALIGEMMA_NAMES, VOCABULARY, PaliGemma, Prefix
from minivla.policies.base import AnyStats, Batch, Draw, Policy, PolicyConfig, Rng
from minivla.policies.vla import (
    TOKENIZER,
    StatePrompt,
    VLAConfig,
    before_tokens,
    compile_decoder,
    keeps_padding,
    look,
    one_group,
    prompt,
    relative_steps,
    set_precision,
)
from minivla.policies.vla_files import EMBEDDING, LM_HEAD, modern_name
from minivla.segments import Segment, arrange

ACTION_TOKENS, ACTION_TOKEN_MASK = f"{ACTION}.tokens", f"{ACTION}.token_mask"


@dataclass
class PI0FastConfig(VLAConfig):
    """LeRobot's PI0FastConfig; what is not told here is in `VLAConfig`.

    text_tokenizer_name, action_tokenizer_name: hub repositories or folders, of PaliGemma's and FAST's
    max_action_tokens, max_decoding_steps: places for a chunk's tokens in training; tokens said, at most
    temperature: 0 for the likeliest token
    fast_skip_tokens: ids at the very end of the vocabulary that FAST leaves alone
    validate_action_token_prefix: whether an answer that does not begin with "Action:" is an error
    use_kv_cache: whether keys and values are kept, or computed anew for each token

    openpi normalises by quantiles, LeRobot's default is by mean and deviation. `rtc_config` and
    `action_expert_variant` have no effect, as upstream. Raises ValueError as `VLAConfig`, and for numbers out
    of range.
    """

    type: ClassVar[str] = "pi0_fast"

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MEAN_STD,
            "ACTION": NormalizationMode.MEAN_STD,
        }
    )
    max_action_tokens: int = 256
    text_tokenizer_name: str = TOKENIZER
    action_tokenizer_name: str = "lerobot/fast-action-tokenizer"
    temperature: float = 0.0
    max_decoding_steps: int = 256
    fast_skip_tokens: int = 128
    validate_action_token_prefix: bool = True
    use_kv_cache: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        self.expect_least(temperature=0, fast_skip_tokens=0, max_decoding_steps=1, max_action_tokens=1)
        if self.upstream == "lerobot" and self.n_action_steps != self.chunk_size:
            warnings.warn(
                f"n_action_steps is {self.n_action_steps} and chunk_size {self.chunk_size}: LeRobot's "
                "π0-FAST reads what was said as n_action_steps actions, whatever it was taught to say. Make "
                "the two equal",
                stacklevel=4,
            )

    def arrange_steps(self, before: list[Step], after: list[Step]) -> tuple[list[Step], list[Step]]:
        """State and action are scaled first, then written as tokens."""
        first, device, scale = before_tokens(before)
        relative, absolute = relative_steps(self)
        return [*first, relative, scale, *self.text_steps(), *device], [after[0], absolute, *after[1:]]

    def text_steps(self) -> list[Step]:
        """Prompt, its tokens, and the chunk's."""
        return [
            FastPrompt(max_state_dim=self.max_state_dim, openpi=self.upstream == "openpi"),
            Tokenize(self.text_tokenizer_name, max_length=self.tokenizer_max_length),
            self.action_tokens(),
        ]

    def action_tokens(self) -> TokenizeActions:
        """The step that writes chunks as tokens, and reads them."""
        return TokenizeActions(
            self.action_tokenizer_name, max_action_tokens=self.max_action_tokens,
            fast_skip_tokens=self.fast_skip_tokens, paligemma_tokenizer_name=self.text_tokenizer_name,
            vocab_size=self.vocab_size, openpi=self.upstream == "openpi",
        )  # fmt: skip


# --- what is read and said ---------------------------------------------------------------------------------


@register
@dataclass(repr=False)
class FastPrompt(StatePrompt):
    """Instruction and normalised state as one text; `openpi` writes it in lower case, and keeps its lines."""

    registry_name: ClassVar[str] = "pi0_fast_prepare_state_tokenizer_processor_step"
    ending: ClassVar[str] = ";\n"
    openpi: bool = False

    def clean(self, text: str) -> str:
        """The instruction as the prompt has it."""
        return text.lower().strip().replace("_", " ") if self.openpi else super().clean(text)

    def to_json(self) -> dict[str, Any]:
        """LeRobot writes no settings; ours only where it is not LeRobot's way."""
        return {"openpi": True} if self.openpi else {}


@register
@dataclass(repr=False)
class TokenizeActions(Step):
    """A chunk as tokens: adds `action.tokens` (B, max_action_tokens) and `action.token_mask` to a batch that
    has an `action` (B, H, A), normalised (`minivla.actions.sentences`).

    The tokenizers, of text and of FAST, are loaded when first needed, or given to `use`: then they are saved
    with the checkpoint, and "tokenizer" and "action_tokenizer" name folders inside it. `trust_remote_code` is
    LeRobot's: nothing that is fetched is ever run here. Minivla only: `vocab_size`, how many ids the language
    model has, and `openpi`, whose way is followed.
    """

    registry_name: ClassVar[str] = "action_tokenizer_processor"
    FOLDER: ClassVar[str] = "action_tokenizer"
    action_tokenizer_name: str | None = None
    trust_remote_code: bool = True
    max_action_tokens: int = 256
    fast_skip_tokens: int = 128
    paligemma_tokenizer_name: str = TOKENIZER
    vocab_size: int = VOCABULARY
    openpi: bool = False

    def __post_init__(self) -> None:
        self._text: Any = None
        self._fast: FastTokenizer | None = None
        self._folder = Path()  # the checkpoint's

    def use(self, *, text: Any = None, fast: FastTokenizer | None = None) -> None:
        """Take these tokenizers, in place of those that the names stand for."""
        if text is not None:
            self._text, self.paligemma_tokenizer_name = text, Tokenize.FOLDER
        if fast is not None:
            self._fast, self.action_tokenizer_name = fast, self.FOLDER

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        """Without an action nothing is done. Errors as `sentences` and `Sentences.write`."""
        if (action := batch.get(ACTION)) is None:
            return batch
        rows, size = self.sentences.write(action), self.max_action_tokens
        if (longest := max(map(len, rows))) > size:
            warnings.warn(
                f"a chunk takes {longest} tokens and max_action_tokens is {size}; its end is cut off, so "
                "that the policy never learns to say it. Raise max_action_tokens",
                stacklevel=2,
            )
        ids = torch.tensor([row[:size] + [PAD] * (size - len(row)) for row in rows], device=action.device)
        lengths = ids.new_tensor([[len(row)] for row in rows])
        return {**batch, ACTION_TOKENS: ids, ACTION_TOKEN_MASK: torch.arange(size).to(ids) < lengths}

    @property
    def sentences(self) -> Sentences:
        """What writes and reads. FileNotFoundError for a tokenizer out of reach, ValueError for one that
        lacks "|".
        """
        if self._text is None:
            self._text = load_tokenizer(self._place(self.paligemma_tokenizer_name, Tokenize.FOLDER))
        if self._fast is None and not self.action_tokenizer_name:
            raise FileNotFoundError("no FAST tokenizer and no action_tokenizer_name; give one to `use`")
        if self._fast is None:
            self._fast = FastTokenizer.load(self._place(str(self.action_tokenizer_name), self.FOLDER))
        marks = Marks.of(self._text)
        return Sentences(self._fast, marks, self.vocab_size, self.fast_skip_tokens, self.openpi)

    def _place(self, name: str, folder: str) -> str:
        return str(kept_in(self._folder, folder)) if name == folder else name

    def describe(self) -> list[str]:
        """One line."""
        return [f"{ACTION} to {self.max_action_tokens} tokens of {self.action_tokenizer_name}"]

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings; and, where they are no defaults, those that it forgets or does not know."""
        settings = {f.name: getattr(self, f.name) for f in fields(self)}
        always = ("trust_remote_code", "max_action_tokens")
        return {k: v for k, v in settings.items() if k in always or v != getattr(TokenizeActions, k)}

    def write_files(self, folder: Path) -> None:
        """FAST itself, when it has no other place (`Tokenize` does so with the text's)."""
        if self.action_tokenizer_name == self.FOLDER:
            self.sentences.fast.save(folder / self.FOLDER)

    def find_files(self, folder: Path) -> None:
        """The checkpoint is in `folder`."""
        self._folder = folder


# --- the policy --------------------------------------------------------------------------------------------


class PI0Fast(Policy):
    """π0-FAST. `malformed` tells of the last chunk: {sample: why what was said is no chunk}."""

    name: ClassVar[str] = "pi0_fast"
    config_class: ClassVar[type[PolicyConfig]] = PI0FastConfig
    resizes_images: ClassVar[bool] = True
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = (
        *PALIGEMMA_NAMES,
        (r"^lm_head\.weight$", LM_HEAD),
    )
    STAND_INS: ClassVar[dict[str, str]] = {EMBEDDING: LM_HEAD}

    def __init__(
        self, config: PI0FastConfig, stats: AnyStats | None = None, *, allow_constant: bool = False
    ) -> None:
        super().__init__(config, stats, allow_constant=allow_constant)
        self.paligemma = PaliGemma(
            config.vision, {"prefix": config.language},
            vocabulary=config.vocab_size, compact_vision=config.compact_vision,
        )  # fmt: skip
        self.lm_head = nn.Linear(config.language.width, config.vocab_size, bias=False)
        self.paligemma.decoder.checkpointing = config.gradient_checkpointing
        compile_decoder(self.paligemma, config, graphs=False)
        self.openpi, self._own_tokens = config.upstream == "openpi", config.action_tokens()
        set_precision(self, config.dtype)
        if self.openpi:  # the table is read from and written with; LeRobot has lost the tie
            self.lm_head.weight = self.paligemma.embedding.weight
        self.lm_head.to(self.paligemma.embedding.weight.dtype)

    @property
    def optional_inputs(self) -> tuple[str, ...]:
        """Cameras may be absent: their tokens are masked; openpi shows black in their place."""
        return tuple(self.config.image_features)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group, with upstream's betas."""
        return [one_group(self)]

    def reset(self) -> None:
        """As `Policy.reset`; the last chunk is forgotten too."""
        super().reset()
        self.malformed: dict[int, str] = {}

    @classmethod
    def canonical_names(cls, keys: Iterable[str]) -> dict[str, str]:
        """Files from before LeRobot 0.6 call things by other names (`modern_name`)."""
        return {key: modern_name(key) for key in keys}

    @property
    def sentences(self) -> Sentences:
        """What writes chunks as tokens and reads them: the preprocessor's, or one of our own."""
        return next(step for step in self._steps() if isinstance(step, TokenizeActions)).sentences

    def _steps(self) -> list[Step]:
        return [*(self.preprocessor.steps if self.preprocessor else ()), self._own_tokens]

    def use_tokenizers(self, *, text: Any = None, fast: FastTokenizer | None = None) -> None:
        """Give tokenizers as objects, in place of those that the config names; `save` keeps them."""
        for step in self._steps():
            if isinstance(step, TokenizeActions):
                step.use(text=text, fast=fast)
            if isinstance(step, Tokenize) and text is not None:
                step.tokenizer = text
        own, self.config.action_tokenizer_name = self._own_tokens, self._own_tokens.action_tokenizer_name
        self.config.text_tokenizer_name = own.paligemma_tokenizer_name

    def forward(
        self, batch: Batch, *, noise: Draw = None, time: Draw = None, generator: Rng = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Cross-entropy of each next token: LeRobot's mean is over all of the batch, openpi's over each
        sample's first. noise, time and generator are unused. Raises KeyError without action tokens.
        """
        ids, valid = self._said(batch)
        prefix = self.embed_prefix(batch)
        last, length = _last(prefix.valid), prefix.tokens.shape[1]
        mask, positions = self.lay_out(prefix, valid, decoding=False)
        recorder.spell("action tokens", ids)
        tokens = torch.cat((prefix.tokens, self.paligemma.embed_tokens(ids)), dim=1)
        out = self.paligemma.decoder({"prefix": tokens}, mask, positions)["prefix"]
        hidden = out[:, length:-1]
        if self.openpi:  # the prompt's end foretells the first token; LeRobot's first is <bos>, and given
            hidden = torch.cat((out[torch.arange(len(out)), last, None], hidden), dim=1)
        logits = self.lm_head(hidden)
        recorder.keep("logits", logits)
        ids, valid = (x[:, -logits.shape[1] :] for x in (ids, valid.float()))
        classes = rearrange(logits, "batch token vocabulary -> batch vocabulary token")
        error = F.cross_entropy(classes, ids, reduction="none")
        over = 1 if self.openpi else (0, 1)
        loss = ((error * valid).sum(over) / valid.sum(over).clamp(min=1)).mean()
        return loss, dict.fromkeys(("loss", "ce_loss"), loss.item())

    def _said(self, batch: Batch) -> tuple[Tensor, Tensor]:
        """The action tokens' ids (B, L) and which are real (B, L), without places that nobody fills."""
        if missing := [key for key in (ACTION_TOKENS, ACTION_TOKEN_MASK) if key not in batch]:
            raise MissingKey(
                f"the batch has no {' and no '.join(missing)}; the loss needs the actions as tokens: give "
                f"policy.preprocess(raw), with raw['{ACTION}'] (B, {self.config.chunk_size}, A)"
            )
        ids, valid = batch[ACTION_TOKENS], batch[ACTION_TOKEN_MASK]
        size = ids.shape[1] if keeps_padding(self.config) else max(2, int(valid.sum(dim=1).max()))
        return ids[:, :size], valid[:, :size]

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: Batch, *, noise: Draw = None, steps: int | None = None, generator: Rng = None
    ) -> Tensor:
        """The chunk, normalised, after at most `steps` tokens: (B, n_action_steps, A) as LeRobot decodes it,
        (B, H, A) with `upstream` "openpi". `noise` is unused: chance comes in by `temperature`, from
        `generator`.

        Warns of malformed samples, and tells of them in `malformed`. Raises ValueError for fewer than one
        step, and, with `validate_action_token_prefix`, when a sample does not begin with "Action:", as
        LeRobot.
        """
        self.eval()
        c, sentences = self.config, self.sentences
        ids = self.generate(batch, c.max_decoding_steps if steps is None else steps, generator)
        horizon = c.chunk_size if self.openpi else c.n_action_steps
        if c.validate_action_token_prefix and not self.openpi and (silent := sentences.without_opening(ids)):
            raise ValueError(
                f"samples {silent} do not begin with '{OPENING}', so this is no chunk; train longer, or "
                "decode it all the same with validate_action_token_prefix=False"
            )
        chunk, self.malformed = sentences.read(ids, horizon, c.action_feature.shape[0])
        recorder.keep("malformed", torch.tensor([i in self.malformed for i in range(len(ids))]))
        if self.malformed:
            told = "; ".join(f"sample {i}: {reason}" for i, reason in self.malformed.items())
            warnings.warn(f"said is no chunk, and decoded as {c.upstream} does. {told}", stacklevel=3)
        return chunk

    def generate(self, batch: Batch, steps: int, generator: Rng = None) -> Tensor:
        """What the policy says: ids (B, L), at most `steps`. Raises ValueError for fewer than one."""
        if steps < 1:
            raise ValueError(f"steps is {steps}, expected 1 or more: the tokens that may be said")
        prefix = self.embed_prefix(batch, decoding=True)
        tokens, last, length = prefix.tokens, _last(prefix.valid), prefix.tokens.shape[1]
        mask, positions = self.lay_out(prefix, prefix.valid.new_ones(len(tokens), steps), decoding=True)
        cache, said = Cache() if self.config.use_kv_cache else None, list[Tensor]()
        for stop in range(length, length + steps):
            new = slice(0 if cache is None else len(cache), stop)
            out = self.paligemma.decoder(
                {"prefix": tokens[:, new]}, mask[:, new, :stop], positions[:, new], cache=cache
            )["prefix"]
            logits = self.lm_head(out[:, -1] if said else out[torch.arange(len(out)), last])
            recorder.keep_step("logits", logits)
            said.append(self.choose(logits, generator))
            tokens = torch.cat((tokens, self.paligemma.embed_tokens(said[-1])), dim=1)
            if self.is_over(ids := torch.cat(said, dim=1)):
                break
        recorder.spell("action tokens", ids[:, :-1])
        recorder.keep("action tokens", ids)
        self._tell(self._segments(prefix, ids.shape[1] - 1), mask)
        return ids

    def choose(self, logits: Tensor, generator: Rng = None) -> Tensor:
        """The next token (B, 1) from logits (B, vocabulary): the likeliest, or drawn by `temperature`."""
        if self.config.temperature == 0:
            return logits.argmax(dim=-1, keepdim=True)
        chances = (logits / self.config.temperature).softmax(dim=-1)
        place = chances.device if generator is None else generator.device
        return torch.multinomial(chances.to(place), 1, generator=generator).to(logits.device)

    def is_over(self, ids: Tensor) -> bool:
        """After ids (B, L), is all said? LeRobot stops when each sample has said "|", and goes on to the end
        when tokens are drawn; openpi stops when all say <eos> at once. What comes later is not read.
        """
        marks = self.sentences.marks
        if self.openpi:
            return bool((ids[:, -1] == marks.stop).all())
        return self.config.temperature == 0 and bool((ids == marks.end).any(dim=1).all())

    # --- the sequence --------------------------------------------------------------------------------------

    def embed_prefix(self, batch: Batch, *, decoding: bool = False) -> Prefix:
        """What is seen and read; as LeRobot decodes, with a further <bos> at the end, which all see."""
        stand_in = "black, which all see" if self.openpi else "masked"
        images, (ids, valid) = look(self.config, batch, absent_is=stand_in), prompt(batch)
        if self.openpi:
            black = next(torch.full_like(image, -1) for image in images.values() if image is not None)
            images = {camera: black if image is None else image for camera, image in images.items()}
        elif decoding:
            ids, valid = (
                F.pad(ids, (0, 1), value=self.sentences.marks.begin),
                F.pad(valid, (0, 1), value=True),
            )
        prefix = self.paligemma.embed_prefix(images, ids, valid)
        return prefix if keeps_padding(self.config) else prefix.without_padding()

    def _segments(self, prefix: Prefix, said: int) -> list[Segment]:
        return arrange([*prefix.segments, Segment("action tokens", "action", said, block=1, rule="causal")])

    def lay_out(self, prefix: Prefix, valid: Tensor, *, decoding: bool) -> tuple[Tensor, Tensor]:
        """Mask (B, L, L) and positions (B, L) of prefix and what is said; `valid` (B, said): the real."""
        segments = self._segments(prefix, valid.shape[1])
        every = torch.cat((prefix.valid, valid), dim=1)
        mask, positions = segment_mask(segments, every), valid_positions(every)
        if self.openpi and decoding:
            positions[:, prefix.valid.shape[1] :] += 1
        elif self.openpi:  # absent cameras are counted
            seen = sum(s.length for s in segments if s.kind == "image")
            positions = valid_positions(torch.cat((torch.ones_like(every[:, :seen]), every[:, seen:]), dim=1))
        self._tell(segments, mask)
        return mask, positions

    def _tell(self, segments: list[Segment], mask: Tensor) -> None:
        if (call := recorder.current()) is not None:
            size = segments[-1].stop
            call.lay_out("joint.*", segments, segments)
            call.describe(segments, mask[0, :size, :size], stacks=("prefix",))


def _last(valid: Tensor) -> Tensor:
    """Where in each row of valid (B, L) the last real token stands: (B,)."""
    return (valid * torch.arange(valid.shape[1], device=valid.device)).argmax(dim=1)
