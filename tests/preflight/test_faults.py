"""Every fault is caught and named, and nothing else is."""

from __future__ import annotations

import pytest

import minivla
from minivla.world import demonstrations
from tests.preflight.fault_table import FAULTS
from tests.preflight.patients import Patient, patient_of, small_act, spoiled


@pytest.fixture(scope="module")
def clean() -> dict[bool, Patient]:
    """A trained policy for checks of what it does, a small random one for the rest."""
    data, small = demonstrations("pick_place", 6, 5), demonstrations("pick_place", 6, 5, size=32)
    return {
        True: patient_of(minivla.load("act-tabletop"), data, "tabletop:pick_place"),
        False: patient_of(small_act(small), small, "tabletop:pick_place?size=32", (3, 40)),
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_named(fault, clean):
    trained = "t" in fault.given
    sick = spoiled(clean[trained])
    fault.make(sick)
    report = sick.report(fault.given)
    assert fault.code in report.codes, str(report)
    replay = {"replay-error"} if "d" in fault.given and not trained else set()
    errors = {finding.code for finding in report.findings if finding.severity == "error"}
    assert errors - {fault.code} <= {*fault.so, *replay}, str(report)
    assert all(f.mend and "\n" not in f.mend and "\n" not in f.what for f in report.findings)
    assert report.ok == (not errors)
