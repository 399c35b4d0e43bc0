"""ACT as a person uses it: acting, saving, what it refuses; with the minivla-only fields on."""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch

import minivla
from minivla.policies.act import ACT, ACTConfig
from tests.parity import redraw
from tests.policies.small import tiny_act, tiny_batch, tiny_config, tiny_raw


def test_acting_goes_from_raw_to_robot_units():
    policy = tiny_act()
    raw = tiny_raw()
    action = policy.act(raw)
    assert action.shape == (2, 2)
    assert action.device.type == "cpu"
    chunk = policy.predict_action_chunk(policy.preprocess(raw))
    torch.testing.assert_close(action, chunk[:, 0] * torch.tensor([2.0, 0.5]) + torch.tensor([1.0, -1.0]))
    torch.testing.assert_close(
        policy.act(tiny_raw(seed=9)), policy.postprocess(chunk[:, 1])
    )  # still from the queue
    policy.reset()
    assert not torch.allclose(policy.act(tiny_raw(seed=9)), policy.postprocess(chunk[:, 0]))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_acting_in_another_precision(dtype):
    policy = tiny_act()
    expected = policy.act(tiny_raw())
    policy.to(dtype).reset()
    torch.testing.assert_close(policy.act(tiny_raw()).float(), expected, rtol=0.1, atol=0.1)


@pytest.mark.parametrize("task", [None, 3, [3, 4]])
def test_an_instruction_that_is_no_text_is_refused(task):
    policy = tiny_act()
    with pytest.raises((KeyError, TypeError, ValueError), match="task"):
        policy.act({key: value for key, value in (tiny_raw() | {"task": task}).items() if value is not None})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"chunk_sise": 4}, r"no field 'chunk_sise' \(did you mean 'chunk_size'\?\)"),
        ({"minivla": [1]}, "'minivla' holds list, expected a table"),
        ({"normalization_mapping": {"STATE": "MEDIAN"}}, "MEDIAN.*MEAN_STD"),
        ({"input_features": [1]}, "'input_features' holds list, expected a table"),
        ({"n_action_steps": "8"}, "n_action_steps is '8', expected int"),
    ],
)
def test_a_config_that_says_nonsense_is_refused(content, message):
    with pytest.raises(ValueError, match=message):
        ACTConfig.from_json(tiny_config().to_json() | content)


def test_one_observation_without_a_batch_axis_is_enough():
    raw = {key: value[0] for key, value in tiny_raw().items()}
    assert tiny_act().act(raw).shape == (1, 2)


def test_a_chunk_depends_on_the_batch_alone():
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    first = policy.predict_action_chunk(batch)
    policy.select_action(batch)
    assert torch.equal(policy.predict_action_chunk(batch), first)


@pytest.mark.parametrize("spoil", ["table", "wrist", "state", "task"])
def test_every_input_reaches_the_chunk(spoil):
    policy = tiny_act()
    batch = policy.preprocess(tiny_raw())
    before = policy.predict_action_chunk(batch)
    key = next(k for k in batch if k.endswith(spoil))
    batch[key] = batch[key][::-1] if key == "task" else batch[key] + 1
    assert not torch.allclose(policy.predict_action_chunk(batch), before)


def test_loss_is_reproducible_by_noise_and_by_generator_and_blind_to_padding():
    policy = tiny_act().train()
    batch = tiny_batch(policy)
    noise = torch.zeros(2, 4)
    loss, metrics = policy(batch, noise=noise)
    assert torch.equal(policy(batch, noise=noise)[0], loss)
    assert set(metrics) == {"l1_loss", "kld_loss"}
    drawn = [policy(batch, generator=torch.Generator().manual_seed(3))[0] for _ in range(2)]
    assert torch.equal(*drawn)
    padded = batch | {"action": batch["action"].masked_fill(batch["action_is_pad"][..., None], 50.0)}
    assert torch.equal(policy(padded, noise=noise)[0], loss)


def test_gradients_reach_every_parameter_that_is_not_inert():
    policy = tiny_act().train()
    redraw(policy)
    policy(tiny_batch(policy))[0].backward()
    still = {name for name, p in policy.named_parameters() if p.grad is None or not p.grad.any()}
    assert still <= set(policy.inert)


def test_optimizer_groups_hold_each_parameter_once_the_backbone_apart():
    policy = tiny_act(optimizer_lr=1e-3, optimizer_lr_backbone=1e-4)
    rest, backbone = policy.optimizer_groups()
    assert (rest["lr"], backbone["lr"]) == (1e-3, 1e-4)
    assert {id(p) for p in backbone["params"]} == {id(p) for p in policy.backbone.parameters()}
    assert len(rest["params"]) + len(backbone["params"]) == len(list(policy.parameters()))


