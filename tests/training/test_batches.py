import random

import numpy as np
import pytest
import torch

from minivla.training.batches import Batches, check_batch, preserved_rng, seed_all, windowed
from tests.training.conftest import assert_same_bits
from tests.training.tiny import ACTION, HORIZON, TinyData, tiny


def test_every_sample_is_seen_once_an_epoch_and_epochs_differ():
    batches = Batches(range(12), 4, seed=3)
    epochs = [[i for step in range(e * 3, e * 3 + 3) for i in batches.indices(step)] for e in range(3)]
    assert all(sorted(epoch) == list(range(12)) for epoch in epochs)
    assert epochs[0] != epochs[1] != epochs[2]


def test_batches_run_on_over_the_end_of_an_epoch():
    batches = Batches(range(5), 3, seed=0)
    stream = [i for step in range(5) for i in batches.indices(step)]
    assert [sorted(stream[k : k + 5]) for k in (0, 5, 10)] == [list(range(5))] * 3


def test_a_seed_decides_the_order():
    assert Batches(range(50), 8, seed=1).indices(7) == Batches(range(50), 8, seed=1).indices(7)
    assert Batches(range(50), 8, seed=1).indices(7) != Batches(range(50), 8, seed=2).indices(7)


@pytest.mark.parametrize("step", [0, 1, 5])
def test_two_processes_share_the_batch_of_one(step):
    pieces = [Batches(range(23), 4, seed=0, process=p, processes=2).indices(step) for p in (0, 1)]
    assert pieces[0] + pieces[1] == Batches(range(23), 8, seed=0).indices(step)


def test_a_batch_has_tensors_stacked_and_tasks_listed():
    batch = Batches(TinyData(), 5, seed=0)[2]
    assert batch["action"].shape == (5, HORIZON, ACTION)
    assert batch["task"] == [f"task {i}" for i in batch["index"].tolist()]


@pytest.mark.parametrize("workers", [0, 2])
def test_workers_and_the_starting_step_change_no_number(workers):
    batches = Batches(TinyData(augment=True), 4, seed=9)
    loaded = list(batches.loader(range(3, 7), num_workers=workers))
    assert len(loaded) == 4
    for step, batch in zip(range(3, 7), loaded, strict=True):
        assert_same_bits(batch, batches[step])
    assert not torch.equal(batches[3]["observation.state"], batches[4]["observation.state"])


def test_augmentation_differs_between_processes_and_steps():
    one, other = (Batches(TinyData(1, augment=True), 1, seed=0, process=p, processes=2) for p in (0, 1))
    states = [b[k]["observation.state"] for b in (one, other) for k in (0, 1)]
    assert len({tuple(s.flatten().tolist()) for s in states}) == 4


def draw():
    return random.random(), np.random.random(), torch.rand(()).item()


def test_seed_all_seeds_every_generator():
    seed_all(1, 2)
    first = draw()
    seed_all(1, 2)
    assert draw() == first
    seed_all(1, 3)
    assert all(a != b for a, b in zip(draw(), first, strict=True))


def test_preserved_rng_gives_the_generators_back_even_after_an_error():
    seed_all(0)
    expected = [draw(), draw()]
    seed_all(0)
    assert draw() == expected[0]
    with pytest.raises(KeyError), preserved_rng():
        seed_all(5)
        draw()
        raise KeyError
    assert draw() == expected[1]


def test_demonstrations_without_windows_get_the_policys():
    class Frames(list):
        fps, deltas = 10, None

        def windows(self, deltas):
            self.deltas = deltas
            return self

    policy = tiny()
    assert windowed(Frames([0]), policy.config).deltas == {"action": [0.0, 0.1, 0.2, 0.3]}
    already = Frames([0])
    already.deltas = {"action": [0.0]}
    assert windowed(already, policy.config).deltas == {"action": [0.0]}
    with pytest.raises(ValueError, match="empty"):
        windowed([], policy.config)


@pytest.mark.parametrize("missing", ["observation.state", "action"])
def test_a_batch_without_what_the_policy_needs_is_refused(missing):
    batch = Batches(TinyData(), 2, seed=0)[0]
    del batch[missing]
    with pytest.raises(KeyError, match=rf"needs {missing}; .*action_is_pad.*features_of"):
        check_batch(batch, tiny().config)


@pytest.mark.parametrize("change", [lambda a: a[:, :3], lambda a: a[..., :1], lambda a: a[:, 0]])
def test_actions_of_another_shape_are_refused(change):
    batch = Batches(TinyData(), 2, seed=0)[0]
    check_batch(batch, tiny().config)
    with pytest.raises(ValueError, match=r"policy's \(4, 2\).*delta_timestamps"):
        check_batch(batch | {"action": change(batch["action"])}, tiny().config)
