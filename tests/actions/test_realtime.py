"""Real-time chunking against LeRobot, against fields whose answer is known, and what must change nothing."""

from __future__ import annotations

import json
import math
import re

import pytest
import torch
from torch import nn

from minivla.actions.flow import Convention, euler
from minivla.actions.realtime import (
    SCHEDULES,
    RTCConfig,
    guidance_weight,
    guide,
    prefix_weights,
    smooth,
)
from tests.parity import relative_error
from tests.policies.small_vla import statistics, tiny_pi, tiny_raw

BATCH, HORIZON, SIZE = 3, 8, 4
NOISE_FIRST, NOISE_LAST = Convention("noise first", 0), Convention("noise last", 1)


class Mixing(nn.Module):
    """A small random field in which every number of the chunk depends on every other, and on the time."""

    def __init__(self, seed=0):
        super().__init__()
        torch.manual_seed(seed)
        flat = HORIZON * SIZE
        self.net = nn.Sequential(nn.Linear(flat + 1, 24), nn.Tanh(), nn.Linear(24, flat))

    def forward(self, x, time):
        time = time.reshape(-1, 1).expand(len(x), 1)
        return self.net(torch.cat((x.flatten(1), time), dim=1)).view_as(x)


def draws(steps=HORIZON, size=SIZE, seed=1):
    generator = torch.Generator().manual_seed(seed)
    noise = torch.randn(BATCH, HORIZON, SIZE, generator=generator)
    return noise, torch.randn(BATCH, steps, size, generator=generator)


def theirs(schedule="LINEAR", **settings):
    # Imported here, since importing LeRobot's policies takes longer than all that is tested.
    from lerobot.policies.rtc.configuration_rtc import RTCConfig as LeRobotConfig
    from lerobot.policies.rtc.modeling_rtc import RTCProcessor

    return RTCProcessor(LeRobotConfig(prefix_attention_schedule=schedule, **settings))


# --- LeRobot -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize("schedule", SCHEDULES)
def test_weights_are_lerobots(schedule):
    upstream = theirs(schedule)
    for delay in range(12):
        for end in range(12):
            ours = prefix_weights(delay, end, HORIZON, schedule)
            torch.testing.assert_close(ours, upstream.get_prefix_weights(delay, end, HORIZON))


CASES = [  # delay, execution horizon (None: the config's), steps and size of what is left over
    (0, None, HORIZON, SIZE),
    (2, 6, HORIZON, SIZE),
    (3, 3, HORIZON, SIZE),
    (5, 2, HORIZON, SIZE),
    (1, 20, HORIZON, SIZE),
    (2, 7, 5, SIZE),
    (2, 6, HORIZON, 2),
    (6, 8, 4, 3),
]


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("delay", "end", "steps", "size"), CASES)
def test_one_step_is_lerobots(schedule, delay, end, steps, size):
    field, (x, previous) = Mixing(), draws(steps, size)
    guided = guide(
        field,
        previous,
        delay,
        RTCConfig(prefix_attention_schedule=schedule),
        NOISE_LAST,
        execution_horizon=end,
    )
    for time in (1.0, 0.9, 0.5, 0.1, 0.0):
        at = torch.tensor([time])
        upstream = theirs(schedule).denoise_step(x, previous, delay, time, lambda p, t=at: field(p, t), end)
        assert relative_error(guided(x, at), upstream) <= 1e-5


@pytest.mark.parametrize("schedule", SCHEDULES)
@pytest.mark.parametrize(("delay", "end", "steps", "size"), CASES)
@torch.no_grad()
def test_ten_steps_are_lerobots(schedule, delay, end, steps, size):
    from lerobot.policies.common.flow_matching import euler_integrate

    field, (noise, previous) = Mixing(), draws(steps, size)
    config = RTCConfig(prefix_attention_schedule=schedule, max_guidance_weight=5)
    ours = euler(
        guide(field, previous, delay, config, NOISE_LAST, execution_horizon=end), noise, 10, NOISE_LAST
    )
    upstream = euler_integrate(
        field,
        noise,
        10,
        rtc_processor=theirs(schedule, max_guidance_weight=5),
        rtc_enabled=True,
        inference_delay=delay,
        prev_chunk_left_over=previous,
        execution_horizon=end,
    )
    assert relative_error(ours, upstream) <= 1e-5


