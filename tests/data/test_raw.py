"""The gate: what passes, what is refused, and what the refusal says."""

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from minivla.data import MissingKey, PolicyFeature, to_batch

TOP, WRIST, STATE = "observation.images.top", "observation.images.wrist", "observation.state"
FEATURES = {TOP: PolicyFeature("VISUAL", (3, 6, 8)), STATE: PolicyFeature("STATE", (4,))}


def raw(**changes):
    return {TOP: np.full((6, 8, 3), 51, np.uint8), STATE: np.zeros(4, np.float32)} | changes


def test_an_environments_observation():
    batch = to_batch(raw(task="push"), FEATURES)
    assert batch[TOP].shape == (1, 3, 6, 8)
    assert batch[TOP].dtype == torch.float32
    torch.testing.assert_close(batch[TOP], torch.full((1, 3, 6, 8), 0.2))
    assert batch[STATE].shape == (1, 4)
    assert batch["task"] == ["push"]


@settings(deadline=None, max_examples=30)
@given(
    st.sampled_from([(), (1,), (5,)]), st.booleans(), st.sampled_from([np.float16, np.float32, np.float64])
)
def test_every_accepted_form_of_an_image_is_the_same_image(lead, as_uint8, dtype):
    pixels = np.random.default_rng(0).integers(0, 256, (*lead, 6, 8, 3), dtype=np.uint8)
    image = pixels if as_uint8 else torch.from_numpy((np.moveaxis(pixels, -1, -3) / 255).astype(dtype))
    batch = to_batch({TOP: image, STATE: torch.zeros(*lead, 4)}, FEATURES)
    expected = torch.from_numpy(pixels).reshape(-1, 6, 8, 3).movedim(-1, 1) / 255
    torch.testing.assert_close(batch[TOP], expected, rtol=0, atol=1e-3 if dtype == np.float16 else 1e-7)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (
            np.zeros((3, 6, 8), np.uint8),
            ValueError,
            r"uint8 of shape \(3, 6, 8\).*Mend: move the channels last",
        ),
        (torch.zeros(6, 8, 3), ValueError, r"float32 of shape \(6, 8, 3\).*Mend: move the channels first"),
        (torch.full((3, 6, 8), 200.0), ValueError, r"Mend: image / 255. Its values run from 200 to 200"),
        (
            torch.linspace(-1, 1, 144).reshape(3, 6, 8),
            ValueError,
            r"Mend: \(image \+ 1\) / 2. Its values run from -1 to 1",
        ),
        (torch.full((3, 6, 8), float("nan")), ValueError, "Mend: look for NaN"),
        (torch.full((3, 6, 8), -2.2), ValueError, "already normalised. Its values run from -2.2"),
        (np.zeros((6, 8, 3), np.int64), TypeError, r"got int64.*Mend: value.astype\('uint8'\)"),
        (np.zeros((6, 8), np.uint8), ValueError, r"shape \(6, 8\).*Mend: stack 3 channels"),
        (np.zeros((3, 5, 3), np.uint8), ValueError, "move the channels last"),
        ("top.png", TypeError, "got str; expected an array or tensor"),
    ],
)
def test_a_doubtful_image_is_refused(image, error, message):
    with pytest.raises(error, match=message) as caught:
        to_batch(raw(**{TOP: image}), FEATURES)
    assert f"'{TOP}': got" in str(caught.value)
    assert "expected" in str(caught.value)


def test_three_rows_of_pixels_are_told_from_three_channels_by_the_expected_size():
    features = {TOP: PolicyFeature("VISUAL", (3, 3, 5))}
    assert to_batch({TOP: np.zeros((3, 5, 3), np.uint8)}, features)[TOP].shape == (1, 3, 3, 5)
    features = {TOP: PolicyFeature("VISUAL", (3, 5, 3))}
    assert to_batch({TOP: torch.zeros(3, 5, 3)}, features)[TOP].shape == (1, 3, 5, 3)


