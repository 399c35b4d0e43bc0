"""The stopwatch: ratios point the right way, intervals hold the truth, reports say who is slower."""

from __future__ import annotations

import json
from time import sleep

import numpy as np
import pytest

from benchmarks.timing import Row, compare, in_fresh_process, race, report


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


def test_the_report_names_what_is_slower():
    rows = [
        Row("chunk", "ms", 1.0, 2.0, 2.0, 1.8, 2.2),
        Row("step", "ms", 2.0, 1.0, 0.5, 0.4, 0.6),
        Row("world", "steps/s", 9),
    ]
    text, content = report(rows, {"machine": "a laptop"})
    assert "Slower than LeRobot: step." in text
    assert "| chunk | 1 ms | 2 ms | 2.00 [1.80, 2.20] |" in text
    assert json.loads(content)["rows"][2]["theirs"] is None


@pytest.mark.slow
def test_the_race_against_lerobot_runs():
    """Not a timed test: a row is measured, whatever it says."""
    from benchmarks.act import training

    assert training("small", 2, 3).ratio > 0
