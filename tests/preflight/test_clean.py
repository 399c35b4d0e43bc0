"""No false alarm: trained and untrained policies, bodies, tasks, seeds, ways to give a batch."""

from __future__ import annotations

import copy
import random

import gymnasium
import numpy as np
import pytest
import torch

import minivla
import minivla.world
from minivla.preflight import Finding, Report, doctor
from minivla.training.evaluation import Episode, raw_batch
from minivla.world import demonstrations
from tests.policies.small import tiny_act, tiny_raw
from tests.preflight.patients import patient_of, small_act


@pytest.fixture(scope="module")
def trained():
    return minivla.load("act-tabletop")


def assert_clean(report: Report, *excused: str) -> None:
    assert set(report.codes) <= set(excused), str(report)
    assert not {"inputs", "depends on state", "frozen and trainable", "queue reset"} & set(report.not_run)


@pytest.mark.parametrize("seed", [1, 2, 3])
def test_the_shipped_policy_is_clean_with_dataset_and_environment(trained, seed):
    dataset = demonstrations("pick_place", 5, seed)
    size = (1, 2, 5)[seed % 3]
    rows = torch.randint(len(dataset), (size,), generator=torch.Generator().manual_seed(seed)).tolist()
    report = patient_of(trained, dataset, "tabletop:pick_place", rows).report("de")
    assert_clean(report)
    assert report.ok
    assert set(report.not_run) == {"time convention", "replay in the environment"}


@pytest.mark.parametrize("seed", range(8))
def test_the_shipped_policy_is_clean_with_a_batch_alone(trained, seed):
    dataset = demonstrations("pick_place", 1, 50 + seed)
    row = 7 * seed % len(dataset)
    assert_clean(doctor(trained, dataset[row]))


@pytest.mark.parametrize(
    ("task", "body"),
    [
        ("pick_place", "cartesian"),
        ("pick_place", "arm2"),
        ("sort", "bimanual"),
        ("detour", "arm2"),
        ("push", "cartesian"),
        ("reach", "bimanual"),
    ],
)
def test_an_untrained_policy_only_replays_badly(task, body):
    """Its statistics, cameras and actions are in order; that it cannot act yet is true."""
    dataset = demonstrations(task, 4, 3, embodiment=body)
    env = f"tabletop:{task}?embodiment={body}"
    report = patient_of(
        small_act(dataset, 1), dataset, env, range(3, len(dataset), len(dataset) // 4)
    ).report("de")
    constant = {"statistics-constant"} if task in ("push", "reach") else set()
    assert set(report.codes) == {"replay-error"} | constant, str(report)


@pytest.mark.parametrize("seed", range(4))
def test_a_tiny_random_policy_is_clean(seed):
    assert_clean(doctor(tiny_act(seed), tiny_raw(2, seed)))


@pytest.mark.parametrize(
    "settings",
    [
        {"temporal_ensemble_coeff": 0.01, "n_action_steps": 1},
        {"use_vae": False},
        {"pre_norm": True},
        {"vocabulary": ()},
        {"dropout": 0.2},
    ],
)
def test_every_kind_of_act_is_clean(settings):
    assert_clean(doctor(tiny_act(**settings), tiny_raw()))


def test_what_an_environment_gives_is_clean(trained):
    env = gymnasium.make("minivla/Tabletop-v0")
    observation, info = env.reset(seed=4)
    assert_clean(doctor(trained, {**observation, "task": info["task"]}, env=env))
    seen = raw_batch([Episode(env, seed, None, False) for seed in range(5)])
    report = doctor(trained, seen, env=env)
    assert_clean(report)
    assert "picture orientation" in report.passed


def test_recorded_episodes_replay_in_the_environment(trained):
    """Demonstrations without disturbances tell their episodes' seeds; disturbed ones do not repeat."""
    assert demonstrations("pick_place", 1, 8).seeds is None
    dataset = demonstrations("pick_place", 3, 8, noise=0.0)
    report = doctor(trained, dataset[2], dataset=dataset, env="tabletop:pick_place")
    assert_clean(report)
    assert report.measurements["recorded episodes that succeed when replayed"] == 1
    assert "replay in the environment" in report.passed


def test_nothing_is_changed(trained):
    dataset = demonstrations("pick_place", 2, 1)
    policy = copy.deepcopy(trained)
    policy.encoder.requires_grad_(False)
    policy.train()
    policy.encoder.eval()
    policy.act(dataset[0])
    policy.train()
    policy.encoder.eval()
    raw, queue = dict(dataset[3]), [action.clone() for action in policy._queue]
    before = {name: tensor.clone() for name, tensor in policy.state_dict().items()}
    flags = [(m.training, [p.requires_grad for p in m.parameters()]) for m in policy.modules()]
    draws = (torch.get_rng_state(), random.getstate(), np.random.get_state()[1].tolist())
    doctor(policy, raw, dataset=dataset, env="tabletop:pick_place")
    assert all(torch.equal(tensor, before[name]) for name, tensor in policy.state_dict().items())
    assert flags == [(m.training, [p.requires_grad for p in m.parameters()]) for m in policy.modules()]
    assert all(p.grad is None for p in policy.parameters())
    assert all(torch.equal(a, b) for a, b in zip(queue, policy._queue, strict=True))
    assert torch.equal(draws[0], torch.get_rng_state())
    assert draws[1:] == (random.getstate(), np.random.get_state()[1].tolist())
    assert raw.keys() == dict(dataset[3]).keys()


def test_a_report_reads_the_same_every_time(trained):
    dataset = demonstrations("pick_place", 2, 1)
    one, other = (str(doctor(trained, dataset[3])) for _ in range(2))
    assert one == other == repr(doctor(trained, dataset[3]))
    assert max(map(len, one.splitlines())) <= 100
    assert "not run" in one
    assert "seen: 1 sample)" in " ".join(one.split())
    assert "dataset" in one


def test_errors_come_first_and_decide():
    warning = Finding("a", "warning", "here", "what", "mend")
    error = Finding("b", "error", "there", "what", "mend", "x | y\n--+--")
    assert Report((warning,)).ok
    assert not Report((warning, error)).ok
    assert "           x | y" in str(Report((error,)))


def test_it_works_where_gradients_are_off(trained):
    raw = demonstrations("pick_place", 1, 1)[3]
    with torch.inference_mode():
        assert_clean(doctor(trained, raw))
    with torch.no_grad():
        assert_clean(doctor(trained, raw))


def test_memory_that_is_short_stops_the_training_probe(trained, monkeypatch):
    from minivla.preflight import learning

    monkeypatch.setattr(learning, "_free_memory", lambda device: 10_000)
    report = doctor(trained, demonstrations("pick_place", 1, 1)[3])
    assert report.not_run["frozen and trainable"].startswith("memory")
    assert report.ok


@pytest.mark.parametrize(
    ("arguments", "error", "says"),
    [
        (lambda p: (p, [1]), TypeError, "batch is a list"),
        (lambda p: (torch.nn.Linear(1, 1), {}), TypeError, "Linear"),
    ],
)
def test_what_cannot_be_examined_is_refused(trained, arguments, error, says):
    with pytest.raises(error, match=says):
        doctor(*arguments(trained))


def test_a_dataset_of_unknown_kind_is_refused(trained):
    with pytest.raises(TypeError, match="dataset is a list"):
        doctor(trained, {}, dataset=[{}])


def test_an_empty_batch_gives_findings_not_errors(trained):
    report = doctor(trained, {})
    assert set(report.codes) == {"camera-absent", "state-absent", "instruction-absent"}
    assert "depends on images" in report.not_run
