"""PushT, the real one: any Diffusion or VQ-BeT folder runs in it, as LeRobot's evaluation runs it."""

from __future__ import annotations

import math
import sys
from pathlib import Path
from typing import Any

import gymnasium
import numpy as np
import pytest
import torch
from torch import Tensor

import minivla
from minivla.data.features import FeatureType, MissingKey, PolicyFeature
from minivla.policies.diffusion import DiffusionConfig, DiffusionPolicy
from minivla.policies.vqbet import VQBeT, VQBeTConfig
from minivla.training.__main__ import main
from minivla.training.batches import EPISODES, preserved_rng, seed_all
from minivla.training.environments import fitting, parse_env
from tests.parity import their_features
from tests.policies import test_diffusion_folders as folders
from tests.policies import test_vqbet

PUSHT = "gym_pusht/PushT-v0"
IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
CORNERS = "observation.environment_state"
SEED, STEPS = 20, 11  # the T lies partly on the goal in both episodes; one chunk ends, another begins
PUBLISHED = folders.TINY | {"horizon": 16, "n_action_steps": 8, "num_train_timesteps": 100}
DIFFUSION = PUBLISHED | {"num_train_timesteps": 5}
VQBET = test_vqbet.TINY | {"compact_vision": False, "crop_shape": (84, 84), "use_group_norm": True}
# Rounded from lerobot/pusht.
STATS = {
    IMAGE: {"mean": torch.tensor([0.97, 0.97, 0.97]).view(3, 1, 1), "std": torch.full((3, 1, 1), 0.13)},
    STATE: {"min": torch.tensor([13.5, 32.9]), "max": torch.tensor([496.1, 511.0])},
    ACTION: {"min": torch.tensor([12.0, 25.0]), "max": torch.tensor([511.0, 511.0])},
    CORNERS: {"min": torch.full((16,), 0.0), "max": torch.full((16,), 512.0)},
}


def features(camera: str = IMAGE, size: tuple[int, int] = (96, 96)) -> dict[str, PolicyFeature]:
    return {
        camera: PolicyFeature(FeatureType.VISUAL, (3, *size)),
        STATE: PolicyFeature(FeatureType.STATE, (2,)),
    }


