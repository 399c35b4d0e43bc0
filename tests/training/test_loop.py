import json
import math
import random

import numpy as np
import pytest
import torch

from minivla.training import train
from tests.training.conftest import assert_same_bits, log_lines, state
from tests.training.tiny import TinyData, tiny


def run(policy=None, data=None, **options):
    options = {"steps": 20, "batch_size": 8, "log_every": 5, "progress": False} | options
    return train(policy or tiny(), data or TinyData(), **options)


def weights(policy):
    return {name: p.detach().clone() for name, p in policy.named_parameters()}


def test_the_policy_learns_and_is_left_ready_to_act():
    policy = tiny(noise=0.0, dropout=0.0)
    result = run(policy, steps=300, log_every=10)
    losses = [record["loss"] for record in result.log]
    assert losses[-1] < 0.4 * losses[0]
    assert result.policy is policy
    assert not policy.training
    assert str(result) == f"300 steps, loss {losses[0]:.4g} → {losses[-1]:.4g}"


def test_the_loop_is_what_anyone_would_write():
    """Twenty steps by hand, with none of the library's loop, give the same weights to the bit."""
    from minivla.training.batches import STEP, Batches, seed_all

    policy, batches = tiny(), Batches(TinyData(), 8, seed=4)
    optimizer = torch.optim.AdamW(policy.optimizer_groups(), fused=True)
    policy.train()
    for step in range(20):
        raw = batches[step]
        seed_all(STEP, 4, step, 0)
        loss, _ = policy(policy.preprocess(raw))
        loss.backward()
        torch.nn.utils.clip_grad_norm_(policy.parameters(), 0.3)
        for group, rate in zip(optimizer.param_groups, (1e-2, 1e-3), strict=True):
            group["lr"] = rate * (
                (step + 1) / 4 if step < 4 else 0.5 * (1 + math.cos(math.pi * (step - 4) / 16))
            )
        optimizer.step()
        optimizer.zero_grad()
    trained = run(tiny(), seed=4, warmup_steps=4, grad_clip=0.3).policy
    assert_same_bits(weights(trained), weights(policy))


def test_log_records_hold_means_over_their_window(tmp_path):
    single = run(log_every=1, steps=7).log
    result = run(log_every=3, steps=7, output=tmp_path / "run")
    assert [record["step"] for record in result.log] == [3, 6, 7]
    for key in ("loss", "l1_loss", "grad_norm"):
        assert result.log[1][key] == pytest.approx(np.mean([r[key] for r in single[3:6]]))
    assert list(result.log[0]) == ["step", "loss", "l1_loss", "grad_norm", "lr", "time"]
    assert result.log[0]["lr"] == pytest.approx(1e-2 * 0.5 * (1 + math.cos(math.pi * 2 / 7)))
    assert result.log[0]["time"]["steps_per_s"] > 0
    written = [json.loads(line) for line in (tmp_path / "run" / "log.jsonl").read_text().splitlines()]
    assert written == result.log


def test_the_seed_decides_everything_and_nothing_else_does():
    first = weights(run(data=TinyData(augment=True), seed=3).policy)
    random.seed(99), np.random.seed(99), torch.rand(5)
    again = weights(run(data=TinyData(augment=True), seed=3, num_workers=2, log_every=7).policy)
    other = weights(run(data=TinyData(augment=True), seed=4).policy)
    assert_same_bits(first, again)
    assert not torch.equal(first["head.weight"], other["head.weight"])


def test_training_leaves_the_callers_random_numbers_alone():
    def drawn():
        return random.random(), np.random.random(), torch.rand(()).item()

    policy = tiny()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    expected = drawn()
    random.seed(1), np.random.seed(1), torch.manual_seed(1)
    run(policy, data=TinyData(augment=True), steps=2)
    assert drawn() == expected


def test_a_run_writes_checkpoints_a_pointer_a_log_and_a_plot(tmp_path):
    result = run(output=tmp_path, save_every=6, keep=2)
    folders = sorted(f.name for f in (tmp_path / "checkpoints").iterdir())
    assert folders == ["000018", "000020", "last"]
    assert (tmp_path / "checkpoints" / "last").resolve().name == "000020"
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")
    assert_same_bits(dict(state(tmp_path, 20)["policy"]), dict(result.policy.state_dict()))
    names = {f.name for f in (tmp_path / "checkpoints" / "last" / "pretrained_model").iterdir()}
    assert names >= {
        "config.json",
        "model.safetensors",
        "policy_preprocessor.json",
        "policy_postprocessor.json",
    }


def test_the_average_is_what_gets_saved_evaluated_and_returned(tmp_path):
    from safetensors.torch import load_file

    result = run(output=tmp_path, ema=0.9, eval_env="tests/Tiny-v0", eval_every=20, eval_episodes=2)
    kept = state(tmp_path, 20)
    saved = load_file(tmp_path / "checkpoints" / "last" / "pretrained_model" / "model.safetensors")
    assert_same_bits(saved, kept["average"])
    assert_same_bits(weights(result.policy), kept["average"])
    assert_same_bits(dict(kept["policy"]), dict(run().policy.state_dict()))
    assert not torch.equal(kept["policy"]["head.weight"], kept["average"]["head.weight"])


def test_evaluation_is_logged_and_changes_no_step(tmp_path):
    result = run(output=tmp_path, eval_env="tests/Tiny-v0", eval_every=10, eval_episodes=4, eval_seed=10)
    rounds = [record for record in result.log if "success" in record]
    assert [r["step"] for r in rounds] == [10, 20]
    assert (rounds[0]["success"], rounds[0]["episodes"]) == (0.5, 4)
    assert_same_bits(weights(result.policy), weights(run().policy))
    assert "success 0.500 [0.150, 0.850]" in str(result)
    assert len(result.plot().axes) == 2


