"""The environment: gymnasium's rules, determinism, what it refuses, how things move."""

import copy
import hashlib
import json
from pathlib import Path

import gymnasium
import numpy as np
import pytest
from gymnasium.utils.env_checker import check_env
from hypothesis import given, settings
from hypothesis import strategies as st

import minivla.world as world
from minivla.world import spec
from minivla.world.embodiments import joints_of, tip_of
from minivla.world.render import FINGERS
from minivla.world.scene import distance

PAIRS = [(task, body) for task in world.TASKS for body in world.EMBODIMENTS]
HASHES = Path(__file__).parent / "frames.json"


@pytest.mark.filterwarnings("ignore:.*symmetric and normalized space")  # arm2's actions are angles
@pytest.mark.parametrize(("task", "body"), PAIRS)
def test_gymnasium_accepts_it(task: str, body: str) -> None:
    env = gymnasium.make("minivla/Tabletop-v0", task=task, embodiment=body, environment_state=True)
    check_env(env.unwrapped, skip_render_check=True)


def test_ids_and_rendering() -> None:
    env = gymnasium.make("minivla.world:minivla/Tabletop-v0", render_mode="rgb_array", size=32)
    check_env(env.unwrapped)
    env.reset(seed=0)
    assert env.render().shape == (384, 384, 3)


def frames(task: str, body: str, size: int = 64) -> np.ndarray:
    """The pictures of both cameras after each of four expert steps, (8, size, size, 3)."""
    env = world.Tabletop(task, body, size=size)
    env.reset(seed=7)
    act = world.expert(env)
    seen = [env.step(act())[0] for _ in range(4)]
    return np.stack([o[f"observation.images.{camera}"] for o in seen for camera in ("table", "wrist")])


def hash_of(image: np.ndarray) -> str:
    return hashlib.sha256(np.ascontiguousarray(image).tobytes()).hexdigest()[:16]


def stored_frames() -> dict[str, str]:
    """Twenty frames: the last of each camera for nine pairs at 64 pixels, and two at 224."""
    found = {}
    for task, body in [*PAIRS[:6], *PAIRS[9:12]]:
        found |= {
            f"{task} {body} {camera}": hash_of(f)
            for camera, f in zip("tw", frames(task, body)[-2:], strict=True)
        }
    large = frames("sort", "arm2", 224)[-2:]
    return found | {f"sort arm2 {camera} 224": hash_of(f) for camera, f in zip("tw", large, strict=True)}


def test_pictures_are_the_stored_ones() -> None:
    # After a change that is meant to be seen: python -m tests.world.test_tabletop
    stored = json.loads(HASHES.read_text())
    assert len(stored) == 20
    assert stored_frames() == stored


@pytest.mark.parametrize(("task", "body"), PAIRS)
def test_same_seed_same_episode(task: str, body: str) -> None:
    one, other = world.Tabletop(task, body, size=32), world.Tabletop(task, body, size=32)
    for env in (one, other):
        env.reset(seed=3)
    start, _ = one.reset(seed=5)
    again, _ = other.reset(seed=5)
    for _ in range(10):
        for key in start:
            np.testing.assert_array_equal(start[key], again[key])
        action = one.action_space.sample()
        start, again = one.step(action)[0], other.step(action)[0]
    assert any((one.reset(seed=6)[0][key] != again[key]).any() for key in again)


@pytest.mark.parametrize("size", [64, 96, 224])
def test_a_picture_shows_things_where_they_are(size: int) -> None:
    env = world.Tabletop(size=size)
    observation, _ = env.reset(seed=1)
    image = observation["observation.images.table"].astype(int)
    for block in env.scene.blocks:
        column, row = int(block.position[0] * size), int((1 - block.position[1]) * size)
        red, green, blue = image[row, column]
        brightest = {
            0: red > max(green, blue),
            1: blue > max(red, green),
            2: green > max(red, blue),
            3: red > blue + 100,
        }
        assert brightest[block.colour], (block, image[row, column])


