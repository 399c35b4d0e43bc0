import gymnasium
import numpy as np
import pytest
import torch

from minivla.training.environments import parse_env
from minivla.training.evaluation import Evaluation, evaluate, raw_batch, wilson
from tests.training.tiny import ACTION, STATE, TinyEnv, tiny


class Scripted(torch.nn.Module):
    """A policy that writes down what it is asked, and answers with the same action always."""

    def __init__(self, value=0.0, size=ACTION):
        super().__init__()
        self.value, self.size = value, size
        self.asked, self.resets = [], 0
        self.frozen = torch.nn.Dropout().eval()

    def act(self, raw):
        self.asked.append(raw)
        assert not self.training
        assert not torch.is_grad_enabled()
        return torch.full((len(raw["observation.state"]), self.size), float(self.value))

    def reset(self):
        self.resets += 1


def run(policy, env="tests/Tiny-v0", episodes=10, seed=0, **options):
    return evaluate(policy, env, episodes, seed, progress=False, **options)


def test_successes_lengths_and_interval():
    result = run(Scripted(), episodes=10, seed=3)
    assert result.successes == tuple(seed % 2 == 0 for seed in range(3, 13))  # once is enough
    assert result.lengths == tuple(seed % 5 + 1 for seed in range(3, 13))
    assert (result.success, result.episodes, result.clipped, result.video) == (0.5, 10, 0.0, None)
    assert (result.low, result.high) == wilson(5, 10)


def test_it_prints_as_promised():
    low, high = wilson(191, 200)
    assert str(Evaluation(0.955, low, high, 200, 0.0)) == "0.955 [0.917, 0.976] over 200 episodes"
    assert str(Evaluation(1.0, 0.5, 1.0, 3, 0.25)).endswith("over 3 episodes, 25.0% of actions clipped")


class Rewarding(TinyEnv):
    """Pays 1/8 at the first step, 2/8 at the second, …; the third pays nothing."""

    def step(self, action):
        observation, _, *ended, info = super().step(action)
        reward = np.float32(0.0 if self.elapsed == 3 else self.elapsed / 8)
        return observation, reward, *ended, info | {"elapsed": np.array([self.elapsed])}


def test_rewards_count_until_the_episode_is_over():
    results = [run(Scripted(), Rewarding, episodes=4, seed=0, batch_size=size) for size in (4, 1)]
    assert results[0] == results[1]  # whoever ended early was not paid while others went on
    assert results[0].lengths == (1, 2, 3, 4)
    assert results[0].max_rewards == (0.125, 0.25, 0.25, 0.5)
    assert results[0].sum_rewards == (0.125, 0.375, 0.375, 0.875)
    assert results[0].max_reward == 0.28125
    assert [info["elapsed"].item() for info in results[0].infos] == [1, 2, 3, 4]
    assert run(Scripted(), Rewarding, episodes=4, max_steps=1).max_rewards == (0.125,) * 4


def test_rewards_are_printed_where_they_say_more_than_success():
    assert "over 4 episodes, mean max reward 0.281" in str(run(Scripted(), Rewarding, episodes=4))
    assert "reward" not in str(run(Scripted(), episodes=4))
    assert "reward" not in str(Evaluation(0.5, 0.1, 0.9, 2, 0.0, max_reward=0.5, max_rewards=(0.0, 1.0)))


@pytest.mark.parametrize(
    ("successes", "trials", "expected"),
    [(0, 10, (0.0, 0.2775)), (10, 10, (0.7225, 1.0)), (1, 4, (0.0456, 0.6994)), (50, 100, (0.4038, 0.5962))],
)
def test_wilson_against_published_values(successes, trials, expected):
    assert wilson(successes, trials) == pytest.approx(expected, abs=5e-5)


