"""VQ-BeT is LeRobot's VQ-BeT: both phases, block by block, losses, gradients, draws, chunks, optimiser."""

from __future__ import annotations

import copy
import json
from dataclasses import dataclass, field
from typing import Any

import pytest
import torch
from torch import Tensor

import minivla
from minivla.actions.vq import focal_loss
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.vqbet import VQBeT, VQBeTConfig
from minivla.training.optim import make_optimizer
from tests.parity import LEDGER, Row, compare, first_red, redraw, relative_error, write_ledger

# Redrawn codebooks look as if phase 1 had begun.
pytestmark = pytest.mark.filterwarnings("ignore:phase 1 of this VQ-VAE was begun before")

TINY: dict[str, Any] = {
    "n_obs_steps": 3,
    "n_action_pred_token": 3,
    "action_chunk_size": 4,
    "crop_shape": (40, 36),
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 6,
    "n_vqvae_training_steps": 3,
    "vqvae_n_embed": 5,
    "vqvae_embedding_dim": 12,
    "vqvae_enc_hidden_dim": 16,
    "gpt_block_size": 20,
    "gpt_input_dim": 24,
    "gpt_output_dim": 20,
    "gpt_n_layer": 2,
    "gpt_n_head": 4,
    "gpt_hidden_dim": 32,
    "dropout": 0.0,
}
CAMERA, STATE = "observation.image", "observation.state"
SHAPES = {CAMERA: (FeatureType.VISUAL, (3, 48, 44)), STATE: (FeatureType.STATE, (4,))}
SEED = 7


@dataclass(frozen=True)
class Case:
    name: str
    settings: dict[str, Any] = field(default_factory=dict)


CASES = [
    Case("both codes at once"),
    Case("one code after the other", {"sequentially_select": True}),
    Case("group norm, no crop", {"use_group_norm": True, "crop_shape": None}),
    Case("no query ahead, central crop", {"n_action_pred_token": 1, "crop_is_random": False}),
    Case("one observation, chunks of one action", {"n_obs_steps": 1, "action_chunk_size": 1}),
    Case("temperature 1, ResNet-34", {"bet_softmax_temperature": 1.0, "vision_backbone": "resnet34"}),
]


def make_theirs(case: Case, **settings: Any) -> Any:
    from lerobot.configs import FeatureType as TheirType
    from lerobot.configs import PolicyFeature as TheirFeature
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig as TheirConfig
    from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy

    inputs = {key: TheirFeature(TheirType(kind.value), shape) for key, (kind, shape) in SHAPES.items()}
    outputs = {"action": TheirFeature(TheirType.ACTION, (2,))}
    options = TINY | case.settings | settings
    policy = VQBeTPolicy(TheirConfig(input_features=inputs, output_features=outputs, device="cpu", **options))
    redraw_vqbet(policy)
    return policy


def redraw_vqbet(theirs: Any) -> None:
    """Everything anew, but causal masks stay masks, and each codebook lies where there is something to code
    and is the ratio of its two averages.
    """
    masks = [block.attn.bias.clone() for block in theirs.vqbet.policy.transformer.h]
    redraw(theirs)
    for block, mask in zip(theirs.vqbet.policy.transformer.h, masks, strict=True):
        block.attn.bias.copy_(mask)
    vqvae = theirs.vqbet.action_head.vqvae_model
    generator = torch.Generator().manual_seed(3)
    size = theirs.config.action_chunk_size * 2
    with torch.no_grad():
        for scale, layer in zip((1.0, 0.4), vqvae.vq_layer.layers, strict=True):
            book = layer._codebook
            drawn = vqvae.encoder(torch.randn(book.embed.shape[1], size, generator=generator))
            book.embed[0] = scale * (drawn if scale == 1 else drawn - drawn.mean(0))
            book.cluster_size.abs_().add_(0.5)
            book.embed_avg.copy_(book.embed * book.cluster_size[..., None])


def make_ours(case: Case, theirs: Any, **settings: Any) -> VQBeT:
    inputs = {key: PolicyFeature(kind, shape) for key, (kind, shape) in SHAPES.items()}
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    options = TINY | case.settings | settings
    ours = VQBeT(VQBeTConfig(input_features=inputs, output_features=outputs, **options))
    state = theirs.state_dict()
    ours.load_state_dict({name: state[ours.upstream_name(name)] for name in ours.state_dict()}, strict=True)
    computed = 1 + len(ours.gpt.stack.layers)  # the sliding window, and a causal mask a layer
    assert len(state) == len(ours.state_dict()) + computed, "a tensor of upstream's is left over"
    return ours


