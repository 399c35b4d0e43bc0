"""Instructions: unique, from a closed vocabulary, and split into parts that do not meet."""

import itertools

import pytest

import minivla.world as world
from minivla.world import language, spec


def triples(task: str, split: str, episodes: int = 80) -> set[tuple[str, ...]]:
    """(colour, shape, template) of the first block in that many scenes, read off the sentence and the
    scene."""
    env = world.Tabletop(task, cameras=(), split=split)
    found = set()
    for seed in range(episodes):
        env.reset(seed=seed)
        block, text = env.scene.blocks[0], env.scene.parts[0].text
        nouns = (*language.ANY_BLOCK, *itertools.chain(*language.BLOCK_NOUNS.values()), *language.GOAL_NOUNS)
        template = " ".join("_" if w in nouns or w in spec.COLOURS else w for w in language.words(text))
        found.add((spec.COLOURS[block.colour], spec.SHAPES[block.shape], template))
    return found


@pytest.mark.parametrize("task", world.TASKS)
def test_train_and_test_do_not_meet(task: str) -> None:
    train, test, both = (triples(task, split) for split in ("train", "test", "all"))
    assert train
    assert test
    assert not train & test
    assert both & train
    assert both & test


@pytest.mark.parametrize("kind", language.TEMPLATES)
def test_held_out_combinations_are_about_a_fifth_and_their_pairs_are_trained(kind: str) -> None:
    train, test = (set(language.combinations(kind, split)) for split in ("train", "test"))
    assert not train & test
    assert 0.1 < len(test) / len(train | test) < 0.3
    for colour, shape, template in test:
        assert any(t[:2] == (colour, shape) for t in train)
        assert any((t[0], t[2]) == (colour, template) for t in train)
        assert any(t[1:] == (shape, template) for t in train)


@pytest.mark.parametrize("task", world.TASKS)
@pytest.mark.parametrize("split", language.SPLITS)
def test_instructions_use_known_words_and_name_what_is_meant(task: str, split: str) -> None:
    env = world.Tabletop(task, cameras=(), split=split)
    for seed in range(60):
        _, info = env.reset(seed=seed)
        scene = env.scene
        assert set(language.words(info["task"])) <= set(world.VOCABULARY)
        assert len({b.colour for b in scene.blocks}) == len(scene.blocks)
        assert len({g.colour for g in scene.goals}) == len(scene.goals)
        for part in scene.parts:
            meant = [spec.COLOURS[scene.blocks[part.block].colour]]
            meant += [] if task == "reach" else [spec.COLOURS[scene.goals[part.goal].colour]]
            assert [word for word in language.words(part.text) if word in spec.COLOURS] == meant


def test_a_noun_fits_its_block() -> None:
    env = world.Tabletop("sort", cameras=(), split="all")
    for seed in range(100):
        env.reset(seed=seed)
        for part in env.scene.parts:
            said = set(language.words(part.text)) & set(itertools.chain(*language.BLOCK_NOUNS.values()))
            assert said <= set(language.BLOCK_NOUNS[spec.SHAPES[env.scene.blocks[part.block].shape]])


def test_vocabulary_is_sorted_and_every_word_occurs() -> None:
    assert list(world.VOCABULARY) == sorted(set(world.VOCABULARY))
    heard: set[str] = set()
    for task in world.TASKS:
        env = world.Tabletop(task, cameras=(), split="all")
        for seed in range(120):
            heard |= set(language.words(env.reset(seed=seed)[1]["task"]))
    assert heard == set(world.VOCABULARY)
