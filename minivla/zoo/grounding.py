"""What a PaliGemma brings along: it finds things in pictures, and what a sentence speaks of, before it acts.

π0 does not learn to see and read from robots: its PaliGemma has learnt from a part of the web. There SigLIP
came first, which puts a picture and the words for it in the same place (Zhai et al. 2023, arXiv 2303.15343);
then both were taught together, by pointing at what is named among other things (Beyer et al. 2024, section
3.2). Ours learns the same, on random scenes of Tabletop and without an action:

1. the eyes: where is anything, and what is the word for its colour?
2. eyes and language model together: where is what the sentence asks for?

Each patch tells what lies near it and how far off, all patches together where everything is; the layers that
tell it are thrown away afterwards. The words in the first part shorten the second: attention has to compare
"red" to what is red before it can gain from it.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from einops import rearrange, reduce
from torch import Tensor, nn

from minivla.data.features import OBS_IMAGES, OBS_STATE
from minivla.nn.compact_vision import coordinate_grid
from minivla.nn.decoder import Joint, rotation, valid_positions
from minivla.nn.masks import segment_mask
from minivla.nn.paligemma import PaliGemma, Prefix
from minivla.training.batches import preserved_rng, seed_all
from minivla.world import spec
from minivla.world.embodiments import EMBODIMENTS
from minivla.world.render import WIDTHS, Camera
from minivla.world.scene import Scene
from minivla.world.tasks import TASKS

CAMERAS = ("table", "wrist")
COLOURS = len(spec.COLOURS)
THINGS = 2 * COLOURS + 1  # a block and a goal of each colour, the obstacle
WANTED = 3  # the block and the goal of the sentence's current part, and the obstacle
SPREAD = 0.6  # in patches: how far around a thing's centre patches are to tell of it


@dataclass
class Scenes:
    """N random moments: pictures uint8 (N, cameras, 64, 64, 3), states (N, S), sentences.

    Where things are, (N, cameras, THINGS, 2), and where that is what is spoken of, (N, cameras, WANTED, 2),
    is told in [-1, 1], y downwards; NaN if out of sight.
    """

    pictures: Tensor
    states: Tensor
    sentences: list[str]
    things: Tensor
    wanted: Tensor

    def raw(self, chosen: Tensor) -> dict[str, Any]:
        """Some of them as an environment would give them."""
        images = {
            f"{OBS_IMAGES}.{name}": _to_float(self.pictures[chosen, i]) for i, name in enumerate(CAMERAS)
        }
        return {**images, OBS_STATE: self.states[chosen], "task": [self.sentences[i] for i in chosen]}


class Finder(nn.Module):
    """What maps of features are taught with: two linear layers that say where each of some things is."""

    def __init__(self, width: int, things: int) -> None:
        super().__init__()
        self.near, self.everywhere = nn.Linear(width, 3 * things), nn.Linear(width, 2 * things)

    def forward(self, patches: Tensor, places: Tensor) -> Tensor:
        """The loss of patches (B, L, D), a square read row by row; things are at places (B, things, 2)."""
        away, there = _around(places, patches.shape[1])
        seen, places = ~places.isnan().any(dim=-1), places.nan_to_num()
        told = rearrange(self.near(patches), "batch patch (thing said) -> batch patch thing said", said=3)
        close = (away.abs().amax(-1) < 1) & seen[:, None]
        which = F.binary_cross_entropy_with_logits(told[..., 0], there, reduction="none").sum(-1).mean()
        offset = (told[..., 1:] - away).abs().sum(-1)[close].mean()
        summary = self.everywhere(reduce(patches, "batch patch width -> batch width", "mean"))
        where = rearrange(summary, "batch (thing xy) -> batch thing xy", xy=2)
        return which + offset / 2 + (where - places).abs().sum(-1)[seen].mean()


class Namer(nn.Module):
    """SigLIP's loss, for patches in place of pictures: is this the word for what lies here, yes or no?

    Source: Zhai et al. 2023, section 3.
    """

    def __init__(self) -> None:
        super().__init__()
        self.scale, self.bias = nn.Parameter(torch.tensor(10.0)), nn.Parameter(torch.tensor(-3.0))

    def forward(self, patches: Tensor, words: Tensor, places: Tensor) -> Tensor:
        """The loss of patches (B, L, D) and the colours' words (COLOURS, D); things are at (B, THINGS, 2)."""
        there = _around(places[:, : 2 * COLOURS], patches.shape[1])[1]
        fits = reduce(there, "batch patch (kind colour) -> batch patch colour", "max", colour=COLOURS)
        alike = F.normalize(patches, dim=-1) @ F.normalize(words, dim=-1).T
        said = self.scale * alike + self.bias
        return F.binary_cross_entropy_with_logits(said, fits, reduction="none").sum(-1).mean()


