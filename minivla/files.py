"""Files that are either whole or absent.

A run that is killed while it writes must not leave half a checkpoint behind, nor lose the one before. So
everything is written to a temporary sibling first (same folder, hence same file system, where a rename is
atomic) and renamed when whole.
"""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any


@contextlib.contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty temporary folder; when the block ends without an error it becomes `path`.

    An existing folder at `path` is replaced *as a whole* (files it alone had are gone), and only once the new
    one is complete and flushed to disk. On any error, Ctrl-C included, the temporary folder is removed and
    `path` is as it was. Parents are made. Replacing takes two renames: a process killed between them leaves
    the old folder whole, under the name `.<name>.old-<id>` beside it.

    Raises NotADirectoryError when `path` is a file.
    """
    target = _absolute(path)
    if target.exists() and not target.is_dir():
        raise NotADirectoryError(f"{target} is a file; give the name of a folder, or remove the file first")
    fresh = _sibling(target, "new")
    fresh.mkdir(parents=True)
    try:
        yield fresh
        _flush(fresh)
        _replace_folder(fresh, target)
    except BaseException:
        shutil.rmtree(fresh, ignore_errors=True)
        raise


def atomic_write(path: str | os.PathLike[str], data: bytes | str) -> Path:
    """Write `data` (str as UTF-8) to `path` so that a reader sees the old file or the new one, never a part.

    Parents are made. Returns the path written.
    """
    target = _absolute(path)
    if target.is_dir():
        raise IsADirectoryError(f"{target} is a folder; give the name of a file in it")
    target.parent.mkdir(parents=True, exist_ok=True)
    fresh = _sibling(target, "new")
    try:
        with open(fresh, "xb") as file:
            file.write(data.encode() if isinstance(data, str) else data)
            file.flush()
            os.fsync(file.fileno())
        os.replace(fresh, target)
    except BaseException:
        fresh.unlink(missing_ok=True)
        raise
    return target


def read_json(path: str | os.PathLike[str]) -> dict[str, Any]:
    """The JSON object in a file.

    Raises FileNotFoundError (naming what the folder does hold) and ValueError (naming line and column, or the
    kind of value found where an object was expected).
    """
    path = Path(path)
    if not path.is_file():
        raise FileNotFoundError(f"no file {path.name} in {path.parent}, which {_contents(path.parent)}")
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise ValueError(
            f"{path} is not JSON: it is not UTF-8 text (byte {error.start}); write it again"
        ) from error
    except json.JSONDecodeError as error:
        place = f"line {error.lineno}, column {error.colno}"
        raise ValueError(
            f"{path} is not JSON: {error.msg} at {place}; mend the file or write it again"
        ) from error
    if (kind := type(value).__name__) != "dict":
        raise ValueError(f"{path} holds a JSON value read as {kind}; expected an object, {{...}}")
    return dict(value)


def _contents(folder: Path) -> str:
    if not folder.is_dir():
        return "does not exist"
    names = sorted(entry.name for entry in folder.iterdir())
    if not names:
        return "is empty"
    return "holds " + ", ".join(names[:12]) + (f" and {len(names) - 12} more" if len(names) > 12 else "")


def _absolute(path: str | os.PathLike[str]) -> Path:
    # A symlink is followed, so that what it points at is replaced and the link stays.
    return Path(path).expanduser().resolve()


def _sibling(target: Path, role: str) -> Path:
    return target.with_name(f".{target.name}.{role}-{uuid.uuid4().hex[:12]}")


def _flush(folder: Path) -> None:
    for file in folder.rglob("*"):
        if file.is_file():
            with open(file, "rb") as handle:
                os.fsync(handle.fileno())


def _replace_folder(fresh: Path, target: Path) -> None:
    if not target.exists():
        fresh.rename(target)
        return
    old = _sibling(target, "old")  # a folder cannot be renamed onto one that holds files
    target.rename(old)
    try:
        fresh.rename(target)
    except BaseException:
        old.rename(target)
        raise
    shutil.rmtree(old, ignore_errors=True)
