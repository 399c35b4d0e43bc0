"""A flow whose velocity is known exactly is drawn as it is, and its numbers are the figure's."""

import matplotlib.pyplot as plt
import numpy as np
import pytest
import torch

from minivla.recorder import Flow
from minivla.viz import animate_flow, convergence, palette, plot_convergence, plot_denoising, plot_flow
from minivla.viz.flow import GRID, clock, spread_over

MEANS, WIDTH = torch.tensor([[1.5, 1.0], [1.2, -1.2], [-1.6, 0.2]]), 0.15


def velocity(x, time):
    """Of straight lines from N(0, 1) at time 0 to a mixture of Gaussians at time 1: E[action − noise | x].

    Given its component, (noise, action, x) are jointly normal; components are weighed by how likely x is.
    """
    spread = (1 - time) ** 2 + (time * WIDTH) ** 2
    off = x[..., None, :] - time * MEANS
    likely = (-(off**2).sum(-1) / (2 * spread)).softmax(-1)
    each = MEANS + (time * WIDTH**2 - (1 - time)) / spread * off
    return (likely[..., None] * each).sum(-2)


def integrated(steps=10, batch=24, horizon=1, *, noise_at=0):
    """Euler's path through that field, every step of the chunk for itself."""
    x = [torch.randn(batch, horizon, 2, generator=torch.Generator().manual_seed(0))]
    v = [velocity(x[0], 0.0)]
    for k in range(steps):
        x.append(x[-1] + v[-1] / steps)
        v.append(velocity(x[-1], (k + 1) / steps))
    times, x, v = torch.linspace(0, 1, steps + 1), torch.stack(x), torch.stack(v[:-1])
    return Flow(times, x, v) if noise_at == 0 else Flow(1 - times, x, -v)


def named(ax, gid):
    """Lines or arrows of one name."""
    return [artist for artist in (*ax.lines, *ax.collections, *ax.patches) if artist.get_gid() == gid]


def test_the_field_carries_the_batch_to_the_mixture():
    flow = integrated(steps=100)
    nearest = torch.cdist(flow.x[-1, :, 0], MEANS).min(-1).values
    assert (nearest < 4 * WIDTH).all()


def test_the_path_drawn_is_the_path_recorded():
    flow = integrated()
    figure = plot_flow(flow, sample=3, field=velocity)
    plane, beside = figure.axes
    (path,) = named(plane, "path")
    assert np.allclose(path.get_xydata(), flow.x[:, 3, 0])
    (noise,), (action,) = named(plane, "noise"), named(plane, "action")
    assert np.allclose(noise.get_xydata()[0], flow.x[0, 3, 0])
    assert np.allclose(action.get_xydata()[0], flow.x[-1, 3, 0])
    companions = named(plane, "companion")
    assert len(companions) == 23
    assert np.allclose(companions[3].get_xydata(), flow.x[:, 4, 0])
    assert {"noise, time 0", "action, time 1"} <= {t.get_text() for t in plane.texts}
    assert plane.get_xlabel() == "action 0 at step 0 (normalised)"
    assert "time 0 → 1" in beside.get_xlabel()
    assert figure.get_size_inches()[0] == 6.5


def test_the_field_drawn_is_the_field_given_at_that_time():
    flow = integrated()
    for time in (None, 0.9):
        (arrows,) = named(plot_flow(flow, field=velocity, time=time).axes[0], "field")
        grid = torch.tensor(np.stack((arrows.X, arrows.Y), -1), dtype=torch.float32)
        assert len(grid) == GRID**2
        drawn = np.stack((arrows.U, arrows.V), -1)
        assert np.allclose(drawn, velocity(grid, 0.5 if time is None else time), atol=1e-5)
    stored = (grid[:5], torch.ones(5, 2))
    (arrows,) = named(plot_flow(flow, field=stored).axes[0], "field")
    assert np.allclose(arrows.X, grid[:5, 0])
    assert (arrows.U == 1).all()


@pytest.mark.parametrize("noise_at", [0, 1])
def test_recorded_arrows_point_the_way_the_sampler_goes_under_both_conventions(noise_at):
    flow = integrated(noise_at=noise_at)
    plane = plot_flow(flow).axes[0]
    (arrows,) = named(plane, "v")
    drawn, moved = np.stack((arrows.U, arrows.V), -1), flow.x.diff(dim=0)[:, :, 0]
    assert np.allclose(drawn.reshape(10, 24, 2), 10 * moved, atol=1e-5)
    assert f"noise, time {noise_at}" in {t.get_text() for t in plane.texts}


