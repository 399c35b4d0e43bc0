"""The data path beside LeRobot's own, live and to the bit where both compute in float32."""

import json
from itertools import product
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.torch import load_file

from minivla.data import (
    MissingKey,
    NormalizationMode,
    Pipeline,
    PolicyFeature,
    compute_stats,
    delta_frames,
    delta_timestamps,
    features_of,
    make_pipelines,
    open_dataset,
    read_pipeline,
    to_batch,
    window_indices,
    with_imagenet_stats,
    write_pipeline,
)
from minivla.data.normalize import as_stats, normalize, unnormalize

MODES = [mode for mode in NormalizationMode if mode != NormalizationMode.IDENTITY]
CAMERA, STATE, ENV, ACTION = (
    "observation.images.top",
    "observation.state",
    "observation.environment_state",
    "action",
)
LENGTHS = [7, 5, 12]
FPS = 10


@pytest.fixture(scope="module")
def lerobot():
    """LeRobot's parts, imported once (it takes half a minute on a slow machine)."""
    from lerobot import configs, datasets, processor
    from lerobot.datasets import compute_stats as stats_module
    from lerobot.datasets.feature_utils import get_delta_indices
    from lerobot.utils.feature_utils import dataset_to_policy_features

    return SimpleNamespace(
        configs=configs,
        datasets=datasets,
        processor=processor,
        stats=stats_module,
        get_delta_indices=get_delta_indices,
        policy_features=dataset_to_policy_features,
    )


def columns(kind):
    names = {"names": None}
    return {
        STATE: {"dtype": "float32", "shape": (4,), **names},
        ENV: {"dtype": "float32", "shape": (1,), **names},
        ACTION: {"dtype": "float32", "shape": (2,), **names},
        CAMERA: {"dtype": kind, "shape": (32, 48, 3), "names": ["height", "width", "channels"]},
        "next.success": {"dtype": "bool", "shape": (1,), **names},
    }


def episode(number, length):
    rng = np.random.default_rng(number)
    return {
        STATE: rng.normal(number, 2, (length, 4)).astype(np.float32),
        ENV: rng.uniform(-1, 1, (length, 1)).astype(np.float32),
        ACTION: rng.standard_t(2, (length, 2)).astype(np.float32),
        CAMERA: rng.integers(0, 256, (length, 32, 48, 3), dtype=np.uint8),
        "next.success": rng.random((length, 1)) > 0.5,
    }


EPISODES = [episode(number, length) for number, length in enumerate(LENGTHS)]


@pytest.fixture(scope="module", params=["image", "video"])
def recorded(request, lerobot, tmp_path_factory):
    """A dataset written by LeRobot: (root, features)."""
    root = tmp_path_factory.mktemp("recorded") / request.param
    dataset = lerobot.datasets.LeRobotDataset.create(
        "test/recorded", FPS, features=columns(request.param), root=root, use_videos=request.param == "video"
    )
    for number, frames in enumerate(EPISODES):
        for index in range(LENGTHS[number]):
            frame = {key: values[index] for key, values in frames.items()}
            dataset.add_frame({**frame, "task": f"task {number}"})
        dataset.save_episode()
    dataset.finalize()
    return root


def config_for(dataset, observations, actions):
    inputs, outputs = features_of(dataset)
    return SimpleNamespace(
        input_features=inputs,
        output_features=outputs,
        observation_delta_indices=observations,
        action_delta_indices=actions,
        device="cpu",
    )


def test_statistics(recorded, lerobot):
    theirs = lerobot.datasets.LeRobotDatasetMetadata("test/recorded", recorded).stats
    ours = compute_stats(EPISODES, columns("image"))
    assert set(ours) == set(theirs) - {"timestamp", "frame_index", "episode_index", "index", "task_index"}
    for key, table in ours.items():
        assert set(table) == set(theirs[key])
        for name, value in table.items():
            np.testing.assert_array_equal(value.numpy(), theirs[key][name], err_msg=f"{key}.{name}")


