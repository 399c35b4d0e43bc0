"""Tracing LeRobot's own π0 and π0.5 shows what tracing ours shows, wherever a token is real."""

from __future__ import annotations

import sys

import pytest
import torch

import minivla
from minivla.proof import prove_masks
from tests.policies.pi_small import (
    EVERYTHING,
    SIDE,
    Case,
    draws,
    make_batch,
    make_ours,
    make_theirs,
    observation,
)

pytest.importorskip("lerobot")

GEMMA = "transformers.models.gemma.modeling_gemma"
ABSENT = Case("the last camera is absent", images=((SIDE, SIDE), (SIDE - 8, SIDE), None), prompts=(9, 4))
pytestmark = pytest.mark.filterwarnings("ignore:no observation.images.right in the batch")


@pytest.fixture(scope="module", params=[("pi0", EVERYTHING), ("pi05", EVERYTHING), ("pi0", ABSENT)], ids=str)
def traces(request):
    """LeRobot's policy, the batch, and a trace each of a chunk, of LeRobot's and of ours."""
    family, case = request.param
    theirs = make_theirs(family, case).eval()
    ours, batch = make_ours(family, theirs, case), make_batch(case)
    noise, _ = draws(case)
    with minivla.trace(theirs) as told:
        theirs.predict_action_chunk(observation(batch), noise=noise, num_steps=3)
    with minivla.trace(ours) as t:
        ours.predict_action_chunk(observation(batch), noise=noise, steps=3)
    return theirs, batch, told, t


def close(hers, mine, what: str) -> None:
    torch.testing.assert_close(hers, mine, rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}")


def test_the_sequence_is_the_same(traces):
    _, _, told, t = traces
    real = t.mask.any(dim=0)  # LeRobot's padding sees nothing, ours may: neither is looked at
    assert told.segments == t.segments and torch.equal(told.mask[real], t.mask[real])
    assert not told.mask[:, ~real].any()
    assert told.sites == t.sites and told.passes == t.passes
    assert told.calls[0].stacks == t.calls[0].stacks
    assert set(told.hidden) == set(t.hidden) and set(told.steps) == set(t.steps)


def test_attention_and_hidden_states_agree_where_tokens_are_real(traces):
    _, _, told, t = traces
    length = t.hidden["prefix"].shape[1]
    for sample in range(len(told.chunk)):
        real = t.masks["joint.0"][sample].any(dim=0)
        for site, mask in t.masks.items():
            rows = real if site.startswith("joint") else slice(None)
            assert torch.equal(told.masks[site][sample][rows], mask[sample][rows]), site
            close(told.attention[site][sample][:, rows], t.attention[site][sample][:, rows], site)
        for name, value in t.hidden.items():
            rows = real[:length] if name.startswith("prefix") else slice(None)
            close(
                told.hidden[name][min(sample, len(value) - 1)][rows],
                value[min(sample, len(value) - 1)][rows],
                name,
            )
    for name, value in t.steps.items():
        close(told.steps[name][:, :1], value[:, :1], name)


def test_the_path_is_the_same(traces):
    _, _, told, t = traces
    assert torch.equal(told.flow.times, t.flow.times)
    close(told.flow.x, t.flow.x, "path")
    close(told.flow.v, t.flow.v, "velocity")
    close(told.flow.x[-1], told.chunk, "chunk")


def test_pictures_can_be_drawn_and_nothing_is_left_behind(traces):
    theirs, batch, told, _ = traces
    assert len(told.explore(sample=1).html) > 10_000
    told.plot_attention(query="actions"), told.plot_cache()
    with minivla.trace(theirs) as trace:
        theirs(dict(batch))
    assert trace.calls[0].passes[0].streams == ("prefix", "suffix")
    assert trace.attention["joint.0"].shape == told.attention["joint.0"].shape
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())
    assert not {"forward", "denoise_step", "sample_actions"} & set(vars(theirs.model))
    assert sys.modules[GEMMA].eager_attention_forward.__module__ == GEMMA


def test_its_masks_are_proven(traces):
    theirs, batch, _, _ = traces
    proof = prove_masks(theirs, batch, exact=False)  # it computes in float32, whatever its weights are
    (sequence,) = proof.sequences
    # The rows of an absent camera are closed throughout, and softmax then shares itself out evenly: harmless,
    # since nobody looks there.
    assert all(leak.startswith(("right[", "and ")) for leak in sequence.leaks), str(proof)
    assert bool(sequence.leaks) == ("observation.images.right" not in batch)
    assert [p.sequence for p in proof.sequences] == ["prefix → suffix"]


def test_of_two_that_are_traced_each_keeps_its_own():
    policies = [make_theirs("pi0").eval(), make_theirs("pi05").eval()]
    batch, (noise, _) = observation(make_batch()), draws()
    with minivla.trace(policies[0]) as first:
        with minivla.trace(policies[1]) as second:
            for policy in policies:
                policy.predict_action_chunk(dict(batch), noise=noise, num_steps=1)
        policies[0].predict_action_chunk(dict(batch), noise=noise, num_steps=1)
    assert [len(first.calls), len(second.calls)] == [2, 1]
    assert torch.equal(first.calls[0].attention["joint.2"], first.calls[1].attention["joint.2"])
    assert sys.modules[GEMMA].eager_attention_forward.__module__ == GEMMA