def test_the_numbers_of_convergence_are_the_figures():
    flow = integrated(horizon=4)
    distance, speed, detour = convergence(flow)
    assert np.allclose(distance, (flow.x - flow.x[-1]).square().mean((-1, -2)).sqrt().numpy())
    assert np.allclose(speed, flow.v.square().mean((-1, -2)).sqrt().numpy())
    way = flow.x.diff(dim=0).square().mean((-1, -2)).sqrt().sum(0).numpy()
    assert np.allclose(detour, way / distance[0], atol=1e-5)
    assert (detour > 1.001).all()  # the field of a mixture bends
    figure = plot_convergence(flow, sample=2, quantity="score")
    (ax,) = figure.axes
    (line,), (steps,) = named(ax, "distance"), named(ax, "speed")
    assert np.allclose(line.get_xydata(), np.stack((np.arange(11), distance[:, 2]), -1))
    assert np.allclose(steps.get_data().values, speed[:, 2])
    assert "size of the score" in {t.get_text() for t in ax.texts}


def straight(steps=4, batch=2, horizon=3):
    """Noise and action joined by straight lines at even speed."""
    noise, action = torch.ones(batch, horizon, 2), 3 * torch.ones(batch, horizon, 2)
    times = torch.linspace(1, 0, steps + 1)
    x = torch.stack([t * noise + (1 - t) * action for t in times])
    return Flow(times, x, (noise - action).expand(steps, -1, -1, -1))


def test_titles_tell_how_straight_and_how_fast():
    assert plot_flow(straight()).get_suptitle() == "From noise to action in 4 steps, along a straight line"
    assert plot_convergence(straight()).get_suptitle() == "Half of the way is done after 2 of 4 steps"
    detour = convergence(integrated())[2][0]
    assert f"{detour:.2f} × the straight line" in plot_flow(integrated()).get_suptitle()
    assert convergence(straight())[2].tolist() == pytest.approx([1, 1])


def test_all_steps_of_the_chunk_are_one_line_at_a_few_moments():
    flow = integrated(horizon=6)
    plane = plot_flow(flow, sample=1, step=None).axes[0]
    for k in spread_over(11, 5):
        (line,) = named(plane, f"chunk {k}")
        assert np.allclose(line.get_xydata(), flow.x[k, 1])
    assert plane.get_xlabel() == "action 0 at all steps (normalised)"


def test_denoising_draws_a_dimension_at_each_moment():
    flow = integrated(horizon=6)
    figure = plot_denoising(flow, dimension=1, sample=2, moments=4, name="dy")
    assert spread_over(11, 4) == [0, 3, 7, 10]
    for ax, k in zip(figure.axes, (0, 3, 7, 10), strict=True):
        (line,) = named(ax, f"step {k}")
        assert np.allclose(line.get_ydata(), flow.x[k, 2, :, 1])
        assert ax.get_title(loc="left") == f"step {k}, time {k / 10:.2g}"
    assert figure.axes[0].get_ylabel() == "dy\n(normalised)"
    assert palette.KIND_COLOURS["action"].lower() == figure.axes[-1].lines[-1].get_color().lower()


def test_on_axes_of_ones_own_only_the_path_is_drawn():
    figure, axes = plt.subplots(1, 2, figsize=(7, 3))
    assert plot_flow(integrated(), ax=axes[0], title="mine") is figure
    assert plot_convergence(integrated(), ax=axes[1], title="too") is figure
    assert [ax.get_title() or ax.get_title(loc="left") for ax in axes] == ["mine", "too"]
    assert len(figure.axes) == 2


def test_a_film_of_a_flow_has_a_frame_for_each_step():
    gif = animate_flow(integrated(steps=5, batch=4), field=velocity)
    assert gif.frames == 6
    assert gif.width == 330
    assert gif.alt == "4 samples move from noise to actions in 5 sampler steps"
    film = animate_flow(integrated(steps=9, batch=2, horizon=5), moments=4, alt="it settles")
    assert (film.frames, film.width, film.alt) == (4, 650, "it settles")
    assert len(film.data) < 200_000
    assert not plt.get_fignums()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"sample": 24}, "sample is 24; the flow has 24: expected 0 to 23"),
        ({"dimensions": (0, 2)}, "dimension is 2; the flow has 2"),
        ({"step": 1}, "step is 1; the flow has 1"),
        ({"field": lambda x, time: x[:3]}, r"vectors \(3, 2\) for points \(225, 2\)"),
    ],
)
def test_flow_errors(options, message):
    with pytest.raises(ValueError, match=message):
        plot_flow(integrated(), **options)


def test_flows_that_are_none():
    with pytest.raises(ValueError, match="there is no flow to draw"):
        plot_flow(None)
    flow = integrated()
    with pytest.raises(ValueError, match=r"times \(10,\), x \(11, 24, 1, 2\) and v \(10, 24, 1, 2\)"):
        plot_denoising(Flow(flow.times[1:], flow.x, flow.v))