def test_lerobots_product_does_not_go_through_the_network():
    """Their correction is the error itself, and the network is called with an x that requires no gradient."""
    field, (x, previous) = Mixing(), draws()
    required, upstream, at = [], theirs(debug=True), torch.tensor([0.4])

    def watched(point):
        required.append(point.requires_grad)
        return field(point, at)

    result = upstream.denoise_step(x, previous, 2, 0.4, watched, execution_horizon=6)
    (step,) = upstream.get_all_debug_steps()
    assert required == [False]
    assert torch.equal(step.correction, step.err)
    paper = guide(field, previous, 2, RTCConfig(), NOISE_LAST, execution_horizon=6, through_network=True)(
        x, at
    )
    assert relative_error(paper, result) > 1e-2


def test_a_leftover_without_a_batch_stands_for_all_as_in_lerobot():
    field, (x, previous) = Mixing(), draws(steps=5)
    at = torch.tensor([0.3])
    upstream = theirs().denoise_step(x, previous[0], 2, 0.3, lambda p: field(p, at))
    assert relative_error(guide(field, previous[0], 2, RTCConfig(), NOISE_LAST)(x, at), upstream) <= 1e-5


def test_config_json_is_lerobots(tmp_path):
    from lerobot.policies.pi0.configuration_pi0 import PI0Config
    from lerobot.policies.rtc.configuration_rtc import RTCConfig as LeRobotConfig

    rtc = LeRobotConfig(prefix_attention_schedule="EXP", max_guidance_weight=3.5, execution_horizon=7)
    PI0Config(rtc_config=rtc, device="cpu").save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())["rtc_config"]
    ours = RTCConfig.from_json(written)
    assert ours == RTCConfig(True, "EXP", 3.5, 7)
    assert json.loads(json.dumps(ours.to_json())) == written
    assert vars(RTCConfig()) == vars(LeRobotConfig())


def test_a_policy_takes_the_config_itself_or_what_a_file_holds():
    rtc, (noise, previous) = RTCConfig(execution_horizon=4), torch.randn(2, 2, 6, 7)
    one, other, later = (
        tiny_pi("pi0", statistics(), rtc_config=given) for given in (rtc, rtc.to_json(), None)
    )
    assert one.config.to_json() == other.config.to_json()
    assert one.config.to_json()["rtc_config"] == rtc.to_json()
    for policy in (other, later):
        policy.load_state_dict(one.state_dict())
    later.config.rtc_config = rtc
    chunks = [
        policy.predict_action_chunk(
            policy.preprocess(tiny_raw()),
            noise=noise,
            prev_chunk_left_over=previous[..., :4],
            inference_delay=1,
        )
        for policy in (one, other, later)
    ]
    assert torch.equal(chunks[0], chunks[1])
    assert torch.equal(chunks[0], chunks[2])
    assert not torch.equal(chunks[0], one.predict_action_chunk(one.preprocess(tiny_raw()), noise=noise))


# --- what is known exactly ---------------------------------------------------------------------------------


class Gaussian:
    """Chunks (H, A) that are normal around `mean`, neighbours in time alike; their field is known.

    Along x = (1 − τ) noise + τ action, the expected action is mean + gain (x − τ mean), with gain
    τ C (τ² C + (1 − τ)²)⁻¹, and the velocity from noise to action (expected action − x) / (1 − τ).
    """

    def __init__(self, convention):
        self.convention = convention
        steps = torch.arange(HORIZON, dtype=torch.float64)
        self.mean = torch.sin(steps)[:, None].repeat(1, SIZE)
        self.covariance = 0.5 * torch.exp(-(steps[:, None] - steps).abs() / 4)

    def gain(self, done):
        noise = (1 - done) ** 2 * torch.eye(HORIZON, dtype=torch.float64)
        return done * self.covariance @ torch.linalg.inv(done**2 * self.covariance + noise)

    def expected(self, x, done):
        return self.mean + self.gain(done) @ (x - done * self.mean)

    def __call__(self, x, time):
        done = 1 - time if self.convention.noise_at else time
        towards = (self.expected(x, done) - x) / (1 - done)
        return -towards if self.convention.noise_at else towards

    def given(self, previous, known):
        """The expected chunk where its first `known` actions are those of `previous`: Gaussian regression."""
        c = self.covariance
        gain = c[:, :known] @ torch.linalg.inv(c[:known, :known])
        return self.mean + gain @ (previous[:, :known] - self.mean[:known])


