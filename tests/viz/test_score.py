"""A denoiser whose answer is known exactly: the field drawn is the score of a mixture of two Gaussians."""

import numpy as np
import pytest
import torch

import minivla
from minivla.viz import basins, plot_score_field, score
from minivla.world.tabletop import Tabletop
from tests.policies.test_diffusion import FLOW, TRANSFORMER, batch_of, moment, policy_of

HORIZON, WIDTH = 8, 0.2
STEPS = torch.linspace(-1, 1, HORIZON)
LEFT = torch.stack(
    (torch.cos(STEPS), 0.5 * STEPS), dim=-1
)  # two ways, (H, A) each: round to the left, to the right
RIGHT = LEFT * torch.tensor([-1.0, 1.0])
MEANS = torch.stack((LEFT, RIGHT))
HALF = float((LEFT - RIGHT).norm()) / 2
KINDS = [{}, {"prediction_type": "sample"}, FLOW]


def exact(x, signal, sigma):
    """Score and mean of what x (G, H, A) may have come from, for `signal` action + `sigma` noise."""
    spread = (signal * WIDTH) ** 2 + sigma**2
    off = x[:, None] - signal * MEANS
    likely = (-off.square().sum((-1, -2)) / (2 * spread)).softmax(-1)[..., None, None]
    score = -(likely * off).sum(1) / spread
    return score, (x + sigma**2 * score) / signal if signal else (likely * MEANS).sum(1)


def knowing(**settings):
    """A policy whose network is right about that mixture, and a batch of two scenes."""
    policy = policy_of(clip_sample=False, **settings)
    policy.asked = []

    def predict(x, time, observed):
        signal, sigma = score.scales(policy, float(time))
        score_there, action = exact(x, signal, sigma)
        policy.asked.append(len(x))
        if policy.config.objective == "flow":
            return action + sigma * score_there
        return action if policy.config.prediction_type == "sample" else -sigma * score_there

    policy.predict = predict
    return policy, batch_of(policy)


def level(policy, share):
    """A time of the sampler, this share of the way from noise to action."""
    return share if policy.config.objective == "flow" else round((1 - share) * 9)


def named(ax, gid):
    return [artist for artist in (*ax.lines, *ax.collections, *ax.images) if artist.get_gid() == gid]


