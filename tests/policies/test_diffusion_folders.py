"""Diffusion folders travel between LeRobot 0.6 and minivla, both ways; old ones are read as they are."""

from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

import minivla
from tests.parity import redraw, relative_error

IMAGE, STATE, ACTION = "observation.image", "observation.state", "action"
SIZES = {IMAGE: (3, 1, 1), STATE: (2,), ACTION: (2,)}
TINY = {
    "horizon": 8,
    "n_action_steps": 4,
    "crop_shape": (84, 84),
    "use_group_norm": True,
    "pretrained_backbone_weights": None,
    "use_separate_rgb_encoder_per_camera": False,
    "down_dims": (16, 24),
    "spatial_softmax_num_keypoints": 5,
    "num_train_timesteps": 10,
}
# What lerobot/diffusion_pusht was trained with; upstream's defaults of then.
PUBLISHED = TINY | {
    "horizon": 16,
    "n_action_steps": 8,
    "down_dims": (512, 1024, 2048),
    "spatial_softmax_num_keypoints": 32,
    "num_train_timesteps": 100,
    "num_inference_steps": 10,  # published without: all 100 would only take longer
}
# Fields that configs did not have when it was saved.
YOUNGER = ("resize_shape", "crop_ratio", "gradient_checkpointing", "compile_model", "compile_mode")


def statistics() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = {key: torch.rand(2, *size, generator=generator) + 0.5 for key, size in SIZES.items()}
    return {key: {"mean": m, "std": s, "min": m - 3, "max": m + 3} for key, (m, s) in drawn.items()}


def raw() -> dict[str, Tensor]:
    """One item, as a LeRobotDataset with a history gives it."""
    generator = torch.Generator().manual_seed(0)
    return {
        IMAGE: torch.rand(2, 3, 96, 96, generator=generator),
        STATE: torch.rand(2, 2, generator=generator),
        "task": "push the T",
    }


def make_upstream(**settings: Any):
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies import make_pre_post_processors
    from lerobot.policies.diffusion.configuration_diffusion import DiffusionConfig
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    config = DiffusionConfig(
        input_features={
            IMAGE: PolicyFeature(FeatureType.VISUAL, (3, 96, 96)),
            STATE: PolicyFeature(FeatureType.STATE, (2,)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        device="cpu",
        **settings,
    )
    policy = DiffusionPolicy(config).eval()
    redraw(policy)
    return policy, make_pre_post_processors(policy_cfg=config, dataset_stats=statistics())


def save_upstream(policy: Any, processors: Any, folder: Path) -> Path:
    policy.save_pretrained(folder)
    for pipeline in processors:
        pipeline.save_pretrained(folder)
    return folder


def expected_chunk(policy: Any, processors: Any, noise: Tensor) -> Tensor:
    batch = processors[0](raw())
    batch = {key: batch[key].view(1, *raw()[key].shape) for key in (IMAGE, STATE)}
    torch.manual_seed(1)
    chunk: Tensor = processors[1](policy.predict_action_chunk(batch, noise=noise))
    return chunk


def our_chunk(policy: Any, noise: Tensor) -> Tensor:
    torch.manual_seed(1)
    chunk: Tensor = policy.postprocess(policy.predict_action_chunk(policy.preprocess(raw()), noise=noise))
    return chunk


def round_trip(tmp_path: Path, settings: dict[str, Any]) -> None:
    from lerobot.policies.diffusion.modeling_diffusion import DiffusionPolicy

    theirs, processors = make_upstream(**settings)
    ours = minivla.load(save_upstream(theirs, processors, tmp_path / "theirs"))
    assert ours.receipt.ok
    assert len(ours.receipt.matched) == len(ours.receipt.entries) == len(theirs.state_dict())
    noise = torch.randn(1, ours.config.horizon, 2, generator=torch.Generator().manual_seed(3))
    expected = expected_chunk(theirs, processors, noise)
    assert relative_error(our_chunk(ours, noise), expected) < 1e-4
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.save(tmp_path / "ours")
    again = DiffusionPolicy.from_pretrained(tmp_path / "ours", strict=True)
    assert torch.equal(expected_chunk(again, processors, noise), expected)
    written = json.loads((tmp_path / "ours" / "config.json").read_text())
    assert written.keys() == json.loads((tmp_path / "theirs" / "config.json").read_text()).keys() - {
        "use_amp", "use_peft", "push_to_hub", "repo_id", "private", "tags", "license", "pretrained_path",
        "pretrained_revision",
    }  # fmt: skip


def legacy(theirs: Any, folder: Path) -> Path:
    """As LeRobot saved before 0.4: no processors, statistics as buffers, fewer fields."""
    theirs.save_pretrained(folder)
    stats, buffers = statistics(), {}
    places = dict.fromkeys(("normalize_targets", "unnormalize_outputs"), (ACTION,))
    places["normalize_inputs"] = (IMAGE, STATE)
    for place, keys in places.items():
        for key in keys:
            for name in ("mean", "std") if key == IMAGE else ("min", "max"):
                buffers[f"{place}.buffer_{key.replace('.', '_')}.{name}"] = stats[key][name].clone()
    save_file(load_file(folder / "model.safetensors") | buffers, folder / "model.safetensors")
    content = json.loads((folder / "config.json").read_text())
    content = {key: value for key, value in content.items() if key not in YOUNGER}
    (folder / "config.json").write_text(json.dumps(content))
    return folder


def check_legacy(tmp_path: Path, settings: dict[str, Any]) -> None:
    theirs, processors = make_upstream(**settings)
    ours = minivla.load(legacy(theirs, tmp_path / "legacy"))
    assert ours.receipt.ok
    assert len(ours.receipt.ignored) == 8
    assert {entry.reason for entry in ours.receipt.ignored} == {"statistics, read into the preprocessor"}
    noise = torch.randn(1, ours.config.horizon, 2, generator=torch.Generator().manual_seed(3))
    assert relative_error(our_chunk(ours, noise), expected_chunk(theirs, processors, noise)) < 1e-4


def test_folders_travel_both_ways(tmp_path):
    round_trip(tmp_path, TINY)


def test_a_folder_of_lerobots_defaults_with_batch_norm(tmp_path):
    round_trip(tmp_path, TINY | {"use_group_norm": False, "use_separate_rgb_encoder_per_camera": True})


def test_an_old_folder_with_statistics_inside_loads(tmp_path):
    check_legacy(tmp_path, TINY)


def test_ddim_is_chosen_when_loading(tmp_path):
    theirs, processors = make_upstream(**TINY)
    ddim = {"noise_scheduler_type": "DDIM", "num_inference_steps": 3}
    ours = minivla.load(save_upstream(theirs, processors, tmp_path / "theirs"), **ddim)
    again, _ = make_upstream(**TINY | ddim)
    again.load_state_dict(theirs.state_dict())
    noise = torch.randn(1, 8, 2, generator=torch.Generator().manual_seed(3))
    assert relative_error(our_chunk(ours, noise), expected_chunk(again, processors, noise)) < 1e-5


@pytest.mark.slow
def test_the_published_size_travels_both_ways_and_from_the_old_layout(tmp_path):
    round_trip(tmp_path, PUBLISHED)
    check_legacy(tmp_path, PUBLISHED)