def test_learning_rate_and_clipping():
    bound = run(grad_clip=0.01, lr=0.05, schedule="constant", steps=5)
    assert {record["lr"] for record in bound.log} == {0.05}
    free = run(grad_clip=None, lr=0.05, schedule="constant", steps=5)
    assert free.log[0]["grad_norm"] > 0.1
    assert not torch.equal(bound.policy.head.weight, free.policy.head.weight)


def test_a_run_says_once_that_lerobot_will_refuse_its_checkpoints(tmp_path, monkeypatch, recwarn):
    monkeypatch.setattr("tests.training.tiny.TinyConfig.MINIVLA_FIELDS", ("width",))
    run(tiny(width=20), output=tmp_path / "run", save_every=5)
    told = [str(warning.message) for warning in recwarn if "LeRobot will refuse" in str(warning.message)]
    assert told == [
        f"the checkpoints in {tmp_path / 'run'} will use fields only minivla knows (width): "
        "LeRobot will refuse them"
    ]


def test_frozen_parameters_do_not_move():
    policy = tiny()
    policy.encoder.requires_grad_(False)
    before = weights(policy)
    policy.optimizer_groups = lambda: [{"params": policy.head.parameters(), "lr": 1e-2, "weight_decay": 0.1}]
    run(policy, ema=0.9)
    after = weights(policy)
    moved = {name for name in before if not torch.equal(before[name], after[name])}
    assert moved == {"head.weight", "head.bias"}


def test_bfloat16_can_be_asked_for():
    half = run(mixed_precision="bf16").policy
    full = run(mixed_precision="no").policy
    assert half.head.weight.dtype == torch.float32
    assert not torch.equal(half.head.weight, full.head.weight)
    torch.testing.assert_close(half.head.weight, full.head.weight, atol=0.02, rtol=0)


def test_a_loss_that_is_not_finite_stops_the_run_before_it_is_saved(tmp_path):
    class Diverging(type(tiny())):
        def forward(self, batch, **settings):
            loss, metrics = super().forward(batch, **settings)
            return loss * (float("nan") if batch["index"][0] == batch_seven else 1.0), metrics

    from minivla.training.batches import Batches

    data = TinyData()
    batch_seven = Batches(data, 8, seed=0)[6]["index"][0]
    policy = tiny()
    policy.__class__ = Diverging
    with pytest.raises(
        ValueError, match=r"at step 7, loss is nan and grad_norm is nan; nothing was saved since"
    ):
        run(policy, data, output=tmp_path, save_every=6, steps=40, log_every=20)
    assert [f.name for f in (tmp_path / "checkpoints").iterdir() if f.is_dir() and not f.is_symlink()] == [
        "000006"
    ]


def test_a_batch_that_does_not_fit_is_refused_before_anything_is_written(tmp_path):
    with pytest.raises(ValueError, match=r"actions have shape \(4, 2\) a sample, the policy's \(6, 2\)"):
        run(tiny(chunk_size=6), output=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_an_existing_run_is_not_overwritten(tmp_path):
    run(output=tmp_path, steps=2)
    with pytest.raises(ValueError, match=r"holds a training run; pass resume=True"):
        run(output=tmp_path, steps=2)
    assert len(log_lines(tmp_path)) == 1


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ({"steps": 0}, "steps=0; expected a whole number from 1 on"),
        ({"steps": 1.5}, "steps=1.5; expected a whole number from 1 on"),
        ({"batch_size": "8"}, "batch_size='8'; expected a whole number from 1 on"),
        ({"save_every": True}, "save_every=True; expected a whole number from 0 on"),
        ({"lr": 0}, "lr=0; expected a learning rate above 0"),
        ({"lr": -1e-3}, "lr=-0.001; expected a learning rate above 0"),
        ({"lr": math.inf}, "lr=inf; expected a learning rate above 0"),
        ({"lr": math.nan}, "lr=nan; expected a learning rate above 0"),
        ({"lr": "1e-3"}, "lr='1e-3'; expected a learning rate above 0"),
        ({"grad_clip": 0.0}, "grad_clip=0.0; expected the largest norm of the gradient"),
        ({"grad_clip": -1}, "grad_clip=-1; expected the largest norm of the gradient"),
        ({"ema": True}, "ema=True; expected a decay between 0 and 1"),
        ({"ema": "0.9"}, "ema='0.9'; expected a decay between 0 and 1"),
        ({"keep": 1.5}, "keep=1.5; expected how many checkpoints stay"),
        ({"seed": -1}, "seed=-1; expected a whole number from 0 on"),
        ({"schedule": "linear"}, "schedule='linear'; expected one of cosine, constant"),
        ({"mixed_precision": "fp16"}, "mixed_precision='fp16'; expected 'bf16', 'no' or None"),
        ({"ema": 1.0}, "ema=1.0; expected a decay between 0 and 1"),
        ({"keep": 0}, "keep=0; expected how many checkpoints stay"),
        ({"eval_every": 5}, "eval_every is set and eval_env is not"),
        ({"resume": True}, "resume and save_every need output="),
        ({"save_every": 5}, "resume and save_every need output="),
    ],
)
def test_settings_that_cannot_work(wrong, message):
    with pytest.raises(ValueError, match=message):
        run(**wrong)