@pytest.mark.parametrize(
    ("frames", "height", "width"), [(1, 8, 8), (130, 16, 16), (3, 310, 200), (2, 200, 460)]
)
def test_image_statistics_sample_and_thin_as_lerobot_does(frames, height, width, lerobot, monkeypatch):
    images = np.random.default_rng(0).integers(0, 256, (frames, height, width, 3), dtype=np.uint8)
    monkeypatch.setattr(
        lerobot.stats, "load_image_as_numpy", lambda path, **_: images[int(path)].transpose(2, 0, 1)
    )
    column = {"x": {"dtype": "image", "shape": (height, width, 3)}}
    theirs = lerobot.stats.compute_episode_stats({"x": [str(i) for i in range(frames)]}, column)["x"]
    ours = compute_stats([{"x": images}], column)["x"]
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize(
    "values",
    [
        np.arange(50),
        np.full((20, 3), 0.8, np.float32),
        np.linspace(0, 1, 30).reshape(10, 3),
        np.ones((1, 2), np.float32),
        np.random.default_rng(1).normal(size=(40, 2, 3)),
        np.arange(9) % 2 == 0,
    ],
)
def test_vector_statistics(values, lerobot):
    column = {"x": {"dtype": str(values.dtype), "shape": values.shape[1:] or (1,)}}
    theirs = lerobot.stats.compute_episode_stats({"x": values}, column)["x"]
    ours = compute_stats([{"x": values}], column)["x"]
    for name, value in theirs.items():
        np.testing.assert_array_equal(ours[name].numpy(), value, err_msg=name)


@pytest.mark.parametrize("observations", [None, [-1, 0], [-2, -1, 0]])
def test_windows(recorded, observations, lerobot):
    actions = list(range(-1, 6))
    config = config_for(columns("image"), observations, actions)
    dataset = open_dataset("test/recorded", root=recorded, config=config)
    assert dataset.delta_timestamps == delta_timestamps(config, FPS)
    deltas = delta_frames(dataset.delta_timestamps, FPS)
    assert deltas == lerobot.get_delta_indices(dataset.delta_timestamps, FPS)
    bounds = np.cumsum([0, *LENGTHS])
    for number, index in ((n, i) for n in range(3) for i in range(bounds[n], bounds[n + 1])):
        item = dataset[index]
        for key, wanted in deltas.items():
            indices, is_pad = window_indices(index, int(bounds[number]), int(bounds[number + 1]), wanted)
            torch.testing.assert_close(is_pad, item[f"{key}_is_pad"], rtol=0, atol=0)
            if key != CAMERA:
                frames = EPISODES[number][key][indices - bounds[number]].reshape(item[key].shape)
                np.testing.assert_array_equal(item[key].numpy(), frames)


def test_an_item_and_a_loader_batch_pass_the_gate(recorded):
    config = config_for(columns("image"), [-1, 0], list(range(4)))
    config.input_features.pop(ENV)  # LeRobot drops the axis of features of size one
    dataset = open_dataset("test/recorded", root=recorded, config=config)
    single = to_batch(dataset[3], config.input_features, n_obs_steps=2)
    assert single[CAMERA].shape == (1, 2, 3, 32, 48)
    assert single[STATE].shape == (1, 2, 4)
    assert single[ACTION].shape == (1, 4, 2)
    assert single["action_is_pad"].shape == (1, 4)
    assert single["task"] == ["task 0"]
    loaded = next(iter(torch.utils.data.DataLoader(dataset, batch_size=2)))
    double = to_batch(loaded, config.input_features, n_obs_steps=2)
    assert double[CAMERA].shape == (2, 2, 3, 32, 48)
    assert double["task"] == ["task 0", "task 0"]
    assert "frame_index" not in double


def test_features(recorded, lerobot):
    dataset = open_dataset("test/recorded", root=recorded)
    ours = features_of(dataset)
    theirs = lerobot.policy_features(dataset.meta.features)
    assert {**ours[0], **ours[1]} == {k: PolicyFeature(f.type.value, f.shape) for k, f in theirs.items()}
    assert list(ours[1]) == [ACTION]
    assert features_of(dataset.meta) == ours