def tiny(kind: str, inputs: dict[str, PolicyFeature] | None = None, **settings: Any) -> Any:
    """A policy with random weights."""
    torch.manual_seed(0)
    table: dict[str, Any] = {
        "input_features": inputs or features(),
        "output_features": {ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
    }
    stats = STATS | {key: STATS[IMAGE] for key in table["input_features"] if key not in STATS}
    if kind == "diffusion":
        return DiffusionPolicy(DiffusionConfig(**table, **DIFFUSION | settings), stats)
    policy = VQBeT(VQBeTConfig(**table, **VQBET | settings), stats)
    policy.vqvae.discretized.fill_(True)
    return policy


def run(policy: Any, env: str = PUSHT, episodes: int = 2, **options: Any) -> Any:
    return minivla.evaluate(policy, env, episodes, SEED, progress=False, **{"max_steps": STEPS} | options)


def watch(policy: Any) -> list[tuple[dict[str, Any], dict[str, Tensor], Tensor]]:
    """What the policy sees, raw and normalised, and does, from now on."""
    seen = []

    def act(raw: dict[str, Any]) -> Tensor:
        batch = policy.preprocess(raw, history=False)
        action = policy.postprocess(policy.select_action(batch))
        seen.append((raw, batch, action))
        return action

    policy.act = act
    return seen


def coverage(pose: np.ndarray) -> float:
    """How much of the goal a T at x, y, angle covers."""
    from shapely import affinity, geometry

    def placed(x: float, y: float, angle: float) -> Any:
        letter = geometry.box(-60, 0, 60, 30).union(geometry.box(-15, 30, 15, 120))
        turned = affinity.rotate(letter, angle, origin=(0, 0), use_radians=True)
        return affinity.translate(turned, x, y)

    goal = placed(256, 256, math.pi / 4)
    return goal.intersection(placed(*pose)).area / goal.area


def replay(seed: int, actions: np.ndarray) -> tuple[list[np.ndarray], list[np.ndarray], list[np.ndarray]]:
    """An episode without us: pictures and agent's positions before each action, the T's poses after."""
    env = gymnasium.make(PUSHT, obs_type="pixels_agent_pos", disable_env_checker=True)
    observation, _ = env.reset(seed=seed)
    pictures, positions, poses = [], [], []
    for action in actions:
        pictures.append(observation["pixels"].copy())
        positions.append(observation["agent_pos"])
        observation, _, _, _, info = env.step(action)
        poses.append(info["block_pose"])
    return pictures, positions, poses


@pytest.mark.parametrize("kind", ["diffusion", "vqbet"])
def test_a_folder_runs_and_sees_what_the_environment_shows(kind, tmp_path):
    policy = minivla.load(tiny(kind).save(tmp_path / kind))
    seen = watch(policy)
    result = run(policy)
    assert result.lengths == (STEPS, STEPS) and result.successes == (False, False)
    for episode in range(2):
        actions = np.stack([np.clip(action[episode].numpy(), 0, 512) for _, _, action in seen])
        pictures, positions, poses = replay(SEED + episode, actions)
        shown = torch.from_numpy(np.stack(pictures))
        assert shown.shape == (STEPS, 96, 96, 3)
        assert torch.equal(torch.stack([raw[IMAGE][episode] for raw, _, _ in seen]), shown)
        image = shown.movedim(-1, 1) / 255
        if kind == "diffusion":  # VQ-BeT leaves pictures as they are
            image = (image - STATS[IMAGE]["mean"]) / STATS[IMAGE]["std"]
        torch.testing.assert_close(torch.stack([batch[IMAGE][episode] for _, batch, _ in seen]), image)
        low, high = STATS[STATE]["min"], STATS[STATE]["max"]
        state = 2 * (torch.tensor(np.stack(positions)).float() - low) / (high - low) - 1
        torch.testing.assert_close(torch.stack([batch[STATE][episode] for _, batch, _ in seen]), state)

        covered = np.array([coverage(pose) for pose in poses])
        assert covered.max() > 0.05
        assert result.max_rewards[episode] == pytest.approx(covered.max() / 0.95)
        assert result.sum_rewards[episode] == pytest.approx(covered.sum() / 0.95)
        assert result.infos[episode]["coverage"] == pytest.approx(covered[-1])
    assert result.max_reward == pytest.approx(np.mean(result.max_rewards))


def lerobots(kind: str, folder: Path) -> tuple[Any, Any]:
    """A policy of LeRobot's with its processors, saved by LeRobot."""
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig as TheirConfig
    from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy

    if kind == "diffusion":
        policy, _ = folders.make_upstream(**DIFFUSION)
    else:
        inputs, outputs = their_features(features(), {ACTION: PolicyFeature(FeatureType.ACTION, (2,))})
        settings = {key: value for key, value in VQBET.items() if key != "compact_vision"}
        torch.manual_seed(0)
        config = TheirConfig(input_features=inputs, output_features=outputs, device="cpu", **settings)
        policy = VQBeTPolicy(config)
        policy.vqbet.action_head.vqvae_model.discretized.fill_(True)
    processors = make_pre_post_processors(policy_cfg=policy.config, dataset_stats=STATS)
    folders.save_upstream(policy, processors, folder)
    return policy, processors


def lerobots_evaluation(policy: Any, processors: Any) -> tuple[list[dict[str, Any]], list[Any]]:
    """(its figures for each episode, what the policy saw and did at each step), from our random numbers."""
    from lerobot.envs import make_env, make_env_pre_post_processors
    from lerobot.envs.configs import PushtEnv
    from lerobot.scripts.lerobot_eval import eval_policy

    config = PushtEnv(episode_length=STEPS)
    env = make_env(config, n_envs=2)["pusht"][0]
    select, seen = policy.select_action, []

    def select_action(batch: dict[str, Any]) -> Tensor:
        action = select(batch)
        seen.append((batch, processors[1](action)))
        return action

    policy.select_action = select_action
    around = make_env_pre_post_processors(config, policy.config)
    with preserved_rng():
        seed_all(EPISODES, SEED, 0)
        with pytest.warns(UserWarning, match="does not have 'task_description'"):
            info = eval_policy(env, policy, *around, *processors, n_episodes=2, start_seed=SEED)
    env.close()
    return info["per_episode"], seen


@pytest.mark.parametrize("kind", ["diffusion", "vqbet"])
def test_it_is_evaluated_as_lerobot_evaluates_it(kind, tmp_path):
    theirs, processors = lerobots(kind, tmp_path / kind)
    ours = minivla.load(tmp_path / kind)
    seen = watch(ours)
    result = run(ours, f"{PUSHT}?max_episode_steps={STEPS}", max_steps=None)
    episodes, expected = lerobots_evaluation(theirs, processors)
    assert len(seen) == len(expected) == STEPS
    for (_, batch, action), (their_batch, their_action) in zip(seen, expected, strict=True):
        assert batch[IMAGE].shape == (2, 3, 96, 96)
        torch.testing.assert_close(batch[IMAGE], their_batch[IMAGE], rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(batch[STATE], their_batch[STATE], rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(action, their_action, rtol=1e-4, atol=1e-2)  # pixels, out of 512
    assert [episode["seed"] for episode in episodes] == [SEED, SEED + 1]
    assert result.clipped == 0
    assert result.max_rewards == pytest.approx([episode["max_reward"] for episode in episodes], abs=1e-4)
    assert result.sum_rewards == pytest.approx([episode["sum_reward"] for episode in episodes], abs=1e-3)
    assert result.successes == tuple(bool(episode["success"]) for episode in episodes)


def test_the_published_folder_would_run(tmp_path, monkeypatch):
    monkeypatch.setattr(folders, "statistics", lambda: STATS)
    theirs, _ = folders.make_upstream(**PUBLISHED)
    policy = minivla.load(folders.legacy(theirs, tmp_path / "diffusion_pusht"))
    assert (policy.config.noise_scheduler_type, policy.config.num_inference_steps) == ("DDPM", None)
    seen = watch(policy)
    result = run(policy, episodes=1)
    assert result.lengths == (STEPS,)
    assert result.max_reward > 0.05
    actions = torch.cat([action for _, _, action in seen])
    assert (actions.amin(0) >= STATS[ACTION]["min"] - 1e-3).all()
    assert (actions.amax(0) <= STATS[ACTION]["max"] + 1e-3).all()
    assert actions.std() > 10


def test_pictures_have_the_size_of_the_policys_camera():
    policy = tiny("diffusion", features(size=(88, 120)))
    seen = watch(policy)
    run(policy, episodes=1, max_steps=1)
    assert seen[0][0][IMAGE].shape == (1, 88, 120, 3)
    with pytest.raises(ValueError, match="got an image of 88 x 96 pixels"):
        run(policy, f"{PUSHT}?observation_width=96", episodes=1)


def test_a_policy_of_corners_gets_corners():
    inputs = {
        CORNERS: PolicyFeature(FeatureType.ENV, (16,)),
        STATE: PolicyFeature(FeatureType.STATE, (2,)),
    }
    policy = tiny("diffusion", inputs, crop_shape=None)
    seen = watch(policy)
    result = run(policy, episodes=1, max_steps=2)
    assert sorted(seen[0][0]) == [CORNERS, STATE]
    corners = seen[1][0][CORNERS][0].view(8, 2)
    pose = torch.from_numpy(result.infos[0]["block_pose"]).float()
    assert (corners - pose[:2]).norm(dim=1).max() < 140  # around the T, and not anywhere
    assert (corners[0] - corners[1]).norm() == pytest.approx(120, abs=1e-2)  # its bar


def test_a_camera_of_another_name_is_refused_until_it_is_renamed():
    policy = tiny("diffusion", features("observation.images.top", (88, 120)))
    with pytest.raises(MissingKey, match=r"lacks observation\.images\.top") as error:
        run(policy, episodes=1)
    assert "rename = {'observation.image': 'observation.images.top'}" in str(error.value)
    assert str(error.value).endswith("policy.preprocessor.rename_map.update(rename)")
    policy.preprocessor.rename_map.update({IMAGE: "observation.images.top"})
    assert run(policy, episodes=1, max_steps=1).lengths == (1,)


def test_of_several_cameras_the_one_that_pusht_feeds_decides_the_size():
    two = features("observation.images.top", (50, 60)) | features(size=(70, 80))
    assert (
        fitting(PUSHT, tiny("diffusion", two, use_separate_rgb_encoder_per_camera=True, crop_shape=None))[
            "observation_height"
        ]
        == 70
    )


def test_other_environments_are_made_as_they_are():
    assert fitting("minivla/Tabletop-v0", tiny("diffusion")) == {}
    assert fitting(PUSHT, None)["obs_type"] == "pixels_agent_pos"


def test_the_package_is_imported_when_its_environment_is_named(monkeypatch):
    monkeypatch.delitem(gymnasium.registry, PUSHT, raising=False)
    monkeypatch.delitem(sys.modules, "gym_pusht", raising=False)
    assert parse_env(f"{PUSHT}?obs_type=state") == (PUSHT, {"obs_type": "state"})
    assert PUSHT in gymnasium.registry


def test_a_package_that_is_not_there_is_named_with_its_command(monkeypatch):
    monkeypatch.delitem(gymnasium.registry, PUSHT, raising=False)
    monkeypatch.setitem(sys.modules, "gym_pusht", None)
    with pytest.raises(ModuleNotFoundError, match=r"not installed; pip install 'minivla\[envs\]'"):
        run(tiny("diffusion"))
    with pytest.raises(ModuleNotFoundError, match=r"package 'gym_nowhere', .* pip install gym-nowhere"):
        parse_env("gym_nowhere/Nothing-v0")


def test_the_command_line_and_the_film(tmp_path, capsys):
    folder = tiny("diffusion").save(tmp_path / "policy")
    words = ["evaluate", "--policy", str(folder), "--env", PUSHT, "--episodes", "1", "--seed", str(SEED)]
    words += ["--max-steps", "2", "--no-progress", "--device", "cpu", "--video", str(tmp_path / "film.gif")]
    assert main(words) == 0
    assert "over 1 episodes, mean max reward 0." in capsys.readouterr().out
    from PIL import Image

    with Image.open(tmp_path / "film.gif") as film:
        assert film.n_frames == 3 and film.info["duration"] == 100
        assert film.size == (200, 200)  # drawn at 384, halved, framed
