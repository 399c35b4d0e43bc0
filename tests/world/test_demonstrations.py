"""Datasets of demonstrations: in memory, on disk, and that the two are the same."""

import time
from pathlib import Path

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader

import minivla.world as world
from minivla.world.demonstrations import Demonstrations

WINDOWS = {"action": [i / 10 for i in range(5)], "observation.state": [-0.1, 0.0]}


@pytest.fixture(scope="module")
def small() -> Demonstrations:
    return world.demonstrations("pick_place", 3, seed=1, environment_state=True)


def test_items(small: Demonstrations) -> None:
    item = small[int(small.starts[1])]
    shapes = {key: (tuple(v.shape), v.dtype) for key, v in item.items() if isinstance(v, torch.Tensor)}
    scalar = ((), torch.int64)
    assert shapes == {
        "observation.state": ((3,), torch.float32),
        "observation.environment_state": ((8,), torch.float32),
        "observation.images.table": ((3, 64, 64), torch.float32),
        "observation.images.wrist": ((3, 64, 64), torch.float32),
        "action": ((3,), torch.float32),
        "timestamp": ((), torch.float32),
        **dict.fromkeys(("frame_index", "episode_index", "index", "task_index"), scalar),
    }
    assert (item["frame_index"], item["episode_index"], item["index"]) == (0, 1, small.starts[1])
    assert item["task"] == small.tasks[item["task_index"]]
    assert 0.5 < item["observation.images.table"].max() <= 1


def test_frames_are_those_of_the_environment(small: Demonstrations) -> None:
    again = world.demonstrations("pick_place", 3, seed=1, environment_state=True)
    other = world.demonstrations("pick_place", 3, seed=2, environment_state=True)
    for key, column in small.columns.items():
        np.testing.assert_array_equal(column, again.columns[key])
    assert other.columns["action"].shape != small.columns["action"].shape or (
        (other.columns["action"] != small.columns["action"]).any()
    )


def test_episodes_end_by_letting_go(small: Demonstrations) -> None:
    for start, stop in small.episodes:
        assert small[start]["frame_index"] == 0
        assert small[stop - 1]["frame_index"] == stop - start - 1
        grips = small.columns["action"][start:stop, 2]
        assert grips[-1] < 0
        assert (grips > 0).any()


def test_windows_stop_at_the_ends_of_an_episode(small: Demonstrations) -> None:
    windowed = small.windows(WINDOWS)
    assert windowed.columns["observation.images.table"] is small.columns["observation.images.table"]
    start, stop = small.episodes[1]
    last, first = windowed[stop - 2], windowed[start]
    assert last["action_is_pad"].tolist() == [False, False, True, True, True]
    assert last["action_is_pad"].dtype == torch.bool
    torch.testing.assert_close(last["action"][1:], small[stop - 1]["action"].expand(4, 3))
    assert first["observation.state_is_pad"].tolist() == [True, False]
    torch.testing.assert_close(first["observation.state"], small[start]["observation.state"].expand(2, 3))
    middle = windowed[start + 3]
    assert not middle["action_is_pad"].any()
    np.testing.assert_array_equal(middle["action"], small.columns["action"][start + 3 : start + 8])
    assert "action_is_pad" not in small[start]


def test_a_window_over_a_camera(small: Demonstrations) -> None:
    item = small.windows({"observation.images.table": [-0.2, 0.0]})[5]
    assert item["observation.images.table"].shape == (2, 3, 64, 64)
    torch.testing.assert_close(item["observation.images.table"][0], small[3]["observation.images.table"])


def test_batches_equal_items(small: Demonstrations) -> None:
    windowed = small.windows(WINDOWS)
    batch = next(iter(DataLoader(windowed, batch_size=4)))
    for i in range(4):
        for key, value in windowed[i].items():
            assert batch[key][i] == value if isinstance(value, str) else torch.equal(batch[key][i], value), (
                key
            )


@pytest.mark.parametrize(
    ("call", "error", "says"),
    [
        (lambda d: d.windows({"actions": [0.0]}), KeyError, "'actions'.*action"),
        (lambda d: d.windows({"action": [0.05]}), ValueError, "between two frames"),
        (lambda d: d[len(d)], IndexError, "expected"),
        (lambda d: world.demonstrations("pick_place", 0, 0), ValueError, "episodes=0"),
        (lambda d: world.demonstrations("pick_place", 1, 0, noise=1.0), ValueError, "noise=1.0"),
        (lambda d: world.demonstrations("juggle", 1, 0), ValueError, "'juggle'.*pick_place"),
    ],
)
def test_bad_input(small: Demonstrations, call, error: type[Exception], says: str) -> None:
    with pytest.raises(error, match=says):
        call(small)


