"""Diffusion Policy is LeRobot's: block by block, loss, gradient, chunk by DDPM and by DDIM, the queue."""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import lru_cache
from typing import Any

import pytest
import torch
from torch import Tensor

import minivla
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.diffusion import DiffusionConfig, DiffusionPolicy
from tests.parity import LEDGER, Row, compare, first_red, redraw, relative_error, their_features, write_ledger

TINY = {
    "horizon": 8,
    "n_action_steps": 4,
    "down_dims": (16, 24),
    "diffusion_step_embed_dim": 12,
    "kernel_size": 3,
    "n_groups": 4,
    "spatial_softmax_num_keypoints": 5,
    "num_train_timesteps": 20,
    "pretrained_backbone_weights": None,
}
SIZE = 3


@dataclass(frozen=True)
class Case:
    name: str
    cameras: int = 1
    environment: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


GROUP_NORM = {"use_separate_rgb_encoder_per_camera": False, "use_group_norm": True}
DDIM = {"noise_scheduler_type": "DDIM", "num_inference_steps": 5}
X0 = {"prediction_type": "sample"}
RESIZED = {"resize_shape": (80, 72), "crop_ratio": 0.9, "n_obs_steps": 3}
SMALL_UNET = {"use_film_scale_modulation": False, "n_groups": 8, "down_dims": (16, 24, 32), "kernel_size": 5}
CENTRAL = {"crop_shape": (64, 64), "crop_is_random": False}
LINEAR = {"beta_schedule": "linear", "clip_sample": False, "do_mask_loss_for_padding": True}
CASES = [
    Case("DDPM, ε, 1 camera, random crop", settings={"crop_shape": (70, 60)}),
    Case("DDPM, x₀, 2 cameras, an encoder each", cameras=2, settings=X0),
    Case("DDIM, ε, 2 cameras, one encoder, group norm", cameras=2, settings=DDIM | GROUP_NORM),
    Case("DDIM, x₀, camera and environment state", environment=True, settings=DDIM | X0),
    Case("DDPM, ε, environment state, no camera", cameras=0, environment=True),
    Case("resize and crop, 3 observations", settings=RESIZED),
    Case("linear betas, no clipping, masked loss", settings=LINEAR | {"crop_shape": (96, 80)}),
    Case("FiLM shifts only, 3 stages, crop in the centre", settings=SMALL_UNET | CENTRAL),
]


def features(case: Case) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    inputs = {
        f"observation.images.camera{i}": PolicyFeature(FeatureType.VISUAL, (3, 96, 80))
        for i in range(case.cameras)
    }
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (5,))
    if case.environment:
        inputs["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (7,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (3,))}


def make_batch(case: Case, *, seed: int = 1) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    inputs, outputs = features(case)
    steps = case.settings.get("n_obs_steps", 2)
    batch = {key: torch.randn(SIZE, steps, *f.shape, generator=generator) for key, f in inputs.items()}
    batch["action"] = torch.randn(SIZE, TINY["horizon"], *outputs["action"].shape, generator=generator)
    batch["action_is_pad"] = torch.arange(TINY["horizon"])[None] >= torch.tensor([8, 5, 2])[:, None]
    return batch


def make_theirs(case: Case, **settings: Any):
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig as TheirConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy as TheirPolicy

    inputs, outputs = their_features(*features(case))
    config = TheirConfig(
        input_features=inputs, output_features=outputs, device="cpu", **TINY | case.settings | settings
    )
    policy = TheirPolicy(config)
    redraw(policy)
    for module in policy.modules():  # upstream's names do not tell norms from convolutions
        if isinstance(module, torch.nn.GroupNorm | torch.nn.BatchNorm2d):
            module.weight.data.mul_(0.4).add_(0.6)
            if isinstance(module, torch.nn.BatchNorm2d):
                module.running_var.abs_().add_(0.5)
    return policy


def make_ours(case: Case, theirs, **settings: Any) -> DiffusionPolicy:
    inputs, outputs = features(case)
    config = DiffusionConfig(
        input_features=inputs, output_features=outputs, **TINY | case.settings | settings
    )
    ours = DiffusionPolicy(config)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[ours.upstream_name(name)] for name in ours.state_dict()}, strict=True)
    assert len(state) == len(ours.state_dict()), "a tensor of upstream's is left over"
    return ours


