"""The chapter lane blocks sockets inside the kernel: proven by a notebook that opens connections and must
fail."""

import json
import re
import subprocess
import sys
from pathlib import Path

HERE = Path(__file__).parent
ROOT = HERE.parent.parent


def run(notebook: Path) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "pytest", "--nbval", "-p", "no:cacheprovider", str(notebook)]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=300)


def code_cells(notebook: Path) -> int:
    return sum(cell["cell_type"] == "code" for cell in json.loads(notebook.read_text())["cells"])


def test_every_way_to_open_a_connection_fails_inside_the_kernel():
    notebook = HERE / "opens_a_connection.ipynb"
    done = run(notebook)
    cells = code_cells(notebook)
    assert done.returncode == 1, done.stdout + done.stderr
    assert f"{cells} failed" in done.stdout, done.stdout
    assert "passed" not in done.stdout.splitlines()[-1]
    # Each for the reason we mean: on a machine without a network they would fail anyway.
    told = done.stdout.partition("short test summary")[0]  # which repeats the reasons where CI is set
    assert len(re.findall(r"something asked for b?'", told)) == cells, done.stdout


def test_loopback_stays_open():
    done = run(HERE / "stays_at_home.ipynb")
    assert done.returncode == 0, done.stdout + done.stderr
    assert "1 passed" in done.stdout
