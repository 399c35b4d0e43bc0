"""What is not a policy: imports, Tabletop's speed, and what a trace that is off costs."""

from __future__ import annotations

from time import process_time

from benchmarks.timing import Row, fresh_race, race

_TIMED = "import time; t = time.process_time(); {}; print(time.process_time() - t)"


def imports(rounds: int) -> list[Row]:
    """Processor seconds of an import, in fresh processes; beside `import torch`, which both contain."""
    lerobot = _TIMED.format("import lerobot.policies.act.modeling_act")
    return [
        fresh_race("import", "s", _TIMED.format("import minivla"), lerobot, rounds=rounds),
        fresh_race(
            "import the ACT policy", "s", _TIMED.format("import minivla.policies.act"), lerobot, rounds=rounds
        ),
    ]


def tabletop(embodiment: str, steps: int = 4000) -> Row:
    """Steps a processor second of one environment, both cameras at 64 × 64, once its sprites are drawn."""
    import gymnasium

    import minivla.world  # noqa: F401

    env = gymnasium.make("minivla/Tabletop-v0", task="pick_place", embodiment=embodiment).unwrapped
    env.action_space.seed(0)
    actions = [env.action_space.sample() for _ in range(200)]
    for start in (-steps, 0):  # the first round fills the cache of sprites
        began = process_time()
        for i in range(start, start + steps):
            if i % 50 == 0:
                env.reset(seed=i + steps)
            env.step(actions[i % 200])
    return Row(f"Tabletop, {embodiment}, two cameras at 64 × 64", "steps/s", steps / (process_time() - began))


def trace_off(rounds: int = 200) -> Row:
    """A chunk of the shipped size with the recorder's questions asked, against the same with the questions
    taken out.
    """
    import torch

    from benchmarks.act import make_batch, make_ours
    from minivla import recorder

    torch.set_num_threads(1)
    policy, batch = make_ours("small"), make_batch("small", 1)
    asked, silent = recorder.current, lambda: None

    def with_questions() -> None:
        recorder.current = asked
        policy.predict_action_chunk(batch)

    def without() -> None:
        recorder.current = silent
        policy.predict_action_chunk(batch)

    row = race(
        "a chunk with the recorder in place (right: taken out)", with_questions, without, rounds=rounds
    )
    recorder.current = asked
    return row
