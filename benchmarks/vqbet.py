"""VQ-BeT beside LeRobot's: a chunk, a training step of each phase, the memory of one.

Two sizes: LeRobot's default (five observations of one 96 × 96 camera cropped to 84 × 84, a GPT of eight
layers and width 512), and one near the shipped checkpoint's (two observations of one 64 × 64 camera, four
layers of width 128; the ResNet stays). What dominates: the ResNet, once for each observation, the same on
both sides; in phase 1, whose matrices are small, the calls themselves.

LeRobot's model is called with its pictures stacked already, as its queue would have them.
"""

from __future__ import annotations

from typing import Any

import torch

from benchmarks import anatomy
from benchmarks.pairs import (
    Call,
    Size,
    chunk_race,
    make_batch,
    make_ours,
    make_pair,
    make_theirs,
    memory_race,
    observation,
    training_race,
)
from benchmarks.timing import Row

SMALL_GPT = {
    "n_obs_steps": 2,
    "crop_shape": None,
    "vqvae_embedding_dim": 64,
    "gpt_input_dim": 128,
    "gpt_hidden_dim": 128,
    "gpt_output_dim": 128,
    "gpt_n_layer": 4,
    "gpt_n_head": 4,
    "gpt_block_size": 16,
}
SMALL = Size("small", 1, (3, 64, 64), 3, 3, SMALL_GPT)
DEFAULT = Size("default size", 1, (3, 96, 96), 2, 2)
SIZES = {size.name: size for size in (SMALL, DEFAULT)}
SAMPLES = {"small": 8, "default size": 4}


def finish_codes(vqvae: Any) -> None:
    """Say that phase 1 is over, as both sides keep it."""
    vqvae.discretized.fill_(True)
    vqvae.vq_layer.freeze_codebook.fill_(True)


def make(who: str, size: str) -> Any:
    """One of the two, ready for phase 2."""
    policy = (make_ours if who == "ours" else make_theirs)("vqbet", SIZES[size])
    finish_codes(policy.vqvae if who == "ours" else policy.vqbet.action_head.vqvae_model)
    return policy


def pair_in_phase(size: str, phase: int) -> tuple[Any, Any]:
    """Both, on one set of tensors, in phase 1 or 2."""
    ours, theirs = make_pair("vqbet", SIZES[size])
    if phase == 2:
        finish_codes(ours.vqvae)
        finish_codes(theirs.vqbet.action_head.vqvae_model)
    return ours, theirs


def chunks(pair: tuple[Any, Any]) -> dict[str, Call]:
    """What makes a chunk, ours and LeRobot's."""
    ours, theirs = pair
    theirs.eval()
    seen = observation(make_batch(ours, 1))
    images = torch.stack([seen[key] for key in ours.config.image_features], dim=2)
    stacked = {"observation.state": seen["observation.state"], "observation.images": images}

    @torch.no_grad()
    def their_chunk() -> object:
        return theirs.vqbet(stacked, rollout=True)

    return {"minivla": lambda: ours.predict_action_chunk(seen), "LeRobot": their_chunk}


def latency(size: str, rounds: int) -> list[Row]:
    """One chunk."""
    calls = chunks(pair_in_phase(size, 2))
    return chunk_race(f"VQ-BeT {size}", *calls.values(), rounds=rounds)


def training(size: str, phase: int, rounds: int) -> list[Row]:
    """One optimiser step of a phase."""
    what = f"VQ-BeT {size}, phase {phase}"
    return training_race(what, pair_in_phase(size, phase), SAMPLES[size], rounds=rounds)


def memory(size: str, rounds: int) -> Row:
    """The peak of a training step of phase 2."""
    return memory_race(f"VQ-BeT {size}, phase 2", "benchmarks.vqbet", size, SAMPLES[size], rounds=rounds)


def where(size: str, rounds: int) -> str:
    """Where the time goes."""
    pair = pair_in_phase(size, 2)
    ours = pair[0]
    parts = {
        "image encoder": ours.rgb_encoder,
        "GPT": ours.gpt,
        "codes and offsets": ours.code_head,
        "codes' decoder": ours.vqvae.decoder,
    }
    batch = make_batch(ours, SAMPLES[size])
    return anatomy.describe(f"VQ-BeT, {size}", ours, parts, chunks(pair), batch, rounds=rounds)


def rows() -> list[Row]:
    """All of VQ-BeT's rows."""
    return [
        *latency("small", 20),
        *latency(DEFAULT.name, 8),
        *training("small", 1, 40),
        *training(DEFAULT.name, 1, 40),
        *training("small", 2, 8),
        *training(DEFAULT.name, 2, 6),
        memory(DEFAULT.name, 2),
    ]


def notes() -> list[str]:
    """Where the time goes, at both sizes."""
    return [where(DEFAULT.name, 3), where("small", 5)]
