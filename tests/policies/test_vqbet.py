"""VQ-BeT's own promises: phases, counting, draws, errors, minivla's additions."""

from __future__ import annotations

import warnings
from typing import Any

import pytest
import torch
from torch import Tensor

import minivla
from minivla.actions.vq import ActionVQVAE, sample_codes
from minivla.checkpoints import load
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.vqbet import VQBeT, VQBeTConfig

CAMERAS = ("observation.images.table", "observation.images.wrist")
TINY: dict[str, Any] = {
    "n_obs_steps": 3,
    "n_action_pred_token": 2,
    "action_chunk_size": 4,
    "crop_shape": None,
    "pretrained_backbone_weights": None,
    "spatial_softmax_num_keypoints": 4,
    "n_vqvae_training_steps": 3,
    "vqvae_n_embed": 5,
    "vqvae_embedding_dim": 8,
    "vqvae_enc_hidden_dim": 16,
    "gpt_block_size": 24,
    "gpt_input_dim": 16,
    "gpt_output_dim": 16,
    "gpt_n_layer": 1,
    "gpt_n_head": 2,
    "gpt_hidden_dim": 16,
    "dropout": 0.0,
    "compact_vision": True,
}
WORDS = ("push", "the", "red", "blue", "block")


def config(cameras: int = 1, **settings: Any) -> VQBeTConfig:
    inputs = {key: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)) for key in CAMERAS[:cameras]}
    inputs["observation.state"] = PolicyFeature(FeatureType.STATE, (3,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (2,))}
    return VQBeTConfig(input_features=inputs, output_features=outputs, **TINY | settings)


def statistics() -> dict[str, dict[str, Tensor]]:
    state, action = (
        {
            "min": torch.zeros(size) - 1,
            "max": torch.ones(size),
            "mean": torch.zeros(size),
            "std": torch.ones(size),
        }
        for size in (3, 2)
    )
    return {"observation.state": state, "action": action}


def vqbet(cameras: int = 1, *, finished: bool = False, **settings: Any) -> VQBeT:
    torch.manual_seed(0)
    policy = VQBeT(config(cameras, **settings), stats=statistics())
    if finished:
        policy.train()
        for seed in range(policy.config.n_vqvae_training_steps):
            policy(batch(policy, seed=seed))
    return policy.eval()


def batch(policy: VQBeT, size: int = 2, seed: int = 0) -> dict[str, Any]:
    generator = torch.Generator().manual_seed(seed)
    c = policy.config
    found: dict[str, Any] = {
        key: torch.rand(size, c.n_obs_steps, *feature.shape, generator=generator)
        for key, feature in c.input_features.items()
    }
    found["action"] = torch.randn(size, len(c.action_delta_indices), 2, generator=generator)
    return found | {"task": ["push the red block", "push the blue block"][:size]}


def test_phase_one_ends_after_its_steps_and_freezes_the_codes():
    policy = vqbet().train()
    names = []
    for step in range(5):
        names.append(set(policy(batch(policy, seed=step))[1]))
        book = policy.vqvae.vq_layer.levels[0].embed.clone()
        assert bool(policy.vqvae.discretized) == (step >= 2)
    assert names[0] == {"n_different_codes", "n_different_combinations", "recon_l1_error"}
    assert {"classification_loss", "offset_loss", "equal_secondary_code_rate"} <= names[3]
    policy(batch(policy, seed=9))
    assert torch.equal(book, policy.vqvae.vq_layer.levels[0].embed)


def test_evaluation_neither_counts_nor_moves_the_codes():
    policy = vqbet()
    before = {name: tensor.clone() for name, tensor in policy.named_buffers()}
    for _ in range(5):
        policy(batch(policy))
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.named_buffers())