def _around(places: Tensor, patches: int) -> tuple[Tensor, Tensor]:
    """How far things at (B, things, 2) are from each patch, in patches (B, L, things, 2), and how much each
    patch is to tell of them, 0 to 1 (B, L, things); nothing of what is out of sight."""
    rows = math.isqrt(patches)
    centres = rearrange(coordinate_grid(rows, rows), "xy y x -> 1 (y x) 1 xy")
    away = (rearrange(places.nan_to_num(), "batch thing xy -> batch 1 thing xy") - centres) * (rows / 2)
    seen = ~places.isnan().any(dim=-1)
    return away, torch.exp(away.square().sum(-1) / (-2 * SPREAD**2)) * seen[:, None]


@preserved_rng()
def teach_to_see(
    paligemma: PaliGemma, colours: list[int], scenes: Scenes, *, steps: int, batch_size: int = 32
) -> list[float]:
    """Teach a PaliGemma's eyes, in place, where things are and what is called what.

    `colours` are the ids of the words for them. Projector and table of words learn too, the decoder does not.
    Returns the loss of every step.
    """
    seed_all(0)
    finder, namer = Finder(paligemma.projector.in_features, THINGS), Namer()

    def loss(chosen: Tensor) -> Tensor:
        images = rearrange(scenes.pictures[chosen], "batch camera y x rgb -> (batch camera) y x rgb")
        seen = rearrange(paligemma.vision(_to_float(images) * 2 - 1), "batch width y x -> batch (y x) width")
        words, places = paligemma.embedding.weight[colours], scenes.things[chosen].flatten(0, 1)
        return finder(seen, places) + namer(paligemma.projector(seen), words, places)

    eyes = (paligemma.vision, paligemma.projector, paligemma.embedding)
    module = nn.ModuleList((*eyes, finder, namer))
    return _learn(module, loss, len(scenes.sentences), steps, batch_size, lr=3e-3)


@preserved_rng()
def teach_to_point(
    paligemma: PaliGemma,
    prefix: Callable[[dict[str, Any]], Prefix],
    scenes: Scenes,
    *,
    steps: int,
    batch_size: int = 8,
    lr: float = 1e-3,
) -> list[float]:
    """Teach a PaliGemma, in place, where the block and the goal are that the sentence asks for now, and the
    obstacle.

    `prefix` makes its tokens of raw observations. What it found is read off the keys and values of the last
    layer, which is all that an expert will see of it. Small batches, for it takes many steps to learn what
    words have to do with pictures, however much each is shown. Returns the loss of every step.
    """
    seed_all(1)
    c = paligemma.decoder.stream("prefix").config
    finder = Finder(2 * c.kv_heads * c.head_dim, WANTED)

    def loss(chosen: Tensor) -> Tensor:
        seen = _keys_and_values(paligemma, prefix(scenes.raw(chosen)))
        patches = rearrange(
            seen[:, : len(CAMERAS) * math.prod(paligemma.grid)],
            "batch (camera patch) width -> (batch camera) patch width", camera=len(CAMERAS),
        )  # fmt: skip
        return finder(patches, scenes.wanted[chosen].flatten(0, 1))

    return _learn(nn.ModuleList((paligemma, finder)), loss, len(scenes.sentences), steps, batch_size, lr=lr)


def _keys_and_values(paligemma: PaliGemma, prefix: Prefix) -> Tensor:
    """The prefix's keys and values in the last layer, side by side (B, L, 2 · kv_heads · head_dim); the keys
    are not turned by their positions yet."""
    decoder, tokens = paligemma.decoder, {"prefix": prefix.tokens}
    turn = rotation(
        valid_positions(prefix.valid), decoder.config.head_dim, decoder.config.rope_base, torch.float32
    )
    joint = Joint(segment_mask(prefix.segments, prefix.valid), {"prefix": turn}, {}, None, False, 0)
    *before, last = range(decoder.config.layers)
    for i in before:
        tokens = decoder.layer(i, tokens, joint, ("prefix",))
    layer = decoder.stream("prefix").layer(last)
    normed, _ = layer.input_norm(tokens["prefix"])
    return torch.cat((layer.k_proj(normed), layer.v_proj(normed)), dim=-1)


