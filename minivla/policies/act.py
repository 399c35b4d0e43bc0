"""ACT, Action Chunking with Transformers: look once, predict the next H actions at once.

Paper: Zhao et al. 2023, "Learning Fine-Grained Bimanual Manipulation with Low-Cost Hardware" (arXiv
2304.13705). Upstream: LeRobot 0.6 `policies/act/modeling_act.py`; the first code, github.com/tonyzhaozh/act.

    training only                          always
    [cls][state][action × H]          [latent][state][env state][instruction][patches, camera 1][camera 2]…
          VAE encoder                                           encoder, all see all
        cls → mean, log variance                                      │ memory
                └──── latent ─────────┘                 [query × H] decoder → H actions

What is special here:
- The chunk is regressed (L1), not sampled. A conditional VAE soaks up what the demonstrations leave open:
  while training, a small encoder that may read the answer squeezes it into a latent; at inference the latent
  is simply zero, the prior's mean.
- A layer adds positions to queries and keys, never to values (DETR). The decoder's input is all zeros: only
  the learned positions of the H queries tell them apart, and its first self-attention averages values that
  are all alike (`inert`).
- The published ACT model uses one decoder layer: the first code stacked seven and, by a slip, read out the
  first (tonyzhaozh/act issue 25); LeRobot made that the default.
- Two minivla-only fields, off by default, serve small worlds: `compact_vision` and `vocabulary`.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
from einops import rearrange, repeat
from torch import Tensor, nn

from minivla import recorder
from minivla.actions.regression import TemporalEnsembler, kl_to_standard_normal, masked_l1
from minivla.data.features import ACTION, OBS_ENV_STATE, OBS_STATE, NormalizationMode
from minivla.nn.compact_vision import CompactVision
from minivla.nn.instruction import InstructionEncoder
from minivla.nn.masks import key_mask, segment_mask
from minivla.nn.positions import sine_positions, sine_positions_2d
from minivla.nn.resnet import ResNet, load_imagenet
from minivla.nn.transformer import Stack
from minivla.policies.base import (
    AnyStats,
    Batch,
    Draw,
    Policy,
    PolicyConfig,
    Rng,
    expect_batch_size,
    group,
    instructions,
)
from minivla.segments import Segment, arrange, camera_names

# Vectors that become a token each: batch key, name, layer.
STATES = {
    OBS_STATE: ("state", "encoder_robot_state_input_proj"),
    OBS_ENV_STATE: ("environment state", "encoder_env_state_input_proj"),
}


@dataclass
class ACTConfig(PolicyConfig):
    """LeRobot's ACTConfig, field by field; defaults are upstream's.

    chunk_size H, n_action_steps: actions predicted, and carried out before looking again
    vision_backbone, pretrained_backbone_weights, replace_final_stride_with_dilation: the ResNet and its start
    dim_model D, n_heads, dim_feedforward, n_encoder_layers, n_decoder_layers, pre_norm, …: the transformer
    use_vae, latent_dim, n_vae_encoder_layers, kl_weight: the variational part
    temporal_ensemble_coeff: None for a queue of actions, a number for temporal ensembling
    compact_vision: the small image encoder of `minivla.nn.compact_vision` for the ResNet (minivla only)
    vocabulary: the words of the instruction; none means no instruction, as upstream (minivla only)

    Raises ValueError for settings that contradict each other.
    """

    type: ClassVar[str] = "act"
    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = ("compact_vision", "vocabulary")

    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: dict.fromkeys(("VISUAL", "STATE", "ACTION"), NormalizationMode.MEAN_STD)
    )
    chunk_size: int = 100
    n_action_steps: int = 100
    vision_backbone: str = "resnet18"
    pretrained_backbone_weights: str | None = "ResNet18_Weights.IMAGENET1K_V1"
    replace_final_stride_with_dilation: int = False
    pre_norm: bool = False
    dim_model: int = 512
    n_heads: int = 8
    dim_feedforward: int = 3200
    feedforward_activation: str = "relu"
    n_encoder_layers: int = 4
    n_decoder_layers: int = 1
    use_vae: bool = True
    latent_dim: int = 32
    n_vae_encoder_layers: int = 4
    temporal_ensemble_coeff: float | None = None
    dropout: float = 0.1
    kl_weight: float = 10.0
    optimizer_lr: float = 1e-5
    optimizer_weight_decay: float = 1e-4
    optimizer_lr_backbone: float = 1e-5
    compact_vision: bool = False
    vocabulary: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.temporal_ensemble_coeff is not None and self.n_action_steps != 1:
            raise ValueError(
                f"temporal ensembling predicts at every step, so n_action_steps must be 1, not "
                f"{self.n_action_steps}; set n_action_steps=1 or temporal_ensemble_coeff=None"
            )
        if not 1 <= self.n_action_steps <= self.chunk_size:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, expected 1 to chunk_size = {self.chunk_size}: "
                "no more actions can be carried out than were predicted"
            )
        if self.n_obs_steps != 1:
            raise ValueError(f"ACT looks at one observation; n_obs_steps must be 1, not {self.n_obs_steps}")

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk: now and the next H - 1 steps."""
        return list(range(self.chunk_size))


