"""VQ-BeT: chunks of actions become words of a small language, and a GPT speaks it.

Paper: Lee et al. 2024, "Behavior Generation with Latent Actions" (arXiv 2403.03181). Upstream: LeRobot 0.6
`policies/vqbet/{modeling_vqbet,vqbet_utils}.py`; the first code, github.com/jayLEE0301/vq_bet_official.

    phase 1   chunk of actions → encoder → G codes out of C each → decoder → the same chunk, nearly
    phase 2   [instruction] [image][state][query] … [image][state][query] [query] [query]
                             └──── t - T + 1 ────┘    └──── now, t ──────┘  t + 1   t + 2
              GPT: every token sees itself and what stands before it
              each query → which G codes? (classified, sampled) → decoder ┐
                         → an offset for these codes (regressed) ─────────┴ + → a chunk that starts there

What is special here:
- A classifier may say "left or right", which a regression averages; what the codes are too coarse for, the
  offset adds. Upstream learns it for the codes that were *drawn*: where left was drawn and right was shown,
  it pulls left towards right, and the average is back. `teach_codes` takes the demonstrated ones instead.
- One `train` run does both phases: `n_vqvae_training_steps` calls of `forward` make the codes, then they are
  frozen. Only the query of the current step acts; the others are further lessons from the same sequence.
- The counter of phase 1 is in no folder, upstream's or ours. A training run saves it with its own state, so
  that resuming goes on; training a folder that was saved in the middle of phase 1 counts anew, and says so.
- The loss counts padded actions as real ones, as upstream.
- Minivla-only fields, off by default: `vqvae_levels`, `vqvae_kmeans_init`, `vqvae_dead_code_threshold`,
  `teach_codes`, `several_cameras`, `compact_vision`, `vocabulary`.
"""

from __future__ import annotations

import warnings
from dataclasses import dataclass, field, replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange
from torch import Tensor, nn

from minivla import recorder
from minivla.actions.vq import ActionVQVAE, CodeHead, Prediction, describe_errors, focal_loss
from minivla.data.features import ACTION, OBS_STATE, NormalizationMode
from minivla.nn.gpt import GPT
from minivla.nn.image_vector import BACKBONE_NAMES, ImageVector
from minivla.nn.instruction import InstructionEncoder
from minivla.nn.masks import segment_mask
from minivla.policies.base import AnyStats, Batch, Draw, Policy, PolicyConfig, Rng, group, instructions
from minivla.segments import Segment, arrange


