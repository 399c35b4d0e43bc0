"""The ViT is transformers' SigLIP, layer by layer; patches in reading order; what does not fit is refused."""

from __future__ import annotations

import re

import pytest
import torch
from torch import Tensor

from minivla.nn.paligemma import PALIGEMMA_NAMES
from minivla.nn.vit import ViT, ViTConfig
from tests.parity import redraw, relative_error

TINY = ViTConfig(width=48, layers=3, heads=4, mlp=96, patch=14, image_size=42)


def their_name(name: str) -> str:
    name = f"paligemma.vision.{name}"
    for pattern, replacement in PALIGEMMA_NAMES:
        name = re.sub(pattern, replacement, name)
    return name.split("vision_model.")[1]


def test_every_layer_equals_transformers_siglip():
    from transformers import SiglipVisionConfig, SiglipVisionModel

    theirs = SiglipVisionModel(
        SiglipVisionConfig(
            hidden_size=48, intermediate_size=96, num_hidden_layers=3, num_attention_heads=4, image_size=42,
            patch_size=14, vision_use_head=False,
        )
    ).eval()  # fmt: skip
    redraw(theirs)
    ours = ViT(TINY)
    state = {name.removeprefix("vision_model."): x for name, x in theirs.state_dict().items()}
    ours.load_state_dict({name: state[their_name(name)] for name in ours.state_dict()}, strict=True)
    assert len(state) == len(ours.state_dict())
    image = torch.randn(2, 3, 42, 42, generator=torch.Generator().manual_seed(0))
    seen: list[Tensor] = []
    for layer in ours.layers:
        layer.register_forward_hook(lambda _, inputs, out: seen.append(out))
    last = ours(image)
    given = theirs(image, output_hidden_states=True)
    for mine, upstream in zip(seen, given.hidden_states[1:], strict=True):
        assert relative_error(mine, upstream) < 2e-6
    assert relative_error(last, given.last_hidden_state) < 2e-6


def test_patches_stand_in_reading_order():
    """What a patch's stem sees is its own piece of the image: changing one piece changes one token before the
    first layer.
    """
    model = ViT(TINY)
    seen: list[Tensor] = []
    model.layers[0].register_forward_pre_hook(lambda _, inputs: seen.append(inputs[0]))
    image = torch.rand(1, 3, 42, 42)
    model(image)
    for row in range(3):
        for column in range(3):
            other = image.clone()
            other[..., 14 * row : 14 * (row + 1), 14 * column : 14 * (column + 1)] += 1
            model(other)
            changed = (seen[-1] != seen[0]).any(dim=-1)[0]
            assert changed.nonzero().tolist() == [[3 * row + column]]


def test_images_of_a_batch_do_not_see_each_other():
    model = ViT(TINY)
    images = torch.rand(3, 3, 42, 42)
    other = images.clone()
    other[1] += 1
    assert torch.equal(model(images)[[0, 2]], model(other)[[0, 2]])


@pytest.mark.parametrize("wrong", [{"heads": 5}, {"image_size": 43}])
def test_what_does_not_divide_is_refused(wrong):
    settings = {"width": 48, "layers": 1, "heads": 4, "mlp": 8, "patch": 14, "image_size": 42}
    with pytest.raises(ValueError, match="width 48 must be a multiple of heads"):
        ViT(ViTConfig(**settings | wrong))


def test_the_published_size_is_siglips():
    with torch.device("meta"):
        model = ViT(ViTConfig())
    assert sum(p.numel() for p in model.parameters()) == 412_442_352
    assert model.config.grid == (16, 16)