@pytest.mark.parametrize("image", [np.zeros((12, 16, 3), np.uint8), torch.zeros(2, 3, 12, 16)])
def test_an_image_of_another_size_is_refused_unless_the_policy_resizes(image):
    state = np.zeros((*image.shape[:-3], 4), np.float32)
    with pytest.raises(
        ValueError, match=rf"'{TOP}': got an image of 12 x 16 pixels .*; expected 6 x 8, .*Mend: resize"
    ) as caught:
        to_batch({TOP: image, STATE: state}, FEATURES)
    assert "Tabletop(" not in str(caught.value)  # its pictures are square
    with pytest.raises(ValueError, match=r"or build it so: Tabletop\(size=8\)"):
        to_batch({TOP: image, STATE: state}, FEATURES | {TOP: PolicyFeature("VISUAL", (3, 8, 8))})
    assert to_batch({TOP: image, STATE: state}, FEATURES, resizes=True)[TOP].shape[-2:] == (12, 16)


def test_what_is_no_observation_is_no_candidate_for_one():
    given = raw(
        task="x",
        action=np.zeros(4),
        action_is_pad=np.zeros(4, bool),
        frame_index=np.zeros(4),
        **dict.fromkeys(("index", "timestamp", "episode_index", "task_index"), 0),
    )
    given["observation.arm"] = given.pop(STATE)
    with pytest.raises(MissingKey) as caught:
        to_batch(given, FEATURES)
    assert [line.split()[-1] for line in str(caught.value).splitlines()[2:5]] == [
        TOP,
        "(missing)",
        "observation.arm",
    ]
    assert f"rename = {{'observation.arm': '{STATE}'}}" in str(caught.value).splitlines()[-2]


def test_a_missing_camera_shows_both_sides_and_the_rename():
    given = raw(**{"observation.images.front": np.zeros((6, 8, 3), np.uint8), "task": "x"})
    given["observation.images.up"] = given.pop(TOP)
    with pytest.raises(MissingKey) as caught:
        to_batch(given, FEATURES | {WRIST: PolicyFeature("VISUAL", (3, 6, 8))})
    message = str(caught.value)
    assert message.splitlines()[:4] == [
        f"the batch lacks {TOP}, {WRIST}",
        "  policy wants              batch has",
        f"  {TOP}    (missing)",
        f"  {STATE}         {STATE}",
    ]
    assert isinstance(caught.value, KeyError)
    # What it prints can be pasted, and mends it.
    scope = {"raw": given}
    for line in message.splitlines()[-2:]:
        exec(line.strip(), scope)
    assert set(to_batch(scope["raw"], FEATURES | {WRIST: PolicyFeature("VISUAL", (3, 6, 8))})) == {
        TOP,
        WRIST,
        STATE,
        "task",
    }


def test_a_missing_state_and_an_optional_camera():
    with pytest.raises(
        KeyError, match=r"lacks observation.state\n[^$]*Give the missing input with each observation"
    ):
        to_batch({TOP: raw()[TOP]}, FEATURES)
    assert WRIST not in to_batch(raw(), FEATURES | {WRIST: FEATURES[TOP]}, optional=[WRIST])


def test_a_renamed_camera_is_checked_under_the_policys_name():
    given = {"observation.images.up": raw()[TOP], STATE: raw()[STATE]}
    batch = to_batch(given, FEATURES, rename={"observation.images.up": TOP})
    assert batch["observation.images.up"].shape == (1, 3, 6, 8)


def test_a_wrong_state_is_refused():
    with pytest.raises(
        ValueError, match=r"'observation.state': got shape \(7,\); expected \(4,\) or \(B, 4\).*Give the same"
    ):
        to_batch(raw(**{STATE: np.zeros(7)}), FEATURES)
    with pytest.raises(
        ValueError, match=r"got NaN or inf at \[2\]; expected finite numbers. Look at the sensor"
    ):
        to_batch(raw(**{STATE: torch.tensor([0.0, 0.0, float("nan"), 0.0])}), FEATURES)


