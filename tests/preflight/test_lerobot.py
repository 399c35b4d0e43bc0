"""LeRobot's own policies under examination, with their own processors."""

from __future__ import annotations

import copy
from importlib import import_module
from types import SimpleNamespace
from unittest import mock

import pytest
import torch
import torch.nn.functional as F
from torch.utils.data import DataLoader, default_collate

import minivla
from minivla.data.windows import delta_timestamps
from minivla.preflight import doctor
from minivla.world import demonstrations, record
from tests.parity import redraw
from tests.policies.fast_small import their_words
from tests.policies.pi_small import EVERYTHING, SIDE, at_tiny_size, redraw_pi, their_module
from tests.preflight.patients import DIFFUSION, STATE, TABLE, VQBET, WRIST


@pytest.fixture(scope="module")
def dataset():
    return demonstrations("pick_place", 5, 2, size=32)


@pytest.fixture(scope="module")
def theirs(dataset):
    """(policy, preprocessor, postprocessor); LeRobot is imported here, which takes its time."""
    from lerobot.configs import FeatureType, PolicyFeature
    from lerobot.policies.act.configuration_act import ACTConfig
    from lerobot.policies.act.modeling_act import ACTPolicy
    from lerobot.policies.act.processor_act import make_act_pre_post_processors

    torch.set_num_threads(1)
    config = ACTConfig(
        input_features={
            TABLE: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            WRIST: PolicyFeature(FeatureType.VISUAL, (3, 32, 32)),
            STATE: PolicyFeature(FeatureType.STATE, (3,)),
        },
        output_features={"action": PolicyFeature(FeatureType.ACTION, (3,))},
        device="cpu",
        chunk_size=6,
        n_action_steps=4,
        dim_model=32,
        n_heads=4,
        dim_feedforward=48,
        n_encoder_layers=1,
        n_vae_encoder_layers=1,
        latent_dim=5,
        dropout=0.0,
        pretrained_backbone_weights=None,
    )
    policy = ACTPolicy(config)
    redraw(policy)
    return policy, *make_act_pre_post_processors(config, dataset.stats)


@pytest.fixture
def sick(theirs):
    """Copies, to spoil."""
    return [copy.deepcopy(part) for part in theirs]


@pytest.fixture
def raw(theirs, dataset):
    windows = dataset.windows(delta_timestamps(theirs[0].config, dataset.fps))
    return default_collate([windows[row] for row in (3, 70)])


def examined(parts, raw, **given):
    policy, preprocessor, postprocessor = parts
    return doctor(policy, raw, preprocessor=preprocessor, postprocessor=postprocessor, **given)


def test_it_is_clean(theirs, raw, dataset):
    before = {name: tensor.clone() for name, tensor in theirs[0].state_dict().items()}
    report = examined(theirs, raw)
    assert report.codes == (), str(report)
    report = examined(theirs, raw, dataset=dataset, env="tabletop:pick_place?size=32")
    assert set(report.codes) <= {"replay-error", "action-out-of-range"}, str(report)  # its weights are random
    assert all(torch.equal(tensor, before[name]) for name, tensor in theirs[0].state_dict().items())
    assert "depends on instruction" in report.not_run


def test_without_processors_its_statistics_are_not_examined(theirs, raw):
    report = doctor(theirs[0], raw)
    assert {"statistics present", "processors agree", "depends on images"} <= set(report.not_run)
    assert report.codes == ()
    assert report.is_thin
    assert "Too little was checked" in str(report).split("measured")[0]


def test_exchanged_processors_are_named_once(theirs, raw):
    policy, before, after = theirs
    assert examined((policy, after, before), raw).codes == ("processors-exchanged",)


@pytest.fixture(scope="module")
def pictures():
    return demonstrations("detour", 4, 3, size=64)