@pytest.mark.parametrize("convention", [NOISE_FIRST, NOISE_LAST])
@pytest.mark.parametrize("through_network", [False, True])
def test_the_guidance_is_the_formula_on_a_linear_field(convention, through_network):
    field, (x, previous) = Gaussian(convention), (draw.double() for draw in draws())
    done = torch.tensor([0.7], dtype=torch.float64)
    time = 1 - done if convention.noise_at else done
    guided = guide(
        field, previous, 2, RTCConfig(execution_horizon=6), convention, through_network=through_network
    )
    error = (previous - field.expected(x, done)) * prefix_weights(2, 6, HORIZON, "LINEAR")[:, None]
    pull = field.gain(done).T @ error if through_network else error
    change = (0.3**2 + 0.7**2) / (0.7 * 0.3) * pull
    sign = -1 if convention.noise_at else 1
    torch.testing.assert_close(guided(x, time) - field(x, time), sign * change)


@pytest.mark.parametrize("through_network", [False, True])
def test_both_conventions_give_one_chunk(through_network):
    noise, previous = (draw.double() for draw in draws())
    chunks = [
        euler(guide(Gaussian(c), previous, 2, RTCConfig(), c, through_network=through_network), noise, 10, c)
        for c in (NOISE_FIRST, NOISE_LAST)
    ]
    torch.testing.assert_close(*chunks)


@pytest.mark.parametrize("through_network", [False, True])
def test_the_overlap_comes_to_the_previous_chunk_and_the_rest_follows(through_network):
    field, known = Gaussian(NOISE_FIRST), 4
    noise, previous = (draw.double() for draw in draws())
    previous = field.mean + 1 + 0.1 * previous  # a chunk that runs beside the usual ones
    config = RTCConfig(prefix_attention_schedule="ONES", execution_horizon=known)
    guided = guide(field, previous, 2, config, NOISE_FIRST, through_network=through_network)
    free, held = (euler(f, noise, 50, NOISE_FIRST) for f in (field, guided))

    def apart(chunk, other, steps):
        return (chunk - other)[:, steps].square().mean().sqrt().item()

    overlap, rest = slice(0, known), slice(known, None)
    assert apart(held, previous, overlap) < 0.15 * apart(free, previous, overlap)
    # Actions next to the overlap are no longer drawn around the mean, but around what the overlap foretells.
    expected = field.given(previous, known)
    assert apart(held, expected, rest) < apart(free, expected, rest)


def test_weights_of_zero_leave_every_bit():
    field, (noise, previous) = Mixing(), draws()
    free = euler(field, noise, 10, NOISE_LAST)
    for config, delay in [(RTCConfig(execution_horizon=0), 3), (RTCConfig(True, "ZEROS"), 0)]:
        assert torch.equal(
            euler(guide(field, previous, delay, config, NOISE_LAST), noise, 10, NOISE_LAST), free
        )
    # Nothing left over, nothing before, or switched off.
    assert torch.equal(
        guide(field, previous[:, :0], 0, RTCConfig(), NOISE_LAST)(noise, torch.ones(1)),
        field(noise, torch.ones(1)),
    )
    assert guide(field, None, 0, RTCConfig(), NOISE_LAST) is field
    assert guide(field, previous, 0, RTCConfig(enabled=False), NOISE_LAST) is field


