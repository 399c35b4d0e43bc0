"""Whole or absent: the writers of `minivla.files`, with failures injected at each point."""

from __future__ import annotations

from pathlib import Path

import pytest

from minivla import files
from minivla.files import atomic_folder, atomic_write, read_json


def names(folder: Path) -> set[str]:
    return {str(path.relative_to(folder)) for path in folder.rglob("*")}


def test_folder_appears_whole_and_only_at_the_end(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "model"
    with atomic_folder(target) as fresh:
        (fresh / "inner").mkdir()
        (fresh / "inner" / "a").write_text("one")
        assert not target.exists()
        assert fresh.parent == target.parent
    assert names(tmp_path / "deep") == {"model", "model/inner", "model/inner/a"}


def test_folder_is_replaced_as_a_whole(tmp_path: Path) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "stale").write_text("old")
    with atomic_folder(target) as fresh:
        (fresh / "a").write_text("new")
        assert names(target) == {"stale"}
    assert names(tmp_path) == {"model", "model/a"}


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_folder_error_leaves_the_old_one(tmp_path: Path, error: type[BaseException]) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").write_text("old")
    with pytest.raises(error), atomic_folder(target) as fresh:
        (fresh / "half").write_text("new")
        raise error
    assert names(tmp_path) == {"model", "model/kept"}


def test_folder_rename_that_fails_restores_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    target = tmp_path / "model"
    target.mkdir()
    (target / "kept").write_text("old")
    rename = Path.rename

    def refuse_new(self: Path, to: Path) -> Path:
        if ".new-" in self.name:
            raise OSError("disk said no")
        return rename(self, to)

    monkeypatch.setattr(Path, "rename", refuse_new)
    with pytest.raises(OSError, match="disk said no"), atomic_folder(target) as fresh:
        (fresh / "a").write_text("new")
    assert names(tmp_path) == {"model", "model/kept"}


def test_folder_refuses_a_file(tmp_path: Path) -> None:
    (tmp_path / "model").write_text("x")
    with pytest.raises(NotADirectoryError, match="is a file"), atomic_folder(tmp_path / "model"):
        pass
    assert names(tmp_path) == {"model"}


def test_write_text_and_bytes(tmp_path: Path) -> None:
    assert atomic_write(tmp_path / "new" / "a", "é").read_bytes() == "é".encode()
    assert atomic_write(tmp_path / "new" / "a", b"\x00").read_bytes() == b"\x00"
    assert names(tmp_path) == {"new", "new/a"}
    with pytest.raises(IsADirectoryError, match="is a folder"):
        atomic_write(tmp_path / "new", b"")


def test_write_that_fails_leaves_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    atomic_write(tmp_path / "a", "old")

    def refuse(*_: object) -> None:
        raise OSError("disk full")

    monkeypatch.setattr(files.os, "fsync", refuse)
    with pytest.raises(OSError, match="disk full"):
        atomic_write(tmp_path / "a", "new")
    assert (tmp_path / "a").read_text() == "old"
    assert names(tmp_path) == {"a"}


def test_read_json(tmp_path: Path) -> None:
    (tmp_path / "good.json").write_text('{"é": [1, 2]}', encoding="utf-8")
    assert read_json(tmp_path / "good.json") == {"é": [1, 2]}


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"a": 1,\n}', r"bad\.json is not JSON: .* at line 2, column 1"),
        (b"", r"bad\.json is not JSON: .* at line 1, column 1"),
        (b"[1]", r"read as list; expected an object"),
        (b"\xff\xfe", r"not UTF-8 text \(byte 0\)"),
    ],
)
def test_read_json_that_is_not(tmp_path: Path, content: bytes, message: str) -> None:
    (tmp_path / "bad.json").write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_json(tmp_path / "bad.json")


def test_read_json_that_is_absent(tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(FileNotFoundError, match=r"no file config\.json in .* which holds other\.json"):
        read_json(tmp_path / "config.json")
    with pytest.raises(FileNotFoundError, match="which does not exist"):
        read_json(tmp_path / "nowhere" / "config.json")
