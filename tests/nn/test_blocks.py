"""Each block against torch's or torchvision's own, or a closed form."""

from __future__ import annotations

import math

import pytest
import torch
from torch import nn

from minivla.nn.attention import MultiheadAttention
from minivla.nn.compact_vision import CompactVision, coordinate_grid, spatial_softmax
from minivla.nn.instruction import InstructionEncoder, split_words
from minivla.nn.positions import sine_positions, sine_positions_2d
from minivla.nn.resnet import RESNETS, FrozenBatchNorm2d, ResNet, load_imagenet
from minivla.nn.transformer import TransformerLayer
from tests.parity import redraw, relative_error


@pytest.mark.parametrize("masked", [False, True])
def test_attention_is_torchs(masked):
    ours, theirs = MultiheadAttention(12, 3), nn.MultiheadAttention(12, 3, batch_first=True)
    redraw(theirs)
    ours.load_state_dict(theirs.state_dict())
    query, key, value = torch.randn(2, 4, 12), torch.randn(2, 6, 12), torch.randn(2, 6, 12)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2])
    out = ours(query, key, value, valid[:, None] if masked else None)
    expected = theirs(query, key, value, key_padding_mask=~valid if masked else None)[0]
    torch.testing.assert_close(out, expected)


def test_width_must_be_a_multiple_of_heads():
    with pytest.raises(ValueError, match="width 10 is not a multiple of heads 4"):
        MultiheadAttention(10, 4)


@pytest.mark.parametrize("name", RESNETS)
def test_resnet_is_torchvisions(name):
    torchvision = pytest.importorskip("torchvision")
    dilate = RESNETS[name][1]
    theirs = getattr(torchvision.models, name)(
        replace_stride_with_dilation=[False, False, dilate], norm_layer=torchvision.ops.FrozenBatchNorm2d
    )
    redraw(theirs)
    ours = ResNet(name, dilate_last=dilate)
    state = {k: v for k, v in theirs.state_dict().items() if not k.startswith("fc.")}
    ours.load_state_dict(state)
    image, seen = torch.randn(1, 3, 64, 96), []
    theirs.layer4.register_forward_hook(lambda module, inputs, out: seen.append(out))
    with torch.no_grad():
        theirs(image)
        out = ours(image)
    assert out.shape[1] == ours.channels
    assert relative_error(out, seen[0]) < 1e-5


def test_frozen_batch_norm_trains_nothing():
    norm = FrozenBatchNorm2d(4)
    assert not list(norm.parameters())
    assert len(list(norm.buffers())) == 4


def test_resnet_refuses_what_it_cannot_do():
    with pytest.raises(ValueError, match="'resnet19' is not known; choose one of resnet18"):
        ResNet("resnet19")
    with pytest.raises(ValueError, match="use resnet50 or deeper"):
        ResNet("resnet18", dilate_last=True)
    with pytest.raises(
        ValueError, match=r"do not fit resnet18; use 'ResNet18_Weights.IMAGENET1K_V1' or None"
    ):
        load_imagenet(ResNet("resnet18"), "ResNet50_Weights.IMAGENET1K_V1")


def test_imagenet_weights_out_of_reach_say_what_to_do(monkeypatch):
    import huggingface_hub

    def offline(*args, **options):
        raise ConnectionError("no network")

    monkeypatch.setattr(huggingface_hub, "hf_hub_download", offline)
    with pytest.raises(OSError, match="pretrained_backbone_weights=None"):
        load_imagenet(ResNet("resnet18"), "ResNet18_Weights.IMAGENET1K_V1")


