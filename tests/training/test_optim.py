import pytest
import torch

from minivla.training.optim import Average, lr_factor, make_optimizer, trainable_report
from tests.training.tiny import tiny


def test_groups_keep_their_ratio_when_the_rate_is_replaced():
    own = [group["lr"] for group in make_optimizer(tiny()).param_groups]
    replaced = [group["lr"] for group in make_optimizer(tiny(), lr=0.5).param_groups]
    assert own == [1e-2, 1e-3]
    assert replaced == pytest.approx([0.5, 0.05])


def test_frozen_parameters_and_nothing_to_train():
    policy = tiny()
    policy.encoder.requires_grad_(False)
    policy.head.requires_grad_(False)
    policy.optimizer_groups = lambda: [{"params": [], "lr": 1.0, "weight_decay": 0.0}]
    with pytest.raises(
        ValueError, match=r"Tiny has nothing to train: every parameter is frozen.*trainable_report"
    ):
        make_optimizer(policy)


def test_schedules():
    constant = [lr_factor(k, steps=5, warmup_steps=2, schedule="constant") for k in range(5)]
    assert constant == [0.5, 1, 1, 1, 1]
    cosine = [lr_factor(k, steps=100) for k in range(100)]
    assert cosine[0] == 1
    assert cosine[50] == pytest.approx(0.5)
    assert 0 < cosine[99] < 3e-4
    assert lr_factor(0, steps=1, warmup_steps=1) == 1


def test_the_average_follows_its_formula_and_gives_the_weights_back():
    policy = tiny()
    average = Average(policy, 0.5)
    before = {name: p.detach().clone() for name, p in policy.named_parameters()}
    with torch.no_grad():
        for p in policy.parameters():
            p.add_(1)
    own = {name: p.detach().clone() for name, p in policy.named_parameters()}
    average.update(policy, step=1)  # decay min(0.5, 2 / 11)
    expected = {name: before[name] + (1 - 2 / 11) for name in before}
    torch.testing.assert_close(average.weights, expected)
    with pytest.raises(KeyError), average.applied(policy):
        torch.testing.assert_close(dict(policy.named_parameters())["head.bias"].data, expected["head.bias"])
        raise KeyError
    assert all(torch.equal(p, own[name]) for name, p in policy.named_parameters())


def test_the_average_of_bfloat16_weights_is_kept_in_float32():
    policy = tiny().bfloat16()
    policy.encoder.requires_grad_(False)
    average = Average(policy, 0.999)
    assert {w.dtype for w in average.weights.values()} == {torch.float32}
    assert list(average.weights) == ["head.weight", "head.bias"]
    with pytest.raises(ValueError, match=r"other parameters \(encoder"):
        average.load(Average(tiny(), 0.9).weights)


def test_trainable_report():
    policy = tiny()
    policy.encoder.bias.requires_grad_(False)
    report = trainable_report(policy)
    assert report.rows == (("encoder", 64, 48), ("head", 136, 136))
    assert (report.total, report.trainable) == (200, 184)
    lines = str(report).splitlines()
    assert lines[0].split() == ["module", "parameters", "trainable", "frozen"]
    assert lines[1].split() == ["encoder", "64", "48", "16"]
    assert lines[-1].split() == ["total", "200", "184", "16"]


def test_trainable_report_looks_below_a_single_root():
    root = torch.nn.ModuleDict(
        {"model": torch.nn.ModuleDict({"eye": torch.nn.Linear(2, 3), "arm": torch.nn.Linear(3, 1)})}
    )
    root["model"]["hand"] = root["model"]["arm"]  # shared, counted once
    assert trainable_report(root).rows == (("eye", 9, 9), ("arm", 4, 4))
    assert trainable_report(torch.nn.Linear(2, 2)).rows == (("weight", 4, 4), ("bias", 2, 2))
