"""What a policy sees and what it outputs: named features with a type and a shape.

A dataset describes its columns; a policy's `config.json` lists the columns it uses. Both follow LeRobot 0.6
(`lerobot/configs/types.py`, `lerobot/utils/feature_utils.py`), so that either side can be read by the other.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

OBS_STATE = "observation.state"
OBS_ENV_STATE = "observation.environment_state"
OBS_IMAGE = "observation.image"
OBS_IMAGES = "observation.images"
OBS_LANGUAGE = "observation.language"
ACTION = "action"


class MissingKey(KeyError):
    """A KeyError whose message keeps its line breaks (a plain KeyError prints them as `\\n`)."""

    def __str__(self) -> str:
        return str(self.args[0])


class FeatureType(StrEnum):
    """What kind of quantity a feature is; normalisation is chosen per type."""

    STATE = "STATE"
    VISUAL = "VISUAL"
    ENV = "ENV"
    ACTION = "ACTION"
    REWARD = "REWARD"
    LANGUAGE = "LANGUAGE"


class NormalizationMode(StrEnum):
    """How a feature is brought to a common scale; `minivla.data.normalize` holds the formulas."""

    IDENTITY = "IDENTITY"
    MEAN_STD = "MEAN_STD"
    MIN_MAX = "MIN_MAX"
    QUANTILES = "QUANTILES"
    QUANTILE10 = "QUANTILE10"


@dataclass(frozen=True)
class PolicyFeature:
    """One input or output of a policy.

    `shape` has neither batch nor time: (S,) for a state, (A,) for an action, (3, H, W) for a camera.
    """

    type: FeatureType
    shape: tuple[int, ...]

    def __post_init__(self) -> None:
        # "STATE" and [14], as JSON has them, are welcome too.
        object.__setattr__(self, "type", FeatureType(self.type))
        object.__setattr__(self, "shape", tuple(int(size) for size in self.shape))

    def to_json(self) -> dict[str, Any]:
        """The form `config.json` holds, `{"type": "STATE", "shape": [14]}`."""
        return {"type": self.type.value, "shape": list(self.shape)}


def feature_from_json(key: str, entry: Mapping[str, Any]) -> PolicyFeature:
    """One feature out of `config.json`; `key` only serves the error.

    Raises ValueError when `type` is not one of FeatureType's or `shape` is not a list of sizes.
    """
    try:
        if not isinstance(entry["shape"], list | tuple):  # "64" would be read as (6, 4)
            raise TypeError("shape is no list")
        return PolicyFeature(entry["type"], tuple(entry["shape"]))
    except (KeyError, TypeError, ValueError) as error:
        raise ValueError(
            f"feature '{key}' reads {entry!r}; expected {{'type': T, 'shape': [sizes]}} with T one of "
            f"{', '.join(FeatureType)}. Mend that entry of config.json."
        ) from error


def features_to_json(features: Mapping[str, PolicyFeature]) -> dict[str, Any]:
    """A table of features in the form `config.json` holds; `features_from_json` reverses it."""
    return {key: feature.to_json() for key, feature in features.items()}


def features_from_json(table: Mapping[str, Any] | None) -> dict[str, PolicyFeature]:
    """A table of features out of `config.json` (null means none). ValueError as `feature_from_json`."""
    if table is not None and not isinstance(table, Mapping):
        raise ValueError(
            f"a table of features reads {table!r}; expected {{name: {{'type': T, 'shape': [sizes]}}}}. Mend "
            "input_features and output_features of config.json, or `features` of the processor's file."
        )
    return {key: feature_from_json(key, entry) for key, entry in (table or {}).items()}


def features_of(dataset: Any) -> tuple[dict[str, PolicyFeature], dict[str, PolicyFeature]]:
    """What a policy trained on `dataset` takes in and gives out: (input_features, output_features).

    dataset: a LeRobotDataset, our Demonstrations, a LeRobotDatasetMetadata, or the features dict itself,
    `{key: {"dtype", "shape", "names"}}`. Columns named `action…` are outputs, `observation…` and cameras are
    inputs, everything else (timestamp, index, reward) is neither. Images are turned to (3, H, W).
    Raises TypeError when there is no such dict, ValueError when an image's layout cannot be told.
    """
    columns = dataset if isinstance(dataset, Mapping) else getattr(dataset, "features", None)
    if not isinstance(columns, Mapping):
        raise TypeError(
            f"got a {type(dataset).__name__}; expected a dataset with `.features`, or that dict itself. Pass "
            "a LeRobotDataset, minivla.world.demonstrations(...), or {key: {'dtype', 'shape', 'names'}}."
        )
    found = {key: _policy_feature(key, column) for key, column in columns.items()}
    features = {key: feature for key, feature in found.items() if feature is not None}
    outputs = {key: feature for key, feature in features.items() if feature.type is FeatureType.ACTION}
    return {key: feature for key, feature in features.items() if key not in outputs}, outputs


def _policy_feature(key: str, column: Mapping[str, Any]) -> PolicyFeature | None:
    shape = tuple(int(size) for size in column["shape"])
    if column["dtype"] in ("image", "video"):
        return PolicyFeature(FeatureType.VISUAL, _channels_first(key, shape, column.get("names")))
    if key == OBS_ENV_STATE:
        return PolicyFeature(FeatureType.ENV, shape)
    if key.startswith("observation"):
        return PolicyFeature(FeatureType.STATE, shape)
    return PolicyFeature(FeatureType.ACTION, shape) if key.startswith(ACTION) else None


def _channels_first(key: str, shape: tuple[int, ...], names: Any) -> tuple[int, ...]:
    if len(shape) == 3 and names is not None and len(names) == 3:
        # Datasets ported to v2.0 say "channel" where later ones say "channels".
        return (shape[2], *shape[:2]) if list(names)[2] in ("channel", "channels") else shape
    if len(shape) == 3 and names is None and (shape[0] == 3) != (shape[2] == 3):
        return shape if shape[0] == 3 else (shape[2], *shape[:2])
    raise ValueError(
        f"camera '{key}' has shape {shape} and axis names {names!r}; expected three axes with names, such as "
        "['height', 'width', 'channels']. Add `names` to this feature of the dataset's meta/info.json."
    )
