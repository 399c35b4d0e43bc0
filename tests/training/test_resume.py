"""Runs that are killed, interrupted, damaged and shared between processes."""

import json
import random
import shutil
import signal
import warnings

import pytest
import torch

from minivla.training import train
from minivla.training.checkpoint import _fingerprint
from tests.training.conftest import assert_same_bits, kill, log_lines, state, wait_for_steps
from tests.training.tiny import TinyData, TinyEnv, script, tiny

RUN = {
    "steps": 30, "batch_size": 8, "seed": 11, "warmup_steps": 5, "ema": 0.9, "save_every": 5, "log_every": 1,
    "eval_env": "tests/Tiny-v0", "eval_every": 7, "eval_episodes": 3, "data": {"augment": True},
}  # fmt: skip


def whole(output, **changes):
    """A run in this process."""
    script({**RUN, "output": str(output), "data": dict(RUN["data"]), **changes})


@pytest.fixture(scope="module")
def reference(tmp_path_factory):
    """The run that nothing happened to."""
    output = tmp_path_factory.mktemp("reference") / "run"
    whole(output)
    return output


def assert_same_run(output, reference):
    assert_same_bits(state(output, 30), state(reference, 30))
    assert log_lines(output) == log_lines(reference)


def test_a_killed_run_resumes_to_the_same_bits(tmp_path, start, reference):
    output, step = tmp_path / "run", random.SystemRandom().randrange(1, 27)
    process = start(**RUN | {"output": str(output), "data": {"augment": True, "pause": 0.001}})
    wait_for_steps(process, output, step)
    assert kill(process) == -signal.SIGKILL, f"killed at step {step}"
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="no whole checkpoint")  # killed before the first one
        whole(output, resume=True)
    assert_same_run(output, reference)


def test_an_interrupted_run_saves_and_resumes_to_the_same_bits(tmp_path, start, reference):
    output = tmp_path / "run"
    process = start(
        **RUN | {"output": str(output), "data": {"augment": True, "pause": 0.002}, "num_workers": 2}
    )
    wait_for_steps(process, output, 10)
    assert kill(process, signal.SIGINT) == 0
    step = max(record["step"] for record in log_lines(output))
    assert 10 <= step < 30
    assert state(output, step)["step"] == step
    whole(output, resume=True)
    assert_same_run(output, reference)


def test_an_unfinished_log_window_survives(tmp_path, reference):
    """Log every 6 steps, save every 5: the steps since the last record are part of the checkpoint."""
    whole(tmp_path / "one", log_every=6)
    whole(tmp_path / "two", log_every=6)
    for step in range(21, 31):
        shutil.rmtree(tmp_path / "two" / "checkpoints" / f"{step:06d}", ignore_errors=True)
    assert len(state(tmp_path / "two", 20)["window"]) == 2
    whole(tmp_path / "two", log_every=6, resume=True)
    assert_same_run(tmp_path / "two", tmp_path / "one")


def test_the_clock_of_an_unfinished_log_window_survives(tmp_path):
    """Two of the window's six steps took a hundred seconds, says the checkpoint they are kept in."""
    whole(tmp_path, steps=20, log_every=6)
    folder = tmp_path / "checkpoints" / "000020"
    shutil.rmtree(folder)
    shutil.rmtree(tmp_path / "checkpoints" / "000015")
    file = tmp_path / "checkpoints" / "000010" / "training_state" / "state.pt"
    kept = torch.load(file, weights_only=True)
    assert kept["time"]["window_seconds"] > 0
    kept["time"] = {"seconds": 1000.0, "window_seconds": 100.0}
    torch.save(kept, file)
    table = file.with_name("files.json")
    listed = json.loads(table.read_text())
    listed["training_state/state.pt"] = _fingerprint(file)
    table.write_text(json.dumps(listed))
    whole(tmp_path, steps=20, log_every=6, resume=True)
    lines = (tmp_path / "log.jsonl").read_text().splitlines()
    times = {r["step"]: r["time"] for r in map(json.loads, lines) if "time" in r}
    assert 1100 <= times[12]["seconds"] < 1110
    assert 0.05 < times[12]["steps_per_s"] <= 0.06
    assert 1100 <= times[18]["seconds"] < 1110


LISTS = {
    "no list": '{"half',
    "empty list": "{}",
    "malformed list": '{"training_state/state.pt": 3, "pretrained_model/model.safetensors": {}}',
}


def damage(folder, how):
    weights = folder / "pretrained_model" / "model.safetensors"
    content = weights.read_bytes()
    if how == "truncated":
        weights.write_bytes(content[:-40])
    elif how == "flipped bit":
        weights.write_bytes(content[:-1] + bytes([content[-1] ^ 1]))
    elif how == "missing file":
        (folder / "training_state" / "state.pt").unlink()
    else:
        (folder / "training_state" / "files.json").write_text(LISTS[how])


@pytest.mark.parametrize(
    ("how", "message"),
    [
        ("truncated", r"000030 is not whole: pretrained_model/model.safetensors has [\d,]+ bytes of"),
        ("flipped bit", r"000030 is not whole: pretrained_model/model.safetensors is not what was written"),
        ("missing file", r"000030 is not whole: training_state/state.pt is missing"),
        ("no list", r"000030 is not whole: .*files.json is not JSON"),
        ("empty list", r"files.json does not list .*state.pt and pretrained_model/model.safetensors; fall"),
        ("malformed list", r"files.json has 3 for training_state/state.pt, not its size and SHA-256; fall"),
    ],
)
def test_a_damaged_checkpoint_falls_back_to_the_one_before(tmp_path, reference, how, message):
    output = tmp_path / "run"
    shutil.copytree(reference, output, symlinks=True)
    damage(output / "checkpoints" / "000030", how)
    with pytest.warns(UserWarning, match=message):
        whole(output, resume=True)
    assert_same_run(output, reference)


