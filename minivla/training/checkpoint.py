"""What a run leaves on disk, and how it goes on from there.

    output/
      log.jsonl                       a line for every `log_every` steps and for every evaluation
      loss.png
      checkpoints/
        000500/
          pretrained_model/           the policy in LeRobot's format, for minivla.load (EMA: the averages)
          training_state/
            state.pt                  step, weights, optimiser, averages, the losses not yet logged, settings
            files.json                size and SHA-256 of every other file: what is unlike it is not whole
        last -> 000500

The folders are named as in LeRobot's `lerobot/common/train_utils.py`. There are no states of random
generators to keep, since every step seeds them anew (`batches.py`).
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import os
import shutil
import warnings
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from minivla.files import atomic_folder, atomic_write, read_json

FILES = "training_state/files.json"
STATE = "training_state/state.pt"
NEEDED = (STATE, "pretrained_model/model.safetensors")  # a checkpoint without these is none
ENTRY = {"size": int, "sha256": str}  # what that table has for a file
TIMES = "time"  # the key of a log record whose values differ from run to run


def save_checkpoint(output: Path, policy: Any, state: dict[str, Any], *, weights: Any = None) -> Path:
    """Write the checkpoint of `state["step"]`, whole or not at all, and point `last` at it; its folder.

    `weights` is a context manager inside which the policy has the weights to publish (None: it has them).
    """
    folder = output / "checkpoints" / f"{state['step']:06d}"
    with atomic_folder(folder) as fresh:
        with weights or contextlib.nullcontext(), warnings.catch_warnings():
            warnings.filterwarnings("ignore", message=".*LeRobot will refuse")  # a run says so at its start
            policy.save(fresh / "pretrained_model")
        (fresh / "training_state").mkdir()
        torch.save(state, fresh / STATE)
        table = {file.relative_to(fresh).as_posix(): _fingerprint(file) for file in _files(fresh)}
        atomic_write(fresh / FILES, json.dumps(table, indent=1) + "\n")
    _point(folder.parent / "last", folder.name)
    return folder


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


def _fingerprint(file: Path) -> dict[str, Any]:
    with open(file, "rb") as handle:
        return {"size": file.stat().st_size, "sha256": hashlib.file_digest(handle, "sha256").hexdigest()}


def _point(link: Path, target: str) -> None:
    fresh = link.with_name(f".{link.name}.new")
    with contextlib.suppress(
        OSError
    ):  # a file system without links: resuming reads the folders' names anyway
        fresh.unlink(missing_ok=True)
        fresh.symlink_to(target)
        os.replace(fresh, link)


def checkpoints(output: Path) -> list[Path]:
    """The checkpoint folders of a run, newest first, whole or not."""
    folders = (output / "checkpoints").glob("[0-9]*")
    return sorted(
        (f for f in folders if f.is_dir() and f.name.isdigit()), key=lambda f: int(f.name), reverse=True
    )


def prune(output: Path, keep: int | None) -> None:
    """Remove all but the `keep` newest checkpoints (None: keep all)."""
    for folder in checkpoints(output)[keep:] if keep else []:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(output: Path) -> None:
    """Remove what a run that was killed in the middle of saving has left beside its checkpoints."""
    for pattern in (".[0-9]*.new-*", ".[0-9]*.old-*"):
        for folder in (output / "checkpoints").glob(pattern):
            shutil.rmtree(folder, ignore_errors=True)


def flaw(folder: Path) -> str | None:
    """What is wrong with a checkpoint, in words; None when every file is there, to the byte."""
    try:
        table = read_json(folder / FILES)
    except (FileNotFoundError, ValueError) as error:
        return str(error)
    if unlisted := [name for name in NEEDED if name not in table]:
        return f"{FILES} does not list {' and '.join(unlisted)}"
    for name, expected in table.items():
        if not isinstance(expected, dict) or {key: type(expected[key]) for key in expected} != ENTRY:
            return f"{FILES} has {expected!r} for {name}, not its size and SHA-256"
        file = folder / name
        if not file.is_file():
            return f"{name} is missing"
        if (size := file.stat().st_size) != expected["size"]:
            return f"{name} has {size:,} bytes of {expected['size']:,}"
        if _fingerprint(file) != expected:
            return f"{name} is not what was written (its SHA-256 differs)"
    return None


def newest_state(output: Path) -> dict[str, Any] | None:
    """The training state of the newest whole checkpoint; None when there is none.

    Each checkpoint passed over gets a warning that names it and what is wrong with it.
    """
    for folder in checkpoints(output):
        problem = flaw(folder)
        if problem is None:
            return dict(torch.load(folder / STATE, map_location="cpu", weights_only=True))
        warnings.warn(
            f"checkpoint {folder} is not whole: {problem}; falling back to the one before", stacklevel=3
        )
    return None


@dataclass
class Log:
    """The records of a run, in memory and, with a `path`, as lines of JSON.

    Every record has `step`; what depends on the clock stands under the key "time", so that two runs can be
    compared without it.
    """

    path: Path | None = None
    records: list[dict[str, Any]] = field(default_factory=list)

    def write(self, record: dict[str, Any]) -> None:
        """Append one record."""
        self.records.append(record)
        if self.path is None:
            return
        self.path.parent.mkdir(parents=True, exist_ok=True)
        with open(self.path, "a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")

    def rewind(self, step: int) -> None:
        """Forget what was written after `step`, and a line cut short: the resumed run writes it again."""
        assert self.path is not None
        lines = self.path.read_text(encoding="utf-8").splitlines() if self.path.exists() else []
        kept = [(line, record) for line in lines if (record := _parsed(line)) and record["step"] <= step]
        atomic_write(self.path, "".join(f"{line}\n" for line, _ in kept))
        self.records = [record for _, record in kept]


def _parsed(line: str) -> dict[str, Any] | None:
    try:
        record = json.loads(line)
    except ValueError:
        return None
    return record if isinstance(record, dict) and "step" in record else None