NOISE = torch.randn(SIZE, TINY["horizon"], 3, generator=torch.Generator().manual_seed(2))
TIME = torch.tensor([0, 11, 19])


def watch_theirs(theirs, seen: dict[str, Tensor]) -> list[Any]:
    """Hooks that keep upstream's hidden states under our names."""
    handles: list[Any] = []

    def keep(module, name: str) -> None:
        handles.append(module.register_forward_hook(lambda _, inputs, out: seen.update({name: out})))

    def keypoints(encoder, cameras: list[str]) -> None:
        def split(_, inputs, out) -> None:
            named = out.unflatten(0, (SIZE, -1, len(cameras))).unbind(2)
            seen.update(
                {f"keypoints.{camera}": points for camera, points in zip(cameras, named, strict=True)}
            )

        handles.append(encoder.pool.register_forward_hook(split))

    model, cameras = theirs.diffusion, list(theirs.config.image_features)
    if cameras and theirs.config.use_separate_rgb_encoder_per_camera:
        for encoder, camera in zip(model.rgb_encoder, cameras, strict=True):
            keypoints(encoder, [camera])
    elif cameras:
        keypoints(model.rgb_encoder, cameras)
    unet = model.unet
    handles.append(
        unet.register_forward_pre_hook(
            lambda _, inputs, options: seen.update(condition=options["global_cond"]), with_kwargs=True
        )
    )
    for i, stage in enumerate(unet.down_modules):
        keep(stage[1], f"down.{i}")
    keep(unet.mid_modules[-1], "mid")
    for i, stage in enumerate(unet.up_modules):
        keep(stage[1], f"up.{i}")
    keep(unet, "denoised")
    return handles


def their_blocks(theirs, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Upstream's hidden states, loss, gradient and chunk."""
    seen: dict[str, Tensor] = {}
    handles = watch_theirs(theirs, seen)
    theirs.train()
    torch.manual_seed(3)  # where to crop
    with pytest.MonkeyPatch.context() as patch:
        randint = torch.randint
        patch.setattr(torch, "randn", lambda *_, **__: NOISE)
        patch.setattr(torch, "randint", lambda *a, **k: TIME if "low" in k else randint(*a, **k))
        loss, _ = theirs.forward(batch)
    loss.backward()
    for handle in handles:
        handle.remove()
    seen = {name: value.detach() for name, value in seen.items()} | {"loss": loss.detach()}
    seen["gradient"] = torch.cat([p.grad.flatten() for p in theirs.parameters()])
    theirs.eval()
    torch.manual_seed(4)  # what DDPM draws on its way
    return seen | {"chunk": theirs.predict_action_chunk(observation(batch), noise=NOISE)}


def observation(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if not key.startswith("action")}


def our_blocks(ours: DiffusionPolicy, batch: dict[str, Tensor], order: list[str]) -> dict[str, Tensor]:
    ours.train()
    torch.manual_seed(3)
    with minivla.trace(ours) as t:
        loss, _ = ours(batch, noise=NOISE, time=TIME)
    loss.backward()
    seen = dict(t.hidden) | {"condition": t.hidden["condition"].flatten(1), "loss": loss.detach()}
    gradients = {ours.upstream_name(name): p.grad for name, p in ours.named_parameters()}
    seen["gradient"] = torch.cat([gradients[name].flatten() for name in order])
    torch.manual_seed(4)
    return seen | {"chunk": ours.predict_action_chunk(observation(batch), noise=NOISE)}


@lru_cache
def upstream(number: int):
    """Upstream's policy of a case, as it was before it ran, and its blocks."""
    theirs = make_theirs(CASES[number])
    return theirs, their_blocks(copy.deepcopy(theirs), make_batch(CASES[number]))


def rows_of(number: int, spoil: Callable[[DiffusionPolicy], None] | None = None) -> list[Row]:
    import lerobot

    case = CASES[number]
    theirs, blocks = upstream(number)
    ours = make_ours(case, theirs)
    if spoil is not None:
        spoil(ours)
    batch = make_batch(case)
    mine = our_blocks(ours, batch, [name for name, _ in theirs.named_parameters()])
    where = {"family": "diffusion", "upstream": "LeRobot", "version": lerobot.__version__, "case": case.name}
    rows = compare(mine, {k: v for k, v in blocks.items() if k != "chunk"}, **where)
    steps = ours.config.num_inference_steps or ours.config.num_train_timesteps
    return rows + compare(mine, {"chunk": blocks["chunk"]}, tolerance=1e-4 if steps >= 10 else 1e-5, **where)


def test_every_block_of_every_case_equals_upstream():
    rows = [row for number in range(len(CASES)) for row in rows_of(number)]
    write_ledger("diffusion", rows)
    assert first_red(rows) is None, [row for row in rows if not row.ok]
    kept = json.loads((LEDGER / "diffusion.json").read_text())
    assert [(r["case"], r["block"]) for r in kept] == [(r.case, r.block) for r in rows], "run `make ledger`"
    assert all(r["ok"] for r in kept)


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("rgb_encoder.0.backbone.layer3.0.conv2.weight", "keypoints.observation.images.camera0"),
        ("rgb_encoder.0.out.weight", "condition"),
        ("unet.diffusion_step_encoder.1.weight", "down.0"),
        ("unet.down_modules.1.0.cond_encoder.1.weight", "down.1"),
        ("unet.mid_modules.1.conv2.block.0.weight", "mid"),
        ("unet.up_modules.0.0.residual_conv.weight", "up.0"),
        ("unet.final_conv.1.bias", "denoised"),
    ],
)
def test_a_flipped_sign_turns_its_block_red(tensor, block):
    def flip(ours: DiffusionPolicy) -> None:
        ours.state_dict()[tensor].neg_()

    assert first_red(rows_of(0, spoil=flip)) == block


