"""Policies that draw their actions: Diffusion's sampler against its loss, VQ-BeT's halves that rest."""

from __future__ import annotations

import pytest
import torch

import minivla
from minivla import recorder
from minivla.actions import flow
from minivla.actions.diffusion import NoiseSchedule
from minivla.actions.flow import Convention
from minivla.policies.diffusion import DiffusionPolicy
from minivla.preflight import doctor
from minivla.world import demonstrations
from tests.policies.small import tiny_act, tiny_raw
from tests.preflight.patients import STATE, bind, patient_of, small_diffusion, small_vqbet

PADDED = "padding-leaks"  # a warning: they learn from padded actions on purpose
pytestmark = pytest.mark.filterwarnings("ignore:phase 1 of this VQ-BeT is not over")


@pytest.fixture(scope="module")
def dataset():
    return demonstrations("detour", 5, 3, size=32)


def examined(policy, dataset, given: str = ""):
    return patient_of(policy, dataset, "tabletop:detour?size=32", (3, 25)).report(given)


DIFFUSIONS = {
    "U-Net": {},
    "U-Net, DDPM": {"noise_scheduler_type": "DDPM", "num_train_timesteps": 8, "num_inference_steps": None},
    "U-Net, action predicted": {"prediction_type": "sample"},
    "U-Net, no clipping": {"clip_sample": False},
    "transformer": {"denoiser": "transformer"},
    "flow": {"objective": "flow"},
    "flow, transformer": {"objective": "flow", "denoiser": "transformer"},
    "flow, one step": {"objective": "flow", "num_inference_steps": 1},
    "one moment": {"n_obs_steps": 1},
    "masked": {"do_mask_loss_for_padding": True},
}


@pytest.mark.parametrize("name", DIFFUSIONS)
def test_every_kind_of_diffusion_is_clean(name, dataset):
    report = examined(small_diffusion(dataset, **DIFFUSIONS[name]), dataset)
    assert report.codes == (() if name == "masked" else (PADDED,)), str(report)
    assert {"time convention", "frozen and trainable", "queue reset"} <= set(report.passed)


@pytest.mark.parametrize("phase", [1, 2])
@pytest.mark.parametrize("settings", [{}, {"sequentially_select": True, "vqvae_kmeans_init": True}])
def test_vqbet_is_clean_in_both_phases_and_the_half_that_rests_is_named(phase, settings, dataset):
    report = examined(small_vqbet(dataset, phase=phase, **settings), dataset)
    assert report.codes == (PADDED,), str(report)
    assert "frozen and trainable" in report.passed
    (note,) = report.notes
    assert ("leaves vqvae alone" in note) == (phase == 2)
    assert note in " ".join(str(report).split())


def test_a_phase_that_ends_under_examination_is_no_fault(dataset):
    policy = small_vqbet(dataset, phase=1, n_vqvae_training_steps=2)
    assert examined(policy, dataset).codes == (PADDED,)
    assert not policy.vqvae.discretized


@pytest.mark.parametrize("make", [small_diffusion, small_vqbet])
def test_untrained_they_only_replay_badly(make, dataset):
    report = examined(make(dataset), dataset, "de")
    assert set(report.codes) <= {PADDED, "replay-error", "action-out-of-range"}, str(report)


@pytest.mark.parametrize("name", ["diffusion-tabletop", "vqbet-tabletop"])
def test_the_shipped_ones_are_clean_with_dataset_and_environment(name):
    report = patient_of(minivla.load(name), demonstrations("detour", 6, 5), "tabletop:detour").report("de")
    assert set(report.codes) <= {PADDED, "camera-extra"}, str(report)
    assert {"open-loop replay", "frozen and trainable", "queue reset"} <= set(report.passed)


# --- a sampler and a loss that do not agree ----------------------------------------------------------------

SWAPPED = Convention("the other", noise_at=1)


def euler_other_end(monkeypatch):
    right = flow.euler
    monkeypatch.setattr(flow, "euler", lambda field, noise, steps, _: right(field, noise, steps, SWAPPED))


def euler_backwards(monkeypatch):
    right = flow.euler
    monkeypatch.setattr(flow, "euler", lambda field, *rest: right(lambda x, time: -field(x, time), *rest))


def loss_other_end(monkeypatch):
    right = flow.interpolate
    monkeypatch.setattr(
        flow, "interpolate", lambda action, noise, time, _: right(action, noise, time, SWAPPED)
    )


def velocity_backwards(monkeypatch):
    monkeypatch.setattr(flow, "velocity_target", lambda action, noise, _: noise - action)


def timesteps_rise(monkeypatch):
    right = NoiseSchedule.timesteps
    monkeypatch.setattr(NoiseSchedule, "timesteps", lambda self, steps: right(self, steps)[::-1])


def scales_exchanged_in_the_loss(monkeypatch):
    def wrong(self, action, noise, timestep):
        signal, sigma = self.scales(timestep, action)
        return (
            right(self, action, noise, timestep)
            if isinstance(timestep, int)
            else sigma * action + signal * noise
        )

    right = NoiseSchedule.add_noise
    monkeypatch.setattr(NoiseSchedule, "add_noise", wrong)


def the_action_is_taught(monkeypatch):
    monkeypatch.setattr(NoiseSchedule, "target", lambda self, action, noise, timestep: action)