@dataclass
class VQBeTConfig(PolicyConfig):
    """LeRobot's VQBeTConfig, field by field; defaults are upstream's.

    n_obs_steps T, n_action_pred_token, action_chunk_size H: observations seen; chunks predicted from the
    current step on; actions in each, all carried out before looking again
    vision_backbone … spatial_softmax_num_keypoints: the image encoder (`minivla.nn.image_vector`)
    n_vqvae_training_steps, vqvae_n_embed C, vqvae_embedding_dim, vqvae_enc_hidden_dim: phase 1
    gpt_…, dropout: the transformer
    offset_loss_weight, primary_code_loss_weight, secondary_code_loss_weight: of the first level, of further
    bet_softmax_temperature, sequentially_select: how codes are sampled; each level knowing those before it
    optimizer_…, scheduler_warmup_steps: how LeRobot trains it
    vqvae_levels G, vqvae_kmeans_init, vqvae_dead_code_threshold: see `minivla.nn.vq` (minivla only)
    teach_codes: in phase 2, offsets and later levels are learnt beside the demonstrated codes (minivla only)
    several_cameras: one image token each, through one encoder (minivla only)
    compact_vision, vocabulary: as in ACT; the instruction is the first token (minivla only)

    Raises ValueError for numbers out of range.
    """

    type: ClassVar[str] = "vqbet"
    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = (
        "vqvae_levels", "vqvae_kmeans_init", "vqvae_dead_code_threshold", "teach_codes",
        "several_cameras", "compact_vision", "vocabulary",
    )  # fmt: skip

    n_obs_steps: int = 5
    n_action_pred_token: int = 3
    action_chunk_size: int = 5
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.IDENTITY,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    vision_backbone: str = "resnet18"
    crop_shape: tuple[int, int] | None = (84, 84)
    crop_is_random: bool = True
    pretrained_backbone_weights: str | None = "ResNet18_Weights.IMAGENET1K_V1"
    use_group_norm: bool = False
    spatial_softmax_num_keypoints: int = 32
    n_vqvae_training_steps: int = 20000
    vqvae_n_embed: int = 16
    vqvae_embedding_dim: int = 256
    vqvae_enc_hidden_dim: int = 128
    gpt_block_size: int = 500
    gpt_input_dim: int = 512
    gpt_output_dim: int = 512
    gpt_n_layer: int = 8
    gpt_n_head: int = 8
    gpt_hidden_dim: int = 512
    dropout: float = 0.1
    offset_loss_weight: float = 10000.0
    primary_code_loss_weight: float = 5.0
    secondary_code_loss_weight: float = 0.5
    bet_softmax_temperature: float = 0.1
    sequentially_select: bool = False
    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, ...] = (0.95, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-6
    optimizer_vqvae_lr: float = 1e-3
    optimizer_vqvae_weight_decay: float = 1e-4
    scheduler_warmup_steps: int = 500
    vqvae_levels: int = 2
    vqvae_kmeans_init: bool = False
    vqvae_dead_code_threshold: float = 0.0
    teach_codes: bool = False
    several_cameras: bool = False
    compact_vision: bool = False
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        at_least_one = (
            "n_obs_steps", "n_action_pred_token", "action_chunk_size", "vqvae_levels", "vqvae_n_embed",
            "vqvae_embedding_dim", "vqvae_enc_hidden_dim", "gpt_n_layer", "spatial_softmax_num_keypoints",
        )  # fmt: skip
        for name in at_least_one:
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}, expected a whole number from 1 on")
        if self.bet_softmax_temperature <= 0:
            raise ValueError(
                f"bet_softmax_temperature is {self.bet_softmax_temperature}, expected a number above 0; "
                "a small one, such as 1e-3, takes the likeliest code"
            )
        if len(self.optimizer_betas) != 2:
            raise ValueError(
                f"optimizer_betas is {self.optimizer_betas}, expected two, such as (0.95, 0.999)"
            )

    @property
    def n_action_steps(self) -> int:
        """A whole chunk is carried out before looking again."""
        return self.action_chunk_size

    @property
    def observation_delta_indices(self) -> list[int]:
        """The last T observations."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """From the oldest observation to the end of the last chunk: Q + H - 1 actions."""
        return list(range(1 - self.n_obs_steps, self.n_action_pred_token + self.action_chunk_size - 1))


class VQBeT(Policy):
    """VQ-BeT. Fetches the ImageNet weights that its config asks for.

    Raises ValueError for inputs other than `observation.state` and one camera (with `several_cameras`, more
    of one size), and for a sequence longer than `gpt_block_size`.
    """

    mask: Tensor

    name: ClassVar[str] = "vqbet"
    config_class: ClassVar[type[PolicyConfig]] = VQBeTConfig
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = (
        *BACKBONE_NAMES,
        (r"^(state_projector|rgb_feature_projector)\.", r"\1.0."),
        (r"^gpt\.(wte|wpe)\.", r"policy.transformer.\1."),
        (r"^gpt\.lm_head\.", "policy.lm_head."),
        (r"^gpt\.stack\.norm\.", "policy.transformer.ln_f."),
        (r"^gpt\.stack\.layers\.(\d+)\.self_attn\.in_proj_", r"policy.transformer.h.\1.attn.c_attn."),
        (r"^gpt\.stack\.layers\.(\d+)\.self_attn\.out_proj\.", r"policy.transformer.h.\1.attn.c_proj."),
        (r"^gpt\.stack\.layers\.(\d+)\.norm([12])\.", r"policy.transformer.h.\1.ln_\2."),
        (r"^gpt\.stack\.layers\.(\d+)\.linear1\.", r"policy.transformer.h.\1.mlp.0."),
        (r"^gpt\.stack\.layers\.(\d+)\.linear2\.", r"policy.transformer.h.\1.mlp.2."),
        (r"^vqvae\.vq_layer\.layers\.(\d+)\.", r"vqvae.vq_layer.layers.\1._codebook."),
        (r"^vqvae\.", "action_head.vqvae_model."),
        (r"^code_head\.all_levels\.", "action_head.map_to_cbet_preds_bin.0."),
        (r"^code_head\.by_level\.0\.", "action_head.map_to_cbet_preds_primary_bin.0."),
        (r"^code_head\.by_level\.1\.", "action_head.map_to_cbet_preds_secondary_bin.0."),
        (r"^code_head\.offset\.", "action_head.map_to_cbet_preds_offset.0."),
        (r"^", "vqbet."),
    )
    IGNORED_KEYS: ClassVar[dict[str, str]] = {
        r"vqbet\.policy\.transformer\.h\.\d+\.attn\.bias": "the causal mask, which follows from the segments",
        r"vqbet\.select_target_actions_indices": "which actions each query learns, a sliding window",
    }

    def __init__(
        self, config: VQBeTConfig, stats: AnyStats | None = None, *, allow_constant: bool = False
    ) -> None:
        super().__init__(config, stats, allow_constant=allow_constant)
        self._check_inputs(config)
        self._has_warned = False
        self.segments = arrange(segments_of(config))
        if (length := self.segments[-1].stop) > config.gpt_block_size:
            raise ValueError(
                f"the sequence has {length} tokens, gpt_block_size allows {config.gpt_block_size}; raise it, "
                "or lower n_obs_steps or n_action_pred_token"
            )
        self.query_places = [i for s in self.segments if s.kind == "query" for i in range(s.start, s.stop)]
        self._add_inputs(config)
        self.gpt = GPT(
            "gpt", config.gpt_input_dim, config.gpt_hidden_dim, config.gpt_output_dim,
            layers=config.gpt_n_layer, heads=config.gpt_n_head, positions=config.gpt_block_size,
            dropout=config.dropout,
        )  # fmt: skip
        self.register_buffer("mask", segment_mask(self.segments), persistent=False)
        self._add_heads(config)

    def _check_inputs(self, config: VQBeTConfig) -> None:
        cameras, others = list(config.image_features), set(config.input_features) - {OBS_STATE}
        several = len(cameras) > 1 and not config.several_cameras
        if not cameras or several or config.robot_state_feature is None or others != set(cameras):
            raise ValueError(
                f"VQ-BeT looks at observation.state and one camera; input_features has "
                f"{sorted(config.input_features)}. Leave the others out"
                + ("; several_cameras=True takes all cameras (minivla only)" if several else "")
            )

    def _add_inputs(self, config: VQBeTConfig) -> None:
        width = config.gpt_input_dim
        if config.vocabulary:
            self.instruction = InstructionEncoder(config.vocabulary, width)
        self.rgb_encoder = ImageVector(
            {key: feature.shape for key, feature in config.image_features.items()},
            backbone=config.vision_backbone, pretrained=config.pretrained_backbone_weights,
            group_norm=config.use_group_norm, crop=config.crop_shape, random_crop=config.crop_is_random,
            keypoints=config.spatial_softmax_num_keypoints, compact=config.compact_vision,
            condition=width if config.vocabulary else 0,
        )  # fmt: skip
        self.rgb_feature_projector = nn.Linear(2 * config.spatial_softmax_num_keypoints, width)
        assert config.robot_state_feature is not None
        self.state_projector = nn.Linear(config.robot_state_feature.shape[0], width)
        self.action_token = nn.Parameter(torch.randn(1, 1, width))

    def _add_heads(self, config: VQBeTConfig) -> None:
        sizes: dict[str, Any] = {"codes": config.vqvae_n_embed, "levels": config.vqvae_levels}
        horizon, actions = config.action_chunk_size, config.action_feature.shape[0]
        self.vqvae = ActionVQVAE(
            horizon, actions, width=config.vqvae_embedding_dim, hidden=config.vqvae_enc_hidden_dim, **sizes,
            kmeans_init=config.vqvae_kmeans_init, dead_code_threshold=config.vqvae_dead_code_threshold,
        )  # fmt: skip
        self.code_head = CodeHead(
            config.gpt_output_dim, horizon, actions, **sizes, one_by_one=config.sequentially_select,
            temperature=config.bet_softmax_temperature,
        )  # fmt: skip

    @property
    def inert(self) -> dict[str, str]:
        """What softmax does not see, and whether a codebook was begun, which only k-means asks."""
        levels = range(0 if self.config.vqvae_kmeans_init else self.config.vqvae_levels)
        begun = {f"vqvae.vq_layer.layers.{g}.initted": "asked only with vqvae_kmeans_init" for g in levels}
        return begun | {"rgb_encoder.pool.nets.bias": "no effect: softmax does not see a constant"}

    @property
    def resting(self) -> dict[str, str]:
        """Each phase trains one half."""
        if self.vqvae.discretized:
            return {"vqvae": "phase 1 is over, the codes stay what they are"}
        parts = {name.split(".")[0] for name, _ in self.named_parameters()}
        return dict.fromkeys(sorted(parts - {"vqvae"}), "phase 1 makes the codes first")

    def forward(
        self, batch: Batch, *, noise: Draw = None, time: Draw = None, generator: Rng = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Phase 1's loss until the codes are made, then phase 2's. In training, a call is a step of phase 1.

        `noise` and `generator` as in `predict`; VQ-BeT has no `time`.
        """
        wanted, given = len(self.config.action_delta_indices), batch[ACTION].shape[1]
        if given != wanted:
            raise ValueError(
                f"the batch has {given} actions a sample, expected {wanted}: from the oldest observation to "
                "the end of the last chunk (config.action_delta_indices)"
            )
        targets = rearrange(
            batch[ACTION].unfold(1, self.config.action_chunk_size, 1), "b query a h -> b query h a"
        )
        if self.vqvae.discretized:
            self.vqvae.requires_grad_(False)  # so that an average of the weights leaves them as they are
            shown = self.vqvae.encode(targets) if self.config.teach_codes else None
            given = self.predict(batch, noise=noise, generator=generator, shown=shown)
            return self.imitation_loss(targets, given)
        chunks = rearrange(targets, "b query h a -> (query b) h a")
        return self.vqvae.learn(chunks, self.config.n_vqvae_training_steps)

    def imitation_loss(self, targets: Tensor, given: Prediction) -> tuple[Tensor, dict[str, float]]:
        """Phase 2: focal loss on the codes of targets (B, Q, H, A), and the L1 of decoded + offset.

        Raises ValueError before phase 1 is over.
        """
        if not self.vqvae.discretized:
            raise ValueError(
                "phase 2 needs codes, and this VQ-VAE is untrained, or not to its end: call forward, which "
                f"trains it for n_vqvae_training_steps = {self.config.n_vqvae_training_steps} steps"
            )
        codes = self.vqvae.encode(targets)
        later = [self.config.secondary_code_loss_weight] * (self.config.vqvae_levels - 1)
        weights = targets.new_tensor([self.config.primary_code_loss_weight, *later])
        classification = (weights * focal_loss(given.logits, codes)).sum()
        offset_loss = F.l1_loss(given.chunks, targets)
        losses = {"classification_loss": classification, "offset_loss": offset_loss}
        metrics = losses | describe_errors(targets, codes, given)
        numbers = torch.stack([value.detach() for value in metrics.values()]).tolist()
        loss = classification + self.config.offset_loss_weight * offset_loss
        return loss, dict(zip(metrics, numbers, strict=True))

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: Batch, *, noise: Draw = None, steps: int | None = None, generator: Rng = None
    ) -> Tensor:
        """The current step's chunk (B, H, A), normalised, of a batch with a history, (B, T, …).

        The codes are drawn: `noise` and `generator` as in `predict`. `steps` changes nothing. Warns, once,
        when phase 1 is not over.
        """
        self.eval()
        if not self.vqvae.discretized and not self._has_warned:
            self._has_warned = True
            warnings.warn(
                "phase 1 of this VQ-BeT is not over: its codes mean nothing yet, and its actions less",
                stacklevel=3,
            )
        return self.predict(batch, noise=noise, generator=generator).chunks[:, self.config.n_obs_steps - 1]

    def predict(
        self, batch: Batch, *, noise: Draw = None, generator: Rng = None, shown: Tensor | None = None
    ) -> Prediction:
        """What every query says of a batch with a history, (B, T, …).

        Codes are drawn from the softmax of logits / temperature by torch.multinomial; `noise` (B, Q, G, C),
        if given, are its draws from Exp(1), `generator` makes them. What is decoded, and its offset, are of
        the codes drawn, or of those `shown` (B, Q, G).
        """
        features = self.think(self.embed(batch, generator=generator))
        logits, codes, offset = self.code_head(features, noise, generator, shown)
        decoded = self.vqvae.decode(codes if shown is None else shown)
        for name, value in (("codes", codes), ("logits", logits), ("offsets", offset), ("decoded", decoded)):
            recorder.keep(name, value)
        return Prediction(logits, codes, decoded, offset)

    def embed(self, batch: Batch, *, generator: Rng = None) -> Tensor:
        """The sequence of tokens, (B, L, gpt_input_dim). Raises ValueError for another history than T."""
        self.expect_history(batch)
        instruction = self.instruction(instructions(batch)) if self.config.vocabulary else None
        images = self.rgb_encoder(batch, instruction, generator=generator)
        recorder.keep("image_features", images)
        images = rearrange(images, "b t (camera d) -> b t camera d", camera=len(self.config.image_features))
        state = rearrange(self.state_projector(batch[OBS_STATE]), "b t d -> b t 1 d")
        query = self.action_token.expand_as(state[:, 0])  # (B, 1, D)
        steps = torch.cat((self.rgb_feature_projector(images), state, query[:, None].expand_as(state)), dim=2)
        first = [] if instruction is None else [rearrange(instruction, "b d -> b 1 d")]
        ahead = [query] * (self.config.n_action_pred_token - 1)
        return torch.cat((*first, rearrange(steps, "b t token d -> b (t token) d"), *ahead), dim=1)

    def think(self, tokens: Tensor) -> Tensor:
        """The GPT, and its answers at the queries: (B, L, gpt_input_dim) to (B, Q, gpt_output_dim)."""
        if (call := recorder.current()) is not None:
            call.lay_out("gpt.*", self.segments, self.segments)
            call.describe(self.segments, self.mask[0], stacks=("gpt",))
        return self.gpt(tokens, self.mask)[:, self.query_places]

    @property
    def schedule_start(self) -> int:
        """Warm-up and decay begin with phase 2; with codes that were made before, at once."""
        made_before = bool(self.vqvae.discretized) and self.vqvae.optimized_steps == 0
        return 0 if made_before else int(self.config.n_vqvae_training_steps)

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Three groups, as upstream, for Adam, whose weight decay is added to the gradient: everything; the
        VQ-VAE; and, without decay, the GPT's biases, norms and positions.
        """
        c = self.config
        settings = (
            (c.optimizer_lr, c.optimizer_weight_decay),
            (c.optimizer_vqvae_lr, c.optimizer_vqvae_weight_decay),
            (c.optimizer_lr, 0.0),
        )
        place = dict.fromkeys(self.vqvae.parameters(), 1) | dict.fromkeys(self.gpt.undecayed, 2)
        trainable = [p for p in self.parameters() if p.requires_grad]
        members = [[p for p in trainable if place.get(p, 0) == i] for i in range(len(settings))]
        adam = {"betas": c.optimizer_betas, "eps": c.optimizer_eps, "decoupled_weight_decay": False}
        return [group(part, *how) | adam for part, how in zip(members, settings, strict=True)]


def segments_of(config: VQBeTConfig) -> list[Segment]:
    """What the tokens are; each segment is a block of its own, so that all is causal."""
    segments = [Segment("instruction", "language", int(bool(config.vocabulary)))]
    for ago in range(config.n_obs_steps - 1, -1, -1):
        when = f" t-{ago}" if ago else " t"
        for key in config.image_features:
            segments.append(Segment(key.rsplit(".", 1)[-1] + when, "image", 1, image=key))
        segments += [Segment("state" + when, "state", 1), Segment("query" + when, "query", 1)]
    segments.append(Segment("queries ahead", "query", config.n_action_pred_token - 1, rule="causal"))
    return [replace(segment, block=i) for i, segment in enumerate(segments)]