class ACT(Policy):
    """Action Chunking with Transformers. Fetches the ImageNet weights that its config asks for."""

    name: ClassVar[str] = "act"
    config_class: ClassVar[type[PolicyConfig]] = ACTConfig
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ((r"^", "model."),)

    def __init__(
        self, config: ACTConfig, stats: AnyStats | None = None, *, allow_constant: bool = False
    ) -> None:
        super().__init__(config, stats, allow_constant=allow_constant)
        actions = config.action_feature.shape[0]
        if not config.image_features and config.env_state_feature is None:
            raise ValueError(
                "ACT needs a camera or observation.environment_state; input_features has "
                f"{sorted(config.input_features)}"
            )
        self.encoder = _stack(config, "encoder", config.n_encoder_layers, norm=config.pre_norm)
        self.decoder = _stack(config, "decoder", config.n_decoder_layers, norm=True, cross=True)
        for parameter in (*self.encoder.parameters(), *self.decoder.parameters()):
            if parameter.dim() > 1:
                nn.init.xavier_uniform_(parameter)
        self._add_inputs(config)
        if config.use_vae:
            self._add_vae(config)
        self.decoder_pos_embed = nn.Embedding(config.chunk_size, config.dim_model)
        self.action_head = nn.Linear(config.dim_model, actions)

    def _add_inputs(self, config: ACTConfig) -> None:
        width, flat_tokens = config.dim_model, 1
        self.encoder_latent_input_proj = nn.Linear(config.latent_dim, width)
        for key in [key for key in STATES if key in config.input_features]:
            self.add_module(STATES[key][1], nn.Linear(config.input_features[key].shape[0], width))
            flat_tokens += 1
        if config.vocabulary:
            self.instruction = InstructionEncoder(config.vocabulary, width)
            flat_tokens += 1
        if config.image_features:
            self.backbone = self._make_backbone(config)
            self.encoder_img_feat_input_proj = nn.Conv2d(self.backbone.channels, width, kernel_size=1)
        self.encoder_1d_feature_pos_embed = nn.Embedding(flat_tokens, width)

    def _make_backbone(self, config: ACTConfig) -> ResNet | CompactVision:
        if config.compact_vision:
            return CompactVision(config.dim_model, condition=config.dim_model if config.vocabulary else 0)
        network = ResNet(config.vision_backbone, dilate_last=bool(config.replace_final_stride_with_dilation))
        if config.pretrained_backbone_weights:
            load_imagenet(network, config.pretrained_backbone_weights)
        return network

    def _add_vae(self, config: ACTConfig) -> None:
        width, has_state = config.dim_model, config.robot_state_feature is not None
        layers = config.n_vae_encoder_layers
        self.vae_encoder = _stack(config, "vae_encoder", layers, norm=config.pre_norm)
        self.vae_encoder_cls_embed = nn.Embedding(1, width)
        if config.robot_state_feature is not None:
            self.vae_encoder_robot_state_input_proj = nn.Linear(config.robot_state_feature.shape[0], width)
        self.vae_encoder_action_input_proj = nn.Linear(config.action_feature.shape[0], width)
        self.vae_encoder_latent_output_proj = nn.Linear(width, 2 * config.latent_dim)
        positions = rearrange(
            sine_positions(1 + has_state + config.chunk_size, width), "token width -> 1 token width"
        )
        self.register_buffer("vae_encoder_pos_enc", positions)

    @property
    def inert(self) -> dict[str, str]:
        """Tensors that are loaded and cannot matter (`inert_act`)."""
        return inert_act(self.config)

    def reset(self) -> None:
        """Forget the episode: the queue of actions, or the ensemble."""
        super().reset()
        coefficient = self.config.temporal_ensemble_coeff
        self.ensembler = (
            None if coefficient is None else TemporalEnsembler(coefficient, self.config.chunk_size)
        )

    def forward(
        self, batch: Batch, *, noise: Draw = None, time: Draw = None, generator: Rng = None
    ) -> tuple[Tensor, dict[str, float]]:
        """L1 + kl_weight · KL. `noise` (B, latent_dim) is the latent's standard normal draw; ACT has no
        `time`.

        In evaluation mode the latent is zero and the loss is the L1 alone, as upstream.
        """
        if self.config.use_vae and self.training:
            latent, mean, log_variance = self.encode_chunk(batch, noise=noise, generator=generator)
            l1 = masked_l1(self.decode(batch, latent), batch[ACTION], batch["action_is_pad"])
            kl = kl_to_standard_normal(mean, log_variance)
            return l1 + self.config.kl_weight * kl, {"l1_loss": l1.item(), "kld_loss": kl.item()}
        l1 = masked_l1(self.decode(batch, self.prior_mean(batch)), batch[ACTION], batch["action_is_pad"])
        return l1, {"l1_loss": l1.item()}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: Batch, *, noise: Draw = None, steps: int | None = None, generator: Rng = None
    ) -> Tensor:
        """The chunk (B, H, A), normalised. `noise` (B, latent_dim), if given, is used as the latent in place
        of zero.

        ACT takes one step and draws nothing: `steps` and `generator` change nothing.
        """
        self.eval()
        return self.decode(batch, self.prior_mean(batch) if noise is None else noise)

    @torch.no_grad()
    def select_action(self, batch: Batch) -> Tensor:
        """The next normalised action (B, A): from the queue, or the mean of all chunks predicted so far."""
        if self.ensembler is None:
            return super().select_action(batch)
        if self.ensembler.mean is not None:
            expect_batch_size(batch, len(self.ensembler.mean))
        return self.ensembler.update(self.predict_action_chunk(batch))

    def prior_mean(self, batch: Batch) -> Tensor:
        """The latent at inference: zeros (B, latent_dim)."""
        example = next(batch[key] for key in self.config.input_features if key in batch)
        return torch.zeros(
            len(example), self.config.latent_dim, dtype=self.action_head.weight.dtype, device=self.device
        )

    def encode_chunk(
        self,
        batch: Batch,
        *,
        noise: Tensor | None = None,
        generator: torch.Generator | None = None,
    ) -> tuple[Tensor, Tensor, Tensor]:
        """The VAE's encoder: the demonstrated chunk to a latent. Returns (latent, mean, log variance), each
        (B, Z).
        """
        action, is_pad = batch[ACTION], batch["action_is_pad"]
        tokens = [repeat(self.vae_encoder_cls_embed.weight, "1 width -> batch 1 width", batch=len(action))]
        if self.config.robot_state_feature is not None:
            tokens.append(
                rearrange(self.vae_encoder_robot_state_input_proj(batch[OBS_STATE]), "b width -> b 1 width")
            )
        # Class and state are always real.
        valid = torch.cat((is_pad.new_ones(len(action), len(tokens)), ~is_pad), dim=1)
        if (call := recorder.current()) is not None:
            describe_vae(call, action.shape[1], has_state=len(tokens) == 2)
        tokens.append(self.vae_encoder_action_input_proj(action))
        out = self.vae_encoder(torch.cat(tokens, dim=1), self.vae_encoder_pos_enc, mask=key_mask(valid))
        mean, log_variance = self.vae_encoder_latent_output_proj(out[:, 0]).chunk(2, dim=-1)
        if noise is None:
            noise = torch.randn(mean.shape, generator=generator, dtype=mean.dtype, device=mean.device)
        latent = mean + (log_variance / 2).exp() * noise
        recorder.keep("posterior", torch.cat((mean, log_variance), dim=-1))
        recorder.keep("latent", latent)
        return latent, mean, log_variance

    def embed(self, batch: Batch, latent: Tensor) -> tuple[Tensor, Tensor, list[Segment]]:
        """Everything the encoder looks at. Returns (tokens (B, L, D), positions (L, D), segments)."""
        flat, segments = [self.encoder_latent_input_proj(latent)], [Segment("latent", "latent", 1)]
        for key, (name, layer) in STATES.items():
            if key in self.config.input_features:
                flat.append(getattr(self, layer)(batch[key]))
                segments.append(Segment(name, "state", 1))
        instruction = self.instruction(instructions(batch)) if self.config.vocabulary else None
        if instruction is not None:
            flat.append(instruction)
            segments.append(Segment("instruction", "language", 1))
        tokens, positions = [torch.stack(flat, dim=1)], [self.encoder_1d_feature_pos_embed.weight]
        cameras = camera_names(self.config.image_features)
        for key, feature_map in self.see(batch, instruction).items():
            recorder.keep(f"backbone.{key}", feature_map)
            rows, columns = feature_map.shape[-2:]
            tokens.append(rearrange(self.encoder_img_feat_input_proj(feature_map), "b d y x -> b (y x) d"))
            positions.append(
                sine_positions_2d(rows, columns, self.config.dim_model, latent.device).to(latent.dtype)
            )
            segments.append(Segment(cameras[key], "image", rows * columns, grid=(rows, columns), image=key))
        return torch.cat(tokens, dim=1), torch.cat(positions), arrange(segments)

    def see(self, batch: Batch, instruction: Tensor | None) -> dict[str, Tensor]:
        """Feature maps (B, C, h, w) by camera. Cameras of one size go through the backbone together."""
        images = {key: batch[key] for key in self.config.image_features}
        if self.config.compact_vision:
            return {key: self.backbone(image, instruction) for key, image in images.items()}
        if len({image.shape for image in images.values()}) != 1:
            return {key: self.backbone(image) for key, image in images.items()}
        maps = self.backbone(torch.cat(list(images.values()))).chunk(len(images))
        return dict(zip(images, maps, strict=True))

    def decode(self, batch: Batch, latent: Tensor) -> Tensor:
        """Observation and latent (B, Z) to the chunk (B, H, A), normalised."""
        tokens, positions, segments = self.embed(batch, latent)
        if (call := recorder.current()) is not None:
            describe_act(call, segments, self.config.chunk_size)
        memory = self.encoder(tokens, positions)
        queries = self.decoder_pos_embed.weight
        blank = torch.zeros(len(memory), *queries.shape, dtype=memory.dtype, device=memory.device)
        return self.action_head(self.decoder(blank, queries, memory, positions))

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """Two groups, as upstream: the backbone has its own learning rate."""
        backbone = {id(p) for p in self.backbone.parameters()} if self.config.image_features else set()
        trainable = [p for p in self.parameters() if p.requires_grad]
        c = self.config
        return [
            group((p for p in trainable if id(p) not in backbone), c.optimizer_lr, c.optimizer_weight_decay),
            group(
                (p for p in trainable if id(p) in backbone), c.optimizer_lr_backbone, c.optimizer_weight_decay
            ),
        ]