def test_opening_refuses_what_is_not_there(recorded, tmp_path):
    with pytest.raises(ValueError, match=r"no episodes \[3\]; expected numbers in 0…2"):
        open_dataset("test/recorded", root=recorded, episodes=[0, 3])
    with pytest.raises(ValueError, match="expected one of them"):
        open_dataset("test/recorded", root=recorded, config=SimpleNamespace(), delta_timestamps={})
    with pytest.raises(
        FileNotFoundError, match=r"no dataset 'test/none'.*expected a LeRobotDataset v3.*root="
    ):
        open_dataset("test/none", root=tmp_path / "none")
    assert not (tmp_path / "none").exists()
    old = tmp_path / "old" / "meta"
    old.mkdir(parents=True)
    (old / "info.json").write_text('{"codebase_version": "v2.1"}')
    with pytest.raises(
        ValueError, match=r"in v2.1; expected v3.0[^$]*convert_dataset_v21_to_v30 --repo-id=test/old"
    ):
        open_dataset("test/old", root=tmp_path / "old")
    assert len(open_dataset("test/recorded", root=recorded, episodes=[1])) == LENGTHS[1]


# Normalisation


def their_step(lerobot, kind, mode, stats, feature):
    cls = getattr(lerobot.processor, kind)
    features = {
        key: lerobot.configs.PolicyFeature(lerobot.configs.FeatureType(f.type), f.shape)
        for key, f in feature.items()
    }
    norm_map = {
        lerobot.configs.FeatureType(f.type): lerobot.configs.NormalizationMode(mode) for f in feature.values()
    }
    return cls(features=features, norm_map=norm_map, stats=stats)


def full_stats(rng, shape):
    values = np.sort(rng.normal(0, 3, (9, *shape)), axis=0).astype(np.float32)
    names = ["min", "q01", "q10", "q50", "mean", "q90", "q99", "max"]
    return {**dict(zip(names, values, strict=False)), "std": np.abs(values[8]) + 0.1, "count": np.array([9])}


@pytest.mark.parametrize(
    ("mode", "dtype"), list(product(MODES, [torch.float32, torch.float64, torch.bfloat16]))
)
def test_each_mode_and_its_inverse(mode, dtype, lerobot):
    rng = np.random.default_rng(3)
    features = {
        CAMERA: PolicyFeature("VISUAL", (3, 4, 5)),
        STATE: PolicyFeature("STATE", (6,)),
        ACTION: PolicyFeature("ACTION", (2,)),
    }
    stats = {key: full_stats(rng, (3, 1, 1) if key == CAMERA else f.shape) for key, f in features.items()}
    for kind, ours in (("NormalizerProcessorStep", normalize), ("UnnormalizerProcessorStep", unnormalize)):
        step = their_step(lerobot, kind, mode, stats, features)
        batch = {key: torch.randn(2, *f.shape, dtype=dtype) for key, f in features.items()}
        theirs = lerobot.processor.DataProcessorPipeline([step])(dict(batch))
        for key in features:
            # LeRobot keeps the dataset's own precision until the first batch; ours is float32 throughout.
            table = {name: torch.as_tensor(value) for name, value in stats[key].items()}
            torch.testing.assert_close(ours(batch[key], mode, table), theirs[key], rtol=0, atol=0)


def test_constant_dimensions_have_lerobots_numbers(lerobot):
    feature = {STATE: PolicyFeature("STATE", (2,))}
    stats = {STATE: {"mean": [1.0, 0.0], "std": [0.0, 1.0], "min": [1.0, 0.0], "max": [1.0, 2.0]}}
    x = torch.tensor([[1.0, 0.5], [1.25, 0.5]])
    for mode in (NormalizationMode.MEAN_STD, NormalizationMode.MIN_MAX):
        step = their_step(lerobot, "NormalizerProcessorStep", mode, stats, feature)
        theirs = lerobot.processor.DataProcessorPipeline([step])({STATE: x})[STATE]
        torch.testing.assert_close(normalize(x, mode, as_stats(stats)[STATE]), theirs, rtol=0, atol=0)


# Pipelines


MAPPING = {"VISUAL": "MEAN_STD", "STATE": "QUANTILES", "ACTION": "MIN_MAX"}


