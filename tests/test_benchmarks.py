"""The stopwatch: ratios point the right way, intervals hold the truth, reports say who is slower."""

from __future__ import annotations

import json
from time import sleep

import numpy as np
import pytest
import torch
from torch import nn

import benchmarks.__main__ as bench
from benchmarks import anatomy, diffusion, vqbet
from benchmarks.act import training_step
from benchmarks.pairs import make_batch, make_ours, threads
from benchmarks.timing import Row, Section, compare, in_fresh_process, race, report

HERE = bench.HERE


def test_the_slower_rival_gives_a_ratio_above_one():
    row = race("sleep", lambda: sleep(0.001), lambda: sleep(0.004), rounds=9)
    assert row.ratio > 1.5
    assert row.low <= row.ratio <= row.high


def test_the_interval_of_equals_holds_one():
    noise = np.random.default_rng(0).normal(10, 1, (2, 200))
    row = compare("equal", "ms", list(noise[0]), list(noise[1]))
    assert row.low < 1 < row.high


def test_a_fresh_process_prints_its_number():
    assert in_fresh_process("print('noise'); print(2.5)") == 2.5


def sections() -> dict[str, Section]:
    rows = [
        Row("chunk", "ms", 1.0, 2.0, 2.0, 1.8, 2.2),
        Row("step", "ms", 2.0, 1.0, 0.5, 0.4, 0.6),
        Row("world", "steps/s", 9),
    ]
    return {"ACT": Section({"machine": "a laptop"}, rows, []), "VQ-BeT": Section({}, rows[:1], ["- a note"])}


def test_the_report_names_what_is_slower():
    text, content = report(sections())
    assert "Slower than LeRobot: step." in text
    assert "| chunk | 1 ms | 2 ms | 2.00 [1.80, 2.20] |" in text
    assert text.index("## ACT") < text.index("- machine: a laptop") < text.index("## VQ-BeT")
    assert text.endswith("- a note\n")
    assert json.loads(content)["ACT"]["rows"][2]["theirs"] is None


def test_a_stored_section_is_read_back():
    stored = json.loads(report(sections())[1])
    assert {title: Section.from_json(content) for title, content in stored.items()} == sections()


def test_what_is_stored_makes_the_page():
    """RESULTS.md and results.json are of one run."""
    stored = json.loads((HERE / "results.json").read_text())
    text = report({title: Section.from_json(content) for title, content in stored.items()})[0]
    assert text == (HERE / "RESULTS.md").read_text()


def test_a_section_measured_again_leaves_the_others(tmp_path, monkeypatch):
    monkeypatch.setattr(bench, "HERE", tmp_path)
    (tmp_path / "results.json").write_text(report(sections())[1])
    again = Row("chunk", "ms", 1.0, 3.0, 3.0, 2.8, 3.2)
    monkeypatch.setitem(bench.SECTIONS, "vqbet", ("VQ-BeT", lambda: [again], lambda: ["- another"]))
    monkeypatch.setattr("sys.argv", ["benchmarks", "vqbet"])
    bench.main()
    stored = {k: Section.from_json(v) for k, v in json.loads((tmp_path / "results.json").read_text()).items()}
    assert stored["ACT"] == sections()["ACT"]
    assert (stored["VQ-BeT"].rows, stored["VQ-BeT"].notes) == ([again], ["- another"])


def test_an_unknown_section_is_refused(monkeypatch, capsys):
    monkeypatch.setattr("sys.argv", ["benchmarks", "vqbeet"])
    with pytest.raises(SystemExit):
        bench.main()
    assert "no section is called vqbeet; there are imports, act, diffusion" in capsys.readouterr().err


def test_threads_are_given_back():
    before = torch.get_num_threads()
    with threads(1) as suffix:
        assert (suffix, torch.get_num_threads()) == (", 1 thread", 1)
    with threads(None) as suffix:
        assert (suffix, torch.get_num_threads()) == ("", before)
    assert torch.get_num_threads() == before


def test_parts_add_up_to_the_whole():
    first, second = nn.Linear(10, 20, bias=False), nn.Linear(20, 5, bias=False)
    last = torch.randn(5, 7)

    def call() -> None:
        with torch.no_grad():
            second(first(torch.randn(3, 10)) + first(torch.randn(3, 10))) @ last

    parts = {"first": first, "second": second}
    shares = anatomy.by_part(call, parts, rounds=3)
    assert {name: (s.calls, s.flops) for name, s in shares.items()} == {
        "first": (2, 2 * 2 * 3 * 10 * 20),
        "second": (1, 2 * 3 * 20 * 5),
        "the rest": (0, 2 * 3 * 5 * 7),
    }
    assert all(share.seconds > 0 for share in shares.values())
    assert not first._forward_hooks and not first._forward_pre_hooks
    assert "| first | 0.00 M | 2 | 2.4e-06 |" in anatomy.parts_table(shares, parts)


def test_kinds_of_work_add_up_to_one():
    x = torch.randn(64, 64)
    shares = anatomy.by_kind(lambda: x @ x, rounds=5)
    assert sum(shares.values()) == pytest.approx(1)
    assert shares["products and convolutions"] > max(
        shares["norms and activations"], shares["copies and layout"]
    )


@pytest.mark.parametrize(("family", "size"), [("diffusion", diffusion.SMALL), ("vqbet", vqbet.SMALL)])
def test_ours_takes_the_step_that_is_timed(family, size):
    policy = make_ours(family, size)
    weights = [p.detach().clone() for p in policy.parameters()]
    training_step(policy, make_batch(policy, 2))()
    assert any((old != new).any() for old, new in zip(weights, policy.parameters(), strict=True))


@pytest.mark.slow
@pytest.mark.parametrize("module", [diffusion, vqbet])
def test_both_of_a_pair_say_the_same(module):
    """What races is equal: both make the same chunk, but for what is drawn."""
    pair = vqbet.pair_in_phase("small", 2) if module is vqbet else diffusion.pair("small")
    made = []
    for call in module.chunks(pair).values():
        torch.manual_seed(1)
        made.append(call())
    torch.testing.assert_close(*made, rtol=1e-4, atol=1e-4)


@pytest.mark.slow
def test_the_race_against_lerobot_runs():
    """Not a timed test: a row is measured, whatever it says."""
    from benchmarks.act import training

    assert training("small", 2, 3).ratio > 0


def test_the_roofline_counts_what_the_model_computes():
    """Its FLOPs against torch's own counter, on a small π0.5 of the same shape."""
    from torch.nn.attention import SDPBackend, sdpa_kernel
    from torch.utils.flop_counter import FlopCounterMode

    from benchmarks import pi

    ours = pi.make_ours("pi05", pi.SMALL)
    batch = pi.observation(pi.make_batch("pi05", pi.SMALL, 1))
    with (
        FlopCounterMode(display=False) as counter,
        sdpa_kernel(SDPBackend.MATH),
    ):  # the fused one is not counted
        ours.predict_action_chunk(batch, steps=3)
    c, eyes = ours.config, ours.config.vision
    tokens = pi.SMALL.cameras * eyes.grid[0] ** 2 + pi.SMALL.real
    counted = pi.cost_of_chunk(
        eyes, c.language, c.expert, cameras=2, prompt=pi.SMALL.real, horizon=c.chunk_size, steps=3
    )
    total = sum(cost.flops for cost in counted)
    # Left out: cutting patches, projections, the time's MLP, adaptive norms.
    assert tokens > 100
    assert 0.9 < total / counter.get_total_flops() <= 1.0
