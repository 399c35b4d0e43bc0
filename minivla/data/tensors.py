"""Safetensors, written a piece at a time.

The library gathers all bytes of a file before it writes the first, a second copy of a large policy. Here a
tensor is cast and written piece by piece, so that saving takes next to no memory: not for weights on a GPU,
not for a cast, not for a tensor that is stored under two names, not for zeros that are only there to be found
(an expanded tensor). The bytes are the library's. `minivla.checkpoints.stored` reads the same way.
"""

import json
from collections.abc import Iterator, Mapping
from io import BufferedWriter
from pathlib import Path

import torch
from torch import Tensor

DTYPES = {
    "BOOL": torch.bool,
    "U8": torch.uint8,
    "I8": torch.int8,
    "I16": torch.int16,
    "I32": torch.int32,
    "I64": torch.int64,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F32": torch.float32,
    "F64": torch.float64,
}
NAMES = {dtype: name for name, dtype in DTYPES.items()}
PIECE = 1 << 22  # elements


def write_tensors(
    path: str | Path, tensors: Mapping[str, Tensor], *, dtype: torch.dtype | None = None
) -> None:
    """Write a safetensors file, floating-point tensors cast to `dtype` if it is given.

    A tensor may stand under several names: each gets a copy of its own, in the file alone. Raises ValueError
    for a dtype that the format does not have.
    """
    kinds = {key: (dtype if dtype and t.is_floating_point() else t.dtype) for key, t in tensors.items()}
    if unknown := [f"{key} ({kind})" for key, kind in kinds.items() if kind not in NAMES]:
        raise ValueError(f"safetensors cannot hold {', '.join(unknown)}; expected one of {', '.join(DTYPES)}")
    # the widest numbers first, as the library does, so that each starts at a multiple of its width
    order = sorted(tensors, key=lambda key: (-kinds[key].itemsize, key))
    with open(path, "wb") as file:
        file.write(_header({key: tensors[key] for key in order}, kinds))
        for key in order:
            for piece in _pieces(tensors[key].detach()):
                _write(file, piece.to("cpu", kinds[key]))


def _header(tensors: Mapping[str, Tensor], kinds: Mapping[str, torch.dtype]) -> bytes:
    entries: dict[str, object] = {"__metadata__": {"format": "pt"}}
    end = 0
    for key, tensor in tensors.items():
        start, end = end, end + tensor.numel() * kinds[key].itemsize
        place = {"shape": list(tensor.shape), "data_offsets": [start, end]}
        entries[key] = {"dtype": NAMES[kinds[key]], **place}
    text = json.dumps(entries, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _pieces(tensor: Tensor) -> Iterator[Tensor]:
    """Of at most PIECE elements where there are rows to cut along, each in memory order."""
    if tensor.dim() == 0 or tensor.numel() <= PIECE:
        yield tensor
        return
    rows = max(1, PIECE * len(tensor) // tensor.numel())
    for part in tensor.split(rows):
        if rows == 1 and part.numel() > PIECE:
            yield from _pieces(part[0])
        else:
            yield part


def _write(file: BufferedWriter, piece: Tensor) -> None:
    flat = piece.contiguous().reshape(-1)
    file.write(memoryview(flat.view(torch.uint8).numpy()))
