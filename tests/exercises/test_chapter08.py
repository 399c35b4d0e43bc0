"""Each check of chapter 8 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

from pathlib import Path

import torch

from minivla.actions import flow
from minivla.exercises import chapter08
from minivla.nn.decoder import Cache

CHAPTER = Path(__file__).parents[2] / "notebooks" / "08_pi0.ipynb"


def from_marks(marks, valid):
    block = marks.cumsum(0)
    return (block <= block[:, None]) & valid


def guided(velocity, x, time, previous, held):
    left = time * (1 - time)
    weight = min(10, (time**2 + (1 - time) ** 2) / left) if left else 10
    return velocity - weight * held[:, None] * (previous - (x - time * velocity))


def state_once(policy, batch, noise):
    decoder, steps, cache = policy.paligemma.decoder, policy.config.num_inference_steps, Cache()
    state, prefix = policy.state(batch), policy.embed_prefix(batch)
    mask, positions = policy.lay_out(prefix, policy.embed_suffix(state, noise, torch.ones(1)))
    length = prefix.tokens.shape[1]
    seen = slice(0, length), slice(length, length + 1), slice(length + 1, None)
    both = (
        {"prefix": prefix.tokens},
        {"suffix": policy.embed_suffix(state, noise, torch.ones(1)).tokens[:, :1]},
    )
    decoder(both[0], mask[:, seen[0], :length], positions[:, seen[0]], cache=cache)
    decoder(both[1], mask[:, seen[1], : length + 1], positions[:, seen[1]], cache=cache)

    def field(x, time):
        tokens = {"suffix": policy.embed_suffix(state, x, time).tokens[:, 1:]}
        out = decoder(tokens, mask[:, seen[2]], positions[:, seen[2]], cache=cache, keep=False)
        return policy.velocity(out["suffix"])

    return flow.euler(field, noise, steps, flow.PI)


CHECKS = [
    (chapter08.check_from_marks, from_marks),
    (chapter08.check_guided, guided),
    (chapter08.check_state_once, state_once),
]


def marks_as_blocks(marks, valid):
    return (marks <= marks[:, None]) & valid


def looking_ahead(marks, valid):
    return from_marks(marks, valid).T


def padding_and_all(marks, valid):
    return from_marks(marks, torch.ones_like(valid))


def own_block_only(marks, valid):
    block = marks.cumsum(0)
    return (block == block[:, None]) & valid


def pushed(velocity, x, time, previous, held):
    return 2 * velocity - guided(velocity, x, time, previous, held)


def held_everywhere(velocity, x, time, previous, held):
    return guided(velocity, x, time, previous, torch.ones_like(held))


def unbounded(velocity, x, time, previous, held):
    weight = (time**2 + (1 - time) ** 2) / max(time * (1 - time), 1e-9)
    return velocity - weight * held[:, None] * (previous - (x - time * velocity))


def the_point_itself(velocity, x, time, previous, held):
    return guided(velocity, x + time * velocity, time, previous, held)


def every_time(policy, batch, noise):
    return policy.predict_action_chunk(batch, noise=noise)


def without_a_state(policy, batch, noise):
    """As if the state were zero."""
    return policy.predict_action_chunk(
        batch | {"observation.state": 0 * batch["observation.state"]}, noise=noise
    )


def one_action(policy, batch, noise):
    return state_once(policy, batch, noise)[:, :1]


MISTAKES = [
    (chapter08.check_from_marks, marks_as_blocks, "token 0 may not look at token 5"),
    (chapter08.check_from_marks, looking_ahead, "token 0 may not look at token 3"),
    (chapter08.check_from_marks, padding_and_all, "nobody looks at padding"),
    (chapter08.check_from_marks, own_block_only, "token 3 may look at token 0, and yours says False"),
    (chapter08.check_guided, pushed, "it pushes away"),
    (chapter08.check_guided, held_everywhere, "bends the last action"),
    (chapter08.check_guided, unbounded, "the weight min(10"),
    (chapter08.check_guided, the_point_itself, "the foreseen chunk is x - time · velocity"),
    (chapter08.check_state_once, every_time, "the expert ran on 24 tokens, [0, 6, 6, 6, 6]; expected 21"),
    (chapter08.check_state_once, without_a_state, "the chunk is another one"),
    (chapter08.check_state_once, one_action, "it returns shape (2, 1, 3), expected (2, 5, 3)"),
]