def test_times_are_written_without_powers_of_ten():
    flow = integrated()
    flow = Flow(flow.times * 100, flow.x, flow.v)
    plane, beside = plot_flow(flow).axes
    assert {"noise, time 0", "action, time 100"} <= {t.get_text() for t in plane.texts}
    assert "time 0 → 100" in beside.get_xlabel()
    assert [clock(t) for t in (0.0, 1 / 3, 9.5, 100.0, 961.4, 1000.0)] == [
        "0",
        "0.33",
        "9.5",
        "100",
        "961",
        "1000",
    ]
    assert plot_denoising(flow).axes[-1].get_title(loc="left") == "step 10, time 100"


def test_half_of_a_straight_way_is_half_in_float32_too():
    ends = torch.randn(2, 1, 16, 3, generator=torch.Generator().manual_seed(1))
    x = torch.stack([torch.lerp(*ends, k / 10) for k in range(11)])
    x[5] += 1e-6 * (x[5] - x[-1])
    flow = Flow(torch.linspace(0, 1, 11), x, (ends[1] - ends[0]).expand(10, -1, -1, -1))
    assert plot_convergence(flow).get_suptitle() == "Half of the way is done after 5 of 10 steps"


def test_one_step_is_one_step():
    flow = straight(steps=1)
    assert plot_flow(flow).get_suptitle() == "From noise to action in 1 step, along a straight line"
    assert plot_convergence(flow).get_suptitle() == "Half of the way is done after 1 of 1 step"
    assert (
        animate_flow(integrated(steps=1, batch=1)).alt
        == "1 sample moves from noise to actions in 1 sampler step"
    )


def test_bfloat16_is_drawn_as_what_it_holds():
    flow = integrated()
    half = Flow(*(part.bfloat16() for part in (flow.times, flow.x, flow.v)))
    (path,) = named(plot_flow(half).axes[0], "path")
    assert np.allclose(path.get_xydata(), half.x[:, 0, 0].float())


@pytest.mark.parametrize("lost", [np.nan, np.inf])
@pytest.mark.parametrize("batch", [1, 4])
def test_where_a_flow_stops_being_numbers_is_in_the_title(lost, batch):
    flow = integrated(batch=batch, horizon=3)
    flow.x[4:], flow.v[4:] = lost, lost
    for draw in (plot_flow, plot_denoising, plot_convergence, lambda f: plot_flow(f, step=None)):
        figure = draw(flow)
        figure.canvas.draw()
        assert figure.get_suptitle() == "From noise to action in 10 steps: not finite from step 4 on"
    (path,) = named(plot_flow(flow).axes[0], "path")
    assert np.isfinite(path.get_xydata()).all(axis=1).tolist() == [True] * 4 + [False] * 7
    assert animate_flow(flow, moments=3).frames == 3
    flow.x[:], flow.v[:] = lost, lost
    assert "not finite from step 0 on" in plot_flow(flow).get_suptitle()


def diffusion(quantity, times=(9, 6, 3, 0, -1)):
    """A sampler of diffusion: falling timesteps, and -1 for the result; v points away from x."""
    x = torch.stack([torch.full((3, 4, 2), float(k)) for k in range(len(times))])
    return Flow(torch.tensor(times), x, 10 + torch.zeros(len(times) - 1, 3, 4, 2), quantity)


@pytest.mark.parametrize(
    ("quantity", "wanted", "told"),
    [
        ("predicted noise", -10, "arrows: against the predicted noise"),
        ("predicted v", -10, "arrows: against the predicted v"),
        ("predicted action", [10, 9, 8, 7], "arrows: to the predicted action"),
    ],
)
def test_what_diffusion_predicts_points_the_way_the_sampler_goes(quantity, wanted, told):
    plane = plot_flow(diffusion(quantity)).axes[0]
    (arrows,) = named(plane, "v")
    assert np.allclose(arrows.U.reshape(4, 3).T, wanted)
    assert told in {t.get_text() for t in plane.texts}


def test_the_end_of_diffusion_is_no_timestep():
    plane, beside = plot_flow(diffusion("predicted noise")).axes
    assert {"noise, time 9", "action, no noise left"} <= {t.get_text() for t in plane.texts}
    assert beside.get_xlabel() == "sampler step (time 9 → no noise left)"
    assert (
        plot_denoising(diffusion("predicted noise")).axes[-1].get_title(loc="left") == "step 4, no noise left"
    )


def test_denoising_in_robot_units():
    flow = integrated(horizon=6)
    figure = plot_denoising(flow, dimension=1, moments=2, robot=lambda x: 100 * x + 7, name="dy", unit="mm")
    for ax, k in zip(figure.axes, (0, 10), strict=True):
        (line,) = named(ax, f"step {k}")
        assert np.allclose(line.get_ydata(), 100 * flow.x[k, 0, :, 1] + 7, atol=1e-3)
    assert figure.axes[0].get_ylabel() == "dy\n(mm)"
    assert plot_denoising(flow, robot=lambda x: x).axes[0].get_ylabel() == "action 0\n(robot units)"