def test_noise_disturbs_what_is_done_not_what_is_recorded() -> None:
    quiet = world.demonstrations("reach", 20, 0, cameras=(), noise=0.0)
    noisy = world.demonstrations("reach", 20, 0, cameras=(), noise=0.3)
    assert drift(quiet) < 1e-6
    assert drift(noisy) > 0.002
    assert np.abs(noisy.columns["action"]).max() <= 1


def drift(dataset: Demonstrations) -> float:
    """How far, on average, a recorded step ends from where its action says."""
    state, action = dataset.columns["observation.state"][:, :2], dataset.columns["action"][:, :2]
    same = np.diff(dataset.columns["episode_index"]) == 0
    return float(np.abs(state[1:] - state[:-1] - 0.04 * action[:-1])[same].mean())


def test_splits_reach_the_dataset() -> None:
    train, test = (
        world.demonstrations("reach", 40, 0, cameras=(), split=split) for split in ("train", "test")
    )
    assert set(train.tasks) != set(test.tasks)


@pytest.mark.parametrize("body", ["arm2", "bimanual"])
def test_other_bodies(body: str) -> None:
    dataset = world.demonstrations("push", 2, 0, embodiment=body, size=32)
    size = len(world.EMBODIMENTS[body].action_low)
    assert dataset.columns["action"].shape[1] == size == dataset.features["action"]["shape"][0]
    space = world.Tabletop("push", body).action_space
    assert all(space.contains(action) for action in dataset.columns["action"])


@pytest.mark.slow
def test_eight_hundred_episodes_in_half_a_minute() -> None:
    start = time.process_time()
    world.demonstrations("pick_place", 800, 0)
    assert time.process_time() - start < 30


@pytest.fixture(scope="module")
def recorded(tmp_path_factory: pytest.TempPathFactory):
    pytest.importorskip("lerobot")
    root = tmp_path_factory.mktemp("datasets") / "tabletop"
    return world.record(
        "pick_place", 3, 1, root, environment_state=True, delta_timestamps=WINDOWS, progress=False
    )


def test_recorded_items_are_those_in_memory(small: Demonstrations, recorded) -> None:
    windowed = small.windows(WINDOWS)
    assert len(recorded) == len(windowed)
    assert recorded.fps == windowed.fps
    for index in (0, 1, int(small.starts[1]) - 1, int(small.starts[1]), len(small) - 1):
        ours, theirs = windowed[index], recorded[index]
        assert ours.keys() == theirs.keys()
        for key, value in theirs.items():
            if isinstance(value, str):
                assert ours[key] == value
                continue
            assert (ours[key].dtype, ours[key].shape) == (value.dtype, value.shape), key
            film = 0.03 if "images" in key else 0  # mean error: film is lossy
            assert (ours[key].float() - value.float()).abs().mean() <= film, key


def test_recorded_features_and_statistics_are_those_in_memory(small: Demonstrations, recorded) -> None:
    theirs = {key: {**feature} for key, feature in recorded.meta.features.items()}
    for feature in theirs.values():
        feature.pop("info", None)
    assert theirs == small.features
    for key, table in recorded.meta.stats.items():
        for name, value in table.items():
            np.testing.assert_allclose(
                small.stats[key][name], value, rtol=1e-6, atol=1e-9, err_msg=f"{key} {name}"
            )


def test_nothing_half_written_is_left(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    pytest.importorskip("lerobot")
    from lerobot.datasets import LeRobotDataset

    def fail(self: object, **options: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(LeRobotDataset, "save_episode", fail)
    with pytest.raises(OSError, match="disk full"):
        world.record("reach", 2, 0, tmp_path / "new", cameras=(), progress=False)
    assert list(tmp_path.iterdir()) == []


def test_an_existing_folder_is_not_replaced(tmp_path: Path) -> None:
    with pytest.raises(FileExistsError, match="overwrite=True"):
        world.record("reach", 1, 0, tmp_path)
