"""Diffusion Policy: start from noise, and let what was seen pull it into a chunk of actions.

Paper: Chi et al. 2023, "Diffusion Policy: Visuomotor Policy Learning via Action Diffusion" (arXiv
2303.04137). Upstream: LeRobot 0.6 `policies/diffusion/modeling_diffusion.py`; the first code,
github.com/real-stanford/diffusion_policy.

    T observations:  state, keypoints of each camera, environment state, instruction
                          │ once a chunk
    noise (H, A) ──→ [denoiser] ──→ a little less noise ──→ [denoiser] ──→ … ──→ chunk (H, A)
                       t = 99                                 t = 98

    time, relative to now   1-T  …  -1    0    1   …   n-1   …   H-T
    observed                 x   x   x    x
    predicted                x   x   x    x    x   x    x    x    x
    carried out                           x    x   x    x                n = n_action_steps

What is special here:
- Noise decides which way round an obstacle: the chunk is sampled, not averaged. The loss is a plain mean
  squared error all the same, against the noise that was added.
- The chunk begins at the *oldest* observation. Its first T - 1 actions are already past when it is made; they
  help it to continue what was begun.
- How many steps, and which sampler, is chosen at call time: `load(…, noise_scheduler_type="DDIM",
  num_inference_steps=10)` on weights that were trained for DDPM.
- The horizon must be a multiple of 2^(stages of the U-Net); upstream asks for one halving more than it makes.
- Minivla-only fields, off by default: `compact_vision`, `vocabulary`; `denoiser="transformer"`, the paper's
  other network; `objective="flow"`, rectified flow with the same network, its time told as t · N.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from einops import rearrange, repeat
from torch import Tensor, nn

from minivla import recorder
from minivla.actions import flow
from minivla.actions.diffusion import SAMPLERS, NoiseSchedule, make_betas, sample
from minivla.data.features import ACTION, OBS_ENV_STATE, OBS_STATE, NormalizationMode
from minivla.nn.action_transformer import ActionTransformer
from minivla.nn.image_vector import BACKBONE_NAMES, ImageVector, Size
from minivla.nn.instruction import InstructionEncoder
from minivla.nn.unet import ConditionalUnet1d
from minivla.policies.base import AnyStats, Batch, Draw, Policy, PolicyConfig, Rng, group, instructions

INSTRUCTION_WIDTH = 64


@dataclass
class DiffusionConfig(PolicyConfig):
    """LeRobot's DiffusionConfig, field by field; defaults are upstream's.

    n_obs_steps T, horizon H, n_action_steps: observations seen, actions predicted, and carried out
    drop_n_last_frames: frames at the end of each episode that training leaves out
    vision_backbone … use_separate_rgb_encoder_per_camera: the image encoders (`minivla.nn.image_vector`)
    down_dims … gradient_checkpointing: the U-Net (`minivla.nn.unet`)
    noise_scheduler_type … num_inference_steps: the noise (`minivla.actions.diffusion`)
    do_mask_loss_for_padding: leave actions beyond an episode's end out of the loss
    compact_vision, vocabulary: as in ACT (minivla only)
    denoiser: "unet" or "transformer", with its transformer_… sizes (minivla only)
    objective: "diffusion" or "flow" (minivla only)

    Raises ValueError for settings that contradict each other.
    """

    type: ClassVar[str] = "diffusion"
    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = (
        "compact_vision", "vocabulary", "denoiser", "objective",
        "transformer_width", "transformer_heads", "transformer_layers", "transformer_dropout",
    )  # fmt: skip

    n_obs_steps: int = 2
    normalization_mapping: dict[str, NormalizationMode] = field(
        default_factory=lambda: {
            "VISUAL": NormalizationMode.MEAN_STD,
            "STATE": NormalizationMode.MIN_MAX,
            "ACTION": NormalizationMode.MIN_MAX,
        }
    )
    horizon: int = 64
    n_action_steps: int = 32
    drop_n_last_frames: int = 7
    vision_backbone: str = "resnet18"
    resize_shape: Size | None = None
    crop_ratio: float = 1.0
    crop_shape: Size | None = None
    crop_is_random: bool = True
    pretrained_backbone_weights: str | None = "ResNet18_Weights.IMAGENET1K_V1"
    use_group_norm: bool = False
    spatial_softmax_num_keypoints: int = 32
    use_separate_rgb_encoder_per_camera: bool = True
    down_dims: tuple[int, ...] = (512, 1024, 2048)
    kernel_size: int = 5
    n_groups: int = 8
    diffusion_step_embed_dim: int = 128
    use_film_scale_modulation: bool = True
    gradient_checkpointing: bool = False
    noise_scheduler_type: str = "DDPM"
    num_train_timesteps: int = 100
    beta_schedule: str = "squaredcos_cap_v2"
    beta_start: float = 0.0001
    beta_end: float = 0.02
    prediction_type: str = "epsilon"
    clip_sample: bool = True
    clip_sample_range: float = 1.0
    num_inference_steps: int | None = None
    compile_model: bool = False
    compile_mode: str = "reduce-overhead"
    do_mask_loss_for_padding: bool = False
    optimizer_lr: float = 1e-4
    optimizer_betas: tuple[float, ...] = (0.95, 0.999)
    optimizer_eps: float = 1e-8
    optimizer_weight_decay: float = 1e-6
    scheduler_name: str = "cosine"
    scheduler_warmup_steps: int = 500
    compact_vision: bool = False
    vocabulary: tuple[str, ...] = ()
    denoiser: str = "unet"
    objective: str = "diffusion"
    transformer_width: int = 256
    transformer_heads: int = 4
    transformer_layers: int = 8
    transformer_dropout: float = 0.3

    def __post_init__(self) -> None:
        flow.expect_one_of("denoiser", self.denoiser, ("unet", "transformer"))
        flow.expect_one_of("objective", self.objective, ("diffusion", "flow"))
        flow.expect_one_of("noise_scheduler_type", self.noise_scheduler_type, SAMPLERS)
        flow.expect_one_of("prediction_type", self.prediction_type, ("epsilon", "sample"))
        factor, latest = 2 ** len(self.down_dims), self.horizon - self.n_obs_steps + 1
        if self.denoiser == "unet" and self.horizon % factor:
            raise ValueError(
                f"horizon is {self.horizon}, expected a multiple of {factor}: the U-Net halves it at each of "
                f"down_dims {self.down_dims}; set horizon={-(-self.horizon // factor) * factor}"
            )
        if self.n_obs_steps < 1 or not 1 <= self.n_action_steps <= latest:
            raise ValueError(
                f"n_action_steps is {self.n_action_steps}, n_obs_steps {self.n_obs_steps}; expected at least "
                f"1 of each, and n_action_steps up to horizon - n_obs_steps + 1 = {latest}: the chunk begins "
                "at the oldest observation"
            )
        if not 0 < self.crop_ratio <= 1:
            raise ValueError(f"crop_ratio is {self.crop_ratio}, expected above 0 and up to 1")
        if self.resize_shape is not None:  # upstream's rule: crop_ratio decides, whatever crop_shape says
            rows, columns = (int(size * self.crop_ratio) for size in self.resize_shape)
            self.crop_shape = (rows, columns) if self.crop_ratio < 1 else None

    @property
    def observation_delta_indices(self) -> list[int]:
        """The history: T observations up to now."""
        return list(range(1 - self.n_obs_steps, 1))

    @property
    def action_delta_indices(self) -> list[int]:
        """The chunk: H actions, the first one beside the oldest observation."""
        return list(range(1 - self.n_obs_steps, 1 - self.n_obs_steps + self.horizon))


class DiffusionPolicy(Policy):
    """Diffusion Policy. Fetches the ImageNet weights that its config asks for."""

    name: ClassVar[str] = "diffusion"
    config_class: ClassVar[type[PolicyConfig]] = DiffusionConfig
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ((r"^", "diffusion."), *BACKBONE_NAMES)

    def __init__(
        self, config: DiffusionConfig, stats: AnyStats | None = None, *, allow_constant: bool = False
    ) -> None:
        super().__init__(config, stats, allow_constant=allow_constant)
        state, environment = config.robot_state_feature, config.env_state_feature
        if state is None or not (config.image_features or environment):
            raise ValueError(
                "Diffusion Policy needs observation.state, and a camera or observation.environment_state; "
                f"input_features has {sorted(config.input_features)}"
            )
        width = state.shape[0] + (environment.shape[0] if environment else 0)
        if config.vocabulary:
            self.instruction = InstructionEncoder(config.vocabulary, INSTRUCTION_WIDTH)
            width += INSTRUCTION_WIDTH
        self.encoders = _image_encoders(config)
        if self.encoders:
            separate = config.use_separate_rgb_encoder_per_camera
            self.rgb_encoder = nn.ModuleList(self.encoders) if separate else self.encoders[0]
            width += sum(encoder.width for encoder in self.encoders)
        self.add_module(config.denoiser, _denoiser(config, width))
        count = config.num_train_timesteps
        betas = make_betas(config.beta_schedule, count, config.beta_start, config.beta_end)
        clip = config.clip_sample_range if config.clip_sample else None
        self.schedule = NoiseSchedule(betas, prediction=config.prediction_type, clip=clip)
        if config.compile_model:
            self.denoiser.compile(mode=config.compile_mode)

    @property
    def denoiser(self) -> Any:
        """The network between noise and chunk."""
        return self.get_submodule(self.config.denoiser)

    @property
    def inert(self) -> dict[str, str]:
        """A number added to a whole heat map leaves its softmax, and so its keypoint, where it was."""
        biases = (name for name, _ in self.named_parameters() if name.endswith("pool.nets.bias"))
        return dict.fromkeys(biases, "no effect: softmax does not see a constant")

    def forward(
        self, batch: Batch, *, noise: Draw = None, time: Draw = None, generator: Rng = None
    ) -> tuple[Tensor, dict[str, float]]:
        """Mean squared error of what the denoiser predicts. `noise` (B, H, A); `time` (B,), timesteps of type
        int64 in [0, N), or in [0, 1] for objective "flow".

        What is not given is drawn: the crop, the noise, the time. There are no parts. Raises ValueError for
        a chunk or history of another length, and for a time of the wrong kind.
        """
        seen, action = self.see(batch, generator), batch[ACTION]
        if action.shape[1] != self.config.horizon:
            raise ValueError(f"action has {action.shape[1]} steps, expected horizon = {self.config.horizon}")
        noise = flow.draw_noise(action.shape, action, generator) if noise is None else noise
        time = self.draw_time(action, generator) if time is None else time
        if time.is_floating_point() != (self.config.objective == "flow"):
            raise ValueError(
                f"time is of {time.dtype}, the objective {self.config.objective!r}; expected int64 timesteps "
                "for 'diffusion', floating-point times in [0, 1] for 'flow'"
            )
        if self.config.objective == "flow":
            x = flow.interpolate(action, noise, time, flow.RECTIFIED)
            target = flow.velocity_target(action, noise, flow.RECTIFIED)
        else:
            x = self.schedule.add_noise(action, noise, time)
            target = self.schedule.target(action, noise, time)
        recorder.keep("noisy", x)
        recorder.keep("target", target)
        error = F.mse_loss(self.predict(x, time, self.denoiser.observe(seen)), target, reduction="none")
        if not self.config.do_mask_loss_for_padding:
            return error.mean(), {}
        valid = rearrange(~batch["action_is_pad"], "b h -> b h 1")
        return (error * valid).sum() / (valid.sum() * error.shape[-1]).clamp(min=1), {}

    @torch.no_grad()
    def predict_action_chunk(
        self, batch: Batch, *, noise: Draw = None, steps: int | None = None, generator: Rng = None
    ) -> Tensor:
        """The n_action_steps actions from the current one on, (B, n_action_steps, A), normalised.

        `noise` (B, H, A) is where the sampler starts; `steps` replaces num_inference_steps (if that is None,
        all N). Raises ValueError for steps out of range, and a history of another length.
        """
        self.eval()
        observed = self.denoiser.observe(seen := self.see(batch))
        c = self.config
        if noise is None:
            noise = flow.draw_noise((len(seen), c.horizon, c.action_feature.shape[0]), seen, generator)
        if steps is None:
            steps = c.num_train_timesteps if c.num_inference_steps is None else c.num_inference_steps

        def network(x: Tensor, time: Tensor) -> Tensor:
            return self.predict(x, time, observed)

        if c.objective == "flow":
            chunk = flow.euler(network, noise, steps, flow.RECTIFIED)
        else:
            chunk = sample(network, noise, self.schedule, steps, c.noise_scheduler_type, generator)
        recorder.keep("horizon", chunk)
        return chunk[:, c.n_obs_steps - 1 :][:, : c.n_action_steps]

    def draw_time(self, action: Tensor, generator: Rng) -> Tensor:
        """A moment for each sample (B,), all alike likely."""
        size, count = (len(action),), self.config.num_train_timesteps
        place = action.device if generator is None else generator.device
        if self.config.objective == "flow":
            return torch.rand(size, generator=generator, device=place).to(action)
        return torch.randint(count, size, generator=generator, device=place).to(action.device)

    def predict(self, x: Tensor, time: Tensor, observed: Any) -> Tensor:
        """What the denoiser says of the noisy chunk x (B, H, A) at `time` (B,) or (1,). Returns (B, H, A)."""
        timestep = time * self.config.num_train_timesteps if self.config.objective == "flow" else time
        predicted: Tensor = self.denoiser(x, timestep, observed)
        recorder.keep("denoised", predicted)
        return predicted

    def see(self, batch: Batch, generator: Rng = None) -> Tensor:
        """The observations as vectors (B, T, C): state, cameras, environment state, instruction.

        Raises ValueError unless the history has n_obs_steps observations.
        """
        self.expect_history(batch)
        instruction = self.instruction(instructions(batch)) if self.config.vocabulary else None
        parts = [batch[OBS_STATE]]
        parts += [encoder(batch, instruction, generator=generator) for encoder in self.encoders]
        if self.config.env_state_feature is not None:
            parts.append(batch[OBS_ENV_STATE])
        if instruction is not None:
            parts.append(repeat(instruction, "b d -> b t d", t=self.config.n_obs_steps))
        seen = torch.cat(parts, dim=-1)
        recorder.keep("condition", seen)
        return seen

    def optimizer_groups(self) -> list[dict[str, Any]]:
        """One group, with upstream's Adam: its betas, and weight decay as part of the gradient."""
        c = self.config
        adam = {"betas": c.optimizer_betas, "eps": c.optimizer_eps, "decoupled_weight_decay": False}
        trainable = (p for p in self.parameters() if p.requires_grad)
        return [group(trainable, c.optimizer_lr, c.optimizer_weight_decay) | adam]