def test_imagenet_weights_are_read_by_their_own_names(monkeypatch, tmp_path):
    import huggingface_hub
    from safetensors.torch import save_file

    source = ResNet("resnet18")
    redraw(source)
    tensors = {
        **source.state_dict(),
        "fc.weight": torch.zeros(10, 512),
        "bn1.num_batches_tracked": torch.tensor(1),
    }
    save_file(tensors, tmp_path / "model.safetensors")
    asked = []
    monkeypatch.setattr(
        huggingface_hub,
        "hf_hub_download",
        lambda *where: asked.append(where) or str(tmp_path / "model.safetensors"),
    )
    network = ResNet("resnet18")
    load_imagenet(network, "ResNet18_Weights.IMAGENET1K_V1")
    assert asked == [("timm/resnet18.tv_in1k", "model.safetensors")]
    assert all(
        torch.equal(a, b)
        for a, b in zip(network.state_dict().values(), source.state_dict().values(), strict=True)
    )


def test_positions_follow_their_formulae():
    codes = sine_positions(7, 8)
    assert codes.shape == (7, 8)
    assert codes[3, 4].item() == pytest.approx(math.sin(3 / 10000 ** (4 / 8)), abs=1e-6)
    assert codes[3, 5].item() == pytest.approx(math.cos(3 / 10000 ** (4 / 8)), abs=1e-6)
    plane = sine_positions_2d(2, 3, 8)
    assert plane.shape == (6, 8)
    assert plane[4, 0].item() == pytest.approx(math.sin(2 * math.pi), abs=1e-4)  # row 2 of 2, first y channel
    assert plane[4, 4].item() == pytest.approx(
        math.sin(2 * math.pi * 2 / 3), abs=1e-4
    )  # column 2 of 3, first x channel


def test_positions_are_added_to_queries_and_keys_but_not_to_values():
    torch.manual_seed(0)
    layer = TransformerLayer(8, 2, 16).eval()
    alike = torch.ones(1, 5, 8)
    out = layer(alike, torch.randn(5, 8))
    torch.testing.assert_close(
        out, out[:, :1].expand_as(out)
    )  # equal values in, equal values out, whatever the positions


def test_a_layer_refuses_an_unknown_activation():
    with pytest.raises(ValueError, match="'swish' is not known; choose one of relu, gelu"):
        TransformerLayer(8, 2, 16, activation="swish")


def test_a_keypoint_is_where_the_heat_is():
    heat = torch.full((1, 1, 8, 8), -50.0)
    heat[0, 0, 6, 1] = 50.0
    expected = coordinate_grid(8, 8)[:, 6, 1]
    torch.testing.assert_close(spatial_softmax(heat)[0, 0], expected)
    torch.testing.assert_close(spatial_softmax(torch.zeros(1, 1, 8, 8))[0, 0], torch.zeros(2))


def test_compact_vision_makes_a_map_that_the_instruction_changes():
    torch.manual_seed(0)
    vision, image = CompactVision(32, condition=8), torch.rand(2, 3, 64, 64)
    first, second = vision(image, torch.zeros(2, 8)), vision(image, torch.ones(2, 8))
    assert first.shape == (2, 32, 8, 8)
    assert not torch.equal(first, second)
    assert CompactVision(32)(torch.rand(1, 3, 96, 64)).shape == (1, 32, 12, 8)


def test_instructions_are_told_apart_by_which_word_stands_beside_which():
    torch.manual_seed(0)
    encoder = InstructionEncoder(["put", "red", "green", "block", "square", "the", "on"], 16)
    one, other = encoder(["put the red block on the green square", "put the green block on the red square"])
    assert not torch.allclose(one, other)


def test_padding_and_unknown_words():
    torch.manual_seed(0)
    encoder = InstructionEncoder(["red", "block"], 8)
    assert encoder.encode(["Red block!", "red"]).tolist() == [[2, 3], [2, 0]]
    assert encoder.encode(["a red zebra"]).tolist() == [[1, 2, 1]]
    assert encoder([""]).isfinite().all()
    assert split_words("Then, go!") == ["then", "go"]
    with pytest.raises(ValueError, match="a word twice"):
        InstructionEncoder(["red", "red"], 8)


def test_a_longer_neighbour_in_the_batch_changes_nothing():
    torch.manual_seed(0)
    encoder = InstructionEncoder(["red", "block", "green"], 8)
    alone, beside = encoder(["red block"]), encoder(["red block", "green block green block green"])
    torch.testing.assert_close(alone[0], beside[0])