def test_every_tensor_matters():
    """A tensor that changes nothing could be wrong unnoticed: each one moves the loss, but for those said to
    be inert, and the counts of batches. A gradient shows it; what gets none is changed.
    """
    case = Case("small", environment=True, settings={"crop_shape": (40, 40)})
    ours = make_ours(case, make_theirs(case)).double().eval()  # so that running statistics matter
    batch = {k: v[:1].double() if v.is_floating_point() else v[:1] for k, v in make_batch(case).items()}
    noise, time = NOISE[:1].double(), TIME[1:2]
    before = ours(batch, noise=noise, time=time)[0]
    before.backward()
    shown = {name for name, p in ours.named_parameters() if p.grad is not None and p.grad.abs().max() > 1e-9}
    assert len(shown) > 0.8 * len(list(ours.parameters()))
    assert not shown & set(ours.inert)
    with torch.no_grad():
        for name, tensor in ours.state_dict().items():
            if name in shown or not tensor.is_floating_point():
                continue
            old = tensor.clone()
            tensor.add_(torch.rand(tensor.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
            change = (ours(batch, noise=noise, time=time)[0] - before).abs()
            assert (change < 1e-12) == (name in ours.inert), f"{name} changes the loss by {change}"
            tensor.copy_(old)


@pytest.mark.parametrize("case", [CASES[1], CASES[2]], ids=["DDPM", "DDIM"])
def test_nine_steps_of_control_equal_upstream(case):
    """History and queue included: the first observation stands for those before it."""
    theirs = make_theirs(case)
    ours = make_ours(case, theirs)
    generator = torch.Generator().manual_seed(5)
    inputs = features(case)[0]
    steps = [
        {key: torch.randn(2, *f.shape, generator=generator) for key, f in inputs.items()} for _ in range(9)
    ]
    theirs.eval()
    torch.manual_seed(6)
    mine = torch.stack([ours.select_action(step) for step in steps])
    torch.manual_seed(6)
    assert relative_error(mine, torch.stack([theirs.select_action(dict(step)) for step in steps])) < 1e-4


def test_ddim_on_weights_trained_for_ddpm_equals_upstream():
    theirs = make_theirs(CASES[0])
    ours = make_ours(CASES[0], theirs, **DDIM)
    again = make_theirs(CASES[0], **DDIM).eval()
    again.load_state_dict(theirs.state_dict())
    seen = observation(make_batch(CASES[0]))
    mine = ours.predict_action_chunk(seen, noise=NOISE)
    assert relative_error(mine, again.predict_action_chunk(seen, noise=NOISE)) < 1e-5


def test_with_nothing_given_the_loss_draws_what_upstream_draws():
    theirs = make_theirs(CASES[0]).train()
    ours = make_ours(CASES[0], theirs).train()
    batch = make_batch(CASES[0])
    torch.manual_seed(7)
    loss = ours(batch)[0]
    torch.manual_seed(7)
    assert relative_error(loss, theirs.forward(batch)[0]) < 1e-5
