"""Every layout in which π0, π0.5 and π0-FAST were published maps, none left over and none missing."""

from __future__ import annotations

import functools
import json
import math
import os
from typing import Any

import pytest

from minivla.checkpoints import Receipt, receipt
from minivla.checkpoints.account import STATUSES
from minivla.policies.vla_files import EMBEDDING, EXPERT_HEAD, LM_HEAD
from tests.parity import LEDGER
from tests.policies.pi_layouts import LAYOUTS, Layout, Shapes, their_network, write_folder

COUNTS = {"pi0": 778, "pi05": 813, "pi0_fast": 604}
PARAMETERS = {"pi0": 3_238_048_528, "pi05": 3_353_433_872, "pi0_fast": 2_923_335_408}
NAMES = {"pi0": "π0", "pi05": "π0.5", "pi0_fast": "π0-FAST"}
CASES = [(family, layout) for layout in LAYOUTS for family in layout.families]
ROWS: list[dict[str, Any]] = []
WRITING = bool(os.environ.get("MINIVLA_LEDGER"))
network = functools.cache(their_network)


def row(family: str, layout: Layout, found: Receipt) -> dict[str, Any]:
    """A line of the ledger's table of layouts."""
    table = {status: len(getattr(found, status)) for status in STATUSES}
    absent = [e for e in found.entries if e.status == "missing" or e.reason.startswith("not stored")]
    where = {"family": NAMES[family], "layout": layout.name, "source": layout.source}
    return where | {"stored": len(found.entries) - len(absent)} | table | {"ok": found.ok}


@pytest.fixture(scope="module", autouse=True)
def _ledger():
    ROWS.clear()
    yield
    if WRITING:
        LEDGER.mkdir(parents=True, exist_ok=True)
        (LEDGER / "layouts.json").write_text(
            json.dumps(ROWS, indent=1, ensure_ascii=False) + "\n", encoding="utf-8"
        )


@pytest.mark.parametrize("family", COUNTS)
def test_lerobots_network_has_as_many_tensors_as_known(family):
    shapes, _ = network(family)
    assert len(shapes) == COUNTS[family]


@pytest.mark.parametrize(("family", "layout"), CASES, ids=lambda value: getattr(value, "name", value))
def test_every_key_of_a_published_layout_is_mapped(family, layout, tmp_path):
    shapes, config = network(family)
    folder = write_folder(tmp_path / "folder", shapes, config, layout)
    found = receipt(folder)
    ROWS.append(row(family, layout, found))
    assert found.ok, str(found)
    assert WRITING or ROWS[-1] in json.loads((LEDGER / "layouts.json").read_text(encoding="utf-8"))
    assert ROWS[-1]["stored"] == len(layout.tensors(shapes))
    ours = [entry.ours for entry in (*found.matched, *found.tied)]
    assert len(ours) == len(set(ours)), "a tensor of ours is filled twice"
    assert {entry.key for entry in found.ignored} == expected_to_be_ignored(family, layout, shapes)


def expected_to_be_ignored(family: str, layout: Layout, shapes: Shapes) -> set[str]:
    """The expert's head; the language model's, where the table is stored too; statistics."""
    keys = layout.tensors(shapes)
    unused = {EXPERT_HEAD} if family != "pi0_fast" else set()
    if family != "pi0_fast" and EMBEDDING in keys:
        unused.add(LM_HEAD)
    stored = {key for key in keys if key in unused or f"model.{key}" in unused}
    return stored | {key for key in keys if "normalize" in key}


@pytest.mark.parametrize("family", PARAMETERS)
def test_the_network_has_the_published_size(family, tmp_path):
    shapes, config = network(family)
    found = receipt(write_folder(tmp_path / "folder", shapes, config, LAYOUTS[0]))
    # the published count has table and head as one
    sizes = {entry.ours: math.prod(entry.shape) for entry in found.matched if entry.ours != "lm_head.weight"}
    assert sum(sizes.values()) == PARAMETERS[family]


def test_a_file_of_another_family_does_not_pass(tmp_path):
    shapes, config = network("pi0")
    found = receipt(write_folder(tmp_path / "folder", shapes, config | {"type": "pi05"}, LAYOUTS[0]))
    assert not found.ok
    assert any("input_layernorm.dense" in entry.key for entry in found.missing)


def test_a_key_too_few_and_a_key_too_many_are_seen(tmp_path):
    shapes, config = network("pi0")
    first = "model.action_in_proj.weight"
    shapes = {key: shape for key, shape in shapes.items() if key != first} | {"model.more": (3,)}
    found = receipt(write_folder(tmp_path / "folder", shapes, config, LAYOUTS[0]))
    assert [entry.key for entry in found.missing] == [first]
    assert [entry.key for entry in found.unexpected] == ["model.more"]
