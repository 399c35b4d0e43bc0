"""Policies with two phases (VQ-BeT): counting, resuming, logs, schedules; and frames left out at the end."""

from __future__ import annotations

import math
import warnings

import pytest
import torch
from torch.utils.data import Dataset

from minivla.training import train
from minivla.training.batches import windowed
from minivla.training.optim import make_optimizer, policy_lr_factor
from tests.policies.test_vqbet import config, vqbet
from tests.training.conftest import assert_same_bits, log_lines, state

RUN = {"steps": 9, "batch_size": 4, "seed": 3, "warmup_steps": 2, "log_every": 2, "progress": False}


class Chunks(Dataset):
    """Random items with VQ-BeT's windows, of whole episodes of 5 frames."""

    def __len__(self):
        return 15

    def __getitem__(self, index):
        generator = torch.Generator().manual_seed(index)
        return {
            "observation.images.table": torch.rand(3, 3, 32, 32, generator=generator),
            "observation.state": torch.rand(3, 3, generator=generator),
            "action": torch.rand(7, 2, generator=generator),
        }


def run(output, **changes):
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message=".*only minivla knows")
        return train(vqbet(n_vqvae_training_steps=5), Chunks(), output=output, **RUN | changes)


@pytest.mark.parametrize("stop", [3, 5, 7])
def test_resuming_goes_on_counting_in_either_phase(stop, tmp_path):
    whole = run(tmp_path / "whole", save_every=stop)
    assert bool(whole.policy.vqvae.discretized)
    assert whole.policy.vqvae.optimized_steps == 5
    folder = tmp_path / "whole" / "checkpoints"
    for later in folder.glob("[0-9]*"):  # as if the run had been killed after step `stop`
        if int(later.name) > stop:
            later.rename(tmp_path / f"kept{later.name}")
    expected = log_lines(tmp_path / "whole")
    with warnings.catch_warnings():
        warnings.filterwarnings("error", message="phase 1")
        run(tmp_path / "whole", save_every=stop, resume=True)
    assert log_lines(tmp_path / "whole") == expected
    kept = torch.load(tmp_path / "kept000009" / "training_state" / "state.pt", weights_only=True)
    assert_same_bits({k: v for k, v in kept.items() if k != "time"}, state(tmp_path / "whole", 9))


def test_the_log_has_the_metrics_of_both_phases_and_the_rate_rises_with_the_second(tmp_path):
    run(tmp_path / "run", log_every=1)
    records = log_lines(tmp_path / "run")
    assert all(("recon_l1_error" in r) == (r["step"] <= 5) for r in records)
    assert all(("offset_loss" in r) == (r["step"] > 5) for r in records)
    rates = [r["lr"] / 1e-3 for r in records]
    assert rates[:7] == [1, 1, 1, 1, 1, 0.5, 1]
    assert rates[8] == pytest.approx(0.5)


def test_adam_with_coupled_decay_stays_so_when_its_state_is_loaded():
    policy = vqbet()
    optimizer = make_optimizer(policy)
    again = make_optimizer(policy)
    again.load_state_dict(optimizer.state_dict())
    assert not any(group["decoupled_weight_decay"] for group in again.param_groups)
    assert [group["betas"] for group in again.param_groups] == [(0.95, 0.999)] * 3


def test_upstreams_schedules():
    from lerobot.optim.schedulers import DiffuserSchedulerConfig, VQBeTSchedulerConfig

    parameter = [torch.nn.Parameter(torch.zeros(1))]
    cases = [
        (VQBeTSchedulerConfig(num_warmup_steps=6, num_vqvae_training_steps=10), 10),
        (DiffuserSchedulerConfig(name="cosine", num_warmup_steps=6), 0),
    ]
    for upstream, start in cases:
        optimizer = torch.optim.SGD(parameter, lr=1.0)
        schedule = upstream.build(optimizer, 40)
        plan = {"start": start, "steps": 40, "schedule": "upstream"}
        for step in range(40):
            ours = policy_lr_factor(config(scheduler_warmup_steps=6), step, **plan)
            assert math.isclose(ours, optimizer.param_groups[0]["lr"], abs_tol=1e-9), (upstream, step)
            optimizer.step()
            schedule.step()


def test_a_policy_without_upstream_schedule_keeps_its_rate():
    bare = type("Config", (), {})()
    assert policy_lr_factor(bare, 7, start=0, steps=10, schedule="upstream") == 1.0
    bare.scheduler_name = "linear"
    with pytest.raises(ValueError, match="scheduler_name is 'linear', minivla knows 'cosine'"):
        policy_lr_factor(bare, 7, start=0, steps=10, schedule="upstream")


class Episodes(Chunks):
    columns = {"episode_index": torch.arange(15).numpy() // 5}  # noqa: RUF012


def test_the_last_frames_of_each_episode_begin_no_window():
    dropping = type("Config", (), {"drop_n_last_frames": 3})()
    assert windowed(Episodes(), dropping).indices == [0, 1, 5, 6, 10, 11]
    assert len(windowed(Episodes(), config())) == 15
    with pytest.warns(UserWarning, match="Chunks does not tell where episodes end"):
        assert len(windowed(Chunks(), dropping)) == 15
    dropping.drop_n_last_frames = 5
    with pytest.raises(ValueError, match="no episode has more than drop_n_last_frames = 5"):
        windowed(Episodes(), dropping)