def _learn(
    module: nn.Module,
    loss_of: Callable[[Tensor], Tensor],
    count: int,
    steps: int,
    batch_size: int,
    *,
    lr: float,
) -> list[float]:
    """AdamW on random choices out of `count`; the rate rises, then falls along a cosine.

    Parameters that are frozen when acting is learnt learn here all the same.
    """
    frozen = [parameter for parameter in module.parameters() if not parameter.requires_grad]
    module.requires_grad_(True)
    optimizer, losses = torch.optim.AdamW(module.parameters(), lr=lr), []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = lr * min(1, (step + 1) / 50) * 0.5 * (1 + math.cos(math.pi * step / steps))
        loss = loss_of(torch.randint(count, (batch_size,)))
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(module.parameters(), 10.0)
        optimizer.step()
        losses.append(loss.item())
    module.zero_grad()  # the next training shall not begin with the last gradients of this one
    for parameter in frozen:
        parameter.requires_grad_(False)
    return losses


def random_scenes(count: int, seed: int) -> Scenes:
    """Moments as in the middle of an episode, the tasks in turn; instructions are those of training."""
    rng, body, makers = np.random.default_rng(seed), EMBODIMENTS["cartesian"], list(TASKS.values())
    cameras = [Camera(name, 64) for name in CAMERAS]
    pictures, states, sentences, things, wanted = [], [], [], [], []
    for i in range(count):
        scene = makers[i % len(makers)](rng, body, "train")
        _stir(scene, rng)
        scene.advance()
        for camera in cameras:
            camera.prepare(scene)
        pictures.append([camera.picture(scene) for camera in cameras])
        states.append(body.state(scene))
        sentences.append(scene.instruction)
        things.append([_places(scene, camera, _things(scene), THINGS) for camera in cameras])
        wanted.append([_places(scene, camera, _wanted(scene), WANTED) for camera in cameras])
    arrays = (torch.from_numpy(np.array(rows)) for rows in (pictures, states, things, wanted))
    seen, felt, *where = arrays
    return Scenes(seen, felt, sentences, *where)


def _stir(scene: Scene, rng: np.random.Generator) -> None:
    """The gripper anywhere, often near a thing or holding one; blocks on goals, the first on its own."""
    gripper = scene.grippers[0]
    gripper.opening = float(rng.choice([0, 0.2, 0.4, 0.6, 0.8, 1]))
    near = [*(block.position for block in scene.blocks), *(goal.position for goal in scene.goals)]
    if (choice := rng.random()) < 0.6:
        gripper.position = gripper.clamp(near[rng.integers(len(near))] + rng.normal(0, 0.05, 2))
    elif choice < 0.8:
        gripper.position = rng.uniform(gripper.low, gripper.high)
    for i, block in enumerate(scene.blocks):
        if gripper.holds is None and rng.random() < 0.15:
            gripper.holds, gripper.opening = i, spec.HOLDING
        on_own = i == 0 and len(scene.parts) > 1 and rng.random() < 0.4
        if gripper.holds == i:
            block.position = gripper.position.copy()
        elif on_own or rng.random() < 0.15:
            goal = scene.goals[0 if on_own else rng.integers(len(scene.goals))]
            block.position = goal.position + rng.normal(0, 0.02, 2)


def _things(scene: Scene) -> dict[int, np.ndarray]:
    found = {block.colour: block.position for block in scene.blocks}
    found |= {COLOURS + goal.colour: goal.position for goal in scene.goals}
    return found | ({} if scene.obstacle is None else {2 * COLOURS: scene.obstacle})


def _wanted(scene: Scene) -> dict[int, np.ndarray]:
    block, goal = scene.blocks[scene.part.block].position, scene.goals[scene.part.goal].position
    wanted = {0: block} if scene.part.verb == "reach" else {0: block, 1: goal}
    return wanted | ({} if scene.obstacle is None else {2: scene.obstacle})


def _places(scene: Scene, camera: Camera, found: dict[int, np.ndarray], count: int) -> np.ndarray:
    """Where things are in a camera's picture: (count, 2), y downwards, NaN if out of sight."""
    centre = np.full(2, 0.5) if camera.follows is None else scene.grippers[camera.follows].position
    places = np.full((count, 2), np.nan, np.float32)
    for thing, position in found.items():
        place = (position - centre) / WIDTHS[camera.name] * (2, -2)
        if np.abs(place).max() < 1:
            places[thing] = place
    return places


def _to_float(pictures: Tensor) -> Tensor:
    return rearrange(pictures, "... y x rgb -> ... rgb y x").float() / 255