def test_phase_two_on_untrained_codes_is_refused_in_training_and_warned_of_once_in_inference():
    policy = vqbet(n_vqvae_training_steps=0)
    policy.train()
    with pytest.raises(ValueError, match=r"phase 2 needs codes.* is untrained.*n_vqvae_training"):
        policy(batch(policy))
    with pytest.raises(ValueError, match="untrained"):
        policy.imitation_loss(torch.zeros(2, 4, 4, 2), policy.predict(batch(policy)))
    with pytest.warns(UserWarning, match="phase 1 of this VQ-BeT is not over"):
        policy.predict_action_chunk(batch(policy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        policy.predict_action_chunk(batch(policy))


def test_a_folder_saved_in_the_middle_of_phase_one_counts_anew_and_says_so(tmp_path):
    policy = vqbet().train()
    policy(batch(policy))
    with pytest.warns(UserWarning, match="only minivla knows"):
        policy.save(tmp_path / "half")
    again = load(tmp_path / "half").train()
    with pytest.warns(UserWarning, match="counted from 0 again, to n_vqvae_training_steps = 3"):
        again(batch(policy))
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        again(batch(policy))
    assert not again.vqvae.discretized
    assert again.schedule_start == 3


def test_a_finished_folder_goes_on_with_phase_two_at_once(tmp_path):
    policy = vqbet(finished=True)
    with pytest.warns(UserWarning, match="only minivla knows"):
        policy.save(tmp_path / "done")
    again = load(tmp_path / "done").train()
    assert again.schedule_start == 0
    assert policy.schedule_start == 3
    assert "offset_loss" in again(batch(policy))[1]
    chunks = [
        p.predict_action_chunk(batch(policy), generator=torch.Generator().manual_seed(1))
        for p in (policy, again)
    ]
    assert torch.equal(*chunks)


def test_draws_follow_from_the_generator_or_the_noise():
    policy = vqbet(finished=True, bet_softmax_temperature=1.0)
    c = policy.config
    noise = torch.empty(2, 4, c.vqvae_levels, c.vqvae_n_embed).exponential_(
        generator=torch.Generator().manual_seed(4)
    )
    drawn = policy.predict_action_chunk(batch(policy), generator=torch.Generator().manual_seed(4))
    assert torch.equal(policy.predict_action_chunk(batch(policy), noise=noise), drawn)
    others = {
        tuple(
            policy.predict(batch(policy), generator=torch.Generator().manual_seed(s)).codes.flatten().tolist()
        )
        for s in range(5)
    }
    assert len(others) > 1
    assert drawn.shape == (2, 4, 2)


def test_codes_are_drawn_with_the_probabilities_of_the_softmax():
    logits = torch.tensor([0.0, 1.0, 2.0])
    codes = sample_codes(logits.expand(20000, 3), generator=torch.Generator().manual_seed(0))
    share = torch.bincount(codes, minlength=3) / len(codes)
    torch.testing.assert_close(share, logits.softmax(0), atol=0.01, rtol=0)


def test_select_action_carries_out_a_whole_chunk_of_the_history():
    policy = vqbet(finished=True, bet_softmax_temperature=1e-6)
    moments = [batch(policy, seed=s) for s in range(9)]
    steps = [{k: v[:, 0] for k, v in m.items() if k.startswith("observation")} for m in moments]
    actions = [policy.select_action(step) for step in steps]
    keys = policy.config.input_features
    for start in (4, 8):
        history = {k: torch.stack([steps[i][k] for i in range(start - 2, start + 1)], 1) for k in keys}
        expected = policy.predict_action_chunk(history)
        assert torch.equal(torch.stack(actions[start : start + 4], 1), expected[:, : 9 - start])


def test_one_training_step_of_each_phase_with_every_addition():
    policy = vqbet(
        2, several_cameras=True, vocabulary=WORDS, vqvae_levels=4, vqvae_kmeans_init=True,
        sequentially_select=True, vqvae_dead_code_threshold=1.0, finished=True,
    ).train()  # fmt: skip
    loss, parts = policy(batch(policy))
    loss.backward()
    assert "equal_level_3_code_rate" in parts
    without = {name for name, p in policy.named_parameters() if p.grad is None}
    assert all(name.startswith("vqvae.") for name in without)
    assert policy.code_head.by_level[3].weight.shape == (5, 16 + 3 * 5)
    one, other = batch(policy), batch(policy)
    other["task"] = ["push the blue block"] * 2
    policy.eval()
    first, second = (policy.predict(given).logits[:, :, 0] for given in (one, other))
    assert not torch.equal(first[0], second[0])
    assert torch.equal(first[1], second[1])


@pytest.mark.parametrize("levels", [1, 2, 4])
def test_any_number_of_levels(levels):
    policy = vqbet(finished=True, vqvae_levels=levels)
    assert policy.predict(batch(policy)).codes.shape == (2, 4, levels)
    rates = [name for name in policy(batch(policy))[1] if name.endswith("_code_rate")]
    assert len(rates) == levels


def test_the_future_is_not_seen_and_the_trace_says_what_each_token_is():
    policy = vqbet(2, several_cameras=True, vocabulary=WORDS, finished=True)
    with minivla.trace(policy, attention=True) as t:
        policy.predict_action_chunk(batch(policy))
    names = [segment.name for segment in t.segments]
    assert names[:5] == ["instruction", "table t-2", "wrist t-2", "state t-2", "query t-2"]
    assert names[-2:] == ["query t", "queries ahead"]
    assert torch.equal(t.mask, torch.ones_like(t.mask).tril())
    assert t.attention["gpt.0"].shape == (2, 2, 14, 14)
    assert {"codes", "logits", "offsets", "decoded", f"keypoints.{CAMERAS[1]}"} <= set(t.hidden)
    assert minivla.prove_masks(policy, batch(policy)).ok
    changed = batch(policy)
    changed["observation.state"][:, -1] += 1
    before, after = policy.predict(batch(policy)).logits, policy.predict(changed).logits
    assert torch.equal(before[:, :2], after[:, :2])
    assert not torch.equal(before[:, 2], after[:, 2])


def test_codes_and_chunks_go_round():
    torch.manual_seed(0)
    vqvae = ActionVQVAE(4, 2, codes=5, width=8, hidden=16, levels=2).train()
    chunks = torch.randn(30, 4, 2)
    before = vqvae.vq_layer.levels[0].embed.clone()
    codes = vqvae.encode(chunks.view(5, 6, 4, 2))
    assert torch.equal(vqvae.vq_layer.levels[0].embed, before)  # encoding moves nothing, in training neither
    vqvae.eval()
    torch.testing.assert_close(vqvae.decode(codes).flatten(0, 1), vqvae(chunks)[0])
    assert torch.equal(codes.flatten(0, 1), vqvae(chunks)[1])


ENV = {"observation.environment_state": PolicyFeature(FeatureType.ENV, (4,))}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: config(vqvae_levels=0), "vqvae_levels is 0, expected a whole number from 1 on"),
        (lambda: config(vqvae_n_embed=0), "vqvae_n_embed is 0"),
        (
            lambda: config(bet_softmax_temperature=0.0),
            "bet_softmax_temperature is 0.0, expected a number above 0",
        ),
        (lambda: config(optimizer_betas=(0.9,)), "optimizer_betas"),
        (lambda: vqbet(2), r"one camera.*Leave the others out; several_cameras=True"),
        (lambda: vqbet(0), "observation.state and one camera"),
        (lambda: vqbet(gpt_block_size=9), "has 10 tokens, gpt_block_size allows 9"),
        (lambda: vqbet(crop_shape=(40, 20)), r"crop_shape is \(40, 20\), the images are \(32, 32\)"),
        (lambda: VQBeT(with_features(ENV)), "Leave the others out"),
        (
            lambda: VQBeT(with_features({CAMERAS[1]: PolicyFeature(FeatureType.VISUAL, (3, 48, 32))})),
            "cameras of several sizes",
        ),
    ],
)
def test_bad_configs_are_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def with_features(more: dict[str, PolicyFeature]) -> VQBeTConfig:
    found = config(several_cameras=True)
    found.input_features |= more
    return found