def test_through_the_network_leaves_parameters_and_grad_mode_alone():
    field, (x, previous) = Mixing(), draws()
    with torch.no_grad():
        velocity = guide(field, previous, 2, RTCConfig(), NOISE_LAST, through_network=True)(
            x, torch.tensor([0.5])
        )
    assert not velocity.requires_grad and not x.requires_grad
    assert all(parameter.grad is None for parameter in field.parameters())


def test_the_pull_is_bounded_at_both_ends():
    done = torch.tensor([0.0, 0.01, 0.5, 0.999, 1.0])
    assert guidance_weight(done, 10.0).tolist() == [10.0, 10.0, 2.0, 10.0, 0.0]


def test_weights_by_hand():
    assert prefix_weights(2, 5, 7, "LINEAR").tolist() == [1, 1, 0.75, 0.5, 0.25, 0, 0]
    assert prefix_weights(2, 5, 7, "ONES").tolist() == [1, 1, 1, 1, 1, 0, 0]
    assert prefix_weights(2, 5, 7, "ZEROS").tolist() == [1, 1, 0, 0, 0, 0, 0]
    half = 0.5 * (math.e**0.5 - 1) / (math.e - 1)
    assert prefix_weights(0, 1, 2, "EXP").tolist() == pytest.approx([half, 0])


# --- smoothing ---------------------------------------------------------------------------------------------


def test_smooth_by_hand():
    old, new = torch.zeros(1, 4, 1), torch.full((1, 6, 1), 4.0)
    assert smooth(old, new, 3).flatten().tolist() == [1, 2, 3, 4, 4, 4]
    assert smooth(old[:, :1], new, 3).flatten().tolist() == [
        2,
        4,
        4,
        4,
        4,
        4,
    ]  # one action is left of the old
    assert torch.equal(smooth(old, new, 0), new)
    assert torch.equal(smooth(old[:, :0], new, 3), new)
    torch.testing.assert_close(smooth(new, new, 5), new)


# --- what makes no sense -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        (
            {"prefix_attention_schedule": "linear"},
            "prefix_attention_schedule is 'linear', expected one of ZEROS",
        ),
        ({"max_guidance_weight": 0.0}, "max_guidance_weight is 0.0, expected a number above 0"),
        ({"max_guidance_weight": math.nan}, "max_guidance_weight is nan"),
        ({"debug_maxlen": -1}, "debug_maxlen is -1"),
        ({"execution_horizon": -2}, "execution_horizon is -2, expected at least 0"),
        ({"execution_horizon": 2.5}, "execution_horizon is 2.5, expected int"),
        ({"enabled": "yes"}, "enabled is 'yes', expected bool"),
        ({"debug_maxlen": True}, "debug_maxlen is True, expected int"),
        ({"horizon": 3}, "unknown fields horizon; known: enabled, "),
    ],
)
def test_a_setting_out_of_range_is_named(settings, message):
    with pytest.raises(ValueError, match=message):
        RTCConfig.from_json(settings)


def test_what_does_not_fit_is_refused():
    field, (x, previous) = Mixing(), draws()
    config, time = RTCConfig(), torch.tensor([0.5])
    with pytest.raises(ValueError, match="delay is -1"):
        guide(field, previous, -1, config, NOISE_LAST)
    for shape in ((), (SIZE,), (1, BATCH, HORIZON, SIZE)):
        expected = rf"left-over has shape {re.escape(str(shape))}, expected \(B, K, A\) or \(K, A\)"
        with pytest.raises(ValueError, match=expected):
            guide(field, torch.zeros(shape), 0, config, NOISE_LAST)
    with pytest.raises(ValueError, match="expected one of ZEROS"):
        prefix_weights(0, 1, 2, "STEP")
    with pytest.raises(ValueError, match="at least 0"):
        smooth(previous, previous, -1)
    for wrong in (torch.zeros(BATCH, HORIZON + 1, SIZE), torch.zeros(BATCH, 2, SIZE + 1), previous[:2]):
        with pytest.raises(ValueError, match=r"left-over has shape .* expected \(3, 8, 4\)"):
            guide(field, wrong, 0, config, NOISE_LAST)(x, time)