@pytest.fixture(scope="module")
def act(lerobot):
    """An ACT config of LeRobot's, statistics, and LeRobot's pipelines for them."""
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.act.configuration_act import ACTConfig

    kinds = lerobot.configs.FeatureType
    feature = lerobot.configs.PolicyFeature
    inputs = {
        CAMERA: feature(kinds.VISUAL, (3, 4, 5)),
        STATE: feature(kinds.STATE, (6,)),
        ENV: feature(kinds.ENV, (2,)),
    }
    outputs = {ACTION: feature(kinds.ACTION, (2,))}
    mapping = {kinds(k): lerobot.configs.NormalizationMode(m) for k, m in MAPPING.items()}
    config = ACTConfig(
        input_features=inputs,
        output_features=outputs,
        normalization_mapping=mapping,
        device="cpu",
        pretrained_backbone_weights=None,
    )
    rng = np.random.default_rng(5)
    stats = {
        key: full_stats(rng, (3, 1, 1) if key == CAMERA else f.shape)
        for key, f in {**inputs, **outputs}.items()
    }
    return SimpleNamespace(
        config=config,
        stats=stats,
        inputs=inputs,
        pipelines=make_pre_post_processors(config, dataset_stats=stats),
    )


def our_config(act):
    ours = lambda table: {key: PolicyFeature(f.type.value, f.shape) for key, f in table.items()}  # noqa: E731
    return SimpleNamespace(
        input_features=ours(act.config.input_features),
        output_features=ours(act.config.output_features),
        normalization_mapping=MAPPING,
        device="cpu",
    )


