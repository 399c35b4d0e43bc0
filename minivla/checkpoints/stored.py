"""Safetensors, read straight into the memory where the tensors stay.

A file is 8 bytes (the length of the header, little-endian), a JSON header {name: {"dtype", "shape",
"data_offsets"}}, and the tensors' bytes one after another. Source: the format's description in the
safetensors README. The library itself maps files into memory, so that a cast or a copy holds everything
twice; reading by hand holds one tensor more than the result.
"""

from __future__ import annotations

import json
import math
import shutil
from dataclasses import dataclass
from io import BufferedReader
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from minivla.data.tensors import DTYPES
from minivla.files import atomic_folder, read_json

WEIGHTS, INDEX = "model.safetensors", "model.safetensors.index.json"
AGAIN = "copy, download or save it again"
PICKLES = (".bin", ".pt", ".pth", ".ckpt")
CHUNK_BYTES = 1 << 24


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor lies on disk; nothing of it has been read. `start` counts from the file's beginning."""

    file: Path
    key: str
    dtype: torch.dtype
    shape: tuple[int, ...]
    start: int

    @property
    def nbytes(self) -> int:
        """Bytes on disk."""
        return math.prod(self.shape) * self.dtype.itemsize


def stored_tensor(file: Path, key: str, dtype: str, shape: list[int], start: int) -> StoredTensor:
    """One entry of a header. Raises ValueError for a dtype that torch does not have."""
    if dtype not in DTYPES:
        raise ValueError(f"'{key}' in {file} has dtype {dtype}; expected one of {', '.join(DTYPES)}")
    return StoredTensor(file, key, DTYPES[dtype], tuple(shape), start)


def read_headers(folder: Path, *, whole: bool = True) -> dict[str, StoredTensor]:
    """All tensors of a checkpoint folder, by key, from the headers of its one file or of its shards.

    With `whole`, files must be as long as their headers say; without, the tensors' bytes may be absent.
    Raises FileNotFoundError when weights are absent, ValueError for a damaged file or an index its shards
    contradict.
    """
    if (folder / WEIGHTS).is_file():
        return read_header(folder / WEIGHTS, whole=whole)
    if not (folder / INDEX).is_file():
        pickles = sorted(path.name for path in folder.glob("*") if path.suffix in PICKLES)
        raise FileNotFoundError(
            f"no {WEIGHTS} and no {INDEX} in {folder}; {AGAIN}"
            + (
                f". {', '.join(pickles)} could run any code when opened and is not read: convert it"
                if pickles
                else ""
            )
        )
    listed = read_json(folder / INDEX).get("weight_map")
    if type(listed) is not dict:
        raise ValueError(f"{folder / INDEX} has no 'weight_map' {{key: file}}; {AGAIN}")
    found: dict[str, StoredTensor] = {}
    for name in sorted({Path(name).name for name in listed.values()}):  # its last part: in this folder
        shard = read_header(folder / name, whole=whole)
        if twice := sorted(found.keys() & shard.keys()):
            raise ValueError(
                f"{folder / name} holds {', '.join(twice[:3])}, and so does another shard; {AGAIN}"
            )
        found |= shard
    if wrong := sorted(found.keys() ^ listed.keys()):
        raise ValueError(f"{folder / INDEX} and the shards disagree about {', '.join(wrong[:3])}; {AGAIN}")
    return found


def read_header(path: Path, *, whole: bool = True) -> dict[str, StoredTensor]:
    """The tensors of one safetensors file, by key, from its header alone. Errors as `read_headers`."""
    raw = header_bytes(path)
    try:
        entries = json.loads(raw[8:])
        found = {key: _entry(path, key, entries[key], len(raw)) for key in entries if key != "__metadata__"}
        end = _end_of_data(found, len(raw))
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        raise ValueError(f"{path} is corrupt ({error}); {AGAIN}") from error
    size = path.stat().st_size
    if whole and size != end:
        state = "too long" if size > end else "cut short"
        alone = " (the header alone)" if size == len(raw) else ""
        raise ValueError(f"{path} is {state}: expected {end:,} bytes, found {size:,}{alone}; {AGAIN}")
    return found


