"""ACT beside LeRobot's, with the same weights: a chunk, a training step, the memory of one.

Two sizes: the default (ResNet-18, width 512, chunk 100, one 480 × 640 camera) and one for small worlds (two
96 × 96 cameras). What dominates: at the default size the ResNet and the encoder's 300 image tokens; both
sides call the same convolutions. Ours asks for no attention weights (torch's module averages them over heads
by default) and sends cameras of one size through the backbone together.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from benchmarks.timing import Row, fresh_race, race
from minivla.data.features import FeatureType, PolicyFeature
from minivla.policies.act import ACT, ACTConfig

SIZES: dict[str, dict[str, Any]] = {
    "default size": {"cameras": 1, "image": (3, 480, 640), "settings": {}},
    "small": {
        "cameras": 2,
        "image": (3, 96, 96),
        "settings": {"dim_model": 256, "dim_feedforward": 1024, "chunk_size": 32, "n_action_steps": 32},
    },
}


def features(size: str) -> dict[str, tuple[str, tuple[int, ...]]]:
    """What the policy sees and does: key → (type, shape)."""
    spec = SIZES[size]
    cameras = {f"observation.images.camera{i}": ("VISUAL", spec["image"]) for i in range(spec["cameras"])}
    return cameras | {"observation.state": ("STATE", (14,)), "action": ("ACTION", (14,))}


def _settings(size: str) -> dict[str, Any]:
    return SIZES[size]["settings"] | {"pretrained_backbone_weights": None}


def make_ours(size: str) -> ACT:
    """Our ACT."""
    table = {key: PolicyFeature(FeatureType(kind), shape) for key, (kind, shape) in features(size).items()}
    action = {"action": table.pop("action")}
    torch.manual_seed(0)
    return ACT(ACTConfig(input_features=table, output_features=action, **_settings(size)))


def make_theirs(size: str) -> Any:
    """LeRobot's ACT."""
    from lerobot.configs import FeatureType as TheirType
    from lerobot.configs import PolicyFeature as TheirFeature
    from lerobot.policies.act.configuration_act import ACTConfig as TheirConfig
    from lerobot.policies.act.modeling_act import ACTPolicy

    table = {key: TheirFeature(TheirType(kind), shape) for key, (kind, shape) in features(size).items()}
    action = {"action": table.pop("action")}
    torch.manual_seed(0)
    return ACTPolicy(
        TheirConfig(input_features=table, output_features=action, device="cpu", **_settings(size))
    )


def make_pair(size: str) -> tuple[ACT, Any]:
    """Both, with LeRobot's weights."""
    ours, theirs = make_ours(size), make_theirs(size)
    state = theirs.state_dict()
    ours.load_state_dict({name: state[ours.upstream_name(name)] for name in ours.state_dict()})
    return ours, theirs


def make_batch(size: str, samples: int) -> dict[str, Tensor]:
    """A random normalised batch with its chunk."""
    generator = torch.Generator().manual_seed(0)
    batch = {
        key: torch.randn(samples, *shape, generator=generator) for key, (_, shape) in features(size).items()
    }
    horizon = SIZES[size]["settings"].get("chunk_size", 100)
    batch["action"] = torch.randn(samples, horizon, 14, generator=generator)
    return batch | {"action_is_pad": torch.zeros(samples, horizon, dtype=torch.bool)}


def training_step(policy: Any, batch: dict[str, Tensor]) -> Callable[[], None]:
    """Loss, gradient and AdamW step, as a callable."""
    optimizer = torch.optim.AdamW([p for p in policy.parameters() if p.requires_grad], lr=1e-5)

    def step() -> None:
        policy.train()
        policy.forward(batch)[0].backward()
        optimizer.step()
        optimizer.zero_grad()

    return step


def latency(size: str, rounds: int) -> Row:
    """One chunk for one observation."""
    ours, theirs = make_pair(size)
    batch = {key: value for key, value in make_batch(size, 1).items() if not key.startswith("action")}
    return race(
        f"ACT {size}: one chunk",
        lambda: ours.predict_action_chunk(batch),
        lambda: theirs.predict_action_chunk(batch),
        rounds=rounds,
    )


def training(size: str, samples: int, rounds: int) -> Row:
    """One optimiser step."""
    ours, theirs = make_pair(size)
    batch = make_batch(size, samples)
    what = f"ACT {size}: training step, batch {samples}"
    return race(what, training_step(ours, batch), training_step(theirs, batch), rounds=rounds)


def memory(size: str, samples: int, rounds: int) -> Row:
    """Peak resident memory that two training steps add to a process which has imported what it needs."""
    code = (
        "from benchmarks.act import peak_of_training; print(peak_of_training({who!r}, {size!r}, {samples}))"
    )
    ours, theirs = (code.format(who=who, size=size, samples=samples) for who in ("ours", "theirs"))
    return fresh_race(f"ACT {size}: training step, peak memory", "MB", ours, theirs, rounds=rounds)


def peak_of_training(who: str, size: str, samples: int) -> float:
    """Megabytes at the peak of two steps, above those after the imports; in a process of its own."""
    import psutil

    if who == "theirs":
        import lerobot.policies.act.modeling_act  # noqa: F401
    # What torch imports at the first optimiser and the first gradient belongs to neither side.
    weight = torch.nn.Parameter(torch.ones(8, 8))
    (weight @ weight).sum().backward()
    torch.optim.AdamW([weight]).step()
    before = psutil.Process().memory_info().rss / 1e6
    step = training_step(make_ours(size) if who == "ours" else make_theirs(size), make_batch(size, samples))
    step(), step()
    return peak_memory() - before


def peak_memory() -> float:
    """Megabytes at this process's peak. Linux has VmHWM; its ru_maxrss would hold the parent's peak too."""
    status = Path("/proc/self/status")
    if status.exists():
        line = next(line for line in status.read_text().splitlines() if line.startswith("VmHWM"))
        return int(line.split()[1]) * 1024 / 1e6
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6


def rows() -> list[Row]:
    """All of ACT's rows."""
    return [
        latency("default size", 12),
        latency("small", 40),
        training("default size", 2, 6),
        training("small", 8, 12),
        memory("default size", 2, 2),
    ]
