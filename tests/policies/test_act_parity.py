"""ACT is LeRobot's ACT: block by block, loss, gradient, chunk and fifty ensembled steps."""

from __future__ import annotations

import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import minivla
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.act import ACT, ACTConfig
from tests.parity import LEDGER, Row, compare, first_red, redraw, relative_error, their_features, write_ledger

TINY = {
    "chunk_size": 6,
    "n_action_steps": 4,
    "dim_model": 32,
    "n_heads": 4,
    "dim_feedforward": 48,
    "n_encoder_layers": 2,
    "n_vae_encoder_layers": 2,
    "latent_dim": 5,
    "dropout": 0.0,
    "pretrained_backbone_weights": None,
}


@dataclass(frozen=True)
class Case:
    name: str
    cameras: int = 1
    state: bool = True
    environment: bool = False
    settings: dict[str, Any] = field(default_factory=dict)


PRE_NORM = {"pre_norm": True, "feedforward_activation": "gelu", "n_decoder_layers": 3}
DILATED = {"vision_backbone": "resnet50", "replace_final_stride_with_dilation": True}
CASES = [
    Case("VAE, 1 camera, state"),
    Case("VAE, 2 cameras, state", cameras=2),
    Case("no VAE, 2 cameras, state", cameras=2, settings={"use_vae": False}),
    Case("VAE, environment state, no camera", cameras=0, environment=True),
    Case("VAE, 1 camera, state and environment state", environment=True),
    Case("no VAE, 1 camera, no state", state=False, settings={"use_vae": False}),
    Case("pre-norm, GELU, 3 decoder layers", settings=PRE_NORM),
    Case("ResNet-50, dilated", settings=DILATED),
]


def features(case: Case) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    inputs = {
        f"observation.images.camera{i}": PolicyFeature(FeatureType.VISUAL, (3, 64, 96))
        for i in range(case.cameras)
    }
    if case.state:
        inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (5,))
    if case.environment:
        inputs["observation.environment_state"] = PolicyFeature(FeatureType.ENV, (7,))
    return inputs, {"action": PolicyFeature(FeatureType.ACTION, (3,))}