def test_unequal_batches_are_refused():
    with pytest.raises(
        ValueError, match=r"batch sizes .*observation.state': 2.*expected one and the same. Cut"
    ):
        to_batch({TOP: np.zeros((3, 6, 8, 3), np.uint8), STATE: np.zeros((2, 4))}, FEATURES)
    with pytest.raises(
        ValueError, match=r"expected the same leading axes on all: a batch axis or none. Add or remove"
    ):
        to_batch(raw(**{STATE: np.zeros((2, 4))}), FEATURES)
    with pytest.raises(ValueError, match="batch sizes"):
        to_batch(raw(task=["a", "b"]), FEATURES)


def test_what_goes_along_and_what_is_dropped():
    batch = to_batch(
        raw(
            action=np.zeros((5, 2)),
            action_is_pad=np.zeros(5, bool),
            index=3,
            frame_index=3,
            success=False,
            **{"observation.force": np.ones(2)},
        ),
        FEATURES,
    )
    assert batch["action"].shape == (1, 5, 2)
    assert batch["action_is_pad"].shape == (1, 5)
    assert batch["index"].tolist() == [3]
    assert batch["observation.force"].shape == (1, 2)
    assert "frame_index" not in batch
    assert "success" not in batch


def test_one_instruction_serves_a_whole_batch():
    pair = {TOP: np.zeros((2, 6, 8, 3), np.uint8), STATE: np.zeros((2, 4))}
    assert to_batch(pair | {"task": "sort"}, FEATURES)["task"] == ["sort", "sort"]
    assert to_batch(pair | {"task": np.array(["a", "b"])}, FEATURES)["task"] == ["a", "b"]
    assert to_batch(pair | {"task": ("a", "b")}, FEATURES)["task"] == ["a", "b"]


@pytest.mark.parametrize("task", [3, [3, 4], torch.zeros(2), np.zeros(2)])
def test_a_task_that_is_no_text_is_refused(task):
    with pytest.raises(TypeError, match=r"'task': got .*; expected an instruction"):
        to_batch(PAIR | {"task": task}, FEATURES)


# A history of two steps: one leading axis is batch or time.

PAIR = {TOP: np.zeros((2, 6, 8, 3), np.uint8), STATE: np.zeros((2, 4))}


@pytest.mark.parametrize(
    ("witness", "shape"),
    [
        ({"task": "x"}, (1, 2, 4)),
        ({"task": ["x", "y"]}, (2, 4)),
        ({"index": torch.tensor(4)}, (1, 2, 4)),
        ({"timestamp": torch.zeros(2)}, (2, 4)),
    ],
)
def test_the_task_or_the_clock_tells_time_from_batch(witness, shape):
    assert to_batch(PAIR | witness, FEATURES, n_obs_steps=2)[STATE].shape == shape


def test_history_in_doubt_or_of_the_wrong_length_is_refused():
    with pytest.raises(
        ValueError, match=r"one leading axis of 2; expected to tell 2 samples from 2 steps.*value\[None\]"
    ):
        to_batch(PAIR, FEATURES, n_obs_steps=2)
    with pytest.raises(ValueError, match=r"got 2 steps of history; expected 3.*delta_timestamps"):
        to_batch(PAIR | {"task": "x"}, FEATURES, n_obs_steps=3)
    assert to_batch(PAIR, FEATURES, n_obs_steps=3)[STATE].shape == (2, 4)
    both = {key: value[None] for key, value in PAIR.items()}
    assert to_batch(both, FEATURES, n_obs_steps=2)[TOP].shape == (1, 2, 3, 6, 8)
    with pytest.raises(ValueError, match="a batch axis or none"):
        to_batch(both, FEATURES)


def test_the_raw_observation_is_left_as_it_was():
    given = raw(task="x")
    to_batch(given, FEATURES)
    assert given[TOP].dtype == np.uint8
    assert given["task"] == "x"
