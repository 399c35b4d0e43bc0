"""Steps and pipelines: what they print, what their files refuse."""

import json
import warnings
from types import SimpleNamespace

import pytest
import torch
from safetensors.torch import save_file

from minivla.data import MissingKey, PolicyFeature, make_pipelines, read_pipeline, write_pipeline
from minivla.data.processors import Pipeline
from minivla.data.steps import STEPS, AddBatch, Device, Normalize, Rename, Tokenize, register

CAMERA, STATE = "observation.images.table", "observation.state"
STATS = {
    CAMERA: {"mean": [0.5] * 3, "std": [0.25] * 3},
    STATE: {"q01": [-1.0] * 4, "q99": [1.0] * 4},
    "action": {"min": [0.0, -2.0], "max": [1.0, 2.0]},
}


def config(**mapping):
    return SimpleNamespace(
        input_features={CAMERA: PolicyFeature("VISUAL", (3, 8, 8)), STATE: PolicyFeature("STATE", (4,))},
        output_features={"action": PolicyFeature("ACTION", (2,))},
        normalization_mapping={"VISUAL": "MEAN_STD", "STATE": "QUANTILES", "ACTION": "MIN_MAX"} | mapping,
        device=None,
    )


def test_a_pipeline_reads_like_a_list():
    pre, post = make_pipelines(config(), STATS, text=[Tokenize("org/words", max_length=48)])
    assert repr(pre) == (
        "policy_preprocessor, 5 steps\n"
        "  1  Rename       keys stay as they are\n"
        "  2  AddBatch     a single observation becomes a batch of one\n"
        "  3  Tokenize     task to 48 tokens of org/words\n"
        "  4  Device       tensors to cpu\n"
        "  5  Normalize    observation.images.table  MEAN_STD    (x - mean) / std\n"
        "                  observation.state         QUANTILES   q01..q99 to -1..1\n"
        "                  action                    MIN_MAX     min..max to -1..1"
    )
    assert repr(post) == (
        "policy_postprocessor, 2 steps\n"
        "  1  Unnormalize  action  MIN_MAX     -1..1 to min..max\n"
        "  2  Device       tensors to cpu"
    )
    assert repr(Rename({"observation.a": "observation.b"})) == "Rename(observation.a -> observation.b)"


def test_there_and_back():
    pre, post = make_pipelines(config(), STATS)
    action = torch.tensor([[0.25, 1.0], [1.0, -2.0]])
    batch = {"action": action, STATE: torch.zeros(2, 4)}
    out = pre(batch)
    assert out["action"].tolist() == [[-0.5, 0.5], [1.0, -1.0]]
    torch.testing.assert_close(post(out["action"]), action)
    assert batch["action"] is action


def test_without_statistics_a_policy_can_be_built_but_not_called():
    pre, post = make_pipelines(config(), None)
    assert "NO STATISTICS" in repr(pre)
    with pytest.raises(
        MissingKey, match=r"'observation.state' is to be scaled by QUANTILES.*no statistics.*with_stats"
    ):
        pre({STATE: torch.zeros(1, 4)})
    with pytest.raises(MissingKey, match="'action' is to be scaled by MIN_MAX"):
        post(torch.zeros(1, 2))
    assert post.with_stats(STATS)(torch.zeros(1, 2)).tolist() == [[0.5, 0.0]]
    assert "NO STATISTICS" not in repr(
        make_pipelines(config(VISUAL="IDENTITY", STATE="IDENTITY", ACTION="IDENTITY"), None)
    )


def test_statistics_are_checked_when_the_pipeline_is_built():
    with pytest.raises(MissingKey, match="no statistics for 'action'"):
        make_pipelines(config(), {key: STATS[key] for key in (CAMERA, STATE)})
    flat = STATS | {"action": {"min": [0.0, 1.0], "max": [0.0, 2.0]}}
    with pytest.raises(ValueError, match=r"action\[0\]: constant"):
        make_pipelines(config(), flat)
    pre, _ = make_pipelines(config(), flat, allow_constant=True)
    assert pre({"action": torch.tensor([[0.0, 1.0]])})["action"].tolist() == [[-1.0, -1.0]]


def test_a_value_of_the_wrong_size_is_refused():
    pre, _ = make_pipelines(config(), STATS)
    with pytest.raises(
        ValueError, match=r"'action': got shape \(2, 7\); expected 2 along axis -1.*Give what"
    ):
        pre({"action": torch.zeros(2, 7)})


def test_only_the_observations_chosen_are_normalised():
    features, norm_map = config().input_features, config().normalization_mapping
    step = Normalize(features, norm_map, STATS, normalize_observation_keys={STATE})
    batch = {CAMERA: torch.zeros(1, 3, 8, 8), STATE: torch.full((1, 4), 3.0)}
    out = step(batch)
    assert out[CAMERA] is batch[CAMERA]
    assert out[STATE].tolist() == [[3.0] * 4]
    assert step.to_json()["normalize_observation_keys"] == [STATE]
    assert Normalize.from_json(step.to_json(), step.state()).normalize_observation_keys == {STATE}