def test_the_batch_keeps_its_size_and_finished_episodes_their_last_observation():
    policy = Scripted()
    run(policy, episodes=6, seed=0, batch_size=4)  # lengths 1 2 3 4 | 5 1
    sizes = [len(raw["observation.state"]) for raw in policy.asked]
    assert sizes == [4] * 4 + [2] * 5
    assert policy.asked[3]["observation.state"][:, 0].tolist() == [1, 2, 3, 3]
    assert policy.asked[0]["task"] == ["seed 0", "seed 1", "seed 2", "seed 3"]
    assert policy.asked[4]["task"] == ["seed 4", "seed 5"]
    assert policy.asked[0]["observation.state"].dtype == torch.float32
    assert policy.resets == 3  # before each round, and once afterwards


def test_the_batch_size_changes_nothing():
    results = [run(Scripted(), episodes=7, seed=2, batch_size=size) for size in (1, 3, 50)]
    assert results[0] == results[1] == results[2]


def test_actions_are_clipped_and_counted():
    envs = []

    def make():
        envs.append(TinyEnv())
        return envs[-1]

    class Halves(Scripted):
        def act(self, raw):
            action = super().act(raw)
            action[: len(action) // 2, 1] = -0.75  # only the first two of four are beyond the bounds
            return action

    result = run(Halves(0.5 + 1e-8), make, episodes=4, seed=0)  # lengths 1 2 3 4
    assert result.clipped == pytest.approx((1 + 2) / 10)
    assert [a.tolist() for a in envs[0].actions] == [[0.5, -0.5]]
    assert all(a.dtype == np.float32 and a.shape == (ACTION,) for env in envs for a in env.actions)


def test_the_policy_comes_back_as_it_was():
    policy = Scripted().train()
    policy.frozen.eval()
    torch.manual_seed(3)
    expected = torch.rand(3)
    torch.manual_seed(3)
    run(policy)
    assert torch.equal(torch.rand(3), expected)
    assert policy.training
    assert not policy.frozen.training


def test_a_policy_that_draws_noise_is_repeatable():
    class Noisy(Scripted):
        def act(self, raw):
            self.drawn = torch.randn(len(raw["observation.state"]), ACTION)
            return self.drawn

    one, two, other = Noisy(), Noisy(), Noisy()
    run(one, seed=1), run(two, seed=1), run(other, seed=2)
    assert torch.equal(one.drawn, two.drawn)
    assert not torch.equal(one.drawn, other.drawn)


def test_max_steps_ends_an_episode():
    assert run(Scripted(), max_steps=2, episodes=5).lengths == (1, 2, 2, 2, 2)
    assert run(Scripted(), lambda: gymnasium.wrappers.TimeLimit(TinyEnv(), 3), episodes=5).lengths[-1] == 3


@pytest.mark.parametrize("make", [lambda: gymnasium.make("tests/Tiny-v0"), TinyEnv])
def test_an_instance_will_do(make):
    env = make()
    assert run(Scripted(), env, episodes=6, seed=0) == run(Scripted(), episodes=6, seed=0)


def test_a_real_policy_acts():
    policy = tiny()
    result = run(policy, episodes=3)
    assert result.episodes == 3
    assert policy.training


@pytest.mark.parametrize(
    ("policy", "env", "error", "message"),
    [
        (Scripted(size=3), "tests/Tiny-v0", ValueError, r"shape \(4, 3\), the environments take \(4, 2\)"),
        (
            Scripted(float("nan")),
            "tests/Tiny-v0",
            ValueError,
            r"NaN or an infinite action, \[nan nan\], at step 0",
        ),
        (Scripted(float("inf")), "tests/Tiny-v0", ValueError, r"infinite action, \[inf inf\]"),
        (Scripted(), 7, TypeError, "env is a int; expected a gymnasium id"),
        (Scripted(), lambda: gymnasium.make("CartPole-v1"), TypeError, r"Discrete\(2\); expected a .*Box"),
        (Scripted(size=1), "Pendulum-v1", KeyError, "reports nothing in info, not 'is_success'"),
    ],
)
def test_bad_input(policy, env, error, message):
    with pytest.raises(error, match=message):
        run(policy, env, episodes=4)


@pytest.mark.parametrize("wrong", [{"episodes": 0}, {"seed": -1}, {"batch_size": 0}])
def test_impossible_numbers(wrong):
    with pytest.raises(ValueError, match="expected ≥ 1, ≥ 1 and ≥ 0"):
        run(Scripted(), **wrong)


@pytest.mark.parametrize("steps", [0, -3])
def test_an_episode_needs_a_step(steps):
    with pytest.raises(ValueError, match=f"max_steps={steps}; expected at least 1, or None"):
        run(Scripted(), max_steps=steps)


def test_a_video_shows_the_first_episodes(tmp_path):
    from PIL import Image

    path = tmp_path / "films" / "film.gif"
    result = run(Scripted(), episodes=8, seed=0, batch_size=4, video=path)
    assert result.video == path
    with Image.open(path) as film:
        assert film.n_frames == 6  # the longest of the first six episodes: five steps and the start
        assert film.info["duration"] == 50
        assert film.size == (3 * (31 * 6 + 8), 2 * (21 * 6 + 8))  # three by two, enlarged six times, framed
        film.seek(5)
        last = np.asarray(film.convert("RGB")).astype(int)
    tile = last.shape[1] // 3
    green, red = np.array([0, 158, 115]), np.array([213, 94, 0])
    assert abs(last[1, 1] - green).max() < 30  # seed 0 succeeded
    assert abs(last[1, tile + 1] - red).max() < 30  # seed 1 did not
    assert [f.name for f in path.parent.iterdir()] == ["film.gif"]


def test_a_camera_is_filmed_where_nothing_renders(tmp_path):
    class Seeing(TinyEnv):
        def _observe(self):
            return super()._observe() | {"observation.images.eye": np.full((8, 8, 3), 200, np.uint8)}

    assert run(Scripted(), Seeing, video=tmp_path / "a.gif").video.exists()
    with pytest.raises(ValueError, match="nor has it a camera"):
        run(Scripted(), TinyEnv, video=tmp_path / "b.gif")
    assert not (tmp_path / "b.gif").exists()


def test_mp4_when_ffmpeg_is_there(tmp_path, monkeypatch):
    import shutil

    if shutil.which("ffmpeg"):
        result = run(Scripted(), episodes=2, video=tmp_path / "a.mp4")
        assert result.video.read_bytes()[4:8] == b"ftyp"
    monkeypatch.setattr("shutil.which", lambda name: None)
    with pytest.raises(ValueError, match=r"needs the ffmpeg program.*give a \.gif"):
        run(Scripted(), video=tmp_path / "b.mp4")
    with pytest.raises(ValueError, match=r"expected a name ending in \.gif or \.mp4"):
        run(Scripted(), video="film.avi")


def test_observations_of_other_environments_get_lerobots_names():
    class One:
        task = None

        def __init__(self, observation):
            self.observation = observation

    picture = np.zeros((4, 4, 3), np.uint8)
    several = {"pixels": picture, "agent_pos": np.zeros(2), "environment_state": np.zeros(1)}
    batch = raw_batch([One(several)] * 2)
    assert {key: (tuple(v.shape), v.dtype) for key, v in batch.items()} == {
        "observation.image": ((2, 4, 4, 3), torch.uint8),
        "observation.state": ((2, 2), torch.float32),
        "observation.environment_state": ((2, 1), torch.float32),
    }
    assert list(raw_batch([One({"pixels": {"top": picture}})])) == ["observation.images.top"]
    assert list(raw_batch([One(np.zeros(STATE, np.float32))])) == ["observation.state"]


def test_names_of_environments():
    assert parse_env("CartPole-v1") == ("CartPole-v1", {})
    assert parse_env("minivla/Tabletop-v0?task=push") == ("minivla/Tabletop-v0", {"task": "push"})
    name, arguments = parse_env("tabletop:reach?cameras=table,wrist&environment_state=true")
    assert (name, arguments) == (
        "minivla/Tabletop-v0",
        {"task": "reach", "cameras": ("table", "wrist"), "environment_state": True},
    )