def make_batch(case: Case, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    inputs, outputs = features(case)
    batch = {key: torch.randn(size, *feature.shape, generator=generator) for key, feature in inputs.items()}
    batch["action"] = torch.randn(size, TINY["chunk_size"], *outputs["action"].shape, generator=generator)
    batch["action_is_pad"] = torch.arange(TINY["chunk_size"])[None] >= torch.tensor([6, 4, 1])[:size, None]
    return batch


def make_theirs(case: Case, **settings: Any):
    from lerobot.policies.act.configuration_act import ACTConfig as TheirConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    inputs, outputs = their_features(*features(case))
    config = TheirConfig(
        input_features=inputs, output_features=outputs, device="cpu", **TINY | case.settings | settings
    )
    policy = ACTPolicy(config)
    redraw(policy)
    return policy


def make_ours(case: Case, theirs, **settings: Any) -> ACT:
    inputs, outputs = features(case)
    ours = ACT(ACTConfig(input_features=inputs, output_features=outputs, **TINY | case.settings | settings))
    state = theirs.state_dict()
    ours.load_state_dict({name: state[ours.upstream_name(name)] for name in ours.state_dict()}, strict=True)
    assert len(state) == len(ours.state_dict()), "a tensor of upstream's is left over"
    return ours


NOISE = torch.randn(3, TINY["latent_dim"], generator=torch.Generator().manual_seed(2))


def their_blocks(theirs, batch: dict[str, Tensor], monkeypatch: pytest.MonkeyPatch) -> dict[str, Tensor]:
    """Upstream's hidden states, loss and its parts, gradient and chunk; sequence-first tensors turned batch
    first.
    """
    seen: dict[str, Tensor] = {}
    cameras = list(theirs.config.image_features)
    handles = []

    def watch(module, keep) -> None:
        handles.append(module.register_forward_hook(lambda _, inputs, out: keep(out)))

    if cameras:
        order = iter(cameras)
        watch(theirs.model.backbone, lambda out: seen.update({f"backbone.{next(order)}": out["feature_map"]}))
    if theirs.config.use_vae:
        watch(theirs.model.vae_encoder, lambda out: seen.update(vae_encoder=out.transpose(0, 1)))
        watch(theirs.model.vae_encoder_latent_output_proj, lambda out: seen.update(posterior=out))
        handles.append(
            theirs.model.encoder_latent_input_proj.register_forward_hook(
                lambda _, inputs, out: seen.update(latent=inputs[0])
            )
        )
    watch(theirs.model.encoder, lambda out: seen.update(encoder=out.transpose(0, 1)))
    watch(theirs.model.decoder, lambda out: seen.update(decoder=out.transpose(0, 1)))
    theirs.train()
    with monkeypatch.context() as patch:
        patch.setattr(torch, "randn_like", lambda like: NOISE[: len(like)].to(like))
        loss, parts = theirs.forward(batch)
    loss.backward()
    for handle in handles:
        handle.remove()
    seen |= {name: torch.tensor(value) for name, value in parts.items()} | {"loss": loss.detach()}
    seen["gradient"] = torch.cat([p.grad.flatten() for p in theirs.parameters() if p.grad is not None])
    observation = {key: value for key, value in batch.items() if not key.startswith("action")}
    if (
        not theirs.config.robot_state_feature
    ):  # upstream reads the device off the state, even when it has none
        observation["observation.state"] = torch.zeros(len(batch["action"]), 1)
    return seen | {"chunk": theirs.predict_action_chunk(observation)}


def our_blocks(ours: ACT, batch: dict[str, Tensor], order: list[str]) -> dict[str, Tensor]:
    ours.train()
    with minivla.trace(ours) as t:
        loss, parts = ours(batch, noise=NOISE)
    loss.backward()
    seen = (
        dict(t.hidden)
        | {name: torch.tensor(value) for name, value in parts.items()}
        | {"loss": loss.detach()}
    )
    gradients = {ours.upstream_name(name): p.grad for name, p in ours.named_parameters()}
    seen["gradient"] = torch.cat([gradients[name].flatten() for name in order if gradients[name] is not None])
    observation = {key: value for key, value in batch.items() if not key.startswith("action")}
    return seen | {"chunk": ours.predict_action_chunk(observation)}


def rows_of(case: Case, monkeypatch: pytest.MonkeyPatch, *, spoil=None) -> list[Row]:
    import lerobot

    theirs = make_theirs(case)
    ours = make_ours(case, theirs)
    if spoil is not None:
        spoil(ours)
    batch = make_batch(case)
    if not case.state:
        batch["observation.state"] = torch.zeros(3, 1)
    blocks = their_blocks(theirs, batch, monkeypatch)
    mine = our_blocks(ours, batch, [name for name, p in theirs.named_parameters() if p.grad is not None])
    where = {"family": "act", "upstream": "LeRobot", "version": lerobot.__version__, "case": case.name}
    return compare(mine, blocks, **where)


def test_every_block_of_every_case_equals_upstream(monkeypatch):
    rows = [row for case in CASES for row in rows_of(case, monkeypatch)]
    write_ledger("act", rows)
    assert first_red(rows) is None, [row for row in rows if not row.ok]
    kept = json.loads((LEDGER / "act.json").read_text())
    assert [(r["case"], r["block"]) for r in kept] == [(r.case, r.block) for r in rows], "run `make ledger`"
    assert all(r["ok"] for r in kept)


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("backbone.layer3.0.conv2.weight", "backbone.observation.images.camera0"),
        ("vae_encoder.layers.1.linear2.weight", "vae_encoder"),
        ("encoder.layers.0.self_attn.out_proj.weight", "encoder"),
        ("decoder.layers.0.multihead_attn.in_proj_weight", "decoder"),
        ("action_head.weight", "l1_loss"),
    ],
)
def test_a_flipped_sign_turns_its_block_red(tensor, block, monkeypatch):
    def flip(ours: ACT) -> None:
        ours.state_dict()[tensor].neg_()

    assert first_red(rows_of(CASES[0], monkeypatch, spoil=flip)) == block


def test_every_tensor_matters():
    """A tensor that changes nothing could be wrong unnoticed: each one moves the loss, but for those said to
    be inert.
    """
    case = CASES[4]
    inputs, outputs = features(case)
    ours = ACT(ACTConfig(input_features=inputs, output_features=outputs, **TINY)).train()
    redraw(ours)
    batch = make_batch(case)
    with torch.no_grad():
        before = ours(batch, noise=NOISE)[0]
        for name, tensor in ours.state_dict().items():
            old = tensor.clone()
            tensor.add_(torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)) * 0.3)
            unmoved = torch.equal(ours(batch, noise=NOISE)[0], before)
            assert unmoved == (name in ours.inert), (
                f"{name}: {'changes nothing' if unmoved else 'is not inert'}"
            )
            tensor.copy_(old)


def test_temporal_ensembling_equals_upstream_over_fifty_steps():
    settings = {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1}
    theirs = make_theirs(CASES[0], **settings)
    ours = make_ours(CASES[0], theirs, **settings)
    generator = torch.Generator().manual_seed(4)
    steps = [
        {key: torch.randn(2, *f.shape, generator=generator) for key, f in features(CASES[0])[0].items()}
        for _ in range(50)
    ]
    mine = torch.stack([ours.select_action(step) for step in steps])
    assert relative_error(mine, torch.stack([theirs.select_action(step) for step in steps])) < 1e-5


def test_the_queue_equals_upstream():
    theirs = make_theirs(CASES[1])
    ours = make_ours(CASES[1], theirs)
    generator = torch.Generator().manual_seed(5)
    steps = [
        {key: torch.randn(2, *f.shape, generator=generator) for key, f in features(CASES[1])[0].items()}
        for _ in range(9)
    ]
    mine = torch.stack([ours.select_action(step) for step in steps])
    assert relative_error(mine, torch.stack([theirs.select_action(step) for step in steps])) < 1e-5