def test_bad_batches_are_refused():
    policy = vqbet(finished=True)
    short = {k: v[:, 1:] if k.startswith("observation") else v for k, v in batch(policy).items()}
    with pytest.raises(ValueError, match=r"expected \(B, 3, \*\(3, 32, 32\)\), a history of n_obs_steps = 3"):
        policy.predict_action_chunk(short)
    with pytest.raises(ValueError, match="has 5 actions a sample, expected 7"):
        policy(batch(policy) | {"action": torch.zeros(2, 5, 2)})


@pytest.mark.parametrize("one_by_one", [False, True])
def test_teaching_codes_learns_the_offsets_of_the_demonstration(one_by_one):
    """Only offsets of demonstrated codes get a gradient; with upstream's rule, only those of drawn ones."""
    for teach in (True, False):
        policy = vqbet(sequentially_select=one_by_one, teach_codes=teach, finished=True)
        given = batch(policy)
        loss, _ = policy(given, generator=torch.Generator().manual_seed(0))
        loss.backward()
        with torch.no_grad():
            chunks = given["action"].unfold(1, policy.config.action_chunk_size, 1).transpose(2, 3)
            shown = policy.vqvae.encode(chunks)
            drawn = policy.predict(given, generator=torch.Generator().manual_seed(0)).codes
            features = policy.think(policy.embed(given))
            second = policy.code_head(features, shown=shown if teach else None)[0][:, :, 1]
        assert not torch.equal(shown, drawn)  # else both rules would be one
        if one_by_one and teach:  # the second level was told the first demonstrated code
            told = torch.nn.functional.one_hot(shown[..., 0], policy.config.vqvae_n_embed).float()
            expected = policy.code_head.by_level[1](torch.cat((features, told), dim=-1))
            torch.testing.assert_close(second, expected)
        levels, codes = policy.config.vqvae_levels, policy.config.vqvae_n_embed
        learnt = policy.code_head.offset.bias.grad.view(levels, codes, -1).abs().sum(-1) > 0
        wanted = torch.zeros_like(learnt)
        for level in range(levels):
            wanted[level, (shown if teach else drawn)[..., level].unique()] = True
        assert torch.equal(learnt, wanted)