def _image_encoders(c: DiffusionConfig) -> list[ImageVector]:
    """One encoder for all cameras, or one for each."""
    shapes = {camera: feature.shape for camera, feature in c.image_features.items()}
    separate = [{camera: shapes[camera]} for camera in shapes]
    return [
        ImageVector(
            cameras, backbone=c.vision_backbone, group_norm=c.use_group_norm, compact=c.compact_vision,
            pretrained=None if c.compact_vision else c.pretrained_backbone_weights,
            resize=c.resize_shape, crop=c.crop_shape, random_crop=c.crop_is_random,
            keypoints=c.spatial_softmax_num_keypoints, condition=INSTRUCTION_WIDTH if c.vocabulary else 0,
        )
        for cameras in (separate if c.use_separate_rgb_encoder_per_camera else [shapes] * bool(shapes))
    ]  # fmt: skip


def _denoiser(c: DiffusionConfig, width: int) -> nn.Module:
    """The network that `denoiser` names, for observations of `width` numbers each."""
    actions = c.action_feature.shape[0]
    if c.denoiser == "transformer":
        return ActionTransformer(
            actions, width, horizon=c.horizon, history=c.n_obs_steps, width=c.transformer_width,
            heads=c.transformer_heads, layers=c.transformer_layers, dropout=c.transformer_dropout,
        )  # fmt: skip
    return ConditionalUnet1d(
        actions, width * c.n_obs_steps, widths=c.down_dims, kernel=c.kernel_size, groups=c.n_groups,
        time_width=c.diffusion_step_embed_dim, scale=c.use_film_scale_modulation,
        remember=not c.gradient_checkpointing,
    )  # fmt: skip
