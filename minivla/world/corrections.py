"""What the expert does where a policy has got to: demonstrations that begin with the policy's own mistakes.

Papers: Ross et al. 2011, "A Reduction of Imitation Learning and Structured Prediction to No-Regret Online
Learning" (DAgger, arXiv 1011.0686); Kelly et al. 2019, "HG-DAgger" (arXiv 1810.02890), where, as here and as
with LeRobot's interventions, the expert takes over for good and only what it does is recorded.
"""

import itertools
from collections.abc import Iterator, Sequence
from typing import Any

import numpy as np
import torch
from tqdm import tqdm

from minivla.world.demonstrations import Demonstrations, Frame, collect, finished
from minivla.world.tabletop import Tabletop

LATEST = 0.75  # of an episode's steps, after which the expert has taken over
PATIENCE = 10  # how many times running `batch_size` episodes may give nothing


def corrections(
    policy: Any,
    task: str | Sequence[str],
    episodes: int,
    seed: int,
    *,
    size: int = 64,
    cameras: Sequence[str] = ("table", "wrist"),
    split: str = "train",
    noise: float = 0.15,
    batch_size: int = 50,
    progress: bool = False,
) -> Demonstrations:
    """Episodes that `policy` begins and the expert ends, `episodes` of them; only the expert's part is kept.

    The expert takes over at a random moment of the first three quarters. Episodes that the policy has solved
    by then are left out, and those that the expert cannot finish within a task's steps any more. So several
    tasks take turns in what is tried, and not in what is kept.

    policy: anything with `reset()` and `act(batch)`, a batch (B, …) of observations with `task`, a list of
    strings, to actions (B, A), such as a `minivla.Policy`; it acts as it does in `minivla.evaluate`.
    batch_size: how many episodes step at once.

    The other arguments are those of `minivla.world.demonstrations`; the arm is "cartesian". Raises ValueError
    for unknown names and numbers out of range, RuntimeError where there is nothing to correct.
    """
    if episodes < 1 or seed < 0 or batch_size < 1 or not 0 <= noise < 1:
        raise ValueError(
            f"episodes={episodes}, seed={seed}, batch_size={batch_size}, noise={noise}; expected ≥ 1, "
            "≥ 0, ≥ 1 and 0 ≤ noise < 1."
        )
    tasks = (task,) if isinstance(task, str) else tuple(task)
    if not tasks:
        raise ValueError("task is empty; expected one task, or several: task=('push', 'sort').")
    kinds = itertools.islice(itertools.cycle(tasks), batch_size)
    envs = [Tabletop(kind, "cartesian", size, tuple(cameras), split=split) for kind in kinds]
    wanted = itertools.islice(_one_after_another(policy, envs, seed, noise), episodes)
    bar = tqdm(wanted, desc=f"{', '.join(tasks)} corrections", total=episodes, disable=not progress)
    return collect(envs[0], list(bar))


def _one_after_another(
    policy: Any, envs: Sequence[Tabletop], seed: int, noise: float
) -> Iterator[tuple[list[Frame], str]]:
    """Corrected episodes without end, in batches of one for each environment."""
    idle = 0
    for turn in itertools.count():
        fresh = list(_corrected(policy, envs, np.random.default_rng([seed, turn]), noise))
        yield from fresh
        idle = 0 if fresh else idle + 1
        if idle == PATIENCE:
            raise RuntimeError(
                f"{PATIENCE * len(envs)} episodes of {', '.join(sorted({env.task for env in envs}))} left "
                "nothing to correct: the policy solves them, or the expert cannot go on from where it leads."
            )


def _corrected(
    policy: Any, envs: Sequence[Tabletop], rng: np.random.Generator, noise: float
) -> Iterator[tuple[list[Frame], str]]:
    """One episode in each environment; frames and instruction of those that were corrected."""
    observations = [env.reset(seed=int(rng.integers(2**31)))[0] for env in envs]
    limits = [int(rng.integers(1, int(LATEST * env.max_steps) + 1)) for env in envs]
    solved = _begun(policy, envs, observations, limits, int(rng.integers(2**31)))
    for i, env in enumerate(envs):
        env.elapsed = 0  # the expert has as many steps as it would have from the start
        if solved[i]:
            continue
        frames = list(finished(env, observations[i], rng, noise))
        if env.scene.stage == len(env.scene.parts):
            yield frames, env.scene.instruction


@torch.no_grad()
def _begun(
    policy: Any,
    envs: Sequence[Tabletop],
    observations: list[dict[str, np.ndarray]],
    limits: Sequence[int],
    seed: int,
) -> list[bool]:
    """Let the policy act as many steps in each environment as its limit says; which are solved by then.

    `observations` are the last ones, and replaced as they come.
    """
    solved = [False] * len(envs)
    tasks = [env.scene.instruction for env in envs]
    policy.reset()
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        for step in range(max(limits)):
            batch = {
                key: torch.from_numpy(np.stack([o[key] for o in observations])) for key in observations[0]
            }
            actions = policy.act({**batch, "task": tasks}).cpu().numpy()
            for i, env in enumerate(envs):
                if step < limits[i] and not solved[i]:
                    observations[i], _, solved[i], *_ = env.step(actions[i])
    policy.reset()
    return solved
