"""README tells the truth: its example runs, its targets and links exist, its map is complete."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
README = (ROOT / "README.md").read_text(encoding="utf-8")
EXAMPLE, LOOKING = re.findall(r"```python\n(.*?)```", README, re.S)[:2]


def test_the_examples_are_short_and_run(tmp_path):
    """The second goes on where the first ends."""
    statements = [line for line in EXAMPLE.splitlines() if line.strip() and not line.startswith("import")]
    assert len(statements) <= 10
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "MPLBACKEND": "agg"}
    command = [sys.executable, "-W", "error::DeprecationWarning:minivla", "-c", EXAMPLE + LOOKING]
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    first, *rest = done.stdout.splitlines()
    assert first.endswith(" done"), first
    assert not first.endswith("not done"), "choose a seed that the shipped policy solves"
    assert "closed places, largest gradient 0;" in rest[0]
    assert "minivla.doctor on ACT: 0 errors, 0 warnings" in done.stdout


def test_it_says_early_that_it_is_not_stanfords():
    top = "\n".join(README.splitlines()[:10])
    assert "Not Stanford's MiniVLA" in top
    assert "Stanford-ILIAD/openvla-mini" in top


def test_every_make_target_it_names_exists():
    pages = README + (ROOT / "CONTRIBUTING.md").read_text() + (ROOT / "book" / "index.md").read_text()
    targets = set(re.findall(r"^([a-z-]+):.*## ", (ROOT / "Makefile").read_text(), re.M))
    named = set(re.findall(r"(?:`|^)make ([a-z-]+)", pages, re.M))
    assert {"lab", "test"} <= named <= targets


def test_every_local_link_leads_somewhere():
    links = re.findall(r"\]\((?!https?:)([^)#]+)", README)
    assert links
    assert [link for link in links if not (ROOT / link).exists()] == []


def test_the_map_of_chapters_is_complete():
    chapters = [path.name for path in sorted((ROOT / "notebooks").glob("*.ipynb"))]
    assert re.findall(r"\(notebooks/([^)]+)\)", README) == chapters


def test_the_policies_it_claims_are_those_that_load():
    from minivla.checkpoints import POLICIES

    claimed = re.search(r"^\| policies \| (.+) \|$", README, re.M)
    assert claimed
    assert {name.strip().lower() for name in claimed[1].split(",")} == set(POLICIES)


@pytest.mark.parametrize("page", ["README.md", "book/index.md"])
def test_the_picture_is_there(page):
    assert "readme.png" in (ROOT / page).read_text()
    assert (ROOT / "book" / "_static" / "readme.png").stat().st_size > 10_000
