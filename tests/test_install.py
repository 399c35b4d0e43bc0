"""The way in: a Python is found or asked for; an unchanged environment costs nothing."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tools import install

ROOT = Path(__file__).parent.parent
FIND = ROOT / "tools" / "find_python.sh"
pytestmark = pytest.mark.skipif(os.name == "nt", reason="make and sh")


def find(folder: Path, path: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    """Run the search with nothing but `path` and the bare system on PATH."""
    environment = {"HOME": str(folder), "PATH": f"{path}:/usr/bin:/bin", **variables}
    return subprocess.run([FIND], env=environment, cwd=folder, capture_output=True, text=True, check=False)


def script(path: Path, text: str) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(f"#!/bin/sh\n{text}\n")
    path.chmod(0o755)


@pytest.fixture
def bare(tmp_path):
    """A PATH on which every name of Python is there and too old, as a pyenv shim for another version is."""
    for name in ("python", "python3", "python3.12", "python3.13", "python3.14", "uv", "pyenv"):
        script(tmp_path / "bin" / name, "exit 127")
    return tmp_path


def test_no_python_gives_a_message_that_helps(bare):
    done = find(bare, bare / "bin")
    assert done.returncode == 1
    assert "Python 3.12 or newer" in done.stderr
    assert "pyenv install 3.12" in done.stderr


def test_a_python_under_pyenv_is_found(bare):
    script(bare / ".pyenv" / "versions" / "3.12.9" / "bin" / "python", f'exec {sys.executable} "$@"')
    done = find(bare, bare / "bin")
    assert done.returncode == 0, done.stderr
    assert Path(done.stdout.strip()).exists()


def test_a_named_python_is_taken_or_refused(bare):
    assert find(bare, bare / "bin", PYTHON=sys.executable).returncode == 0
    refused = find(bare, bare / "bin", PYTHON=str(bare / "bin" / "python3"))
    assert refused.returncode == 1
    assert "Unset it" in refused.stderr


@pytest.fixture
def elsewhere(tmp_path, monkeypatch):
    """The installer, working on copies."""
    inputs = [tmp_path / path.name for path in install.INPUTS]
    for path in inputs:
        path.write_text("one")
    monkeypatch.setattr(install, "INPUTS", tuple(inputs))
    monkeypatch.setattr(install, "STAMP", tmp_path / "stamp")
    monkeypatch.setattr(install, "PYTHON", Path(sys.executable))
    return inputs


def test_an_environment_is_done_until_an_input_changes(elsewhere):
    assert not install.is_done()
    install.STAMP.write_text(install.digest())
    assert install.is_done()
    elsewhere[1].write_text("another pin")
    assert not install.is_done()


def test_a_failed_installation_leaves_no_stamp(elsewhere, monkeypatch):
    def fail():
        sys.exit("no network")

    install.STAMP.write_text("an older one")
    monkeypatch.setattr(install, "make_environment", lambda: None)
    monkeypatch.setattr(install, "ROOT", elsewhere[0].parent)
    monkeypatch.setattr(install, "install", fail)
    monkeypatch.setattr(sys, "argv", ["install.py"])
    with pytest.raises(SystemExit):
        install.main()
    assert not install.STAMP.exists()


def test_the_second_call_is_quick():
    if not install.is_done():
        pytest.skip("this environment was not made by make")
    started = time.monotonic()
    quiet = ["make", "--no-print-directory", "install"]  # a make inside make would name its folder
    done = subprocess.run(quiet, cwd=ROOT, capture_output=True, text=True, check=False)
    assert (done.returncode, done.stdout) == (0, "")
    assert time.monotonic() - started < 5


def test_help_lists_every_target():
    listed = subprocess.run(["make", "help"], cwd=ROOT, capture_output=True, text=True, check=True).stdout
    for target in ("lab", "test", "test-slow", "book", "zoo", "bench", "ledger", "notebooks", "format"):
        assert f"make {target} " in listed
