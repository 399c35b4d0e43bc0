import json
import multiprocessing
import os
import signal
import time
from pathlib import Path

import pytest
import torch

from tests.training.tiny import child

# A server that has imported everything forks the processes that tests start and kill: one slow start.
PROCESSES = multiprocessing.get_context("forkserver")
# torch._dynamo is what the first optimiser imports.
PRELOAD = ["tests.training.tiny", "minivla.training", "accelerate", "matplotlib.figure", "torch._dynamo"]
PROCESSES.set_forkserver_preload(PRELOAD)


@pytest.fixture(autouse=True)
def _one_thread():
    """Sums over threads may differ in the last bit between a process that has two and one that has one."""
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture
def start():
    """start(output=…, …) begins a training run in a process of its own, and returns that process."""
    running = []

    def begin(environment=(), **options):
        process = PROCESSES.Process(target=child, args=(options, dict(environment)))
        process.start()
        running.append(process)
        return process

    yield begin
    for process in running:
        if process.is_alive():
            process.kill()
        process.join()


def log_lines(output):
    """The records of a run without what depends on the clock."""
    path = Path(output) / "log.jsonl"
    records = [json.loads(line) for line in path.read_text().splitlines()] if path.exists() else []
    return [{key: value for key, value in record.items() if key != "time"} for record in records]


def wait_for_steps(process, output, steps):
    """Return as soon as the log of a running process (one line a step) has that many lines."""
    path, deadline = Path(output) / "log.jsonl", time.monotonic() + 120
    while not path.exists() or path.read_bytes().count(b"\n") < steps:
        assert process.is_alive(), f"the run ended before step {steps}, with {process.exitcode}"
        assert time.monotonic() < deadline, f"step {steps} was not reached"
        time.sleep(0.002)


def kill(process, number=signal.SIGKILL):
    """Send a signal to a process and its workers, as a terminal does; the process's exit code."""
    os.killpg(process.pid, number)
    process.join(60)
    return process.exitcode


def state(output, step):
    """The training state of a checkpoint, but for the clock."""
    file = Path(output) / "checkpoints" / f"{step:06d}" / "training_state" / "state.pt"
    content = torch.load(file, weights_only=True)
    return {key: value for key, value in content.items() if key != "time"}


def assert_same_bits(one, other, where="state"):
    """Nested dicts, lists and tensors are equal to the bit."""
    assert type(one) is type(other), where
    if isinstance(one, torch.Tensor):
        assert one.dtype == other.dtype, where
        assert one.numpy().tobytes() == other.numpy().tobytes(), where
    elif isinstance(one, dict):
        assert one.keys() == other.keys(), where
        for key in one:
            assert_same_bits(one[key], other[key], f"{where}.{key}")
    elif isinstance(one, (list, tuple)):
        assert len(one) == len(other), where
        for i, (a, b) in enumerate(zip(one, other, strict=True)):
            assert_same_bits(a, b, f"{where}.{i}")
    else:
        assert one == other, where
