"""Tracing LeRobot's own Diffusion and VQ-BeT shows what tracing ours shows; ACT's is in test_recorder.py."""

from __future__ import annotations

import pytest
import torch

import minivla
from minivla.proof import prove_masks
from minivla.viz.explorer_scene import answers, views
from tests.policies import test_diffusion_parity as diffusion
from tests.policies import test_vqbet_parity as vqbet

pytest.importorskip("lerobot")


def close(hers, mine, what: str) -> None:
    torch.testing.assert_close(
        hers.float(), mine.float(), rtol=1e-4, atol=1e-5, msg=lambda text: f"{what}: {text}"
    )


def expect_same(hers, mine) -> None:
    """Two calls hold the same, but for the batch, which LeRobot's queues complete."""
    assert (hers.method, hers.segments, hers.sites) == (mine.method, mine.segments, mine.sites)
    for name in ("masks", "attention", "hidden"):
        ours, theirs = getattr(mine, name), getattr(hers, name)
        assert list(theirs) == list(ours) or set(theirs) == set(ours), name
        for key, value in theirs.items():
            close(value, ours[key], f"{name} {key}")


@pytest.fixture(scope="module", params=[0, 1, 2], ids=["random crop", "an encoder each", "one encoder"])
def chunks(request):
    """LeRobot's Diffusion Policy, ours, and a trace of the same chunk of each."""
    case = diffusion.CASES[request.param]
    theirs = diffusion.make_theirs(case).eval()
    ours, batch = diffusion.make_ours(case, theirs), diffusion.observation(diffusion.make_batch(case))
    traces = []
    for policy in (theirs, ours):
        torch.manual_seed(4)  # what DDPM draws on its way
        with minivla.trace(policy) as trace:
            policy.predict_action_chunk(batch, noise=diffusion.NOISE)
        traces.append(trace)
    return theirs, batch, *traces


def test_diffusion_walks_the_same_path(chunks):
    _, _, told, t = chunks
    expect_same(told.calls[0], t.calls[0])
    assert told.flow.quantity == t.flow.quantity
    assert torch.equal(told.flow.times, t.flow.times)
    close(told.flow.x, t.flow.x, "path")
    close(told.flow.v, t.flow.v, "predictions")
    close(told.chunk, t.chunk, "chunk")
    torch.testing.assert_close(told.hidden["horizon"], told.flow.x[-1])


def test_diffusions_keypoints_lie_on_the_same_pixels(chunks):
    _, _, told, t = chunks
    shown = [views(x.calls[0], [], sample=1, side=96, encoders=x._encoders) for x in (told, t)]
    assert [v["camera"] for v in shown[0]] == [v["camera"] for v in shown[1]]
    for hers, mine in zip(*shown, strict=True):
        assert hers["source"] == mine["source"] and hers["ago"] == mine["ago"]
        close(torch.tensor(hers["points"]), torch.tensor(mine["points"]), "points")
    assert len(told.explore(sample=1).html) > 10_000


def test_diffusions_queues_complete_the_pictures_and_the_hooks_go(chunks):
    theirs, batch, _, _ = chunks
    theirs.reset()
    moments = [{key: value[:, t] for key, value in batch.items()} for t in (0, 1)]
    with minivla.trace(theirs) as told:
        theirs.select_action(dict(moments[0]))
        theirs._queues["action"].clear()
        theirs.select_action(dict(moments[1]))
    for camera in theirs.config.image_features:
        torch.testing.assert_close(told.calls[1].batch[camera], batch[camera])
        assert torch.equal(told.calls[0].batch[camera][:, 0], told.calls[0].batch[camera][:, 1])
    theirs.reset()
    model = theirs.diffusion
    assert "step" not in vars(model.noise_scheduler)
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in model.modules())


def test_a_loss_of_diffusion_holds_what_was_told_and_no_path(chunks):
    theirs, batch, told, _ = chunks
    full = diffusion.make_batch(diffusion.CASES[0]) | batch
    with minivla.trace(theirs) as trace:
        theirs.train()(dict(full))
    theirs.eval()
    assert trace.flow is None and set(trace.hidden) == set(told.hidden) - {"horizon"}
    assert trace.hidden["condition"].shape == told.hidden["condition"].shape


@pytest.mark.parametrize("number", [0, 1, 3], ids=["both codes at once", "one by one", "no query ahead"])
def test_vqbet_has_the_same_tokens_attention_and_answers(number):
    case = vqbet.CASES[number]
    theirs = vqbet.make_theirs(case).eval()
    theirs.vqbet.action_head.vqvae_model.discretized.fill_(True)
    ours = vqbet.make_ours(case, theirs).eval()
    batch = vqbet.make_batch(case)
    moment = {key: value[:, 0] for key, value in vqbet.observation(batch).items()}
    with minivla.trace(theirs) as told, minivla.trace(ours) as t:
        for policy in (theirs, ours):
            torch.manual_seed(vqbet.SEED)
            policy.select_action(dict(moment))
    (hers,), (mine,) = told.calls, t.calls
    expect_same(hers, mine)
    assert torch.equal(told.mask, t.mask)
    close(hers.chunk, mine.chunk, "chunk")
    assert torch.equal(hers.hidden["codes"], mine.hidden["codes"])
    said = [answers(call, call.segments, sample=1, robot=None)["of"] for call in (hers, mine)]
    assert said == [ours.config.n_obs_steps - 1] * 2
    assert hers.batch[vqbet.CAMERA].shape == mine.batch[vqbet.CAMERA].shape
    assert prove_masks(theirs, batch, exact=False).ok  # its quantiser knows float32 only
    assert not any(m._forward_hooks or m._forward_pre_hooks for m in theirs.modules())
