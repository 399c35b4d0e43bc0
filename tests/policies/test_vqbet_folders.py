"""VQ-BeT's folders travel between LeRobot and minivla, both ways; old ones are read as they are."""

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
from minivla.checkpoints import receipt, write_headers
from tests.parity import relative_error
from tests.policies.test_vqbet_parity import CASES, SEED, make_theirs, redraw_vqbet

LEGACY = ("normalize_inputs.buffer_observation_state", "normalize_targets.buffer_action")
PUSHT = {"observation.image": (3, 96, 96), "observation.state": (2,), "action": (2,)}


def statistics(state: int) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    sizes = {"observation.state": (state,), "action": (2,), "observation.image": (3, 1, 1)}
    drawn = {key: torch.rand(size, generator=generator) for key, size in sizes.items()}
    return {key: {"min": v - 2, "max": v + 1, "mean": v - 0.5, "std": v + 0.5} for key, v in drawn.items()}


def lerobots_folder(theirs: Any, folder: Path) -> tuple[Any, Any]:
    """Save a policy of LeRobot's with its processors, which come back."""
    from lerobot.policies.factory import make_pre_post_processors

    state = theirs.config.input_features["observation.state"].shape[0]
    processors = make_pre_post_processors(theirs.config, dataset_stats=statistics(state))
    theirs.save_pretrained(folder)
    for pipeline in processors:
        pipeline.save_pretrained(folder)
    return processors


def raw(theirs: Any, seed: int = 0) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(seed)
    features = theirs.config.input_features
    return {key: torch.rand(feature.shape, generator=generator) for key, feature in features.items()}


def their_actions(theirs: Any, processors: Any) -> Tensor:
    before, after = processors
    theirs.eval().reset()
    torch.manual_seed(SEED)
    return torch.cat([after(theirs.select_action(before(raw(theirs, seed)))) for seed in range(3)])


def our_actions(ours: Any, theirs: Any) -> Tensor:
    ours.reset()
    torch.manual_seed(SEED)
    return torch.cat([ours.act(raw(theirs, seed)) for seed in range(3)])


def travel(theirs: Any, tmp_path: Path) -> Any:
    """LeRobot's folder opened here computes the same; saved here and opened there, too."""
    from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy

    theirs.vqbet.action_head.vqvae_model.discretized.fill_(True)
    processors = lerobots_folder(theirs, tmp_path / "theirs")
    ours = minivla.load(tmp_path / "theirs")
    assert ours.receipt.ok
    layers = theirs.config.gpt_n_layer
    assert len(ours.receipt.ignored) == layers + 1
    assert len(ours.receipt.matched) == len(theirs.state_dict()) - layers - 1
    expected = their_actions(theirs, processors)
    assert relative_error(our_actions(ours, theirs), expected) < 1e-5
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        ours.save(tmp_path / "ours")
    again = VQBeTPolicy.from_pretrained(tmp_path / "ours")
    assert torch.equal(their_actions(again, processors), expected)
    for key, value in theirs.state_dict().items():
        assert torch.equal(again.state_dict()[key], value), key
    return ours


@pytest.mark.parametrize("case", CASES[:2], ids=lambda case: case.name)
def test_folders_travel_both_ways(case, tmp_path):
    ours = travel(make_theirs(case), tmp_path)
    headers = write_headers(tmp_path / "theirs", tmp_path / "headers")
    assert receipt(headers).ok
    assert ours.config.optimizer_betas == (0.95, 0.999)


def test_other_betas_in_the_folder_are_followed(tmp_path):
    theirs = make_theirs(CASES[0])
    lerobots_folder(theirs, tmp_path)
    content = json.loads((tmp_path / "config.json").read_text()) | {"optimizer_betas": [0.5, 0.9]}
    (tmp_path / "config.json").write_text(json.dumps(content))
    assert {g["betas"] for g in minivla.load(tmp_path).optimizer_groups()} == {(0.5, 0.9)}


def make_legacy(folder: Path, state: int) -> None:
    """What LeRobot saved before it had processors: statistics among the weights, no processor files."""
    tensors, stats = load_file(folder / "model.safetensors"), statistics(state)
    for prefix in (*LEGACY, "unnormalize_outputs.buffer_action"):
        key = "action" if prefix.endswith("action") else "observation.state"
        tensors |= {f"{prefix}.{name}": stats[key][name].clone() for name in ("min", "max")}
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    for path in folder.glob("policy_*"):
        path.unlink()


def test_a_legacy_folder_loads(tmp_path):
    theirs = make_theirs(CASES[0])
    theirs.vqbet.action_head.vqvae_model.discretized.fill_(True)
    processors = lerobots_folder(theirs, tmp_path)
    make_legacy(tmp_path, state=4)
    ours = minivla.load(tmp_path)
    assert sum(entry.reason.startswith("statistics") for entry in ours.receipt.ignored) == 6
    assert relative_error(our_actions(ours, theirs), their_actions(theirs, processors)) < 1e-5


@pytest.mark.slow
def test_the_published_size_travels_both_ways_and_in_the_legacy_layout(tmp_path):
    """PushT: one 96 × 96 camera, 37.5 M parameters, LeRobot's defaults."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.vqbet.configuration_vqbet import VQBeTConfig
    from lerobot.policies.vqbet.modeling_vqbet import VQBeTPolicy

    kinds = (FeatureType.VISUAL, FeatureType.STATE, FeatureType.ACTION)
    features = {key: PolicyFeature(kind, s) for (key, s), kind in zip(PUSHT.items(), kinds, strict=True)}
    outputs = {"action": features.pop("action")}
    config = VQBeTConfig(
        input_features=features, output_features=outputs, pretrained_backbone_weights=None, device="cpu"
    )
    theirs = VQBeTPolicy(config)
    redraw_vqbet(theirs)
    ours = travel(theirs, tmp_path)
    assert 37_400_000 < sum(p.numel() for p in ours.parameters()) < 37_600_000
    make_legacy(tmp_path / "theirs", state=2)
    assert torch.equal(our_actions(minivla.load(tmp_path / "theirs"), theirs), our_actions(ours, theirs))
    batch = {
        "observation.image": torch.rand(2, 5, 3, 96, 96, generator=torch.Generator().manual_seed(0)),
        "observation.state": torch.rand(2, 5, 2, generator=torch.Generator().manual_seed(1)),
        "action": torch.rand(2, 11, 2, generator=torch.Generator().manual_seed(2)),
    }
    losses = []
    for policy in (ours, theirs):
        policy.eval()
        torch.manual_seed(SEED)
        losses.append(policy.forward(dict(batch))[0].detach())
    assert relative_error(*losses) < 1e-5