def noise_of_its_own(monkeypatch):
    right = NoiseSchedule.add_noise
    monkeypatch.setattr(
        NoiseSchedule, "add_noise", lambda self, a, noise, t: right(self, a, torch.randn_like(noise), t)
    )


def noise_is_added(monkeypatch):
    right = NoiseSchedule.split
    monkeypatch.setattr(NoiseSchedule, "split", lambda self, predicted, x, t: right(self, -predicted, x, t))


def predicting(change):
    """A predict_action_chunk that does something else."""

    def make(monkeypatch):
        right = DiffusionPolicy.predict_action_chunk
        monkeypatch.setattr(
            DiffusionPolicy,
            "predict_action_chunk",
            lambda *given, **options: change(right, *given, **options),
        )

    return make


deaf = predicting(lambda right, self, batch, *, noise=None, **rest: right(self, batch, **rest))
late = predicting(lambda right, *given, **rest: right(*given, **rest).roll(1, dims=1))


@pytest.mark.parametrize(
    ("spoil", "settings", "code"),
    [
        (euler_other_end, {"objective": "flow"}, "time-start"),
        (euler_backwards, {"objective": "flow"}, "time-end"),
        (loss_other_end, {"objective": "flow"}, "time-start"),
        (velocity_backwards, {"objective": "flow"}, "time-direction"),
        (deaf, {"objective": "flow"}, "time-start"),
        (timesteps_rise, {}, "time-start"),
        (scales_exchanged_in_the_loss, {}, "time-start"),
        (the_action_is_taught, {}, "time-direction"),
        (noise_of_its_own, {}, "loss-noise"),
        (noise_is_added, {"clip_sample": False}, "time-end"),
        (noise_is_added, {"noise_scheduler_type": "DDPM", "clip_sample": False}, "time-end"),
        (late, {}, "time-end"),
        (deaf, {}, "time-start"),
        (lambda monkeypatch: None, {"num_inference_steps": 1}, "time-start"),
    ],
)
def test_a_sampler_that_parts_from_its_loss_is_named(spoil, settings, code, dataset, monkeypatch):
    policy = small_diffusion(dataset, **settings)
    spoil(monkeypatch)
    report = examined(policy, dataset)
    assert code in report.codes, str(report)
    assert set(report.codes) == {code, PADDED}, str(report)


def walking(turned: float):
    """An ACT that records a path with one step from noise to its chunk, and of its loss nothing."""

    def predict(self, batch, *, noise=None, steps=None, generator=None):
        end = self.decode(batch, self.prior_mean(batch)).detach()
        x = torch.randn_like(end) if noise is None else noise
        if (call := recorder.current()) is not None:
            path, velocity = torch.stack([x, end]), turned * (end - x)[None]
            call.flow = recorder.Flow(torch.tensor([0.0, 1.0]), path, velocity)
        return end

    policy = tiny_act()
    bind(policy, "predict_action_chunk", predict)
    return policy


def test_of_a_loss_that_tells_nothing_only_the_path_is_examined():
    report = doctor(walking(1.0), tiny_raw())
    assert report.codes == ()
    assert "what it teaches" in report.not_run["time convention"]
    assert doctor(walking(-1.0), tiny_raw()).codes == ("time-direction",)


# --- a half that does not rest, or never wakes -------------------------------------------------------------


def leaking_decoder(policy):
    """Phase 2's loss reaches the VQ-VAE, which is to stay as it is."""

    def forward(self, batch, **options):
        loss, parts = type(self).__mro__[1].forward(self, batch, **options)
        self.vqvae.requires_grad_(True)
        return loss + self.vqvae(torch.ones(3, 4, 3))[0].square().mean(), parts

    bind(policy, "forward", forward)


def restless_codebook(policy):
    """The codebooks go on following the data in phase 2."""

    def forward(self, batch, **options):
        self.vqvae.vq_layer.freeze_codebook.fill_(False)
        self.vqvae(torch.randn(30, 4, 3))
        return type(self).__mro__[1].forward(self, batch, **options)

    bind(policy, "forward", forward)


def eager(policy):
    """Phase 1 trains what is to wait for phase 2."""

    def forward(self, batch, **options):
        loss, parts = type(self).__mro__[1].forward(self, batch, **options)
        return loss + self.state_projector(batch[STATE]).square().mean(), parts

    bind(policy, "forward", forward)


def without(part):
    def spoil(policy):
        def groups(self):
            return [{"params": [p for name, p in self.named_parameters() if not name.startswith(part)]}]

        bind(policy, "optimizer_groups", groups)

    return spoil


@pytest.mark.parametrize(
    ("spoil", "phase", "code"),
    [
        (leaking_decoder, 2, "resting-moves"),
        (restless_codebook, 2, "resting-moves"),
        (eager, 1, "resting-moves"),
        (without("code_head"), 2, "trainable-stuck"),
        (without("vqvae"), 1, "trainable-stuck"),
    ],
)
def test_a_half_that_does_not_rest_or_never_wakes_is_named(spoil, phase, code, dataset):
    policy = small_vqbet(dataset, phase=phase)
    spoil(policy)
    report = examined(policy, dataset)
    assert set(report.codes) == {code, PADDED}, str(report)
