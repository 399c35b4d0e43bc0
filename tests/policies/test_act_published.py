"""ACT at its published size: ALOHA transfer cube, 52 M parameters, one 480 × 640 camera, chunk 100."""

from __future__ import annotations

import warnings

import pytest
import torch

import minivla
from tests.parity import redraw, relative_error

SHAPES = {"observation.images.top": (3, 480, 640), "observation.state": (14,), "action": (14,)}


@pytest.mark.slow
def test_lerobots_default_folder_loads_and_computes_the_same_and_ours_loads_there(tmp_path):
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    kinds = (FeatureType.VISUAL, FeatureType.STATE, FeatureType.ACTION)
    features = {
        key: PolicyFeature(kind, shape) for (key, shape), kind in zip(SHAPES.items(), kinds, strict=True)
    }
    action = {"action": features.pop("action")}
    config = ACTConfig(
        input_features=features, output_features=action, pretrained_backbone_weights=None, device="cpu"
    )
    theirs = ACTPolicy(config).eval()
    redraw(theirs)
    # The widest layers saturate attention at the scale that suits tiny ones: keep the pictures' tokens small.
    theirs.model.encoder_img_feat_input_proj.weight.data.mul_(0.1)
    generator = torch.Generator().manual_seed(0)
    sizes = {key: (3, 1, 1) if len(shape) == 3 else shape for key, shape in SHAPES.items()}
    stats = {
        key: {
            "mean": torch.rand(size, generator=generator),
            "std": torch.rand(size, generator=generator) + 0.5,
            "min": torch.zeros(size) - 3,
            "max": torch.ones(size) + 3,
        }
        for key, size in sizes.items()
    }
    before, after = make_pre_post_processors(config, dataset_stats=stats)
    theirs.save_pretrained(tmp_path / "theirs")
    before.save_pretrained(tmp_path / "theirs")
    after.save_pretrained(tmp_path / "theirs")

    ours = minivla.load(tmp_path / "theirs")
    assert ours.receipt.ok
    assert not ours.receipt.ignored
    assert sum(p.numel() for p in ours.parameters()) > 51_000_000
    raw = {
        "observation.images.top": torch.rand(3, 480, 640, generator=generator),
        "observation.state": torch.rand(14, generator=generator),
    }
    chunk = ours.postprocess(ours.predict_action_chunk(ours.preprocess(raw)))
    expected = after(theirs.predict_action_chunk(before(raw)))
    assert relative_error(chunk, expected) < 1e-5

    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.save(tmp_path / "ours")
    again = ACTPolicy.from_pretrained(tmp_path / "ours", strict=True)
    assert torch.equal(again.predict_action_chunk(before(raw)), theirs.predict_action_chunk(before(raw)))