def test_large_and_small_pictures_agree() -> None:
    means = {
        s: frames("sort", "arm2", s).reshape(8, 16, s // 16, 16, s // 16, 3).mean((2, 4))
        for s in (64, 96, 224)
    }
    for size in (96, 224):
        assert abs(means[size] - means[64]).mean() < 4, size


def test_each_wrist_camera_looks_at_its_gripper() -> None:
    cameras = ("table", "wrist", "wrist_right")
    env = world.Tabletop("push", "bimanual", cameras=cameras)
    observation, _ = env.reset(seed=3)
    for index, camera in enumerate(cameras[1:]):
        window = observation[f"observation.images.{camera}"][24:40].reshape(-1, 3).tolist()
        assert list(FINGERS[index]) in window
        assert list(FINGERS[1 - index]) not in window


def test_environment_state_starts_with_what_the_instruction_names() -> None:
    env = world.Tabletop("sort", environment_state=True)
    observation, info = env.reset(seed=2)
    named = [env.scene.blocks[0].position, env.scene.goals[0].position]
    np.testing.assert_allclose(
        observation["observation.environment_state"][:4], np.concatenate(named), atol=1e-6
    )
    colours = [spec.COLOURS[env.scene.blocks[0].colour], spec.COLOURS[env.scene.goals[0].colour]]
    assert [word for word in info["subtask"].split() if word in spec.COLOURS] == colours


def test_subtask_moves_on_in_sort() -> None:
    env = world.Tabletop("sort", cameras=())
    _, info = env.reset(seed=4)
    act, subtasks = world.expert(env), []
    while not info["is_success"]:
        subtasks.append(info["subtask"])
        *_, info = env.step(act())
    assert ", then ".join(dict.fromkeys(subtasks)) == info["task"]


@pytest.mark.parametrize(
    ("action", "error", "says"),
    [
        (np.zeros(2, np.float32), ValueError, r"shape \(2,\).*\(3,\): \(dx, dy, grip\)"),
        (np.zeros((1, 3), np.float32), ValueError, "not a batch or a chunk"),
        (np.array([0, np.nan, 0], np.float32), ValueError, "NaN"),
        (np.array([0, np.inf, 0], np.float32), ValueError, "infinity"),
        (np.zeros(3, np.int64), TypeError, "int64.*float32"),
        (np.array(["a", "b", "c"]), TypeError, "float"),
    ],
)
def test_wrong_actions_are_refused(action: np.ndarray, error: type[Exception], says: str) -> None:
    env = world.Tabletop(cameras=())
    env.reset(seed=0)
    with pytest.raises(error, match=says):
        env.step(action)


def test_actions_beyond_the_bounds_are_clipped() -> None:
    one, other = world.Tabletop(cameras=()), world.Tabletop(cameras=())
    for env in (one, other):
        env.reset(seed=0)
    state = one.step(np.array([9, -9, 9], np.float32))[0]["observation.state"]
    np.testing.assert_array_equal(state, other.step(np.array([1, -1, 1], np.float32))[0]["observation.state"])


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"task": "dance"}, "task 'dance'.*pick_place"),
        ({"task": ["reach"]}, r"task \['reach'\].*pick_place"),
        ({"embodiment": "legs"}, "embodiment 'legs'.*cartesian"),
        ({"split": "validation"}, "split 'validation'.*train"),
        ({"cameras": ("front",)}, "camera 'front'.*table"),
        ({"cameras": ("wrist_right",)}, "one gripper"),
        ({"render_mode": "ansi"}, "render_mode 'ansi'.*rgb_array"),
        ({"size": 4}, "size.*4"),
        ({"max_steps": 0}, "max_steps.*0"),
    ],
)
def test_unknown_names_list_the_known_ones(wrong: dict, says: str) -> None:
    with pytest.raises(ValueError, match=says):
        world.Tabletop(**wrong)


@pytest.mark.parametrize(
    ("wrong", "says"),
    [
        ({"size": "64"}, "size='64'; expected a whole number"),
        ({"size": None}, "size=None; expected"),
        ({"size": 64.0}, "size=64.0; expected"),
        ({"max_steps": "9"}, "max_steps='9'; expected"),
        ({"cameras": "table"}, r"cameras='table'.*Write cameras=\('table',\)"),
    ],
)
def test_arguments_of_the_wrong_kind(wrong: dict, says: str) -> None:
    with pytest.raises(TypeError, match=says):
        world.Tabletop(**wrong)


def test_stepping_before_reset_says_so() -> None:
    with pytest.raises(RuntimeError, match="reset"):
        world.Tabletop().step(np.zeros(3, np.float32))


def test_truncation() -> None:
    env = world.Tabletop(max_steps=3, cameras=())
    env.reset(seed=0)
    ends = [env.step(np.zeros(3, np.float32))[2:4] for _ in range(3)]
    assert ends == [(False, False), (False, False), (False, True)]


actions = st.lists(st.tuples(*[st.floats(-4, 4, width=32)] * 6), min_size=1, max_size=40)


@settings(max_examples=40, deadline=None)
@given(pair=st.sampled_from(PAIRS), seed=st.integers(0, 99), path=actions)
def test_nothing_leaves_the_table_or_enters_the_obstacle(
    pair: tuple[str, str], seed: int, path: list
) -> None:
    env = world.Tabletop(*pair, cameras=())
    env.reset(seed=seed)
    for action in path:
        before = copy.deepcopy(env.scene)
        observation, *_ = env.step(np.array(action[: env.action_space.shape[0]], np.float32))
        assert env.observation_space.contains(observation)
        for gripper, was in zip(env.scene.grippers, before.grippers, strict=True):
            assert (gripper.position >= gripper.low - 1e-9).all()
            assert (gripper.position <= gripper.high + 1e-9).all()
            assert 0 <= gripper.opening <= 1
            assert abs(gripper.opening - was.opening) <= spec.GRIP_STEP + 1e-9
            if env.scene.obstacle is not None:
                assert distance(gripper.position, env.scene.obstacle) > spec.OBSTACLE_RADIUS
        for block in env.scene.blocks:
            assert (block.position >= spec.EDGE - 1e-9).all()
            assert (block.position <= 1 - spec.EDGE + 1e-9).all()


