"""Instructions: templates with synonyms, and which combinations of words are held out.

A template's braces are filled with a verb, a block ("red cube"), a goal ("green pad"). The colour alone tells
the blocks of a scene apart, and the goals; the noun may name the block's shape or be general. An instruction
counts as *test* when (colour + shape + template) is divisible by five, colour and shape being those of the
first block it names: every word and every pair of words is met in training, those triples are not.
"""

import re

import numpy as np

from minivla.world.spec import COLOURS, SHAPES

SPLITS = ("train", "test", "all")
BLOCK_NOUNS = {"cube": ("cube", "box"), "disc": ("disc", "puck"), "triangle": ("triangle", "wedge")}
ANY_BLOCK = ("block", "piece")
GOAL_NOUNS = ("pad", "square", "target")

TEMPLATES: dict[str, tuple[str, ...]] = {
    "reach": ("reach the {block}", "move to the {block}", "go to the {block}", "touch the {block}"),
    "push": (
        "push the {block} onto the {goal}",
        "slide the {block} onto the {goal}",
        "push the {block} to the {goal}",
        "slide the {block} to the {goal}",
    ),
    "place": (
        "put the {block} on the {goal}",
        "place the {block} on the {goal}",
        "move the {block} onto the {goal}",
        "pick up the {block} and put it on the {goal}",
    ),
    "carry": (
        "take the {block} around the obstacle to the {goal}",
        "carry the {block} around the obstacle to the {goal}",
        "bring the {block} to the {goal} past the obstacle",
        "move the {block} past the obstacle onto the {goal}",
    ),
}
JOIN = ", then "


def words(sentence: str) -> list[str]:
    """The words of a sentence, in lower case and without punctuation."""
    return re.findall(r"[a-z]+", sentence.lower())


def _vocabulary() -> tuple[str, ...]:
    nouns = " ".join((*ANY_BLOCK, *GOAL_NOUNS, *(noun for pair in BLOCK_NOUNS.values() for noun in pair)))
    templates = " ".join(template for group in TEMPLATES.values() for template in group)
    text = re.sub(r"\{\w+\}", " ", templates)
    return tuple(sorted(set(words(f"{text} {nouns} {' '.join(COLOURS)} {JOIN}"))))


VOCABULARY: tuple[str, ...] = _vocabulary()
"""Every word an instruction can hold, sorted."""


def is_held_out(colour: int, shape: int, template: int) -> bool:
    """Whether a block's colour and shape in a template belong to the test split."""
    return (colour + shape + template) % 5 == 0


def allowed(colour: int, shape: int, template: int, split: str) -> bool:
    """Whether a combination may occur in a split ("train", "test" or "all")."""
    return split == "all" or is_held_out(colour, shape, template) == (split == "test")


def combinations(kind: str, split: str) -> list[tuple[int, int, int]]:
    """All (colour, shape, template) of a kind of sentence in a split."""
    every = np.ndindex(len(COLOURS), len(SHAPES), len(TEMPLATES[kind]))
    return [(c, s, t) for c, s, t in every if allowed(c, s, t, split)]


def sentence(kind: str, template: int, block: tuple[int, int], goal: int, rng: np.random.Generator) -> str:
    """Fill template number `template` of a kind with a block (colour, shape) and a goal's colour; nouns come
    from `rng`."""
    nouns = (*BLOCK_NOUNS[SHAPES[block[1]]], *ANY_BLOCK)
    block_words = f"{COLOURS[block[0]]} {nouns[rng.integers(len(nouns))]}"
    goal_words = f"{COLOURS[goal]} {GOAL_NOUNS[rng.integers(len(GOAL_NOUNS))]}"
    return TEMPLATES[kind][template].format(block=block_words, goal=goal_words)
