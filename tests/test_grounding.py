"""What a small PaliGemma learns beforehand: labels are where things are drawn, and pointing is learnt."""

import numpy as np
import torch

from minivla.nn.compact_vision import CompactVision
from minivla.world.render import RGB
from minivla.zoo.grounding import CAMERAS, COLOURS, THINGS, Finder, random_scenes, teach_to_see


def test_labels_are_where_things_are_drawn():
    """The pixel at a block's place has the block's colour, unless the gripper lies over it."""
    scenes = random_scenes(40, seed=0)
    assert scenes.things.shape == (40, len(CAMERAS), THINGS, 2)
    hits = []
    for pictures, things in zip(scenes.pictures.numpy(), scenes.things.numpy(), strict=True):
        for picture, places in zip(pictures, things, strict=True):
            for colour in np.flatnonzero(~np.isnan(places[:COLOURS, 0])):
                column, row = ((places[colour] + 1) * 32).astype(int).clip(0, 63)
                hits.append(np.abs(picture[row, column].astype(int) - RGB[colour]).max() < 60)
    assert len(hits) > 80
    assert np.mean(hits) > 0.9


def test_what_is_wanted_is_among_the_things():
    scenes = random_scenes(20, seed=1)
    for wanted, things in zip(scenes.wanted, scenes.things, strict=True):
        for place in wanted[0][~wanted[0].isnan().any(-1)]:
            assert (things[0] == place).all(-1).any()


def test_the_same_seed_gives_the_same_scenes():
    one, two = random_scenes(5, seed=3), random_scenes(5, seed=3)
    assert torch.equal(one.pictures, two.pictures)
    assert one.sentences == two.sentences


def test_a_wrong_place_costs_its_distance():
    """A summary that is off by 0.5 costs 0.5."""
    finder = Finder(4, 1)
    places, patches = torch.tensor([[[0.1, -0.3]]]), torch.zeros(1, 16, 4)
    with torch.no_grad():
        finder.everywhere.weight.zero_()
        finder.everywhere.bias.copy_(torch.tensor([0.1, -0.3]))
        right = finder(patches, places)
        finder.everywhere.bias.copy_(torch.tensor([0.6, -0.3]))
        torch.testing.assert_close(finder(patches, places) - right, torch.tensor(0.5))


def test_seeing_is_learnt_and_repeatable():
    scenes = random_scenes(60, seed=2)
    losses = []
    for _ in range(2):
        torch.manual_seed(0)
        losses.append(teach_to_see(CompactVision(16), scenes, steps=80, batch_size=8))
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-5:]) < 0.5 * losses[0][0]
