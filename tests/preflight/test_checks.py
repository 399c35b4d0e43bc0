"""Checks that need a patient of their own: odd pictures, bodies that take places."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from minivla.data.features import FeatureType, PolicyFeature
from minivla.preflight import doctor, views
from minivla.preflight.pictures import examine
from minivla.world import demonstrations
from tests.policies.small import tiny_act, tiny_raw
from tests.preflight.faults import column
from tests.preflight.patients import TABLE, bind, patient_of, small_act, spoiled

FEATURE = PolicyFeature(FeatureType.VISUAL, (3, 16, 16))


def picture(seed: int = 0) -> torch.Tensor:
    return torch.rand(2, 3, 16, 16, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize(
    ("spoil", "codes"),
    [
        (lambda x: x, []),
        (lambda x: (x * 255).byte().movedim(1, -1), []),
        (lambda x: (x * 255).byte().movedim(1, -1).numpy(), []),
        (lambda x: (x * 255).long(), ["image-range"]),
        (lambda x: x * 1.06 - 0.03, ["image-range"]),
        (lambda x: x * 4000, ["image-range"]),
        (lambda x: x[:, :1], ["image-channels"]),
        (lambda x: torch.cat([x, torch.ones(2, 1, 16, 16)], 1), ["image-channels"]),
        (lambda x: x[:, 0, 0], ["image-layout"]),
        (lambda x: [1, 2], ["image-layout"]),
        (lambda x: x[..., :8, :], ["image-size"]),
        (lambda x: (x * 255).movedim(1, -1), ["image-layout", "image-range"]),
        (lambda x: torch.full_like(x, 0.5), ["image-blank"]),
    ],
)
def test_what_is_wrong_with_a_picture_is_named_and_mended(spoil, codes):
    look = examine("camera", spoil(picture()), FEATURE, None)
    assert [finding.code for finding in look.findings] == codes
    if look.value is not None:
        assert look.value.shape[-3:] == (3, 16, 16)
        assert 0 <= look.value.min() <= look.value.max() <= 1


def test_a_mended_picture_is_the_picture():
    clean = picture()
    for spoiled_ in (clean * 255, clean * 2 - 1, (clean * 255).movedim(1, -1)):
        torch.testing.assert_close(examine("camera", spoiled_, FEATURE, None).value, clean)


def test_a_turned_picture_is_told_among_its_references():
    pictures = torch.rand(2, 3, 16, 16)
    reference = torch.cat([pictures[:, None], torch.rand(2, 5, 3, 16, 16)], 1)
    assert views.turned(pictures, reference) == (None, True)
    for name, turn in views.TRANSFORMS.items():
        seen = turn(turn(turn(pictures)))  # undone by one more
        assert views.turned(seen, reference) == (name, True)
    for count in (2, 4, 8):
        strangers, others = torch.rand(count, 3, 16, 16), torch.rand(count, 6, 3, 16, 16)
        assert views.turned(strangers, others) == (None, False), "strangers prove nothing"


def test_a_preprocessor_that_pads_wrongly_is_named():
    policy = tiny_act()

    def preprocess(self, raw):
        batch = type(self).__mro__[1].preprocess(self, raw)
        batch[TABLE][..., :6, :] = -3.0
        return batch

    bind(policy, "preprocess", preprocess)
    report = doctor(policy, tiny_raw())
    assert report.codes == ("image-pad-value",)
    assert "preprocessed" in report.findings[0].where


@pytest.mark.parametrize(
    ("change", "code"),
    [
        (
            lambda a, s: np.concatenate([np.diff(s[:, :2], axis=0, append=s[-1:, :2]), a[:, 2:]], 1),
            "action-delta",
        ),
        (lambda a, s: a * [-1, 1, 1], "action-sign"),
        (lambda a, s: a * [57.3, 57.3, 1], "action-units"),
    ],
)
def test_actions_of_a_body_that_takes_places(change, code):
    dataset = demonstrations("pick_place", 5, 4, embodiment="arm2")
    patient = spoiled(patient_of(small_act(dataset), dataset, "tabletop:pick_place?embodiment=arm2", (3, 30)))
    column(change)(patient)
    assert code in patient.report("de").codes


def test_a_frozen_camera_is_told_from_the_state_that_moves():
    raw = tiny_raw(4)
    raw["task"] *= 2
    raw[TABLE] = raw[TABLE][:1].expand_as(raw[TABLE]).clone()
    assert doctor(tiny_act(), raw).codes == ("image-stale",)
    raw["observation.state"] = raw["observation.state"][:1].expand_as(raw["observation.state"]).clone()
    assert doctor(tiny_act(), raw).codes == (), "nothing moved"


def test_a_compiled_or_wrapped_policy_is_examined_itself():
    policy, raw = tiny_act(), tiny_raw()
    plain = str(doctor(policy, raw))
    for name in ("module", "_orig_mod"):  # as distributed training and torch.compile wrap it
        wrapped = torch.nn.Module()
        setattr(wrapped, name, policy)
        assert str(doctor(wrapped, raw)) == plain


def test_a_chunk_of_nan_from_sound_weights_is_named():
    policy = tiny_act()
    predict = type(policy).predict_action_chunk
    bind(policy, "predict_action_chunk", lambda self, batch, **o: predict(self, batch, **o) * float("nan"))
    report = doctor(policy, tiny_raw())
    assert report.codes == ("chunk-not-finite",), str(report)


def test_weights_by_position_want_the_cameras_in_order():
    dataset = demonstrations("pick_place", 4, 4)
    policy = small_act(dataset)
    features = policy.config.input_features
    policy.config.input_features = {key: features[key] for key in reversed(features)}
    assert "camera-order-config" in patient_of(policy, dataset, None, (3, 30)).report("d").codes
