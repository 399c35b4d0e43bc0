"""Folders travel between LeRobot 0.6 and minivla, both ways, and old ones are read as they are."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor

from minivla.checkpoints import load, receipt, write_headers
from minivla.policies import act

STATE, ENV, CAMERA, ACTION = (
    "observation.state",
    "observation.environment_state",
    "observation.images.top_view",
    "action",
)
SIZES = {STATE: (5,), ENV: (4,), CAMERA: (3, 1, 1), ACTION: (2,)}
SMALL: dict[str, Any] = {
    "chunk_size": 4,
    "n_action_steps": 2,
    "dim_model": 32,
    "n_heads": 2,
    "dim_feedforward": 48,
    "n_encoder_layers": 1,
    "n_vae_encoder_layers": 1,
    "latent_dim": 6,
}


def statistics() -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(2)
    drawn = {key: torch.rand(2, *size, generator=generator) + 0.5 for key, size in SIZES.items()}
    return {key: {"mean": m, "std": s, "min": m - 3, "max": m + 3} for key, (m, s) in drawn.items()}


def raw(seed: int = 0) -> dict[str, Tensor]:
    """One observation, as a LeRobotDataset gives it."""
    generator = torch.Generator().manual_seed(seed)
    sizes = {STATE: (5,), ENV: (4,), CAMERA: (3, 40, 48)}
    return {key: torch.rand(size, generator=generator) for key, size in sizes.items()}


@pytest.fixture(scope="module")
def upstream() -> Any:
    """A small ACT of LeRobot's, every tensor of it random."""
    pytest.importorskip("lerobot")
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    config = ACTConfig(
        input_features={
            STATE: PolicyFeature(FeatureType.STATE, (5,)),
            ENV: PolicyFeature(FeatureType.ENV, (4,)),
            CAMERA: PolicyFeature(FeatureType.VISUAL, (3, 40, 48)),
        },
        output_features={ACTION: PolicyFeature(FeatureType.ACTION, (2,))},
        pretrained_backbone_weights=None,
        device="cpu",
        **SMALL,
    )
    config.normalization_mapping["ENV"] = config.normalization_mapping["STATE"]
    torch.manual_seed(0)
    policy = ACTPolicy(config).eval()
    for tensor in policy.state_dict().values():
        if tensor.dim() == 1:  # norms and biases start at ones and zeros; variances must stay positive
            tensor.uniform_(0.5, 1.5)
    return policy


@pytest.fixture(scope="module")
def processors(upstream: Any) -> Any:
    """LeRobot's pre- and postprocessor for it."""
    from lerobot.policies import make_pre_post_processors

    return make_pre_post_processors(policy_cfg=upstream.config, dataset_stats=statistics())