def header_bytes(path: Path) -> bytes:
    """A safetensors file up to where the tensors begin: the header's length and the header.

    Raises FileNotFoundError, or ValueError when that much is not there, or the file is the pointer that Git
    LFS leaves.
    """
    if not path.is_file():
        raise FileNotFoundError(
            f"no file {path.name} in {path.parent}; copy or download the folder again, whole"
        )
    size = path.stat().st_size
    with open(path, "rb") as file:
        prefix = file.read(8)
        if prefix == b"version ":
            raise ValueError(
                f"{path} is a Git LFS pointer of {size} bytes, not the weights; run `git lfs pull` there"
            )
        header = int.from_bytes(prefix, "little")
        if len(prefix) < 8 or header > size - 8:
            raise ValueError(
                f"{path} is cut short, or no safetensors file: its header alone should have "
                f"{8 + header if len(prefix) == 8 else 8:,} bytes or more, the file has {size:,}; {AGAIN}"
            )
        return prefix + file.read(header)


def _entry(path: Path, key: str, entry: dict[str, Any], data: int) -> StoredTensor:
    start, stop = entry["data_offsets"]
    tensor = stored_tensor(path, key, entry["dtype"], entry["shape"], data + start)
    if stop - start != tensor.nbytes:
        raise ValueError(
            f"'{key}' {tensor.shape} takes {tensor.nbytes:,} bytes, its place has {stop - start:,}"
        )
    return tensor


def _end_of_data(found: dict[str, StoredTensor], data: int) -> int:
    """Where the last tensor ends. Raises ValueError where there is a gap between two, or they overlap."""
    end = data
    for tensor in sorted(found.values(), key=lambda tensor: (tensor.start, tensor.nbytes)):
        if tensor.start != end:
            raise ValueError(f"'{tensor.key}' starts at byte {tensor.start:,}, expected {end:,}")
        end += tensor.nbytes
    return end


def read_tensor(stored: StoredTensor, *, dtype: torch.dtype | None = None) -> Tensor:
    """One tensor in fresh memory, cast to `dtype` piece by piece as it is read (None: as stored).

    Raises ValueError when the file ends too early.
    """
    target = torch.empty(stored.shape, dtype=dtype or stored.dtype)
    flat = target.view(-1)
    same = target.dtype == stored.dtype
    step = max(1, len(flat) if same else CHUNK_BYTES // stored.dtype.itemsize)
    with open(stored.file, "rb") as file:
        file.seek(stored.start)
        for begin in range(0, len(flat), step):
            piece = flat[begin : begin + step]
            raw = piece if same else torch.empty(len(piece), dtype=stored.dtype)
            _fill(file, raw, stored)
            if not same:
                piece.copy_(raw)
    return target


def _fill(file: BufferedReader, flat: Tensor, stored: StoredTensor) -> None:
    """Read the next bytes of `file` into the memory of `flat`, one-dimensional and contiguous."""
    view = memoryview(flat.view(torch.uint8).numpy())
    while len(view):  # one call reads 2 GiB at most
        if not (read := file.readinto(view)):
            raise ValueError(f"{stored.file} ends inside '{stored.key}', {len(view):,} bytes early; {AGAIN}")
        view = view[read:]


def write_headers(source: str | Path, target: str | Path) -> Path:
    """Copy a checkpoint folder without its tensors: `target` gets the JSON files and the headers of the
    safetensors.

    That is some kilobytes, from which `receipt` makes the same account as from the whole. Returns `target`.
    """
    source, target = Path(source), Path(target)
    with atomic_folder(target) as staging:
        for path in sorted(source.iterdir()):
            if path.suffix == ".json":
                shutil.copyfile(path, staging / path.name)
            elif path.suffix == ".safetensors":
                (staging / path.name).write_bytes(header_bytes(path))
    return target
