"""π0 and π0.5 as a user meets them: what matters, what is drawn, what is refused, and how it says so."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import minivla
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.pi import PI0
from tests.policies.pi_small import (
    CAMERAS,
    EVERYTHING,
    FAMILIES,
    SIDE,
    Case,
    draws,
    make_batch,
    observation,
    tiny_config,
    tiny_pi,
)

ABSENT = Case("a camera is absent", images=((SIDE, SIDE), None, (SIDE, SIDE)))
families = pytest.mark.parametrize("family", FAMILIES)


def velocity(policy: PI0, batch: dict[str, Tensor]) -> Tensor:
    """What the network predicts when the loss is asked for: (B, H, 32)."""
    noise, time = draws()
    seen: list[Tensor] = []
    handle = policy.action_out_proj.register_forward_hook(lambda _, inputs, out: seen.append(out.detach()))
    policy(batch, noise=noise, time=time)
    handle.remove()
    return seen[0]


def furthest(a: Tensor, b: Tensor) -> float:
    return ((a - b).abs().max() / b.abs().max()).item()


@families
def test_every_tensor_matters_but_those_said_to_be_inert(family):
    """A bias of SigLIP's keys adds the same to all scores of a query, so that softmax cancels it: it moves
    nothing but the rounding.
    """
    policy, batch = tiny_pi(family), make_batch()
    assert set(policy.inert) < set(policy.state_dict())
    with torch.no_grad():
        before = velocity(policy, batch)
        for name, tensor in policy.state_dict().items():
            old = tensor.clone()
            tensor.add_(0.3 * torch.randn(tensor.shape, generator=torch.Generator().manual_seed(3)))
            moved = furthest(velocity(policy, batch), before)
            tensor.copy_(old)
            if name in policy.inert:
                assert moved == 0, f"{name} is not inert"
            elif "vision" in name and name.endswith("k_proj.bias"):
                assert moved < 1e-5, f"{name} does more than softmax can cancel"
            else:
                assert moved > 1e-4, f"{name} changes nothing"


@families
def test_what_is_drawn_follows_from_noise_time_and_generator(family):
    policy, batch = tiny_pi(family), make_batch()
    noise, time = draws()
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (policy(batch, generator=seed)[0] for seed in seeds)
    assert first == again != other
    assert policy(batch, noise=noise, time=time)[0] == policy(batch, noise=noise, time=time)[0]
    seeds = [torch.Generator().manual_seed(seed) for seed in (0, 0, 1)]
    first, again, other = (policy.predict_action_chunk(batch, generator=seed) for seed in seeds)
    assert torch.equal(first, again) and not torch.equal(first, other)
    assert torch.equal(*(policy.predict_action_chunk(batch, noise=noise) for _ in range(2)))
    times = policy.draw_time(2000, torch.Generator().manual_seed(0))
    assert times.min() >= 0.001 and times.max() <= 1.0 and times.mean() > 0.55


@families
def test_the_sampler_goes_from_noise_at_one_to_an_action_at_zero(family):
    policy, (noise, _) = tiny_pi(family), draws()
    with minivla.trace(policy) as t:
        chunk = policy.predict_action_chunk(make_batch(), noise=noise, steps=5)
    torch.testing.assert_close(t.flow.times, torch.linspace(1, 0, 6))
    assert torch.equal(t.flow.x[0], noise[..., :4]) and torch.equal(t.flow.x[-1], chunk)
    torch.testing.assert_close(t.flow.x[1:], t.flow.x[:-1] - t.flow.v / 5)


@families
def test_the_loss_counts_the_robots_own_dimensions_and_openpis_all_of_them(family):
    noise, time = draws()
    batch = make_batch()
    for upstream, counted in (("lerobot", 4), ("openpi", 32)):
        policy = tiny_pi(family, upstream=upstream)
        target = noise - torch.nn.functional.pad(batch["action"], (0, 28))
        error = (velocity(policy, batch) - target)[..., :counted].square().mean()
        torch.testing.assert_close(policy(batch, noise=noise, time=time)[0].detach(), error)


# --- who sees whom -----------------------------------------------------------------------------------------


@families
def test_what_is_seen_sees_nothing_of_what_is_done(family):
    policy = tiny_pi(family)
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(make_batch())
    names = [segment.name for segment in t.segments]
    state = ["state"] if family == "pi0" else []
    assert names == ["front", "left", "right", "prompt", *state, "actions"]
    block = {segment.name: segment.block for segment in t.segments}
    for query in t.segments:
        for key in t.segments:
            if key.name != "prompt":  # some of which is padding
                seen = t.mask[query.start : query.stop, key.start : key.stop]
                assert seen.all() == seen.any() == (block[key.name] <= block[query.name])


@families
def test_padding_changes_nothing_to_the_bit_whether_it_is_left_out_or_masked(family):
    policy, (noise, _), batch = tiny_pi(family), draws(), make_batch()
    valid = batch["observation.language.attention_mask"]
    ids = batch["observation.language.tokens"]
    other = batch | {"observation.language.tokens": torch.where(valid, ids, (ids + 7) % 200)}
    out = policy.predict_action_chunk(batch, noise=noise)
    assert torch.equal(policy.predict_action_chunk(other, noise=noise), out)
    with minivla.trace(policy):
        whole, changed = (policy.predict_action_chunk(b, noise=noise) for b in (batch, other))
    assert torch.equal(whole, changed)
    assert furthest(out, whole) < 1e-5
    longer = batch | {
        "observation.language.tokens": torch.nn.functional.pad(ids, (0, 11)),
        "observation.language.attention_mask": torch.nn.functional.pad(valid, (0, 11)),
    }
    assert torch.equal(policy.predict_action_chunk(longer, noise=noise), out)


@families
def test_an_absent_camera_is_a_camera_less(family):
    noise, _ = draws()
    policy = tiny_pi(family, ABSENT)
    with pytest.warns(UserWarning, match=r"no observation\.images\.left in the batch"):
        out = policy.predict_action_chunk(make_batch(ABSENT), noise=noise)
    del policy.config.input_features[CAMERAS[1]]
    without = policy.predict_action_chunk(make_batch(ABSENT), noise=noise)
    assert furthest(out, without) < 1e-5


def test_an_absent_camera_is_told_once_and_an_empty_one_never():
    policy = tiny_pi("pi0", ABSENT, empty_cameras=2)
    assert [name for name in policy.config.image_features if "empty" in name] == [
        "observation.images.empty_camera_0",
        "observation.images.empty_camera_1",
    ]
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(3):
            policy.predict_action_chunk(make_batch(ABSENT))
    (warning,) = caught
    assert str(warning.message).startswith("no observation.images.left in the batch: its picture is masked")


# --- training ----------------------------------------------------------------------------------------------


@families
@pytest.mark.parametrize("checkpointing", [False, True])
def test_several_draws_for_each_observation_are_that_observation_several_times(family, checkpointing):
    batch, size = make_batch(), len(EVERYTHING.prompts)
    generator = torch.Generator().manual_seed(4)
    noise = torch.randn(3 * size, 6, 32, generator=generator)
    time = torch.rand(3 * size, generator=generator)
    several = tiny_pi(family, noise_draws=3, gradient_checkpointing=checkpointing).train()
    one = tiny_pi(family).train()
    repeated = {key: value.repeat_interleave(3, dim=0) for key, value in batch.items()}
    losses = [
        several(batch, noise=noise, time=time)[0],
        one(repeated, noise=noise, time=time)[0],
    ]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    total = max(p.grad.abs().max() for p in one.parameters() if p.grad is not None)
    for (name, mine), other in zip(several.named_parameters(), one.parameters(), strict=True):
        if other.grad is not None and other.grad.any():
            assert (mine.grad - other.grad).abs().max() < 1e-5 * total, name


@families
def test_as_many_draws_as_noises_are_given(family):
    """One row of noise for each sample is one draw, whatever the config says; drawn here, there are more."""
    several, one, batch = tiny_pi(family, noise_draws=3), tiny_pi(family), make_batch()
    size = len(EVERYTHING.prompts)
    noise, time = torch.randn(size, 6, 32), torch.rand(size)
    losses = [policy(batch, noise=noise, time=time)[0] for policy in (several, one)]
    torch.testing.assert_close(*losses)
    with pytest.raises(ValueError, match=f"{size + 1} rows, the batch {size} samples"):
        several(batch, noise=torch.randn(size + 1, 6, 32), time=torch.rand(size + 1))


@families
def test_only_what_learns_is_given_to_the_optimizer(family):
    policy = tiny_pi(family, train_expert_only=True)
    (group,) = policy.optimizer_groups()
    given = {id(p) for p in group["params"]}
    names = {name for name, p in policy.named_parameters() if id(p) in given}
    assert not any(name.startswith(("paligemma.vision", "paligemma.embedding")) for name in names)
    assert all("prefix" not in name for name in names)
    assert any("streams.suffix" in name for name in names) and "action_in_proj.weight" in names
    assert group["betas"] == (0.9, 0.95) and group["lr"] == 2.5e-5 and group["weight_decay"] == 0.01


@families
def test_bfloat16_learns_and_acts(family):
    policy, batch = tiny_pi(family, dtype="bfloat16"), make_batch()
    loss, _ = policy.train()(batch)
    loss.backward()
    assert loss.isfinite() and policy.action_in_proj.weight.grad.isfinite().all()
    assert policy.paligemma.decoder.stream("prefix").dtype == torch.bfloat16
    chunk = policy.predict_action_chunk(batch)
    assert chunk.dtype == torch.float32 and chunk.isfinite().all()


@families
def test_small_eyes_see_too(family):
    policy = tiny_pi(family, compact_vision=True, image_resolution=(32, 32))
    loss, _ = policy.train()(make_batch())
    loss.backward()
    assert policy.predict_action_chunk(make_batch()).shape == (3, 6, 4)


# --- control -----------------------------------------------------------------------------------------------


@families
def test_a_chunk_is_carried_out_before_the_next_is_predicted(family, monkeypatch):
    policy, batch = tiny_pi(family), observation(make_batch())
    plain, chunks = policy.predict_action_chunk, []

    def predict(*args: Any, **options: Any) -> Tensor:
        chunks.append(plain(*args, **options))
        return chunks[-1]

    monkeypatch.setattr(policy, "predict_action_chunk", predict)
    actions = [policy.select_action(batch) for _ in range(6)]
    assert len(chunks) == 2
    expected = [*chunks[0][:, :4].unbind(dim=1), *chunks[1][:, :2].unbind(dim=1)]
    assert all(torch.equal(a, b) for a, b in zip(actions, expected, strict=True))
    policy.reset()
    policy.select_action(batch)
    assert len(chunks) == 3


# --- what is refused ---------------------------------------------------------------------------------------


def test_what_makes_no_sense_names_what_was_given_and_how_to_mend_it():
    policy, batch = tiny_pi("pi0"), make_batch()
    with pytest.raises(ValueError, match="steps is 0; expected at least 1 step"):
        policy.predict_action_chunk(batch, steps=0)
    blind = {key: value for key, value in batch.items() if "images" not in key}
    with pytest.raises(ValueError, match=r"none of the policy's cameras.*front.*rename yours"):
        policy.predict_action_chunk(blind)
    wide = batch | {"observation.state": torch.zeros(3, 33)}
    with pytest.raises(ValueError, match=r"observation\.state has 33 numbers, the policy takes 32 at most"):
        policy(wide)
    with pytest.raises(ValueError, match="action has 40 numbers, the policy takes 32 at most"):
        policy(batch | {"action": torch.zeros(3, 6, 40)})
    mute = {key: value for key, value in batch.items() if "language" not in key}
    with pytest.raises(KeyError, match=r"no observation\.language\.tokens.*raw\['task'\]"):
        policy(mute)


@pytest.mark.parametrize(
    ("settings", "words"),
    [
        (
            {"paligemma_variant": "gemma_7b"},
            "paligemma_variant is 'gemma_7b', expected one of gemma_2b",
        ),
        ({"action_expert_variant": "tiny"}, "action_expert_variant is 'tiny', expected one of"),
        ({"dtype": "float16"}, "dtype is 'float16', expected one of float32, bfloat16"),
        ({"upstream": "jax"}, "upstream is 'jax', expected one of lerobot, openpi"),
        ({"n_action_steps": 7}, "n_action_steps is 7, expected 1 to chunk_size = 6"),
        ({"image_resolution": (28, 42)}, r"image_resolution is \(28, 42\); SigLIP expects a square"),
    ],
)
def test_settings_that_do_not_fit_are_refused_by_name(settings, words):
    with pytest.raises(ValueError, match=words):
        tiny_config("pi0", **settings)


def test_a_robot_with_more_numbers_than_the_policy_has_places_is_refused():
    many = {"observation.state": PolicyFeature(FeatureType.STATE, (40,))}
    with pytest.raises(ValueError, match=r"observation\.state has 40 numbers.*raise max_state_dim"):
        FAMILIES["pi0"][1](input_features=many)
    many = {"action": PolicyFeature(FeatureType.ACTION, (33,))}
    with pytest.raises(ValueError, match=r"action has 33 numbers.*raise max_action_dim"):
        FAMILIES["pi0"][1](output_features=many)