@pytest.mark.parametrize("settings", KINDS)
@pytest.mark.parametrize("share", [0.1, 0.5, 0.9])
def test_the_score_is_that_of_the_mixture_for_every_objective(settings, share):
    policy, batch = knowing(**settings)
    x = torch.randn(5, HORIZON, 2, generator=torch.Generator().manual_seed(0))
    time = level(policy, share)
    found, action = score.denoise(policy, basins.one_sample(batch, 1), x, time)
    wanted, mean = exact(x, *score.scales(policy, time))
    torch.testing.assert_close(found, wanted, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(action, mean, rtol=1e-4, atol=1e-4)
    assert policy.asked == [5]


def test_scales_are_those_of_the_noise_that_is_added():
    policy, flowing = policy_of(), policy_of(**FLOW)
    signal, sigma = score.scales(policy, 4)
    assert signal**2 == pytest.approx(float(policy.schedule.alpha_bar[4]))
    assert signal**2 + sigma**2 == pytest.approx(1)
    assert score.scales(flowing, 0.3) == (0.3, 0.7)


def test_the_network_itself_is_asked_with_what_the_observations_say():
    policy = policy_of(**TRANSFORMER)
    batch, x = batch_of(policy), torch.randn(3, HORIZON, 2, generator=torch.Generator().manual_seed(0))
    found, _ = score.denoise(policy, basins.one_sample(batch, 1), x, 4)
    with torch.no_grad():
        observed = policy.denoiser.observe(policy.see(batch)[1:].expand(3, -1, -1))
        noise = policy.predict(x, torch.tensor([4]), observed)
    torch.testing.assert_close(found, -noise / score.scales(policy, 4)[1])
    other, _ = score.denoise(policy, basins.one_sample(batch, 0), x, 4)
    assert not torch.allclose(found, other)


def test_what_is_frozen_does_not_move():
    x = torch.randn(HORIZON, 2, generator=torch.Generator().manual_seed(0))
    plane = score.slice_through((3, 0), (5, 1), x)
    moved = plane.through(x, torch.tensor([[0.0, 0.0], [7.0, -7.0]]))
    free = plane.axes.sum(0).bool()
    assert torch.equal(moved[:, ~free], x[~free].expand(2, -1))
    torch.testing.assert_close(moved[:, 3, 0], torch.tensor([0.0, 7.0]))
    torch.testing.assert_close(moved[:, 5, 1], torch.tensor([0.0, -7.0]))
    assert plane.names == ("action 0 at step 3", "action 1 at step 5")


def cloud(count=60, dimensions=2):
    generator = torch.Generator().manual_seed(0)
    which = torch.randint(2, (count,), generator=generator)
    return MEANS[which] + WIDTH * torch.randn(count, HORIZON, 2, generator=generator), which


def test_the_slice_runs_from_one_group_of_samples_to_the_other():
    chunks, which = cloud()
    plane = score.slice_between(chunks)
    torch.testing.assert_close(
        torch.einsum("iha,jha->ij", plane.axes, plane.axes), torch.eye(2), atol=1e-5, rtol=0
    )
    between = (LEFT - RIGHT) / (LEFT - RIGHT).norm()
    assert float((plane.axes[0] * between).sum()) > 0.98  # of random directions it would be about 0.25
    assert float(plane.axes[0, :, 0].sum()) > 0
    torch.testing.assert_close(plane.origin, MEANS.mean(0), atol=0.2, rtol=0)
    at = plane.coordinates(chunks)
    assert torch.equal(score.two_groups(at[:, 0]), which == 0)
    assert at[which == 0, 0].mean() == pytest.approx(HALF, abs=0.15)
    x, places = torch.randn(HORIZON, 2), torch.tensor([[0.3, -2.0], [1.0, 0.0]])
    for signal in (1.0, 0.4):
        torch.testing.assert_close(
            plane.coordinates(plane.through(x, places, signal), signal), places, atol=1e-5, rtol=0
        )


def test_only_the_named_dimensions_make_groups():
    chunks, which = cloud()
    grip = (
        torch.randint(2, (60, 1), generator=torch.Generator().manual_seed(1)) * 6.0 - 3
    )  # a larger difference
    chunks = torch.cat((chunks, grip[..., None].expand(-1, HORIZON, 1)), dim=-1)
    plane = score.slice_between(chunks, (0, 1))
    assert not plane.axes[..., 2].any()
    assert torch.equal(score.two_groups(plane.coordinates(chunks)[:, 0]), which == 0)
    assert not torch.equal(
        score.two_groups(score.slice_between(chunks).coordinates(chunks)[:, 0]), which == 0
    )


def test_two_groups_leave_the_least_variance():
    values = torch.randn(9, generator=torch.Generator().manual_seed(0))
    ordered = values.sort().values
    least = min(
        range(1, 9),
        key=lambda n: ordered[:n].var(unbiased=False) * n + ordered[n:].var(unbiased=False) * (9 - n),
    )
    assert int((~score.two_groups(values)).sum()) == least
    assert torch.equal(score.two_groups(values), values >= ordered[least])


def test_one_basin_becomes_two_where_it_should():
    policy, batch = knowing(num_train_timesteps=100)
    one, plane = basins.one_sample(batch, 0), score.slice_between(cloud()[0])
    for time in (95, 70, 50, 20, 5):
        signal, sigma = score.scales(policy, time)
        places = score.grid(signal * HALF + 2 * sigma, 31, LEFT)
        field = score.score_field(policy, one, torch.zeros(HORIZON, 2), time, plane, places)
        # Two equal Gaussians have one mode as long as their distance is below two of their widths.
        wanted = 1 if signal * HALF < ((signal * WIDTH) ** 2 + sigma**2) ** 0.5 else 2
        assert score.basins(field, 31) == wanted
    assert wanted == 2


def test_the_arrows_drawn_are_the_score_and_the_colours_the_answer():
    policy, batch = knowing(num_train_timesteps=100, noise_scheduler_type="DDIM", num_inference_steps=10)
    figure = plot_score_field(policy, batch, sample=1, seed=3, samples=40)
    one = basins.one_sample(batch, 1)
    flow = basins.sampled(policy, one, 40, None, 3)
    plane = score.slice_between(flow.x[-1])
    high = score.two_groups(plane.coordinates(flow.x[-1])[:, 0])
    for ax, k in zip(figure.axes, (0, 4, 8), strict=True):
        time = int(flow.times[k])
        signal, sigma = score.scales(policy, time)
        (arrows,), (colours,) = named(ax, "score"), named(ax, "answer")
        places = torch.tensor(np.stack((arrows.X, arrows.Y), -1), dtype=torch.float32)
        assert len(places) == 15**2
        wanted, _ = exact(plane.through(flow.x[k, 0], places, signal), signal, sigma)
        wanted = torch.einsum("gha,iha->gi", wanted, plane.axes)
        np.testing.assert_allclose(np.stack((arrows.U, arrows.V), -1), wanted, atol=2e-3 / sigma)
        shade = colours.get_array()
        assert shade[:, 0].max() < 0 < shade[:, -1].min()  # low on the left, high on the right
        dots = [line.get_xydata() for line in named(ax, "samples")]
        here = plane.coordinates(flow.x[k], signal)
        for found, group in zip(dots, (~high, high), strict=True):
            np.testing.assert_allclose(found, here[group], atol=1e-5)
        assert f"time {time}: " in ax.get_title(loc="left")
    assert figure.get_suptitle() == "1 basin at time 90, 2 at time 50 and 2 at time 10"


def test_a_moment_is_one_question():
    policy, batch = knowing(noise_scheduler_type="DDIM", num_inference_steps=5)
    plot_score_field(policy, batch, moments=[1, 3], samples=10)
    assert policy.asked == [10] * 5 + [basins.FIELD**2] * 2


def test_below_are_the_ways_of_the_answers():
    policy, batch = knowing(noise_scheduler_type="DDIM", num_inference_steps=5)
    policy.postprocess = lambda chunk: chunk
    figure = plot_score_field(policy, batch, meaning=("dx", "dy"), samples=10, moments=[3])
    (ax,) = figure.axes[1:]
    flow = basins.sampled(policy, basins.one_sample(batch, 0), 10, None, 0)
    _, clean = exact(flow.x[3], *score.scales(policy, int(flow.times[3])))
    start = moment(seed=1)["observation.state"][0, :2]
    ways = [line.get_xydata() for line in named(ax, "companion")]
    assert len(ways) == 10
    for way, chunk in zip(ways, clean, strict=True):
        moves = torch.cat((start[None], chunk[1:]))  # the chunk begins one observation ago
        np.testing.assert_allclose(way, moves.cumsum(0), atol=1e-4)


@pytest.mark.parametrize("settings", [TRANSFORMER, FLOW, TRANSFORMER | FLOW])
def test_real_networks_are_drawn_from_a_trace(settings):
    policy = policy_of(**settings | {"num_inference_steps": 4})
    batch = batch_of(policy)
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch)
    figure = t.plot_score(sample=1, samples=8, along=((2, 0), (2, 1)), moments=2)
    assert len(figure.axes) == 2
    assert figure.axes[1].get_xlabel() == "action 0 at step 2"
    assert len(t.calls) == 1


@pytest.mark.parametrize(
    ("options", "told"),
    [
        ({"sample": 2}, "sample is 2; the batch has 2: expected 0 to 1"),
        ({"samples": 2}, "2 samples span no plane"),
        ({"samples": 0}, "samples is 0; expected at least 1"),
        (
            {"along": ((8, 0), (0, 1))},
            "along names step 8, dimension 0; the chunk has 8 steps of 2 dimensions",
        ),
        ({"along": ((1, 0), (1, 0))}, "twice"),
        ({"moments": [10]}, r"moments has \[10\]; the sampler's steps are 0 to 9"),
    ],
)
def test_errors(options, told):
    policy, batch = knowing()
    with pytest.raises(ValueError, match=told):
        plot_score_field(policy, batch, **{"samples": 4, **options})


def test_a_policy_without_a_denoiser_has_no_score(seen):
    with pytest.raises(TypeError, match="ACT has no denoiser"):
        seen.trace.plot_score(meaning=Tabletop().action_spec)
