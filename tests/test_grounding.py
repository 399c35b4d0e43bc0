"""What a small PaliGemma learns beforehand: labels are where things are drawn, and pointing is learnt."""

from typing import Any

import numpy as np
import torch

from minivla.nn.decoder import DecoderConfig
from minivla.nn.paligemma import PaliGemma, Prefix
from minivla.nn.vit import ViTConfig
from minivla.world.render import RGB
from minivla.world.spec import COLOURS as NAMES
from minivla.zoo.grounding import (
    CAMERAS,
    COLOURS,
    THINGS,
    Finder,
    Namer,
    random_scenes,
    teach_to_point,
    teach_to_see,
)

WORDS = [5, 6, 7, 8]


def small_paligemma() -> PaliGemma:
    torch.manual_seed(0)
    stream = DecoderConfig(width=16, layers=1, mlp=16, heads=1, kv_heads=1, head_dim=8)
    eyes = ViTConfig(width=16, image_size=64)
    return PaliGemma(eyes, {"prefix": stream}, vocabulary=9, compact_vision=True)


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


def test_a_patch_is_to_point_where_the_word_for_its_colour_does():
    """A green goal in the lower right patch of four: the word for green there is cheap, another one dear."""
    places = torch.full((1, THINGS, 2), torch.nan)
    places[0, COLOURS + 2] = 0.5
    words = torch.eye(COLOURS, 8)
    silent = torch.eye(8)[7].expand(1, 4, 8)
    for said, cheaper in ((2, True), (1, False)):
        patches = silent.clone()
        patches[0, 3] = words[said]
        assert bool(Namer()(patches, words, places) < Namer()(silent, words, places)) == cheaper


def test_seeing_and_naming_are_learnt_and_repeatable():
    scenes = random_scenes(60, seed=2)
    losses, taught = [], []
    for _ in range(2):
        taught.append(small_paligemma())
        losses.append(teach_to_see(taught[-1], WORDS, scenes, steps=80, batch_size=8))
    assert losses[0] == losses[1]
    assert np.mean(losses[0][-5:]) < 0.6 * losses[0][0]
    moved = (taught[0].embedding.weight - small_paligemma().embedding.weight).norm(dim=1)
    assert moved[WORDS].min() > 3 * moved[: WORDS[0]].max()


def colours_of(paligemma: PaliGemma, raw: dict[str, Any]) -> Prefix:
    """A prefix whose prompt is the colours that the sentence names, in its order."""
    named = [[WORDS[NAMES.index(word)] for word in text.split() if word in NAMES] for text in raw["task"]]
    longest = max(map(len, named))
    ids = torch.tensor([each + [0] * (longest - len(each)) for each in named])
    images = {key: value * 2 - 1 for key, value in raw.items() if "images" in key}
    return paligemma.embed_prefix(images, ids, ids > 0)


def test_pointing_is_learnt_in_what_an_expert_sees():
    """The loss falls; what comes after the last layer's keys and values is left as it was."""
    scenes, taught, before = random_scenes(60, seed=4), small_paligemma(), small_paligemma().state_dict()
    taught.decoder.requires_grad_(False)
    losses = teach_to_point(taught, lambda raw: colours_of(taught, raw), scenes, steps=80)
    assert np.mean(losses[-10:]) < 0.8 * np.mean(losses[:5])
    moved = {key for key, value in taught.state_dict().items() if not torch.equal(value, before[key])}
    layer = "decoder.streams.prefix.layers.0."
    assert {f"{layer}{part}" for part in ("k_proj.weight", "v_proj.weight", "input_norm.weight")} <= moved
    unseen = ("q_proj", "o_proj", "gate_proj", "up_proj", "down_proj", "post_norm")
    assert not moved & {f"{layer}{part}.weight" for part in unseen}
    assert not any(p.requires_grad for p in taught.decoder.parameters()), "as frozen as before"
    assert all(p.requires_grad for p in taught.vision.parameters())
