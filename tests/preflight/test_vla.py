"""Policies on a PaliGemma: clean where they are, and their own faults named."""

from __future__ import annotations

import pytest
import torch

from minivla.actions import flow
from minivla.actions.flow import Convention
from minivla.data.features import features_of
from minivla.policies import vla
from minivla.policies.pi import PI0
from minivla.preflight import doctor
from minivla.world import demonstrations
from tests.policies.fast_small import chunks, statistics, tiny_fast
from tests.policies.small_vla import tiny_pi
from tests.preflight.patients import STATE, TABLE, WRIST, bind, patient_of

PADDED = "padding-leaks"  # a warning: π's loss counts padded actions on purpose
pytestmark = [
    pytest.mark.filterwarnings("ignore:no observation.images.wrist in the batch"),
    pytest.mark.filterwarnings("ignore:Detected call of"),
]


@pytest.fixture(scope="module")
def dataset():
    return demonstrations("detour", 5, 3, size=32)


def patient(name, dataset, **settings):
    inputs, outputs = features_of(dataset)
    policy = tiny_pi(name, dataset.stats, input_features=inputs, output_features=outputs, **settings)
    return patient_of(policy, dataset, "tabletop:detour?size=32", (3, 25))


RUN = {
    "frozen and trainable", "time convention", "queue reset", "depends on images", "depends on state",
    "depends on instruction", "preparation", "zero padding",
}  # fmt: skip


@pytest.mark.parametrize("name", ["pi0", "pi05"])
@pytest.mark.parametrize(
    "settings",
    [
        {},
        {"train_expert_only": True},
        {"freeze_vision_encoder": True},
        {"upstream": "openpi"},
        {"noise_draws": 3},
    ],
    ids=["all trains", "expert alone", "vision frozen", "openpi", "several draws"],
)
def test_a_clean_one_is_clean(name, settings, dataset):
    report = patient(name, dataset, **settings).report("")
    assert report.codes == (PADDED,), str(report)
    assert set(report.passed) >= RUN


@pytest.mark.parametrize("name", ["pi0", "pi05"])
def test_untrained_it_only_replays_badly(name, dataset):
    report = patient(name, dataset).report("de")
    assert set(report.codes) <= {PADDED, "replay-error", "action-out-of-range"}, str(report)


def test_an_absent_camera_is_worth_a_warning_and_the_rest_is_examined(dataset):
    lacking = patient("pi0", dataset)
    del lacking.raw[WRIST]
    report = lacking.report("")
    assert set(report.codes) == {PADDED, "camera-absent"}, str(report)
    assert report.ok and set(report.passed) >= RUN


def test_cameras_that_are_always_absent_are_none_to_report(dataset):
    assert patient("pi05", dataset, empty_cameras=1).report("").codes == (PADDED,)


def test_pictures_of_any_size_are_welcome(dataset):
    large = patient("pi0", dataset)
    large.raw[TABLE] = large.raw[TABLE].repeat_interleave(2, -1)
    assert large.report("").codes == (PADDED,)


def test_a_policy_that_says_its_actions_is_clean():
    """Untrained it may say nonsense, whatever is observed: what depends on what is not asked here."""
    policy = tiny_fast(stats=statistics())
    with pytest.warns(UserWarning, match="said is no chunk"):
        report = doctor(policy, raw_for(policy))
    assert not {"check-failed", "trainable-stuck", "frozen-moves", "preprocessing-fails"} & set(report.codes)
    assert "words, of the whole chunk" in report.not_run["padding leaves the loss alone"]
    assert "integrates nothing" in report.not_run["time convention"]
    assert {"frozen and trainable", "preparation", "inputs"} <= set(report.passed), str(report)


def raw_for(policy):
    generator = torch.Generator().manual_seed(0)
    cameras = {
        c: torch.rand(2, *f.shape, generator=generator) for c, f in policy.config.image_features.items()
    }
    return {
        **cameras,
        STATE: torch.randn(2, 5, generator=generator) / 2,
        "action": chunks(2),
        "action_is_pad": torch.zeros(2, 6, dtype=torch.bool),
        "task": ["go", "stay"],
    }


