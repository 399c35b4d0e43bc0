"""The two sides of a comparison at the published size, each in a process of its own.

    python -m tests.policies.pi_published theirs pi0 FOLDER [tiny]     LeRobot: build, save, compute
    python -m tests.policies.pi_published ours pi0 FOLDER [tiny]       minivla: load it, save, compute

3.2 thousand million parameters do not fit a machine of 24 GiB twice, so the sides meet in files: the folder
`checkpoint`, `inputs.safetensors`, `theirs.safetensors`, `ours.safetensors`, `measured.json`.

What bfloat16 means. LeRobot casts the whole network before it puts norms and vision back to float32, and with
it the frequencies of the rotary positions, which stay rounded: at position 800 an angle is off by up to a
radian. Neither its float32 nor openpi does that; minivla follows it (`rope_rounds`), and what the slip costs
is measured. Two programs that round at other places, or sum in another order, are about √2 times as far apart
as each is from float32. At a tiny size nothing remains where minivla is made to round where LeRobot does
(`rounding_as_lerobot`: it keeps attention scores and gated branches in bfloat16); at the published size sums
over thousands come out in another order all the same, since we leave padding out. So there the two are held
together in float32, and in bfloat16 each against that.
"""

from __future__ import annotations

import contextlib
import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
from einops import repeat
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

STEPS = 2


def inputs(sizes: dict[str, int]) -> dict[str, Tensor]:
    """One observation, already normalised, and noise."""
    generator = torch.Generator().manual_seed(1)
    cameras = ("base_0_rgb", "left_wrist_0_rgb", "right_wrist_0_rgb")
    side, words = sizes["side"], sizes["words"]
    images = {
        f"observation.images.{name}": torch.rand(1, 3, side, side, generator=generator) for name in cameras
    }
    return images | {
        "observation.state": torch.rand(1, 32, generator=generator) * 2 - 1,
        "observation.language.tokens": torch.randint(3, words, (1, 24), generator=generator),
        "observation.language.attention_mask": torch.arange(24)[None] < 17,
        "noise": torch.randn(1, sizes["horizon"], 32, generator=generator),
    }


def exact_frequencies(theirs: nn.Module) -> None:
    """LeRobot's rotary positions as they are before it rounds them."""
    for module in theirs.modules():
        if (found := getattr(module, "inv_freq", None)) is not None:
            step = torch.arange(0, 2 * len(found), 2).float() / (2 * len(found))
            module.inv_freq = 1.0 / 10_000**step


@contextlib.contextmanager
def rounding_as_lerobot() -> Iterator[None]:
    """Inside, our decoder rounds to bfloat16 where transformers' eager attention and gates do."""

    def attend(query: Tensor, key: Tensor, value: Tensor, mask: Tensor, **_: Any) -> Tensor:
        group = query.shape[1] // key.shape[1]
        key, value = (repeat(x, "b heads k d -> b (heads group) k d", group=group) for x in (key, value))
        scores = query @ key.transpose(2, 3) * query.shape[-1] ** -0.5
        scores = scores + torch.where(mask[:, None], 0.0, -2.3819763e38)
        return scores.softmax(dim=-1, dtype=torch.float32).to(query.dtype) @ value

    def gated(tokens: Tensor, branch: Tensor, gate: Tensor | None) -> Tensor:
        return tokens + (branch if gate is None else branch * gate)

    with mock.patch("minivla.nn.decoder.attend", attend), mock.patch("minivla.nn.decoder._gated", gated):
        yield


PUBLISHED = {"side": 224, "words": 257_152, "horizon": 50}
TINY = {"side": 28, "words": 200, "horizon": 6}


