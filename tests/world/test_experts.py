"""The experts: how often they succeed, undisturbed and disturbed, and which side of the obstacle they
take."""

import numpy as np
import pytest

import minivla.world as world
from minivla.world.demonstrations import Disturbance
from minivla.world.scene import detour_side

PAIRS = [(task, body) for task in world.TASKS for body in world.EMBODIMENTS]


def successes(task: str, body: str, seeds: range, noise: float = 0.0, split: str = "all") -> int:
    """In how many of the episodes the expert succeeds, without pictures."""
    env = world.Tabletop(task, body, cameras=(), split=split)
    act, total = world.expert(env), 0
    for seed in seeds:
        env.reset(seed=seed)
        disturb, over = Disturbance(env, np.random.default_rng(seed), noise), False
        while not over:
            _, _, terminated, truncated, info = env.step(disturb(act()))
            over = terminated or truncated
        total += info["is_success"]
    return total


@pytest.mark.parametrize(("task", "body"), PAIRS)
def test_experts_succeed(task: str, body: str) -> None:
    assert successes(task, body, range(30)) >= 29


@pytest.mark.slow
@pytest.mark.parametrize(("task", "body"), PAIRS)
def test_experts_succeed_on_a_thousand_seeds(task: str, body: str) -> None:
    assert successes(task, body, range(10_000, 11_000)) >= 990


@pytest.mark.parametrize(("task", "body"), PAIRS)
def test_experts_recover_from_disturbance(task: str, body: str) -> None:
    assert successes(task, body, range(30), noise=0.15) >= 26


@pytest.mark.parametrize("body", world.EMBODIMENTS)
def test_each_side_of_the_obstacle_is_taken_about_as_often(body: str) -> None:
    env = world.Tabletop("detour", body, cameras=())
    left = sum(side_taken(env, seed) == "left" for seed in range(100))
    assert 40 <= left <= 60


def side_taken(env: world.Tabletop, seed: int, expert_seed: int = 0) -> str:
    """The side on which an episode's gripper is farthest off the straight way."""
    env.reset(seed=seed)
    act, path = world.expert(env, seed=expert_seed), []
    holder = next(gripper for gripper in env.scene.grippers if gripper.holds == 0)
    goal, wall, over = env.scene.goals[0].position, env.scene.obstacle, False
    while not over:
        _, _, over, _, _ = env.step(act())
        ahead, offset = goal - wall, holder.position - wall
        path.append((abs(ahead[0] * offset[1] - ahead[1] * offset[0]), detour_side(env.scene, holder)))
    return max(path)[1]


def test_another_seed_may_take_the_other_side_of_the_same_scene() -> None:
    env = world.Tabletop("detour", cameras=())
    assert {side_taken(env, 0, expert_seed) for expert_seed in range(8)} == {"left", "right"}
    assert len({side_taken(env, 0, 3) for _ in range(3)}) == 1


def test_the_straight_way_of_a_detour_is_barred() -> None:
    env = world.Tabletop("detour", cameras=())
    for seed in range(20):
        env.reset(seed=seed)
        gripper, over = env.scene.grippers[0], False
        while not over:
            way = env.scene.goals[0].position - gripper.position
            move = 0.04 * way / max(np.linalg.norm(way), 1e-9)
            _, _, success, truncated, _ = env.step(env.embodiment.action_for(env.scene, [move], [1.0]))
            over = success or truncated
        assert truncated
        assert not success


def test_bimanual_hands_over() -> None:
    env = world.Tabletop("pick_place", "bimanual", cameras=())
    act, used = world.expert(env), []
    for seed in range(30):
        env.reset(seed=seed)
        holders, over = set(), False
        while not over:
            _, _, over, _, _ = env.step(act())
            holders |= {i for i, gripper in enumerate(env.scene.grippers) if gripper.holds == 0}
        used.append(len(holders))
    assert 8 <= used.count(2) <= 24
    assert used.count(1) >= 6


def test_expert_of_something_else_is_refused() -> None:
    with pytest.raises(TypeError, match="Tabletop only, not int"):
        world.expert(3)
