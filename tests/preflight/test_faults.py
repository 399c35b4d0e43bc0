"""Every fault is caught and named, and nothing else is."""

from __future__ import annotations

import pytest
import torch

import minivla
from minivla.world import demonstrations
from tests.preflight.patients import FAULTS, Patient, patient_of, small_act, spoiled


@pytest.fixture(scope="module", autouse=True)
def _one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def clean() -> dict[bool, Patient]:
    """A trained policy for checks that need a dataset or an environment, a small random one for the rest."""
    dataset = demonstrations("pick_place", 6, 5)
    policies = {True: minivla.load("act-tabletop"), False: small_act(dataset)}
    return {
        trained: patient_of(policy, dataset, "tabletop:pick_place", (3, 40, 61, 85)[: 4 if trained else 2])
        for trained, policy in policies.items()
    }


@pytest.mark.parametrize("fault", FAULTS, ids=lambda fault: fault.name)
def test_a_fault_is_caught_and_named(fault, clean):
    sick = spoiled(clean[bool(fault.given)])
    fault.make(sick)
    report = sick.report(fault.given)
    assert fault.code in report.codes, str(report)
    errors = {finding.code for finding in report.findings if finding.severity == "error"}
    assert errors - {fault.code} <= set(fault.so), str(report)
    assert all(f.mend and "\n" not in f.mend and "\n" not in f.what for f in report.findings)
    assert report.ok == (not errors)