def test_leftovers_of_a_kill_in_the_middle_of_saving_do_no_harm(tmp_path, reference):
    output = tmp_path / "run"
    shutil.copytree(reference, output, symlinks=True)
    folders = output / "checkpoints"
    (folders / "000030").rename(folders / ".000030.new-0123456789ab")
    with open(output / "log.jsonl", "a") as log:
        log.write('{"step": 31, "lo')
    whole(output, resume=True)
    assert_same_run(output, reference)
    assert {f.name for f in folders.iterdir()} == {f.name for f in (reference / "checkpoints").iterdir()}


def test_nothing_to_resume_from_starts_at_the_beginning(tmp_path, reference):
    with pytest.warns(UserWarning, match="no whole checkpoint in .*: starting at step 0"):
        whole(tmp_path / "run", resume=True)
    assert_same_run(tmp_path / "run", reference)


def test_a_finished_run_resumed_does_nothing_more(tmp_path, reference):
    output = tmp_path / "run"
    shutil.copytree(reference, output, symlinks=True)
    policy = tiny(seed=5)
    options = {k: v for k, v in RUN.items() if k != "data"}
    result = train(policy, TinyData(augment=True), output=output, resume=True, progress=False, **options)
    assert (result.step, result.interrupted) == (30, False)
    assert torch.equal(policy.head.weight, state(reference, 30)["average"]["head.weight"])


def test_other_settings_are_told(tmp_path, reference):
    output = tmp_path / "run"
    shutil.copytree(reference, output, symlinks=True)
    with pytest.warns(
        UserWarning, match=r"resumed at step 30 with other settings \(steps 30 → 33, batch_size 8 → 4\)"
    ):
        whole(output, resume=True, steps=33, batch_size=4)
    assert max(record["step"] for record in log_lines(output)) == 33


def test_another_policys_checkpoint_is_refused(tmp_path, reference):
    output = tmp_path / "run"
    shutil.copytree(reference, output, symlinks=True)
    with pytest.raises(
        ValueError, match=r"(?s)trained with another policy than this Tiny; .*size mismatch for encoder"
    ):
        train(tiny(width=20), TinyData(), steps=31, output=output, resume=True)


def test_ctrl_c_in_an_evaluation_ends_it_saves_and_returns(tmp_path):
    class Interrupting(TinyEnv):
        def step(self, action):
            signal.raise_signal(signal.SIGINT)
            raise AssertionError("the evaluation went on")

    before = signal.getsignal(signal.SIGINT)
    options = {
        "steps": 9,
        "batch_size": 4,
        "eval_every": 4,
        "eval_env": Interrupting,
        "ema": 0.9,
        "log_every": 1,
    }
    result = train(tiny(), TinyData(), output=tmp_path, progress=False, **options)
    assert (result.step, result.interrupted) == (4, True)
    assert "4 steps (interrupted)" in str(result)
    assert state(tmp_path, 4)["step"] == 4
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_ctrl_c_stops_at_once(tmp_path):
    class Stubborn(TinyData):
        def __getitem__(self, index):
            if self.armed:
                signal.raise_signal(signal.SIGINT)
            return super().__getitem__(index)

        armed = False

    data = Stubborn()
    policy = tiny()
    inner = policy.forward

    def forward(batch):
        data.armed = True
        return inner(batch)

    policy.forward = forward
    before = signal.getsignal(signal.SIGINT)
    with pytest.raises(KeyboardInterrupt):
        train(policy, data, steps=9, batch_size=4, output=tmp_path, progress=False)
    assert not (tmp_path / "checkpoints").exists()
    assert signal.getsignal(signal.SIGINT) is before


def free_port():
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def test_two_processes_give_the_gradient_of_one_at_twice_the_batch(tmp_path, start):
    """Without noise and dropout, which each process draws for itself."""
    options = {
        "steps": 4,
        "fields": {"noise": 0.0, "dropout": 0.0},
        "grad_clip": 0.2,
        "log_every": 2,
        "save_every": 1,
    }
    script({**options, "output": str(tmp_path / "one"), "batch_size": 8, "fields": dict(options["fields"])})
    shared = {
        "WORLD_SIZE": "2",
        "MASTER_ADDR": "127.0.0.1",
        "MASTER_PORT": str(free_port()),
        "ACCELERATE_USE_CPU": "1",
    }
    pair = [
        start(
            environment=shared | {"RANK": str(rank), "LOCAL_RANK": str(rank)},
            **options,
            output=str(tmp_path / "two"),
            batch_size=4,
        )
        for rank in range(2)
    ]
    for process in pair:
        process.join(120)
    assert [process.exitcode for process in pair] == [0, 0]
    one, two = (state(tmp_path / name, 1)["optimizer"]["state"] for name in ("one", "two"))
    for index in one:  # after one step the first moment is a tenth of the gradient
        torch.testing.assert_close(one[index]["exp_avg"], two[index]["exp_avg"], rtol=1e-5, atol=1e-8)
    torch.testing.assert_close(
        state(tmp_path / "one", 4)["policy"], state(tmp_path / "two", 4)["policy"], rtol=1e-5, atol=1e-6
    )
    for a, b in zip(log_lines(tmp_path / "one"), log_lines(tmp_path / "two"), strict=True):
        assert a == pytest.approx(b, rel=1e-5)
