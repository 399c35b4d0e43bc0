"""Our policy and LeRobot's, of one config and on the same weights, and the races between them.

Both are built in one process and share their tensors, so that a billion bytes of weights are there once. Each
race is of calls in turn (`benchmarks.timing`), with torch's default number of threads, or as many as asked.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from benchmarks.act import peak_memory, training_step
from benchmarks.timing import Row, fresh_race, race
from minivla.data.features import ACTION, FeatureType, PolicyFeature

# The classes of a family: our policy, our config, LeRobot's policy, LeRobot's config.
CLASSES = {
    "diffusion": ("DiffusionPolicy", "DiffusionConfig", "DiffusionPolicy", "DiffusionConfig"),
    "vqbet": ("VQBeT", "VQBeTConfig", "VQBeTPolicy", "VQBeTConfig"),
}
Call = Callable[[], object]


@dataclass(frozen=True)
class Size:
    """A policy of a family, as large as `settings` make it, for `cameras` pictures (3, H, W)."""

    name: str
    cameras: int
    image: tuple[int, int, int]
    state: int
    actions: int
    settings: dict[str, Any] = field(default_factory=dict)

    def features(self, kind: Any, feature: Any) -> tuple[dict[str, Any], dict[str, Any]]:
        """Inputs and outputs, of our types or of LeRobot's."""
        keys = [f"observation.images.camera{i}" for i in range(self.cameras)]
        inputs = {key: feature(kind("VISUAL"), self.image) for key in keys}
        inputs["observation.state"] = feature(kind("STATE"), (self.state,))
        return inputs, {ACTION: feature(kind("ACTION"), (self.actions,))}


def make_ours(family: str, size: Size, **settings: Any) -> Any:
    """Our policy with random weights."""
    module = importlib.import_module(f"minivla.policies.{family}")
    policy, config, *_ = CLASSES[family]
    return _make(getattr(module, policy), getattr(module, config), size, FeatureType, PolicyFeature, settings)


def make_theirs(family: str, size: Size, **settings: Any) -> Any:
    """LeRobot's, the same."""
    from lerobot.configs import FeatureType as TheirType
    from lerobot.configs import PolicyFeature as TheirFeature

    module = importlib.import_module(f"lerobot.policies.{family}.modeling_{family}")
    *_, policy, config = CLASSES[family]
    options = {"device": "cpu"} | settings
    return _make(getattr(module, policy), getattr(module, config), size, TheirType, TheirFeature, options)


def _make(policy: Any, config: Any, size: Size, kind: Any, feature: Any, settings: dict[str, Any]) -> Any:
    inputs, outputs = size.features(kind, feature)
    torch.manual_seed(0)
    options = {"pretrained_backbone_weights": None} | size.settings | settings
    return policy(config(input_features=inputs, output_features=outputs, **options))


def make_pair(family: str, size: Size, **settings: Any) -> tuple[Any, Any]:
    """Both, on one set of tensors."""
    ours, theirs = make_ours(family, size, **settings), make_theirs(family, size, **settings)
    state = theirs.state_dict()
    shared = {name: state[ours.upstream_name(name)] for name in ours.state_dict()}
    ours.load_state_dict(shared, strict=True, assign=True)
    return ours, theirs


def make_batch(policy: Any, samples: int) -> dict[str, Tensor]:
    """A random normalised batch with histories and actions; `policy` is ours or LeRobot's."""
    generator, c = torch.Generator().manual_seed(0), policy.config
    steps, horizon = c.n_obs_steps, len(c.action_delta_indices)
    batch = {
        key: torch.randn(samples, steps, *feature.shape, generator=generator)
        for key, feature in c.input_features.items()
    }
    batch[ACTION] = torch.randn(samples, horizon, *c.action_feature.shape, generator=generator)
    return batch | {"action_is_pad": torch.zeros(samples, horizon, dtype=torch.bool)}


def observation(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What of a batch is seen."""
    return {key: value for key, value in batch.items() if not key.startswith(ACTION)}


@contextmanager
def threads(count: int | None) -> Iterator[str]:
    """Run with so many of torch's threads, None for its default. Yields what to add to a row's name."""
    before = torch.get_num_threads()
    torch.set_num_threads(count or before)
    try:
        yield "" if count is None else f", {count} thread" + "s" * (count > 1)
    finally:
        torch.set_num_threads(before)


def chunk_race(what: str, ours: Call, theirs: Call, *, rounds: int, warmup: int = 2) -> list[Row]:
    """One chunk for one observation, with torch's default of threads and with one."""
    rows = []
    for count in (None, 1):
        with threads(count) as suffix:
            rows.append(race(f"{what}: one chunk{suffix}", ours, theirs, rounds=rounds, warmup=warmup))
    return rows


def training_race(
    what: str,
    pair: tuple[Any, Any],
    samples: int,
    *,
    rounds: int,
    warmup: int = 2,
    counts: tuple[int | None, ...] = (None, 1),
) -> list[Row]:
    """One step of training: loss, gradient and AdamW. `counts` of threads, None for torch's default."""
    batch = make_batch(pair[0], samples)
    ours, theirs = (training_step(policy, batch) for policy in pair)
    rows = []
    for count in counts:
        with threads(count) as suffix:
            name = f"{what}: training step, batch {samples}{suffix}"
            rows.append(race(name, ours, theirs, rounds=rounds, warmup=warmup))
    return rows


def memory_race(what: str, module: str, size: str, samples: int, *, rounds: int) -> Row:
    """Peak resident memory that two training steps add to a process which has imported what it needs.

    `module` is the one whose `make(who, size)` builds a policy that is ready to be trained.
    """
    code = (
        f"from {module} import make; from benchmarks.pairs import peak_of_training; "
        f"print(peak_of_training(lambda: make('{{who}}', {size!r}), '{{who}}', {samples}))"
    )
    ours, theirs = (code.format(who=who) for who in ("ours", "theirs"))
    name = f"{what}: training step, batch {samples}, peak memory"
    return fresh_race(name, "MB", ours, theirs, rounds=rounds)


def peak_of_training(make: Callable[[], Any], who: str, samples: int) -> float:
    """Megabytes at the peak of two steps, above those after the imports; in a process of its own."""
    import psutil

    if who == "theirs":
        for family in CLASSES:
            importlib.import_module(f"lerobot.policies.{family}.modeling_{family}")
    # What torch imports at the first optimiser and the first gradient belongs to neither side.
    weight = torch.nn.Parameter(torch.ones(8, 8))
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()
    before = psutil.Process().memory_info().rss / 1e6
    policy = make()
    step = training_step(policy, make_batch(policy, samples))
    step(), step()
    return peak_memory() - before