@pytest.fixture(scope="module")
def saved(upstream: Any, processors: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder that LeRobot makes of both."""
    folder = tmp_path_factory.mktemp("lerobot") / "act"
    upstream.save_pretrained(folder)
    for pipeline in processors:
        pipeline.save_pretrained(folder)
    return folder


def upstream_action(policy: Any, processors: Any) -> Tensor:
    policy.reset()
    action: Tensor = processors[1](policy.select_action(processors[0](raw())))
    assert action.isfinite().all()
    return action


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    (folder / "config.json").write_text(json.dumps(content))


def test_lerobot_folder_loads(saved: Path, upstream: Any, processors: Any) -> None:
    policy = load(saved)
    assert policy.receipt.ok
    assert {entry.key for entry in policy.receipt.matched} == set(upstream.state_dict())
    assert len(policy.receipt.entries) == len(policy.receipt.matched)
    ours = {policy.upstream_name(key): value for key, value in policy.state_dict().items()}
    for key, value in upstream.state_dict().items():
        assert torch.equal(ours[key], value), key
    torch.testing.assert_close(policy.act(raw()), upstream_action(upstream, processors), rtol=1e-5, atol=1e-6)


def test_nothing_is_fetched(saved: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A folder whose config asks for ImageNet weights, LeRobot's default, has better ones itself."""
    folder = shutil.copytree(saved, tmp_path / "act")
    edit_config(folder, pretrained_backbone_weights="ResNet18_Weights.IMAGENET1K_V1", device="cuda")

    def fetch(*_: object) -> None:
        raise AssertionError("weights were fetched")

    monkeypatch.setattr(act, "load_imagenet", fetch)
    policy = load(folder)
    assert receipt(folder).ok
    assert policy.device.type == "cpu"
    assert policy.preprocess(raw())[STATE].device.type == "cpu"


def test_headers_of_a_lerobot_folder(saved: Path, tmp_path: Path) -> None:
    headers = write_headers(saved, tmp_path / "headers")
    assert sum(path.stat().st_size for path in headers.iterdir()) < 64_000
    assert receipt(headers).ok
    assert receipt(headers).entries == load(saved).receipt.entries


def test_minivla_folder_loads_in_lerobot(
    saved: Path, upstream: Any, processors: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from huggingface_hub import constants
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.factory import make_pre_post_processors

    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    folder = load(saved).save(tmp_path / "ours")
    theirs = ACTPolicy.from_pretrained(folder, strict=True)
    assert theirs.config.pretrained_backbone_weights is None
    for key, value in upstream.state_dict().items():
        assert torch.equal(theirs.state_dict()[key], value), key
    read = make_pre_post_processors(policy_cfg=theirs.config, pretrained_path=str(folder))
    torch.testing.assert_close(
        upstream_action(theirs, read), upstream_action(upstream, processors), rtol=0, atol=0
    )
    again = load(folder)
    assert again.receipt.entries == load(saved).receipt.entries


@pytest.fixture
def legacy(saved: Path, tmp_path: Path) -> Path:
    """The same policy as LeRobot saved it before 0.4: no processors, statistics as buffers of the model."""
    folder = tmp_path / "legacy"
    folder.mkdir()
    shutil.copy(saved / "config.json", folder)
    stats, buffers = statistics(), {}
    for place, keys in (
        ("normalize_inputs", (STATE, ENV, CAMERA)),
        ("normalize_targets", (ACTION,)),
        ("unnormalize_outputs", (ACTION,)),
    ):
        for key in keys:
            for name in ("mean", "std"):
                buffers[f"{place}.buffer_{key.replace('.', '_')}.{name}"] = stats[key][name].clone()
    save_file(load_file(saved / "model.safetensors") | buffers, folder / "model.safetensors")
    return folder


def test_legacy_folder_loads(legacy: Path, saved: Path) -> None:
    """Under a camera and an environment state whose names have underscores of their own."""
    old, new = load(legacy), load(saved)
    assert old.receipt.ok
    assert len(old.receipt.ignored) == 10
    assert {entry.reason for entry in old.receipt.ignored} == {"statistics, read into the preprocessor"}
    assert old.receipt.matched == [entry for entry in old.receipt.entries if entry.status == "matched"]
    batch, expected = old.preprocess(raw()), new.preprocess(raw())
    for key in (STATE, ENV, CAMERA):
        assert torch.equal(batch[key], expected[key]), key
    assert torch.equal(old.act(raw()), new.act(raw()))


def test_legacy_layout_is_what_the_migration_reads(legacy: Path) -> None:
    """Our legacy folder is one: LeRobot's own migration finds the same statistics in it."""
    from lerobot.processor.migrate_policy_normalization import extract_normalization_stats

    found = extract_normalization_stats(load_file(legacy / "model.safetensors"))
    stats = statistics()
    for key in (STATE, ACTION):
        for name in ("mean", "std"):
            assert torch.equal(found[key][name], stats[key][name])


def test_legacy_folder_saved_anew(legacy: Path, tmp_path: Path) -> None:
    policy = load(legacy)
    again = load(policy.save(tmp_path / "new"))
    assert not again.receipt.ignored
    assert torch.equal(again.act(raw()), policy.act(raw()))