def build_theirs(family: str, tiny: bool) -> Any:
    """LeRobot's policy in bfloat16, every tensor of it redrawn."""
    from lerobot.configs import FeatureType, PolicyFeature

    from tests.policies.pi_small import EVERYTHING, at_tiny_size, redraw_pi, their_module

    sizes = TINY if tiny else PUBLISHED
    given = inputs(TINY)
    cameras = {
        key: PolicyFeature(FeatureType.VISUAL, (3, sizes["side"], sizes["side"]))
        for key in given
        if "images" in key
    }
    options: dict[str, Any] = {
        "input_features": {**cameras, "observation.state": PolicyFeature(FeatureType.STATE, (32,))},
        "output_features": {"action": PolicyFeature(FeatureType.ACTION, (32,))},
        "dtype": "bfloat16",
        "device": "cpu",
    }
    if tiny:
        options |= {"image_resolution": (28, 28), "chunk_size": 6, "n_action_steps": 6}
    module = their_module(family)
    kind = "PI0" if family == "pi0" else "PI05"
    with at_tiny_size(module, EVERYTHING) if tiny else contextlib.nullcontext():
        policy = getattr(module, f"{kind}Policy")(getattr(module, f"{kind}Config")(**options))
    redraw_pi(policy)
    return policy.eval()


def theirs(family: str, folder: Path, tiny: bool) -> None:
    """Save the folder, and what LeRobot computes with it in bfloat16 and in float32."""
    policy = build_theirs(family, tiny)
    policy.save_pretrained(folder / "checkpoint")
    given = inputs(TINY if tiny else PUBLISHED)
    save_file(given, folder / "inputs.safetensors")
    network = policy.model.paligemma_with_expert
    network.paligemma.lm_head = network.gemma_expert.lm_head = nn.Identity()  # nobody asks them
    gc.collect()
    noise = given.pop("noise")

    def chunk() -> Tensor:
        return policy.predict_action_chunk(given, noise=noise, num_steps=STEPS).float().contiguous()

    found = {"bfloat16": chunk()}
    exact_frequencies(policy)
    found["exact frequencies"] = chunk()
    for parameter in policy.parameters():  # one by one: both at once are too large
        parameter.data = parameter.data.float()
    found["float32"] = chunk()
    save_file(found, folder / "theirs.safetensors")


def peak() -> int:
    """The most memory this process has held so far, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))


def ours(family: str, folder: Path, tiny: bool) -> None:
    """Load the folder, save it anew, compute; and how much memory the first two took."""
    import minivla
    from minivla.checkpoints.loading import POLICIES  # noqa: F401  (all that loading imports is here by now)
    from minivla.policies import pi  # noqa: F401
    from tests.policies.pi_small import EXPERT, LANGUAGE, VISION, WORDS

    sizes = {"vision_size": VISION, "language_size": LANGUAGE, "expert_size": EXPERT, "vocab_size": WORDS}
    before = peak()
    policy = minivla.load(folder / "checkpoint", stats=None, **(sizes if tiny else {}))
    loaded = peak() - before
    policy.save(folder / "again")
    saved = peak() - before
    used = sum(p.numel() * p.element_size() for p in policy.state_dict().values())
    given = load_file(folder / "inputs.safetensors")
    noise = given.pop("noise")
    found = {"bfloat16": policy.predict_action_chunk(given, noise=noise, steps=STEPS).float().contiguous()}
    with rounding_as_lerobot():
        chunk = policy.predict_action_chunk(given, noise=noise, steps=STEPS)
    found["rounded alike"] = chunk.float().contiguous()
    for parameter in policy.parameters():
        parameter.data = parameter.data.float()
    found["float32"] = policy.predict_action_chunk(given, noise=noise, steps=STEPS).contiguous()
    save_file(found, folder / "ours.safetensors")
    measured = {
        "used": used,
        "loaded": loaded,
        "saved": saved,
        "matched": len(policy.receipt.matched),
        "ignored": [entry.key for entry in policy.receipt.ignored],
        "family": policy.name,
    }
    (folder / "measured.json").write_text(json.dumps(measured))


if __name__ == "__main__":
    os.environ["HF_HUB_OFFLINE"] = "1"
    side, name, where, *rest = sys.argv[1:]
    {"theirs": theirs, "ours": ours}[side](name, Path(where), rest == ["tiny"])