def make_batch(case: Case, size: int = 3) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(1)
    config = VQBeTConfig(**TINY | case.settings)
    batch = {
        key: torch.randn(size, config.n_obs_steps, *shape, generator=generator)
        for key, (_, shape) in SHAPES.items()
    }
    actions = len(config.action_delta_indices)
    return batch | {"action": torch.randn(size, actions, 2, generator=generator)}


def observation(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    return {key: value for key, value in batch.items() if key != "action"}


def gradient(parameters: dict[str, Tensor | None]) -> Tensor:
    return torch.cat([parameters[name].flatten() for name in parameters if parameters[name] is not None])


def their_gradient(theirs: Any) -> Tensor:
    return gradient({name: p.grad for name, p in theirs.named_parameters()})


def our_gradient(ours: VQBeT, theirs: Any) -> Tensor:
    grads = {ours.upstream_name(name): p.grad for name, p in ours.named_parameters()}
    return gradient({name: grads[name] for name, p in theirs.named_parameters() if p.grad is not None})


def tensors(parts: dict[str, float]) -> dict[str, Tensor]:
    """Metrics as tensors; of rates, which may be 0, what is left to 1."""
    values = {name: 1 - value if name.endswith("_rate") else value for name, value in parts.items()}
    return {name: torch.tensor(float(value)) for name, value in values.items()}


# --- phase 1 -----------------------------------------------------------------------------------------------


def their_first_phase(theirs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """Two updates; of the second everything that is passed through, and the codebooks it leaves."""
    seen: dict[str, Tensor] = {}
    vqvae = theirs.vqbet.action_head.vqvae_model
    theirs.train()
    theirs.forward(dict(batch))
    handles = [
        vqvae.encoder.register_forward_hook(lambda _, inputs, out: seen.update(encoded=out)),
        vqvae.vq_layer.register_forward_hook(
            lambda _, inputs, out: seen.update(
                quantised=out[0][:, 0], codes=out[1][:, 0].float(), commitment=out[2][0]
            )
        ),
        vqvae.decoder.register_forward_hook(lambda _, inputs, out: seen.update(reconstruction=out)),
    ]
    loss, parts = theirs.forward(dict(batch))
    for handle in handles:
        handle.remove()
    loss.backward()
    seen |= tensors(parts) | {"phase 1 loss": loss.detach(), "phase 1 gradient": their_gradient(theirs)}
    for g, layer in enumerate(vqvae.vq_layer.layers):
        seen |= {
            f"level {g} {name}": getattr(layer._codebook, name).clone()
            for name in ("cluster_size", "embed_avg", "embed")
        }
    return seen


def our_first_phase(ours: VQBeT, theirs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    ours.train()
    ours(batch)
    vqvae = ours.vqvae
    handles = [
        vqvae.encoder.register_forward_hook(lambda _, inputs, out: seen.update(encoded=out)),
        vqvae.vq_layer.register_forward_hook(
            lambda _, inputs, out: seen.update(quantised=out[0], codes=out[1].float(), commitment=out[2])
        ),
        vqvae.decoder.register_forward_hook(lambda _, inputs, out: seen.update(reconstruction=out)),
    ]
    loss, parts = ours(batch)
    for handle in handles:
        handle.remove()
    loss.backward()
    seen |= tensors(parts) | {"phase 1 loss": loss.detach(), "phase 1 gradient": our_gradient(ours, theirs)}
    for g, layer in enumerate(vqvae.vq_layer.levels):
        seen |= {
            f"level {g} {name}": getattr(layer, name).clone()
            for name in ("cluster_size", "embed_avg", "embed")
        }
    return seen


# --- phase 2 -----------------------------------------------------------------------------------------------


def their_second_phase(theirs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    focal: list[Tensor] = []
    model, head = theirs.vqbet, theirs.vqbet.action_head
    head.vqvae_model.discretized.fill_(True)
    head.vqvae_model.vq_layer.freeze_codebook.fill_(True)
    size = len(batch["action"])

    def keep(name: str, module: Any, change: Any = lambda out: out) -> None:
        handles.append(
            module.register_forward_hook(lambda _, inputs, out: seen.update({name: change(out).detach()}))
        )

    handles: list[Any] = []
    keep("image features", model.rgb_encoder, lambda out: out.unflatten(0, (size, -1)))
    for i, block in enumerate(model.policy.transformer.h):
        keep(f"gpt.{i}", block)
    keep("gpt", model.policy.transformer.ln_f)
    keep("lm_head", model.policy)
    keep("logits", head, lambda out: out["cbet_logits"].unflatten(0, (size, -1)))
    keep("sampled codes", head, lambda out: out["sampled_centers"].unflatten(0, (size, -1)).float())
    keep("decoded", head, lambda out: out["decoded_action"].unflatten(0, (size, -1)))
    keep("predicted", head, lambda out: out["predicted_action"].unflatten(-1, (-1, 2)))
    handles.append(head._focal_loss_fn.register_forward_hook(lambda _, inputs, out: focal.append(out)))
    theirs.train()
    theirs.zero_grad()
    torch.manual_seed(SEED)
    loss, parts = theirs.forward(dict(batch))
    for handle in handles:
        handle.remove()
    loss.backward()
    seen["focal loss by level"] = torch.stack(focal).detach()
    seen |= tensors(parts) | {"loss": loss.detach(), "gradient": their_gradient(theirs)}
    theirs.eval()
    torch.manual_seed(SEED)
    images = torch.stack([batch[CAMERA]], dim=2)
    chunk = theirs.vqbet({STATE: batch[STATE], "observation.images": images}, rollout=True)
    return seen | {"chunk": chunk.detach()}


def our_second_phase(ours: VQBeT, theirs: Any, batch: dict[str, Tensor]) -> dict[str, Tensor]:
    seen: dict[str, Tensor] = {}
    ours.vqvae.finish()
    handles = [
        layer.register_forward_hook(lambda _, inputs, out, i=i: seen.update({f"gpt.{i}": out.detach()}))
        for i, layer in enumerate(ours.gpt.stack.layers)
    ]
    handles.append(ours.gpt.register_forward_hook(lambda _, inputs, out: seen.update(lm_head=out.detach())))
    ours.train()
    ours.zero_grad()
    torch.manual_seed(SEED)
    with minivla.trace(ours) as t:
        loss, parts = ours(batch)
    for handle in handles:
        handle.remove()
    loss.backward()
    hidden = t.hidden
    seen |= {"image features": hidden["image_features"], "gpt": hidden["gpt"], "logits": hidden["logits"]}
    seen |= {"sampled codes": hidden["codes"].float(), "decoded": hidden["decoded"]}
    seen["predicted"] = hidden["decoded"] + hidden["offsets"]
    targets = batch["action"].unfold(1, ours.config.action_chunk_size, 1).transpose(2, 3)
    seen["focal loss by level"] = focal_loss(hidden["logits"], ours.vqvae.encode(targets))
    seen |= tensors(parts) | {"loss": loss.detach(), "gradient": our_gradient(ours, theirs)}
    torch.manual_seed(SEED)
    return seen | {"chunk": ours.predict_action_chunk(observation(batch))}


def rows_of(case: Case, *, spoil: Any = None) -> list[Row]:
    import lerobot

    theirs = make_theirs(case)
    ours = make_ours(case, theirs)
    if spoil is not None:
        spoil(ours)
    batch = make_batch(case)
    where = {"family": "vqbet", "upstream": "LeRobot", "version": lerobot.__version__, "case": case.name}
    blocks = their_first_phase(theirs, batch)
    rows = compare(our_first_phase(ours, theirs, batch), blocks, **where)
    blocks = their_second_phase(theirs, batch)
    return rows + compare(our_second_phase(ours, theirs, batch), blocks, **where)


def test_every_block_of_every_case_equals_upstream():
    rows = [row for case in CASES for row in rows_of(case)]
    write_ledger("vqbet", rows)
    assert first_red(rows) is None, [row for row in rows if not row.ok]
    kept = json.loads((LEDGER / "vqbet.json").read_text())
    assert [(r["case"], r["block"]) for r in kept] == [(r.case, r.block) for r in rows], "run `make ledger`"
    assert all(r["ok"] for r in kept)


@pytest.mark.parametrize(
    ("tensor", "block"),
    [
        ("vqvae.encoder.2.weight", "encoded"),
        ("vqvae.vq_layer.layers.1.embed_avg", "quantised"),
        ("vqvae.decoder.4.bias", "reconstruction"),
        ("rgb_encoder.backbone.layer2.1.conv1.weight", "image features"),
        ("action_token", "gpt.0"),
        ("gpt.stack.layers.1.linear2.weight", "gpt.1"),
        ("code_head.all_levels.weight", "logits"),
        ("code_head.offset.weight", "predicted"),
    ],
)
def test_a_flipped_sign_turns_its_block_red(tensor, block):
    def flip(ours: VQBeT) -> None:
        ours.state_dict()[tensor].neg_()

    assert first_red(rows_of(CASES[0], spoil=flip)) == block


def outcomes(ours: VQBeT, batch: dict[str, Tensor]) -> Tensor:
    """Two losses of phase 1, one of phase 2, and the chunks, all in evaluation of what phase 1 left."""
    ours.train()
    torch.manual_seed(SEED)
    first = [ours(batch)[0] for _ in range(2)]
    ours.vqvae.finish()
    ours.eval()  # where batch norms' running statistics count
    given = ours.predict(observation(batch))
    targets = batch["action"].unfold(1, ours.config.action_chunk_size, 1).transpose(2, 3)
    return torch.stack([*first, ours.imitation_loss(targets, given)[0], given.chunks.sum()])


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_every_tensor_matters(case):
    """A tensor that changes nothing could be wrong unnoticed. A gradient of some size shows that it does; all
    others are changed: buffers, what gets next to none, and the VQ-VAE, whose gradient is made up on purpose.
    """
    policy, batch = make_ours(case, make_theirs(case)), make_batch(case)
    ours = copy.deepcopy(policy)
    total = outcomes(ours, batch).sum()
    total.backward()
    moved = {
        name
        for name, p in ours.named_parameters()
        if p.grad is not None and p.grad.abs().max() > 1e-5 * total
    }
    shown = {name for name in moved if not name.startswith("vqvae.")}
    assert len(shown) > len(list(ours.gpt.parameters()))
    assert not shown & set(policy.inert)
    counters = {name for name in policy.state_dict() if name.endswith("num_batches_tracked")}
    with torch.no_grad():
        before = outcomes(copy.deepcopy(policy), batch)
        for name in sorted(set(policy.state_dict()) - counters - shown):
            ours = copy.deepcopy(policy)
            tensor = ours.state_dict()[name]
            other = torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3))
            tensor.copy_(~tensor if tensor.dtype is torch.bool else tensor + 0.3 * other.abs())
            change = (outcomes(ours, batch) - before) / before
            unmoved = bool(change.abs().max() < 2e-6)  # the chunks' sum cancels: rounding leaves 1.4e-6
            assert unmoved == (name in ours.inert), (
                f"{name}: {'changes nothing' if unmoved else 'is not inert'}"
            )


def test_two_phases_of_training_equal_upstream_with_its_optimizer():
    """LeRobot's Adam against ours. Adam turns rounding, where a gradient is nearly 0, into steps of its full
    size, so weights are allowed some of these; losses and codebooks are not.
    """
    theirs = make_theirs(CASES[0], use_group_norm=True)
    ours = make_ours(CASES[0], theirs, use_group_norm=True)
    adams = [theirs.config.get_optimizer_preset().build(theirs.get_optim_params()), make_optimizer(ours)]
    batch = make_batch(CASES[0])
    for step in range(6):
        losses = []
        for policy, adam in zip((theirs.train(), ours.train()), adams, strict=True):
            torch.manual_seed(step)
            losses.append(policy.forward(dict(batch))[0])
            losses[-1].backward()
            adam.step()
            adam.zero_grad()
        assert relative_error(losses[1].detach(), losses[0].detach()) < 1e-5
        assert bool(ours.vqvae.discretized) == (step >= 2)
    state = theirs.state_dict()
    for name, value in ours.state_dict().items():
        upstream = state[ours.upstream_name(name)]
        if "vq_layer" in name and value.any():
            assert relative_error(value, upstream) < 1e-5, name
        torch.testing.assert_close(value, upstream, rtol=1e-3, atol=6e-4)


def test_the_groups_of_the_optimizer_are_upstreams():
    theirs = make_theirs(CASES[0])
    ours = make_ours(CASES[0], theirs)
    their_names = {id(p): name for name, p in theirs.named_parameters()}
    our_names = {id(p): ours.upstream_name(name) for name, p in ours.named_parameters()}
    optimizer = theirs.config.get_optimizer_preset().build(theirs.get_optim_params())
    settings = ("lr", "weight_decay", "betas", "eps", "decoupled_weight_decay")
    for expected, given in zip(optimizer.param_groups, make_optimizer(ours).param_groups, strict=True):
        assert {their_names[id(p)] for p in expected["params"]} == {our_names[id(p)] for p in given["params"]}
        assert {key: tuple_of(expected[key]) for key in settings} == {
            key: tuple_of(given[key]) for key in settings
        }


def tuple_of(value: Any) -> Any:
    return tuple(value) if isinstance(value, list | tuple) else value


def test_ten_steps_of_control_equal_upstream():
    """The history, repeated at the start, the queue of actions, and the draws."""
    theirs = make_theirs(CASES[0])
    ours = make_ours(CASES[0], theirs)
    theirs.vqbet.action_head.vqvae_model.discretized.fill_(True)
    ours.vqvae.finish()
    generator = torch.Generator().manual_seed(5)
    steps = [
        {key: torch.randn(2, *shape, generator=generator) for key, (_, shape) in SHAPES.items()}
        for _ in range(10)
    ]
    chosen = []
    for policy in (ours, theirs.eval()):
        torch.manual_seed(SEED)
        chosen.append(torch.stack([policy.select_action(dict(step)) for step in steps]))
    assert relative_error(*chosen) < 1e-5
