"""`compile_model`: the same chunks and gradients, with one graph for each kind of call."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import pytest
import torch

from minivla.policies.base import Policy
from tests.policies.fast_small import fast_batch, tiny_fast
from tests.policies.small_vla import statistics, tiny_pi, tiny_raw

COMPILED = {"compile_model": True, "compile_mode": "max-autotune"}


@pytest.fixture(autouse=True)
def fresh() -> Iterator[None]:
    """No code compiled before, and none left."""
    torch._dynamo.reset()
    torch._dynamo.utils.counters.clear()
    yield
    torch._dynamo.reset()


@pytest.fixture
def modes(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Captures graphs and differentiates them, and runs them as they are: no C++ compiler, no minutes."""
    asked: list[str] = []

    def compile_(module: torch.nn.Module, *, mode: str) -> None:
        asked.append(mode)
        module._compiled_call_impl = torch.compile(module._call_impl, backend="aot_eager")

    monkeypatch.setattr(torch.nn.Module, "compile", compile_)
    return asked


def pair(name: str, **settings: Any) -> tuple[Policy, Policy, dict[str, Any]]:
    """One that is not compiled, one that is, and a batch."""
    if name == "pi0_fast":
        ours = [tiny_fast(), tiny_fast(**settings)]
        return ours[0], ours[1], fast_batch(ours[0])
    plain, compiled = tiny_pi(name, statistics()), tiny_pi(name, statistics(), **settings)
    return plain, compiled, plain.preprocess(tiny_raw())


def compared(name: str, **settings: Any) -> None:
    """Loss, gradients, and chunks of one sample and of all, which is another shape."""
    plain, compiled, batch = pair(name, **settings)
    given: dict[str, Any] = (
        {} if name == "pi0_fast" else {"noise": torch.randn(2, 6, 7), "time": torch.rand(2)}
    )
    losses = [policy.train()(batch, **given)[0] for policy in (plain, compiled)]
    torch.testing.assert_close(*losses)
    for loss in losses:
        loss.backward()
    most = max(p.grad.abs().max() for p in plain.parameters() if p.grad is not None)
    for (key, mine), other in zip(compiled.named_parameters(), plain.parameters(), strict=True):
        assert (mine.grad is None) == (other.grad is None), key
        if mine.grad is not None:
            assert (mine.grad - other.grad).abs().max() < 1e-5 * most, key
    given.pop("time", None)
    torch.testing.assert_close(*(policy.predict_action_chunk(batch, **given) for policy in (plain, compiled)))
    assert not torch._dynamo.utils.counters["graph_break"]


@pytest.mark.filterwarnings("ignore:said is no chunk")
@pytest.mark.parametrize(
    ("name", "mode"),
    [("pi0", "max-autotune"), ("pi05", "max-autotune"), ("pi0_fast", "max-autotune-no-cudagraphs")],
)
def test_compiled_it_does_the_same(name: str, mode: str, modes: list[str]) -> None:
    compared(name, **COMPILED)
    assert modes == [mode]


def test_words_said_one_by_one_do_not_compile_one_by_one(modes: list[str]) -> None:
    """The cache grows with every word; the second length makes the code one for all lengths."""
    _, policy, batch = pair("pi0_fast", **COMPILED)
    with pytest.warns(UserWarning, match="said is no chunk"):
        policy.predict_action_chunk(batch)
    assert torch._dynamo.utils.counters["frames"]["ok"] <= 4 < policy.config.max_decoding_steps


@pytest.mark.slow
def test_with_torchs_own_compiler() -> None:
    """Some minutes on two cores."""
    compared("pi05", compile_model=True, compile_mode="default")