def observation(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return {
        CAMERA: torch.rand(3, 4, 5, generator=generator),
        STATE: torch.randn(6, generator=generator),
        ENV: torch.randn(2, generator=generator),
        "task": "reach",
    }


def training_batch():
    single = observation(1)
    batch = {key: value[None].repeat(3, *[1] * value.ndim) for key, value in single.items() if key != "task"}
    action = torch.randn(3, 5, 2)
    return {
        **batch,
        ACTION: action,
        "action_is_pad": torch.zeros(3, 5, dtype=torch.bool),
        "task": ["a", "b", "c"],
    }


def assert_same_numbers(ours, theirs):
    for raw in (observation(), training_batch()):
        mine, upstream = ours[0](dict(raw)), theirs[0](dict(raw))
        assert set(mine) <= set(upstream)
        for key, value in mine.items():
            if isinstance(value, torch.Tensor):
                torch.testing.assert_close(value, upstream[key], rtol=0, atol=0)
            else:
                assert value == upstream[key]
    action = torch.randn(2, 2)
    torch.testing.assert_close(ours[1](action), theirs[1](action), rtol=0, atol=0)


def their_pipelines(lerobot, folder):
    from lerobot.processor.converters import policy_action_to_transition, transition_to_policy_action

    read = lerobot.processor.PolicyProcessorPipeline.from_pretrained
    post = {"to_transition": policy_action_to_transition, "to_output": transition_to_policy_action}
    return read(folder, "policy_preprocessor.json"), read(folder, "policy_postprocessor.json", **post)


def test_fresh_pipelines_equal_lerobots(act):
    assert_same_numbers(make_pipelines(our_config(act), act.stats), act.pipelines)


def test_pipelines_written_by_lerobot_are_read(act, tmp_path):
    for pipeline in act.pipelines:
        pipeline.save_pretrained(tmp_path)
    ours = [read_pipeline(tmp_path, f"policy_{name}.json") for name in ("preprocessor", "postprocessor")]
    assert_same_numbers(ours, act.pipelines)


def test_pipelines_written_by_us_are_read_by_lerobot(act, lerobot, tmp_path):
    pipelines = make_pipelines(our_config(act), act.stats)
    for pipeline in pipelines:
        write_pipeline(pipeline, tmp_path)
    assert_same_numbers(pipelines, their_pipelines(lerobot, tmp_path))


def test_both_write_the_same_files(act, tmp_path):
    for pipeline in act.pipelines:
        pipeline.save_pretrained(tmp_path / "theirs")
    for pipeline in make_pipelines(our_config(act), act.stats):
        write_pipeline(pipeline, tmp_path / "ours")
    names = sorted(path.name for path in (tmp_path / "theirs").iterdir())
    assert names == sorted(path.name for path in (tmp_path / "ours").iterdir())
    assert "policy_preprocessor_step_3_normalizer_processor.safetensors" in names
    for name in names:
        theirs, ours = tmp_path / "theirs" / name, tmp_path / "ours" / name
        if name.endswith(".json"):
            assert json.loads(ours.read_text()) == json.loads(theirs.read_text())
        else:
            torch.testing.assert_close(load_file(ours), load_file(theirs), rtol=0, atol=0)


class Words:
    """A tokenizer of five words."""

    def __call__(self, text, *, max_length, truncation, padding, padding_side, return_tensors):
        rows = [[len(word) for word in line.split()][:max_length] for line in text]
        padded = [row + [0] * (max_length - len(row)) for row in rows]
        ids = torch.tensor(padded)
        return {"input_ids": ids, "attention_mask": (ids > 0).long()}


def test_tokens_and_renamed_keys_equal_lerobots(lerobot):
    from minivla.data.steps import AddBatch, Device, Rename, Tokenize

    steps = lerobot.processor
    theirs = steps.DataProcessorPipeline(
        [
            steps.RenameObservationsProcessorStep({"observation.images.front": CAMERA}),
            steps.AddBatchDimensionProcessorStep(),
            steps.TokenizerProcessorStep(tokenizer=Words(), max_length=4),
            steps.DeviceProcessorStep("cpu", float_dtype="bfloat16"),
        ]
    )
    ours = Pipeline(
        [
            Rename({"observation.images.front": CAMERA}),
            AddBatch(),
            Tokenize(tokenizer=Words(), max_length=4),
            Device("cpu", "bfloat16"),
        ]
    )
    raw = observation()
    raw["observation.images.front"] = raw.pop(CAMERA)
    raw |= {
        "subtask": ["grasp it"],
        "index": torch.tensor(3),
        ACTION: torch.randn(2),
        "timestamp": torch.tensor(0.1),
    }
    mine, upstream = ours(dict(raw)), theirs(dict(raw))
    mine.pop("subtask")  # LeRobot drops it, and its tokens with it
    for key, value in mine.items():
        if "subtask" in key:
            continue
        if isinstance(value, torch.Tensor):
            torch.testing.assert_close(value, upstream[key], rtol=0, atol=0)
        else:
            assert value == upstream[key]
    assert mine["observation.language.attention_mask"].dtype == torch.bool


def test_imagenet_statistics(lerobot):
    from lerobot.utils.constants import IMAGENET_STATS

    ours = with_imagenet_stats({}, {CAMERA: PolicyFeature("VISUAL", (3, 4, 4))})[CAMERA]
    for name, value in IMAGENET_STATS.items():
        torch.testing.assert_close(ours[name], torch.tensor(value), rtol=0, atol=0)


@settings(max_examples=20, deadline=None)
@given(st.sampled_from(MODES), st.integers(0, 2**31))
def test_old_buffers_become_the_statistics_that_lerobot_extracts(mode, seed):
    from lerobot.processor.migrate_policy_normalization import extract_normalization_stats

    from minivla.data import legacy_stats

    rng = np.random.default_rng(seed)
    features = {
        CAMERA: PolicyFeature("VISUAL", (3, 4, 5)),
        STATE: PolicyFeature("STATE", (6,)),
        ACTION: PolicyFeature("ACTION", (2,)),
    }
    names = {"MEAN_STD": ("mean", "std")}.get(mode, ("min", "max"))
    tensors = {"model.weight": torch.ones(2)}
    for key, feature in features.items():
        module = "normalize_inputs" if key != ACTION else "unnormalize_outputs"
        for name in names:
            value = torch.from_numpy(rng.normal(size=(3, 1, 1) if key == CAMERA else feature.shape))
            tensors[f"{module}.buffer_{key.replace('.', '_')}.{name}"] = value
    theirs = extract_normalization_stats(tensors)
    torch.testing.assert_close(legacy_stats(tensors, features), theirs, rtol=0, atol=0)


def test_lerobot_passes_over_absent_statistics_and_we_do_not(lerobot):
    """The difference that is meant: upstream's silence is our error."""
    feature = {STATE: PolicyFeature("STATE", (2,))}
    step = their_step(lerobot, "NormalizerProcessorStep", "MEAN_STD", {"other": {"mean": [0.0]}}, feature)
    x = torch.ones(1, 2)
    assert torch.equal(lerobot.processor.DataProcessorPipeline([step])({STATE: x})[STATE], x)
    config = SimpleNamespace(
        input_features=feature, output_features={}, normalization_mapping={"STATE": "MEAN_STD"}, device=None
    )
    with pytest.raises(MissingKey, match=r"no statistics for 'observation.state'"):
        make_pipelines(config, {"other": {"mean": [0.0]}})