def generative(family: str, dataset, *cameras: str, **settings):
    """(policy, preprocessor, postprocessor) of LeRobot's Diffusion or VQ-BeT, small and freshly made."""
    from lerobot.configs import FeatureType, PolicyFeature

    parts = [
        f"lerobot.policies.{family}.{part}_{family}" for part in ("configuration", "modeling", "processor")
    ]
    configuration, modeling, processor = map(import_module, parts)
    title = {"diffusion": "Diffusion", "vqbet": "VQBeT"}[family]
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for camera in cameras}
    inputs[STATE] = PolicyFeature(FeatureType.STATE, (3,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
    config = getattr(configuration, f"{title}Config")(
        input_features=inputs, output_features=outputs, device="cpu", use_group_norm=True, **settings
    )
    torch.manual_seed(0)
    policy = getattr(modeling, f"{title}Policy")(config)
    return policy, *getattr(processor, f"make_{family}_pre_post_processors")(config, dataset.stats)


def seen(policy, dataset):
    windows = dataset.windows(delta_timestamps(policy.config, dataset.fps))
    raw = default_collate([windows[row] for row in (3, 25)])
    others = {TABLE, WRIST} - set(policy.config.input_features)
    return {key: value for key, value in raw.items() if key not in others}


@pytest.mark.parametrize("masked", [False, True])
def test_its_diffusion_is_clean(masked, pictures):
    ours_alone = ("compact_vision", "vocabulary", "denoiser", "objective")
    settings = {k: v for k, v in DIFFUSION.items() if k not in ours_alone and not k.startswith("transformer")}
    parts = generative("diffusion", pictures, TABLE, WRIST, **settings, do_mask_loss_for_padding=masked)
    report = examined(parts, seen(parts[0], pictures))
    assert report.codes == ("padding-leaks",), str(report)
    assert report.ok
    assert {"frozen and trainable", "queue reset", "depends on images"} <= set(report.passed)


@pytest.mark.parametrize("phase", [1, 2])
def test_its_vqbet_is_clean_in_both_phases(phase, pictures):
    settings = {
        k: v for k, v in VQBET.items() if k not in ("several_cameras", "compact_vision", "vocabulary")
    }
    parts = generative("vqbet", pictures, TABLE, **settings)
    vqvae = parts[0].vqbet.action_head.vqvae_model
    vqvae.discretized.fill_(phase == 2)
    vqvae.vq_layer.freeze_codebook.fill_(phase == 2)
    report = examined(parts, seen(parts[0], pictures))
    assert report.codes == ("padding-leaks",), str(report)
    assert {"frozen and trainable", "queue reset", "depends on state"} <= set(report.passed)
    assert len(report.notes) == 1


def pi(family: str, dataset):
    """(policy, preprocessor, postprocessor) of LeRobot's π0 or π0.5, tiny, with a tokenizer of letters."""
    import lerobot.processor.tokenizer_processor as tokenizing
    from lerobot.configs import FeatureType, PolicyFeature

    module, title = their_module(family), {"pi0": "PI0", "pi05": "PI05"}[family]
    inputs = {camera: PolicyFeature(FeatureType.VISUAL, (3, 64, 64)) for camera in (TABLE, WRIST)}
    inputs[STATE] = PolicyFeature(FeatureType.STATE, (3,))
    outputs = {"action": PolicyFeature(FeatureType.ACTION, (3,))}
    config = getattr(module, f"{title}Config")(
        input_features=inputs, output_features=outputs, device="cpu", chunk_size=6, n_action_steps=3,
        image_resolution=(SIDE, SIDE), tokenizer_max_length=90,
    )  # fmt: skip
    with at_tiny_size(module, EVERYTHING):
        policy = getattr(module, f"{title}Policy")(config)
    redraw_pi(policy)
    processor = import_module(f"lerobot.policies.{family}.processor_{family}")
    letters = SimpleNamespace(from_pretrained=their_words)
    with mock.patch.object(tokenizing, "AutoTokenizer", letters):
        return policy, *getattr(processor, f"make_{family}_pre_post_processors")(config, dataset.stats)


@pytest.mark.parametrize("family", ["pi0", "pi05"])
def test_its_pi_is_clean(family, pictures):
    """The head for words and most of the last language layer do nothing, which is known of them."""
    parts = pi(family, pictures)
    report = examined(parts, seen(parts[0], pictures))
    assert report.codes == ("padding-leaks",), str(report)
    assert {"frozen and trainable", "queue reset", "depends on state"} <= set(report.passed)
    assert "depends on instruction" in report.passed


def no_statistics(parts, raw):
    from lerobot.policies.act.processor_act import make_act_pre_post_processors

    parts[1:] = make_act_pre_post_processors(parts[0].config, None)


def infinite(parts, raw):
    step = next(step for step in parts[1].steps if hasattr(step, "norm_map"))
    step.stats[STATE]["mean"] = torch.full((3,), float("inf"))
    step._tensor_stats[STATE]["mean"] = torch.full((3,), float("inf"))


def leaky(parts, raw):
    def forward(self, batch):
        batch = dict(batch)
        batch["observation.images"] = [batch[key] for key in self.config.image_features]
        loss = F.l1_loss(self.model(batch)[0], batch["action"])
        return loss, {}

    parts[0].__class__ = type("Leaky", (type(parts[0]),), {"forward": forward})


def no_reset(parts, raw):
    parts[0].__class__ = type("Stale", (type(parts[0]),), {"reset": lambda self: None})


def blind(parts, raw):
    with torch.no_grad():
        parts[0].model.encoder_img_feat_input_proj.weight.zero_()


def renamed(parts, raw):
    raw["observation.images.cam_0"], raw["observation.images.cam_1"] = raw.pop(TABLE), raw.pop(WRIST)


def bytes_first(parts, raw):
    raw[TABLE] = (raw[TABLE] * 255).byte()


def bright(parts, raw):
    raw[TABLE] = raw[TABLE] * 255


@pytest.mark.parametrize(
    ("spoil", "code"),
    [
        (no_statistics, "statistics-absent"),
        (infinite, "statistics-not-finite"),
        (leaky, "padding-leaks"),
        (no_reset, "queue-not-reset"),
        (blind, "ignores-image"),
        (renamed, "camera-names"),
        (bytes_first, "image-layout"),
        (bright, "image-range"),
    ],
)
def test_its_faults_are_caught_and_named(spoil, code, sick, raw):
    spoil(sick, raw)
    report = examined(sick, raw)
    assert {finding.code for finding in report.findings if finding.severity == "error"} == {code}, str(report)


def test_its_datasets_are_read(tmp_path):
    """Recorded with video, read back, batched by a data loader; then a batch is turned upside down."""
    dataset = record("pick_place", 3, 5, tmp_path / "data", progress=False)
    policy = minivla.load("act-tabletop")
    raw = next(iter(DataLoader(dataset, batch_size=2)))
    report = doctor(policy, raw, dataset=dataset, env="tabletop:pick_place")
    assert report.codes == (), str(report)
    assert {"statistics of this dataset", "picture orientation", "open-loop replay"} <= set(report.passed)
    assert doctor(policy, raw | {TABLE: raw[TABLE].flip(-2)}, dataset=dataset).codes == ("image-flipped",)