def test_renaming_two_keys_to_one_is_refused():
    with pytest.raises(
        ValueError, match=r"puts observation.a, observation.b under one name; expected one each. Take"
    ):
        Rename({"observation.a": "observation.b"})({"observation.a": 1, "observation.b": 2})
    swap = Rename({"observation.a": "observation.b", "observation.b": "observation.a"})
    assert swap({"observation.a": 1, "observation.b": 2, "task": "x"}) == {
        "observation.b": 1,
        "observation.a": 2,
        "task": "x",
    }


def test_the_pipelines_parts_can_be_changed():
    pre, _ = make_pipelines(config(), STATS)
    pre.rename_map.update({"observation.images.up": CAMERA})
    assert "observation.images.up -> observation.images.table" in repr(pre)
    assert set(pre.stats) == set(STATS)
    assert "tensors to cuda:1" in repr(pre.with_device("cuda:1"))
    assert "tensors to cpu" in repr(pre)


def test_a_device_that_is_not_there_is_refused(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    step = Device("cuda:1")
    assert step.to_json() == {"device": "cuda", "float_dtype": None}
    with pytest.raises(
        ValueError, match=r"sends tensors to 'cuda:1'.*no CUDA device; expected.*device='cpu'"
    ):
        step({"x": torch.zeros(1)})
    with pytest.raises(ValueError, match=r"float_dtype is 'int8'; expected null or one of float16"):
        Device(float_dtype="int8")


def test_floats_are_cast_and_the_rest_is_not():
    out = Device("cpu", "bfloat16")(
        {"x": torch.zeros(1), "n": torch.zeros(1, dtype=torch.int64), "task": ["a"]}
    )
    assert (out["x"].dtype, out["n"].dtype, out["task"]) == (torch.bfloat16, torch.int64, ["a"])


# Tokens


def test_a_tokenizer_out_of_reach_fails_when_called_and_not_before(tmp_path):
    step = Tokenize(str(tmp_path / "no-tokenizer-here"))
    write_pipeline(Pipeline([step]), tmp_path)
    again = read_pipeline(tmp_path)
    with pytest.raises(
        FileNotFoundError,
        match=r"no-tokenizer-here' could not be loaded.*licence.*hf auth login.*set `step\.tokenizer`",
    ):
        again({"task": ["reach"]})
    with pytest.raises(FileNotFoundError, match=r"no tokenizer_name; expected one. Set"):
        Tokenize()({"task": "reach"})


def test_a_batch_without_an_instruction_is_refused():
    with pytest.raises(
        MissingKey,
        match=r"no 'task' in the batch, which holds observation.state; expected an instruction. Add raw",
    ):
        Tokenize("x")({STATE: torch.zeros(1, 4)})


# Files


def saved(folder, pipeline=None):
    write_pipeline(pipeline or make_pipelines(config(), STATS)[0], folder)
    return json.loads((folder / "policy_preprocessor.json").read_text())


def rewrite(folder, content):
    (folder / "policy_preprocessor.json").write_text(json.dumps(content))


def test_round_trip(tmp_path):
    pre, _ = make_pipelines(config(), STATS)
    saved(tmp_path, pre)
    assert sorted(path.name for path in tmp_path.iterdir()) == [
        "policy_preprocessor.json",
        "policy_preprocessor_step_3_normalizer_processor.safetensors",
    ]
    again = read_pipeline(tmp_path)
    assert repr(again) == repr(pre)
    torch.testing.assert_close(again.stats, pre.stats, rtol=0, atol=0)
    assert "tensors to mps" in repr(read_pipeline(tmp_path, device="mps"))
    other = {
        key: {name: [2 * x for x in value] for name, value in table.items()} for key, table in STATS.items()
    }
    assert read_pipeline(tmp_path, stats=other).stats["action"]["max"].tolist() == [2.0, 4.0]


def test_constant_dimensions_in_a_folder_warn_and_load(tmp_path):
    flat = STATS | {"action": {"min": [0.0, 1.0], "max": [0.0, 2.0]}}
    pre, post = make_pipelines(config(), flat, allow_constant=True)
    saved(tmp_path, pre)
    with pytest.warns(UserWarning, match=r"action\[0\]: constant, max-min = 0"):
        again = read_pipeline(tmp_path)
    x = {"action": torch.tensor([[0.0, 1.5]])}
    assert again(x)["action"].tolist() == pre(x)["action"].tolist() == [[-1.0, 0.0]]
    write_pipeline(post, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # once is enough
        read_pipeline(tmp_path, "policy_postprocessor.json")


def test_an_unknown_step_is_named(tmp_path):
    content = saved(tmp_path)
    content["steps"][1]["registry_name"] = "juggle_processor"
    rewrite(tmp_path, content)
    with pytest.raises(
        ValueError, match=r"step 1 of .*is 'juggle_processor'; expected one of rename_observations.*register"
    ):
        read_pipeline(tmp_path)
    content["steps"][1] = {"class": "lab.steps.Juggle", "config": {}}
    rewrite(tmp_path, content)
    with pytest.raises(ValueError, match=r"is 'lab.steps.Juggle'"):
        read_pipeline(tmp_path)


def test_an_unknown_setting_is_named(tmp_path):
    content = saved(tmp_path)
    content["steps"][2]["config"]["speed"] = 9
    rewrite(tmp_path, content)
    with pytest.raises(
        ValueError,
        match=r"step 2 \('device_processor'\).*'speed': 9.*expected those of Device\(device, float_dtype\)",
    ):
        read_pipeline(tmp_path)


def test_a_registered_step_is_read(tmp_path):
    class Shout(AddBatch):
        registry_name = "shout_processor"

    try:
        register(Shout)
        saved(tmp_path, Pipeline([Shout()]))
        assert isinstance(read_pipeline(tmp_path).steps[0], Shout)
    finally:
        del STEPS["shout_processor"]


def test_damaged_folders_are_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"policy_preprocessor.json"):
        read_pipeline(tmp_path)
    content = saved(tmp_path)
    state = tmp_path / content["steps"][3]["state_file"]
    whole = state.read_bytes()
    for part in (whole[:40], whole[:-8], b""):
        state.write_bytes(part)
        with pytest.raises(
            ValueError, match=r"normalizer_processor.safetensors is truncated or damaged .*; copy or download"
        ):
            read_pipeline(tmp_path)
    state.unlink()
    with pytest.raises(
        FileNotFoundError, match=r"step 3 keeps its tensors in .*, which is not there; expected it in .*Copy"
    ):
        read_pipeline(tmp_path)
    rewrite(tmp_path, {"mean": 3})
    with pytest.raises(ValueError, match=r"has mean; expected 'name' and a list 'steps'.*minivla.load"):
        read_pipeline(tmp_path)


def test_a_folder_that_lacks_one_features_statistics_is_refused(tmp_path):
    content = saved(tmp_path)
    save_file({"observation.state.q01": torch.zeros(4)}, tmp_path / content["steps"][3]["state_file"])
    with pytest.raises(MissingKey, match=r"no statistics for 'observation.images.table'"):
        read_pipeline(tmp_path)


def test_state_files_outside_the_folder_are_not_read(tmp_path):
    inside = tmp_path / "inside"
    inside.mkdir()
    content = saved(inside)
    name = content["steps"][3]["state_file"]
    (inside / name).rename(tmp_path / name)
    content["steps"][3]["state_file"] = f"../{name}"
    rewrite(inside, content)
    with pytest.raises(FileNotFoundError):
        read_pipeline(inside)


@pytest.mark.parametrize(
    "entry",
    [
        "a",
        ["to_batch_processor"],
        {"registry_name": ["to_batch_processor"]},
        {"registry_name": "to_batch_processor", "config": [1]},
        {"registry_name": "normalizer_processor", "config": {}, "state_file": 3},
    ],
)
def test_an_entry_of_the_wrong_kind_is_shown(tmp_path, entry):
    rewrite(tmp_path, {"name": "x", "steps": [entry]})
    with pytest.raises(
        ValueError, match=r"step 0 of .*policy_preprocessor.json reads .*expected \{'registry_"
    ):
        read_pipeline(tmp_path)


@pytest.mark.parametrize("settings", [{"norm_map": [1], "features": {}}, {"norm_map": {}, "features": [1]}])
def test_settings_of_the_wrong_kind_are_shown(tmp_path, settings):
    entry = {"registry_name": "normalizer_processor", "config": settings}
    rewrite(tmp_path, {"name": "x", "steps": [entry]})
    with pytest.raises(ValueError, match=r"reads \[1\]; expected|'norm_map': \[1\].*of the wrong kind"):
        read_pipeline(tmp_path)


def test_statistics_given_in_place_of_the_folders_must_vary(tmp_path):
    content = saved(tmp_path)
    flat = STATS | {"action": {"min": [0.0, 1.0], "max": [0.0, 2.0]}}
    with pytest.raises(ValueError, match=r"action\[0\]: constant, .*allow_constant=True"):
        read_pipeline(tmp_path, stats=flat)
    with pytest.raises(TypeError, match=r"stats is str; expected .*dataset\.stats"):
        read_pipeline(tmp_path, stats="dataset")
    (tmp_path / content["steps"][3]["state_file"]).unlink()  # not needed any more
    again = read_pipeline(tmp_path, stats=flat, allow_constant=True)
    assert again.stats["action"]["max"].tolist() == [0.0, 2.0]
