"""Diffusion Policy as a person uses it: acting with a history, what it refuses, and minivla's own options."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import minivla
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.diffusion import DiffusionConfig, DiffusionPolicy
from tests.parity import redraw

TABLE, WRIST, STATE = "observation.images.table", "observation.images.wrist", "observation.state"
TASKS = ["put the red block on the square", "put the blue block on the square"]
HORIZON, ACTIONS = 8, 2
TRANSFORMER = {
    "denoiser": "transformer", "transformer_width": 16, "transformer_heads": 2, "transformer_layers": 2,
    "transformer_dropout": 0.0,
}  # fmt: skip
FLOW = {"objective": "flow", "num_inference_steps": 4}
VARIANTS = [{}, TRANSFORMER, FLOW, TRANSFORMER | FLOW, {"noise_scheduler_type": "DDIM"}]


def config(**settings: Any) -> DiffusionConfig:
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for key in (TABLE, WRIST)}
    inputs[STATE] = PolicyFeature(FeatureType.STATE, (3,))
    options = {
        "horizon": HORIZON,
        "n_action_steps": 4,
        "down_dims": (16, 24),
        "num_train_timesteps": 10,
        "spatial_softmax_num_keypoints": 4,
        "use_separate_rgb_encoder_per_camera": False,
        "pretrained_backbone_weights": None,
        "compact_vision": True,
        "vocabulary": ("put", "the", "red", "blue", "block", "on", "square"),
    }
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (ACTIONS,))}
    return DiffusionConfig(input_features=inputs, output_features=outputs, **options | settings)


def statistics() -> dict[str, dict[str, Tensor]]:
    image = {"mean": torch.full((3, 1, 1), 0.4), "std": torch.full((3, 1, 1), 0.2)}
    state = {"min": torch.zeros(3), "max": torch.ones(3)}
    action = {"min": torch.tensor([-1.0, -3.0]), "max": torch.tensor([3.0, 1.0])}
    return {TABLE: image, WRIST: image, STATE: state, "action": action}


def policy_of(**settings: Any) -> DiffusionPolicy:
    torch.manual_seed(0)
    policy = DiffusionPolicy(config(**settings), stats=statistics())
    redraw(policy)
    return policy


def moment(size: int = 2, seed: int = 0) -> dict[str, Any]:
    """What an environment gives: observations of one moment."""
    generator = torch.Generator().manual_seed(seed)
    images = {key: torch.rand(size, 3, 64, 64, generator=generator) for key in (TABLE, WRIST)}
    return {**images, STATE: torch.rand(size, 3, generator=generator), "task": TASKS[:size]}


def batch_of(policy: DiffusionPolicy, *seeds: int) -> dict[str, Any]:
    """A normalised training batch whose history is the moments of these seeds."""
    past = [moment(seed=seed) for seed in seeds or (0, 1)]
    raw = {key: torch.stack([m[key] for m in past], dim=1) for key in (TABLE, WRIST, STATE)}
    raw["action"] = torch.rand(2, HORIZON, ACTIONS, generator=torch.Generator().manual_seed(9))
    raw["action_is_pad"] = torch.arange(HORIZON)[None].expand(2, HORIZON) >= 6
    return policy.preprocess(raw | {"task": TASKS})


def rng(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


@pytest.mark.parametrize("settings", VARIANTS)
def test_chunk_and_loss_are_reproducible(settings):
    policy = policy_of(**settings)
    batch = batch_of(policy)
    chunk = policy.predict_action_chunk(batch, generator=rng())
    assert chunk.shape == (2, 4, ACTIONS)
    assert torch.equal(policy.predict_action_chunk(batch, generator=rng()), chunk)
    assert not torch.allclose(policy.predict_action_chunk(batch, generator=rng(1)), chunk)
    policy.train()
    losses = [policy(batch, generator=rng())[0] for _ in range(2)]
    assert torch.equal(*losses)
    losses[0].backward()
    still = {name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= set(policy.inert)


def test_acting_keeps_a_history_and_a_queue():
    policy = policy_of(noise_scheduler_type="DDIM")
    chunks = []
    for history in ((0, 0), (3, 4)):
        torch.manual_seed(0)
        chunks.append(policy.postprocess(policy.predict_action_chunk(batch_of(policy, *history))))
    torch.manual_seed(0)
    acted = [policy.act(moment(seed=seed)) for seed in range(4)]
    torch.manual_seed(0)
    acted += [policy.act(moment(seed=seed)) for seed in range(4, 8)]
    torch.testing.assert_close(torch.stack(acted, dim=1), torch.cat(chunks, dim=1))
    policy.reset()
    torch.manual_seed(0)
    torch.testing.assert_close(policy.act(moment(seed=0)), acted[0])


def test_a_chunk_depends_on_the_batch_alone():
    policy = policy_of()
    batch = batch_of(policy)
    first = policy.predict_action_chunk(batch, generator=rng())
    policy.act(moment(seed=5))
    assert torch.equal(policy.predict_action_chunk(batch, generator=rng()), first)


def test_one_observation_without_a_batch_axis_is_enough():
    raw = {key: value[0] for key, value in moment().items()}
    assert policy_of().act(raw).shape == (1, ACTIONS)
    assert policy_of().preprocess(raw)[STATE].shape == (1, 3)


@pytest.mark.parametrize("settings", [{}, TRANSFORMER])
@pytest.mark.parametrize("spoiled", [TABLE, WRIST, STATE, "task"])
def test_every_input_at_every_moment_reaches_the_chunk(spoiled, settings):
    policy = policy_of(clip_sample=False, **settings)
    batch = batch_of(policy)
    before = policy.predict_action_chunk(batch, generator=rng())
    for step in range(2):
        changed = dict(batch)
        if spoiled == "task":
            changed["task"] = TASKS[::-1]
        else:
            changed[spoiled] = batch[spoiled].clone()
            changed[spoiled][:, step] += 1
        assert not torch.allclose(policy.predict_action_chunk(changed, generator=rng()), before)


def test_fewer_steps_are_chosen_at_call_time():
    policy = policy_of(noise_scheduler_type="DDIM")
    batch, noise = batch_of(policy), torch.randn(2, HORIZON, ACTIONS, generator=rng())
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch, noise=noise, steps=2)
        policy.predict_action_chunk(batch, noise=noise)
    assert t.calls[0].flow.times.tolist() == [5, 0, -1]
    assert len(t.flow.times) == 11


@pytest.mark.parametrize("settings", VARIANTS)
def test_a_trace_holds_the_path_the_chunk_and_the_keypoints(settings):
    policy = policy_of(**settings)
    noise = torch.randn(2, HORIZON, ACTIONS, generator=rng())
    with minivla.trace(policy) as t:
        chunk = policy.predict_action_chunk(batch_of(policy), noise=noise)
    assert torch.equal(t.flow.x[0], noise)
    assert torch.equal(t.flow.x[-1][:, 1:5], chunk)
    assert torch.equal(t.chunk, chunk)
    assert t.flow.v.shape == (len(t.flow.times) - 1, 2, HORIZON, ACTIONS)
    assert torch.equal(t.flow.v[-1], t.hidden["denoised"])
    assert t.hidden[f"keypoints.{TABLE}"].shape == (2, 2, 4, 2)
    if settings.get("objective") == "flow":
        steps = t.flow.times.diff()[:, None, None, None]
        torch.testing.assert_close(t.flow.x.diff(dim=0), t.flow.v * steps)


def test_the_transformer_looks_back_only_and_its_masks_are_proven():
    policy = policy_of(**TRANSFORMER)
    batch = batch_of(policy)
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch, steps=2)
    assert [s.name for s in t.segments] == ["time", "observations", "chunk"]
    assert t.attention["denoiser.1.cross"].shape == (2, 2, HORIZON, 3)
    assert torch.equal(t.masks["denoiser.0.self"][0], torch.ones(HORIZON, HORIZON).tril().bool())
    proof = minivla.prove_masks(policy, batch)
    assert proof.ok, proof


def test_padding_is_left_out_only_when_asked():
    for masked in (True, False):
        policy = policy_of(do_mask_loss_for_padding=masked, **FLOW).eval()
        batch = batch_of(policy)
        given = {"noise": torch.zeros(2, HORIZON, ACTIONS), "time": torch.full((2,), 0.0)}
        loss = policy(batch, **given)[0]
        batch["action"] = batch["action"].masked_fill(batch["action_is_pad"][..., None], 50.0)
        assert torch.equal(policy(batch, **given)[0], loss) == masked


@pytest.mark.parametrize("settings", VARIANTS)
def test_save_and_load_round_trip(settings, tmp_path):
    policy = policy_of(**settings).eval()
    with pytest.warns(UserWarning, match="LeRobot will refuse"):
        policy.save(tmp_path)
    again = minivla.load(tmp_path)
    batch = batch_of(policy)
    chunks = [p.predict_action_chunk(batch, generator=rng()) for p in (policy, again)]
    assert torch.equal(*chunks)
    assert again.config.optimizer_betas == (0.95, 0.999)


def test_recomputing_activations_changes_nothing():
    gradients = []
    for checkpointing in (False, True):
        policy = policy_of(gradient_checkpointing=checkpointing).train()
        policy(batch_of(policy), generator=rng())[0].backward()
        gradients.append(policy.unet.mid_modules[0].conv1.block[0].weight.grad)
    torch.testing.assert_close(*gradients)


def test_the_optimiser_is_upstreams():
    from minivla.training.optim import make_optimizer

    (group,) = make_optimizer(policy_of()).param_groups
    assert (group["lr"], group["weight_decay"], group["betas"]) == (1e-4, 1e-6, (0.95, 0.999))
    assert not group["decoupled_weight_decay"]  # Adam's decay, not AdamW's


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"horizon": 10}, r"horizon is 10, expected a multiple of 4.*set horizon=12"),
        ({"crop_shape": (65, 60)}, r"crop_shape is \(65, 60\), the images are \(64, 64\)"),
        ({"n_action_steps": 8}, r"n_action_steps is 8.*up to horizon - n_obs_steps \+ 1 = 7"),
        ({"n_obs_steps": 0}, "n_obs_steps 0; expected at least 1"),
        ({"crop_ratio": 0.0}, "crop_ratio is 0.0"),
        ({"noise_scheduler_type": "DPM"}, "noise_scheduler_type is 'DPM', expected one of DDPM, DDIM"),
        ({"prediction_type": "x0"}, "prediction_type is 'x0', expected one of epsilon, sample"),
        ({"beta_schedule": "cosine"}, "beta_schedule is 'cosine'"),
        ({"objective": "score"}, "objective is 'score', expected one of diffusion, flow"),
        ({"denoiser": "mamba"}, "denoiser is 'mamba', expected one of unet, transformer"),
    ],
)
def test_settings_that_make_no_sense_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        policy_of(**settings)


def test_cameras_of_two_sizes_need_an_encoder_each():
    inputs = config().input_features | {WRIST: PolicyFeature(FeatureType.VISUAL, (3, 32, 32))}
    settings = config()
    settings.input_features = inputs
    with pytest.raises(ValueError, match="cameras of several sizes"):
        DiffusionPolicy(settings)
    settings.use_separate_rgb_encoder_per_camera = True
    assert len(DiffusionPolicy(settings).encoders) == 2


def test_a_policy_without_state_or_without_anything_to_see_is_refused():
    for key in (STATE, TABLE):
        settings = config()
        kept = [key] if key == TABLE else [STATE]
        settings.input_features = {k: settings.input_features[k] for k in kept}
        with pytest.raises(ValueError, match=r"needs observation\.state, and a camera"):
            DiffusionPolicy(settings)


def test_batches_that_do_not_fit_are_refused():
    policy = policy_of()
    batch = batch_of(policy)
    short = batch | {STATE: batch[STATE][:, :1]}
    with pytest.raises(ValueError, match=r"'observation.state' has shape \(2, 1, 3\), expected \(B, 2,"):
        policy.predict_action_chunk(short)
    with pytest.raises(ValueError, match="action has 7 steps, expected horizon = 8"):
        policy(batch | {"action": batch["action"][:, :7]})
    with pytest.raises(ValueError, match=r"time is of torch.float32.*expected int64"):
        policy(batch, time=torch.zeros(2))
    for steps in (0, 11):
        with pytest.raises(ValueError, match=f"steps is {steps}; expected 1 to num_train_timesteps = 10"):
            policy.predict_action_chunk(batch, steps=steps)
    with pytest.raises(ValueError, match="select_action takes one moment's observation"):
        policy.select_action(batch)
    policy.act(moment())
    with pytest.raises(ValueError, match=r"the batch holds 1 samples.*call policy.reset"):
        policy.act(moment(1))
