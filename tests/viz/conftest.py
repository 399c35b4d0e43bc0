"""A tiny ACT with random weights that looks at two pictures of Tabletop, and no figure left open."""

import matplotlib

matplotlib.use("agg")

from types import SimpleNamespace

import matplotlib.pyplot as plt
import pytest
import torch

import minivla
import minivla.world
from minivla.data.features import features_of
from minivla.data.windows import delta_timestamps
from minivla.policies.act import ACT, ACTConfig


@pytest.fixture(autouse=True)
def _close_figures():
    yield
    plt.close("all")


@pytest.fixture(scope="session")
def seen():
    """policy, dataset, raw item, batch and a trace of one chunk."""
    torch.manual_seed(0)
    dataset = minivla.world.demonstrations("pick_place", 2, 0)
    inputs, outputs = features_of(dataset)
    small = {"dim_model": 32, "n_heads": 4, "dim_feedforward": 48, "latent_dim": 4}
    config = ACTConfig(
        input_features=inputs,
        output_features=outputs,
        compact_vision=True,
        vocabulary=minivla.world.VOCABULARY,
        n_encoder_layers=2,
        n_vae_encoder_layers=1,
        pretrained_backbone_weights=None,
        chunk_size=8,
        n_action_steps=4,
        **small,
    )
    policy = ACT(config, dataset.stats)
    windows = dataset.windows(delta_timestamps(config, dataset.fps))
    item = windows[dataset.episodes[0][1] - 5]
    batch = policy.preprocess(item)
    with minivla.trace(policy) as trace:
        policy.predict_action_chunk(batch)
    return SimpleNamespace(policy=policy, dataset=windows, item=item, batch=batch, trace=trace)
