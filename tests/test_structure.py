"""The house: which way imports point, what `import minivla` costs, what the wheel holds."""

import ast
import json
import os
import subprocess
import sys
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
PACKAGE = ROOT / "minivla"
MODULES = sorted(PACKAGE.rglob("*.py"))

# What each room may import from the others. A room not named may import everything but the rooms above it.
GROUND = {"files", "recorder", "segments"}
POLICIES = GROUND | {"nn", "actions", "data", "policies"}
LOOKING = {"tracing", "upstream", "upstream_pi", "proof"}
MAY_IMPORT = {
    "files": set(),
    "segments": set(),
    "recorder": {"segments"},
    "nn": GROUND,
    "actions": GROUND | {"nn"},
    "data": {"files"},
    "world": {"data", "files"},
    "policies": GROUND | {"nn", "actions", "data"},
    "checkpoints": POLICIES,
    # Pictures are imported only when a trace is asked to draw, hooks only when LeRobot's policy is traced.
    "tracing": GROUND | {"upstream", "viz"},
    "upstream": POLICIES | {"upstream_pi"},
    "upstream_pi": GROUND,
    "proof": GROUND | {"tracing"},
    "viz": POLICIES | {"checkpoints", "world", "training", "tracing"},
    "training": POLICIES | {"checkpoints", "world", "viz"},
    "preflight": POLICIES | LOOKING | {"checkpoints", "world", "training"},
    "exercises": POLICIES | LOOKING | {"checkpoints", "world", "training", "viz", "preflight"},
    "zoo": POLICIES | {"checkpoints", "world", "viz", "training"},
}
HEAVY = ("lerobot", "transformers", "matplotlib", "gymnasium")


def room(path: Path) -> str:
    """The first name below minivla: a file at the top or a folder."""
    return path.relative_to(PACKAGE).parts[0].removesuffix(".py")


def dotted(path: Path) -> str:
    """The module's full name; a package is its own parent."""
    return ".".join(path.relative_to(ROOT).with_suffix("").parts)


def imports(path: Path) -> set[str]:
    """Every module imported anywhere in a file, inside functions too, with full names."""
    package = dotted(path).split(".")[:-1]
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Import):
            found |= {alias.name for alias in node.names}
        if isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else []
            module = ".".join([*base, *([node.module] if node.module else [])])
            found |= {module} | {f"{module}.{alias.name}" for alias in node.names}
    return found


def rooms_imported(path: Path) -> set[str]:
    """The rooms of minivla that a file imports from, its own excepted."""
    inside = {name.split(".")[1] for name in imports(path) if name.startswith("minivla.")}
    return {name for name in inside if (PACKAGE / name).is_dir() or (PACKAGE / f"{name}.py").is_file()} - {
        room(path)
    }


def python(code: str) -> str:
    """What a fresh process prints."""
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.parametrize(
    "path", [path for path in MODULES if path.parent != PACKAGE or path.stem != "__init__"], ids=dotted
)
def test_imports_point_one_way(path):
    assert room(path) in MAY_IMPORT, f"say in MAY_IMPORT where {room(path)} stands"
    wrong = rooms_imported(path) - MAY_IMPORT[room(path)]
    assert not wrong, f"{dotted(path)} imports {sorted(wrong)}, which stand above it"


def test_the_walk_over_imports_sees_what_it_must(tmp_path):
    """The arrow test can fail: absolute, relative and hidden imports are all seen."""
    path = PACKAGE / "nn" / "imagined.py"
    seen = {"minivla.policies", "minivla.policies.act", "minivla.viz.colours"}

    class Imagined(type(path)):
        def read_text(self, *_, **__):
            return "def f():\n    from ..policies import act\nimport minivla.viz.colours\n"

    assert seen <= imports(Imagined(path))