def test_save_and_load_round_trip(tmp_path):
    policy = tiny_act().eval()
    with pytest.warns(UserWarning, match=r"compact_vision, vocabulary.*LeRobot will refuse"):
        policy.save(tmp_path / "act")
    again = minivla.load(tmp_path / "act")
    assert isinstance(again, ACT)
    assert replace(again.config, device=None) == policy.config
    assert again.receipt.ok
    raw = tiny_raw()
    assert torch.equal(again.act(raw), policy.act(raw))
    stored = json.loads((tmp_path / "act" / "config.json").read_text())
    assert stored["type"] == "act"
    assert set(stored["minivla"]) == {"compact_vision", "vocabulary"}


def test_with_upstreams_defaults_nothing_of_ours_is_written(tmp_path, recwarn):
    policy = tiny_act(compact_vision=False, vocabulary=())
    policy.save(tmp_path / "act")
    assert "minivla" not in json.loads((tmp_path / "act" / "config.json").read_text())
    assert not [w for w in recwarn if "LeRobot" in str(w.message)]


def test_a_failed_save_leaves_nothing(tmp_path, monkeypatch):
    policy = tiny_act(compact_vision=False, vocabulary=())
    monkeypatch.setattr("minivla.policies.base.write_pipeline", lambda *args: 1 / 0)
    with pytest.raises(ZeroDivisionError):
        policy.save(tmp_path / "act")
    assert not list(tmp_path.iterdir())


def test_half_precision_on_disk(tmp_path):
    policy = tiny_act()
    with pytest.warns(UserWarning, match="LeRobot will refuse"):
        policy.save(tmp_path / "act", dtype=torch.float16)
    again = minivla.load(tmp_path / "act")
    assert {p.dtype for p in again.parameters()} == {torch.float32}
    torch.testing.assert_close(again.act(tiny_raw()), policy.act(tiny_raw()), rtol=1e-2, atol=1e-2)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"temporal_ensemble_coeff": 0.01}, "set n_action_steps=1"),
        ({"n_action_steps": 7}, "expected 1 to chunk_size = 6"),
        ({"n_action_steps": 0}, "expected 1 to chunk_size = 6"),
        ({"n_obs_steps": 2}, "must be 1, not 2"),
        ({"feedforward_activation": "swish"}, "choose one of relu, gelu"),
        ({"vision_backbone": "vit", "compact_vision": False}, "choose one of resnet18"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings, message):
    with pytest.raises(ValueError, match=message):
        tiny_act(**settings)


def test_an_act_without_eyes_is_refused():
    config = tiny_config()
    state = {"observation.state": config.input_features["observation.state"]}
    with pytest.raises(ValueError, match=r"needs a camera or observation\.environment_state"):
        ACT(ACTConfig(input_features=state, output_features=config.output_features))
    with pytest.raises(ValueError, match="expected 'action'"):
        ACT(ACTConfig(input_features=config.input_features))


def test_a_changed_batch_size_in_an_episode_is_refused():
    policy = tiny_act()
    policy.act(tiny_raw(2))
    with pytest.raises(ValueError, match=r"1 samples, the episode in progress has 2; call policy\.reset\(\)"):
        policy.act(tiny_raw(1))
    policy = tiny_act(n_action_steps=1, temporal_ensemble_coeff=0.01)
    policy.act(tiny_raw(2))
    with pytest.raises(ValueError, match=r"policy\.reset"):
        policy.act(tiny_raw(1))


def test_without_statistics_nothing_is_guessed():
    policy = ACT(tiny_config())
    with pytest.raises(
        ValueError, match=r"no statistics, so it cannot preprocess; build it with ACT\(config, stats="
    ):
        policy.act(tiny_raw())


def test_bad_observations_are_named():
    policy = tiny_act()
    raw = tiny_raw()
    missing = {key: value for key, value in raw.items() if not key.endswith("wrist")}
    with pytest.raises((KeyError, ValueError), match=r"observation\.images\.wrist"):
        policy.act(missing)
    with pytest.raises(ValueError, match=r"observation\.state"):
        policy.act(raw | {"observation.state": torch.zeros(2, 4)})
    with pytest.raises(ValueError, match="table"):
        policy.act(raw | {"observation.images.table": raw["observation.images.table"] * 255})
