"""Features: read off a dataset, written to config.json and back."""

import pytest

from minivla.data import FeatureType, PolicyFeature, features_of
from minivla.data.features import features_from_json, features_to_json

COLUMNS = {
    "observation.images.top": {
        "dtype": "video",
        "shape": [48, 64, 3],
        "names": ["height", "width", "channels"],
    },
    "observation.image": {"dtype": "image", "shape": (3, 9, 9), "names": ["channels", "height", "width"]},
    "observation.state": {"dtype": "float32", "shape": (6,), "names": None},
    "observation.environment_state": {"dtype": "float32", "shape": (5,), "names": None},
    "action": {"dtype": "float32", "shape": (2,), "names": ["x", "y"]},
    "timestamp": {"dtype": "float32", "shape": (1,), "names": None},
    "next.reward": {"dtype": "float32", "shape": (1,), "names": None},
}


def test_columns_become_inputs_and_outputs():
    inputs, outputs = features_of(COLUMNS)
    assert inputs == {
        "observation.images.top": PolicyFeature(FeatureType.VISUAL, (3, 48, 64)),
        "observation.image": PolicyFeature(FeatureType.VISUAL, (3, 9, 9)),
        "observation.state": PolicyFeature(FeatureType.STATE, (6,)),
        "observation.environment_state": PolicyFeature(FeatureType.ENV, (5,)),
    }
    assert outputs == {"action": PolicyFeature(FeatureType.ACTION, (2,))}


def test_json_round_trip():
    inputs, _ = features_of(COLUMNS)
    assert features_to_json(inputs)["observation.state"] == {"type": "STATE", "shape": [6]}
    assert features_from_json(features_to_json(inputs)) == inputs
    assert features_from_json(None) == {}


@pytest.mark.parametrize(
    "entry", [{"type": "TOUCH", "shape": [2]}, {"type": "STATE"}, {"type": "STATE", "shape": 4}, 7]
)
def test_a_broken_entry_is_named(entry):
    with pytest.raises(
        ValueError, match=r"feature 'grip' reads .*expected .*STATE, VISUAL.*Mend that entry of config.json"
    ):
        features_from_json({"grip": entry})


def test_a_layout_that_cannot_be_told_is_refused():
    for names, shape in ((None, (3, 4, 3)), (None, (4, 4)), (["height", "width"], (4, 4, 3))):
        with pytest.raises(
            ValueError, match=r"camera 'observation.images.x' has shape .*expected three axes.*meta/info.json"
        ):
            features_of({"observation.images.x": {"dtype": "image", "shape": shape, "names": names}})
    assert features_of({"observation.images.x": {"dtype": "image", "shape": (4, 5, 3)}})[0] == {
        "observation.images.x": PolicyFeature(FeatureType.VISUAL, (3, 4, 5))
    }


def test_what_is_no_dataset_is_refused():
    with pytest.raises(
        TypeError, match=r"got a list; expected a dataset with `.features`.*Pass a LeRobotDataset"
    ):
        features_of([1, 2])


@pytest.mark.parametrize(
    "table", [[1], "x", {"observation.state": 3}, {"a": {"type": "STATE", "shape": "64"}}]
)
def test_a_malformed_table_is_refused(table):
    with pytest.raises(ValueError, match=r"reads .*; expected .*Mend"):
        features_from_json(table)