@pytest.mark.parametrize("path", sorted((PACKAGE / "policies").glob("*.py")), ids=dotted)
def test_no_policy_imports_another(path):
    others = {f"minivla.policies.{other.stem}" for other in (PACKAGE / "policies").glob("*.py")}
    shared = {f"minivla.policies.{name}" for name in ("base", "vla", "vla_files", "__init__")}
    assert not imports(path) & (others - shared - {dotted(path)})


def test_import_minivla_pulls_in_nothing_heavy():
    loaded = json.loads(
        python(f"import json, sys, minivla; print(json.dumps([m for m in {HEAVY} if m in sys.modules]))")
    )
    assert loaded == []


def test_import_minivla_costs_little_more_than_torch():
    """CPU time, alternating, the least of five each: what else the machine does cannot change the verdict
    much."""
    clock = "import time; start = time.process_time(); import {}; print(time.process_time() - start)"
    pairs = [(float(python(clock.format("torch"))), float(python(clock.format("minivla")))) for _ in range(5)]
    torch, minivla = (min(times) for times in zip(*pairs, strict=True))
    assert minivla <= 1.3 * torch, (
        f"import minivla took {minivla:.2f} s of CPU time, import torch {torch:.2f} s"
    )


def test_public_names_survive_the_import_of_every_submodule():
    """A submodule named like a function would take its place in the package: each function is called after
    all imports."""
    code = """
import importlib, pkgutil
import minivla
for module in pkgutil.walk_packages(minivla.__path__, "minivla."):
    if not module.name.endswith("__main__"):
        importlib.import_module(module.name)
for name in sorted(set(minivla.__all__) - {"__version__", "Policy"}):
    try:
        getattr(minivla, name)()
    except TypeError as error:
        assert "required" in str(error) and name in str(error), (name, error)
print(isinstance(minivla.list_checkpoints(), list), isinstance(minivla.Policy, type))
"""
    assert python(code).split() == ["True", "True"]


def test_versions_agree():
    import minivla

    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    assert minivla.__version__ == project["version"]
    assert f"## {minivla.__version__}" in (ROOT / "CHANGELOG.md").read_text()
    assert f"version: {minivla.__version__}" in (ROOT / "CITATION.cff").read_text()
    assert (PACKAGE / "py.typed").exists()


def test_every_pin_is_exact_and_no_index_is_named():
    pins = [line for line in (ROOT / "constraints.txt").read_text().splitlines() if line.strip()]
    assert pins
    assert all("==" in pin.split(";")[0] and not pin.startswith("-") for pin in pins)


@pytest.mark.slow
def test_the_wheel_works_in_an_environment_of_its_own(tmp_path):
    """`pip install .` from the wheel, nothing of the source tree in sight: imports, lists and loads its
    checkpoints.

    The dependencies are borrowed from the environment that runs the tests, since fetching them again proves
    nothing.
    """
    wheels, venv = tmp_path / "wheels", tmp_path / "venv"
    build = [
        sys.executable,
        "-m",
        "pip",
        "wheel",
        "--no-deps",
        "--no-build-isolation",
        "--wheel-dir",
        str(wheels),
        str(ROOT),
    ]
    subprocess.run(build, check=True, capture_output=True, cwd=tmp_path)
    subprocess.run([sys.executable, "-m", "venv", str(venv)], check=True)
    interpreter = venv / "bin" / "python"
    (wheel,) = wheels.glob("*.whl")
    subprocess.run(
        [interpreter, "-m", "pip", "install", "--no-deps", "--no-index", str(wheel)],
        check=True,
        capture_output=True,
    )
    borrowed = [folder for folder in sys.path if folder.endswith("site-packages")]
    code = f"""
import sys
sys.path.extend({borrowed!r})
import minivla
names = minivla.list_checkpoints()
print(minivla.__file__, len(names), *(type(minivla.load(name)).__name__ for name in names))
"""
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"}
    done = subprocess.run(
        [interpreter, "-c", code], cwd=tmp_path, env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    where, count, *_ = done.stdout.split()
    assert Path(where).is_relative_to(venv)
    assert int(count) == len(list((PACKAGE / "zoo" / "checkpoints").glob("*/config.json"))) > 0