@given(x=st.floats(0.05, 0.95), y=st.floats(0.1, 0.95))
def test_inverse_kinematics_undoes_forward(x: float, y: float) -> None:
    joints = joints_of(np.array([x, y]))
    np.testing.assert_allclose(tip_of(joints), [x, y], atol=1e-9)
    arm = world.EMBODIMENTS["arm2"]
    assert (joints >= arm.action_low[:2]).all()
    assert (joints <= arm.action_high[:2]).all()


def test_fingers_that_close_on_a_block_lift_it_and_let_go() -> None:
    env = world.Tabletop(cameras=())
    env.reset(seed=0)
    scene = env.scene
    scene.grippers[0].position = scene.blocks[1].position + np.array([0.03, 0.02])
    for _ in range(3):
        env.step(np.array([0, 0, 1], np.float32))
    assert scene.grippers[0].holds == 1
    assert scene.grippers[0].opening == spec.HOLDING
    start = scene.grippers[0].position.copy()
    env.step(np.array([0.5, -0.5, 1], np.float32))
    assert distance(scene.blocks[1].position, start) > 0.02
    np.testing.assert_array_equal(scene.blocks[1].position, scene.grippers[0].position)
    env.step(np.array([0, 0, -1], np.float32))
    left = scene.blocks[1].position.copy()
    env.step(np.array([1, 1, -1], np.float32))
    np.testing.assert_array_equal(scene.blocks[1].position, left)


def test_fingers_just_out_of_reach_close_on_nothing() -> None:
    env = world.Tabletop(cameras=())
    env.reset(seed=0)
    env.scene.grippers[0].position = env.scene.blocks[1].position + np.array([spec.GRASP_RADIUS + 0.002, 0])
    for _ in range(6):
        env.step(np.array([0, 0, 1], np.float32))
    assert env.scene.grippers[0].holds is None
    assert env.scene.grippers[0].opening == 0


def test_closed_fingers_push_and_open_ones_do_not() -> None:
    for grip, moved in ((1.0, True), (-1.0, False)):
        env = world.Tabletop("push", cameras=())
        env.reset(seed=0)
        gripper, block = env.scene.grippers[0], env.scene.blocks[1]
        gripper.opening = 0.0 if moved else 1.0
        gripper.position, block.position = np.array([0.4, 0.5]), np.array([0.5, 0.5])
        for _ in range(3):
            env.step(np.array([1, 0, grip], np.float32))
        assert (block.position[0] > 0.55) == moved


def test_holding_a_block_over_its_goal_is_not_success() -> None:
    env = world.Tabletop(cameras=())
    env.reset(seed=0)
    gripper = env.scene.grippers[0]
    gripper.position = env.scene.goals[0].position.copy()
    env.scene.blocks[0].position, gripper.holds, gripper.opening = gripper.position.copy(), 0, spec.HOLDING
    assert not env.step(np.array([0, 0, 1], np.float32))[4]["is_success"]
    infos = [env.step(np.array([0, 0, -1], np.float32)) for _ in range(2)]
    assert [(o[1], o[2], o[4]["is_success"]) for o in infos] == [(0.0, False, False), (1.0, True, True)]


def test_grippers_do_not_pass_through_one_another() -> None:
    env = world.Tabletop("reach", "bimanual", cameras=())
    env.reset(seed=0)
    left, right = env.scene.grippers
    left.position, right.position = np.array([0.4, 0.5]), np.array([0.62, 0.5])
    for _ in range(10):
        env.step(np.array([1, 0, -1, -1, 0, -1], np.float32))
    assert left.position[0] < right.position[0]
    assert distance(left.position, right.position) >= spec.GRIPPER_GAP - 1e-9


def test_action_spec_describes_the_action() -> None:
    for body in world.EMBODIMENTS.values():
        card = body.action_spec
        size = len(body.action_low)
        assert size == len(card.names) == len(card.units) == len(card.absolute) == len(card.max_step)
        assert [card.names[i].endswith("grip") for i in range(size)] == [
            i in card.gripper for i in range(size)
        ]
        env = world.Tabletop(embodiment=body.name, cameras=())
        env.reset(seed=0)
        before = body.state(env.scene)
        env.step(env.action_space.high)
        change = np.abs(body.state(env.scene) - before)
        assert (change <= np.array(card.max_step) + 1e-6).all()


def test_closing_means_above_zero() -> None:
    for name, body in world.EMBODIMENTS.items():
        env = world.Tabletop("reach", name, cameras=())
        env.reset(seed=0)
        arms = len(env.scene.grippers)
        env.step(
            body.action_for(env.scene, [np.zeros(2)] * arms, [float(body.action_spec.gripper_closes)] * arms)
        )
        assert all(gripper.opening < 1 for gripper in env.scene.grippers)


if __name__ == "__main__":
    HASHES.write_text(json.dumps(stored_frames(), indent=1) + "\n")