# --- faults ------------------------------------------------------------------------------------------------

OTHER = Convention("the other", noise_at=0)


def sampler_other_end(p, monkeypatch):
    right = flow.euler
    monkeypatch.setattr(flow, "euler", lambda field, noise, steps, _: right(field, noise, steps, OTHER))


def euler_backwards(p, monkeypatch):
    right = flow.euler
    monkeypatch.setattr(flow, "euler", lambda field, *rest: right(lambda x, t: -field(x, t), *rest))


def paper_not_code(p, monkeypatch):
    """The loss in the paper's convention, time 1 the action, the sampler in the code's."""
    right = flow.interpolate
    monkeypatch.setattr(flow, "interpolate", lambda action, noise, t, _: right(action, noise, t, OTHER))


def velocity_backwards(p, monkeypatch):
    monkeypatch.setattr(flow, "velocity_target", lambda action, noise, _: action - noise)


def padded_with_minus_one(p, monkeypatch):
    right = vla.resize_with_pad
    monkeypatch.setattr(vla, "resize_with_pad", lambda image, h, w: right(image, h, w, value=-1.0))


def thawing(p, monkeypatch):
    """What is frozen moves all the same."""

    def forward(self, batch, **options):
        loss, parts = PI0.forward(self, batch, **options)
        with torch.no_grad():
            self.paligemma.projector.bias.add_(0.1)
        return loss, parts

    bind(p.policy, "forward", forward)


def unread(p, monkeypatch):
    """The prompt is masked."""

    def embed_prefix(self, batch):
        mask = "observation.language.attention_mask"
        return PI0.embed_prefix(self, {**batch, mask: torch.zeros_like(batch[mask])})

    bind(p.policy, "embed_prefix", embed_prefix)


def numb(p, monkeypatch):
    p.policy.state_proj.requires_grad_(False).weight.zero_()


def own_noise(p, monkeypatch):
    def predict(self, batch, *, noise=None, **options):
        return PI0.predict_action_chunk(self, batch, **options)

    bind(p.policy, "predict_action_chunk", predict)


def late(p, monkeypatch):
    def predict(self, batch, **options):
        return PI0.predict_action_chunk(self, batch, **options).roll(1, dims=1)

    bind(p.policy, "predict_action_chunk", predict)


def renamed(p, monkeypatch):
    p.raw["observation.images.hand"] = p.raw.pop(WRIST)


def padded_state(p, monkeypatch):
    p.raw[STATE] = torch.nn.functional.pad(p.raw[STATE], (0, 32 - p.raw[STATE].shape[-1]))


def no_reset(p, monkeypatch):
    bind(p.policy, "reset", lambda self: None)


@pytest.mark.parametrize(
    ("spoil", "name", "code", "so"),
    [
        (sampler_other_end, "pi0", "time-start", ()),
        (euler_backwards, "pi05", "time-end", ()),
        (paper_not_code, "pi0", "time-start", ()),
        (velocity_backwards, "pi05", "time-direction", ()),
        (padded_with_minus_one, "pi0", "image-pad-value", ()),
        (thawing, "pi0", "frozen-moves", ()),
        (unread, "pi0", "ignores-instruction", ("trainable-stuck",)),
        (unread, "pi05", "ignores-state", ("ignores-instruction", "trainable-stuck")),
        (numb, "pi0", "ignores-state", ()),
        (own_noise, "pi05", "time-start", ()),
        (late, "pi0", "time-end", ("queue-not-reset",)),
        (renamed, "pi0", "camera-names", ()),
        (padded_state, "pi05", "state-size", ()),
        (no_reset, "pi0", "queue-not-reset", ()),
    ],
    ids=lambda value: getattr(value, "__name__", None),
)
def test_a_fault_is_named(spoil, name, code, so, dataset, monkeypatch):
    ill = patient(name, dataset, train_expert_only=spoil is thawing)
    spoil(ill, monkeypatch)
    report = ill.report("")
    assert code in report.codes, str(report)
    assert set(report.codes) <= {code, PADDED, *so}, str(report)
