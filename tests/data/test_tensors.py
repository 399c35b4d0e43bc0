"""Safetensors written a piece at a time are the library's, byte for byte, and take next to no memory."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from minivla.data import tensors as module
from minivla.data.tensors import write_tensors

ROOT = Path(__file__).parents[2]


def some():
    generator = torch.Generator().manual_seed(0)
    return {
        "b.weight": torch.randn(7, 5, generator=generator),
        "a": torch.tensor(5),
        "half": torch.randn(3, 2, generator=generator).half(),
        "brain": torch.randn(9, generator=generator).bfloat16(),
        "flags": torch.tensor([True, False, True]),
        "double": torch.randn(2, 3, 4, generator=generator).double(),
        "none": torch.zeros(0, 4),
        "π": torch.ones(1),
    }


def test_the_bytes_are_the_librarys(tmp_path):
    write_tensors(tmp_path / "ours", some())
    save_file(some(), tmp_path / "theirs", metadata={"format": "pt"})
    assert (tmp_path / "ours").read_bytes() == (tmp_path / "theirs").read_bytes()


@pytest.mark.parametrize("piece", [1, 3, 10, 1000])
def test_pieces_of_any_size_make_the_same_file(tmp_path, monkeypatch, piece):
    monkeypatch.setattr(module, "PIECE", piece)
    write_tensors(tmp_path / "ours", some())
    found = load_file(tmp_path / "ours")
    assert all(torch.equal(found[key], value) for key, value in some().items())


def test_views_casts_and_second_names(tmp_path):
    table = torch.randn(6, 4)
    given = {"turned": table.T, "twice": table, "again": table, "zeros": torch.zeros(()).expand(5, 3)}
    write_tensors(tmp_path / "f", given | {"n": torch.arange(3)}, dtype=torch.bfloat16)
    found = load_file(tmp_path / "f")
    assert found.pop("n").dtype == torch.int64
    assert all(torch.equal(found[key], value.bfloat16()) for key, value in given.items())


def test_what_the_format_cannot_hold_is_named(tmp_path):
    with pytest.raises(ValueError, match=r"cannot hold wave \(torch.complex64\); expected one of BOOL"):
        write_tensors(tmp_path / "f", {"wave": torch.zeros(2, dtype=torch.complex64)})
    assert not (tmp_path / "f").exists()


def test_saving_takes_next_to_no_memory(tmp_path):
    """100 MB, cast, under two names, with 100 MB of zeros that are there in name only."""
    code = f"""
import resource, torch
from minivla.data.tensors import write_tensors
table = torch.ones(2500, 10_000)
small = {{"a": table[:1], "b": torch.zeros(()).expand(3, 2)}}
write_tensors(r"{tmp_path / "f"}", small, dtype=torch.bfloat16)
before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
large = {{"a": table, "b": table, "zeros": torch.zeros(()).expand(2500, 10_000)}}
write_tensors(r"{tmp_path / "f"}", large, dtype=torch.bfloat16)
print(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before)
"""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=True)
    assert (tmp_path / "f").stat().st_size > 150_000_000
    assert int(done.stdout) * 1024 < 40_000_000