def _stack(config: ACTConfig, name: str, layers: int, *, norm: bool, cross: bool = False) -> Stack:
    return Stack(
        name, layers, config.dim_model, config.n_heads, config.dim_feedforward, norm=norm, cross=cross,
        dropout=config.dropout, activation=config.feedforward_activation, pre_norm=config.pre_norm,
    )  # fmt: skip


def inert_act(config: Any) -> dict[str, str]:
    """Tensors that upstream trains and that change nothing, with the reason; for LeRobot's config as well."""
    blank = "no effect: the decoder's input is zero, so all its values are alike"
    inert = {f"decoder.layers.0.{'norm1.weight' if config.pre_norm else 'self_attn.in_proj_weight'}": blank}
    if not config.use_vae:
        inert["encoder_latent_input_proj.weight"] = "no effect: without a VAE the latent is always zero"
    return inert


def describe_act(call: recorder.Call, segments: list[Segment], chunk_size: int) -> None:
    """Tell a trace what the tokens are: the encoder's, then one query for each action of the chunk."""
    queries = Segment("queries", "query", chunk_size, block=1)
    call.lay_out("encoder.*", segments, segments)
    call.lay_out("decoder.*.self", arrange([queries]), arrange([queries]))
    call.lay_out("decoder.*.cross", arrange([queries]), segments)
    main = arrange([*segments, queries])
    call.describe(main, segment_mask(main)[0], stacks=("encoder", "decoder"))


def describe_vae(call: recorder.Call, chunk_size: int, *, has_state: bool) -> None:
    """Tell a trace what the VAE encoder's tokens are."""
    known = [Segment("class", "latent", 1), Segment("state", "state", int(has_state))]
    segments = arrange([*known, Segment("chunk", "action", chunk_size)])
    call.lay_out("vae_encoder.*", segments, segments)
