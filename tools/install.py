"""Makes .venv and installs minivla with all its extras, at the versions of constraints.txt.

Run with a bare Python 3.12 or newer (`make install` finds one). The last thing it does is to write a stamp
that holds a digest of everything the environment depends on, so that the next call is over before it begins,
and a call that was interrupted starts again. Two calls at once wait for each other.
"""

import contextlib
import hashlib
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VENV = ROOT / ".venv"
STAMP = VENV / "minivla-installed"
BIN = VENV / ("Scripts" if os.name == "nt" else "bin")
PYTHON = BIN / ("python.exe" if os.name == "nt" else "python")
CONSTRAINTS = ROOT / "constraints.txt"
INPUTS = (ROOT / "pyproject.toml", CONSTRAINTS, Path(__file__).resolve())
REQUIREMENT = ".[lerobot,envs,book,dev]"


def digest() -> str:
    """What the environment depends on: the three input files and where it stands (a moved one is broken)."""
    parts = [path.read_bytes() for path in INPUTS] + [str(VENV).encode()]
    return hashlib.sha256(b"\0".join(parts)).hexdigest()


def runs(*command: str | Path) -> bool:
    """Whether a command can be started and ends well."""
    try:
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, check=False)
    except OSError:
        return False
    return done.returncode == 0


def call(*command: str | Path, **variables: str) -> bool:
    """Run a command in the repository, its output shown; whether it ended well."""
    environment = {**os.environ, **variables}
    return (
        subprocess.run(command, stdin=subprocess.DEVNULL, cwd=ROOT, env=environment, check=False).returncode
        == 0
    )


@contextlib.contextmanager
def one_at_a_time() -> Iterator[None]:
    """Hold a lock file while the environment is built, where the system has such locks."""
    try:
        import fcntl
    except ImportError:  # Windows
        yield
        return
    with (ROOT / ".venv.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield


def make_environment() -> None:
    """Create .venv, or replace one that does not start. One made without pip is kept and given pip."""
    starts = runs(PYTHON, "-c", "import sys; sys.exit(sys.version_info < (3, 12))")
    if starts and (runs(PYTHON, "-c", "import pip") or runs(PYTHON, "-m", "ensurepip")):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    if call(sys.executable, "-m", "venv", VENV):
        return
    shutil.rmtree(VENV, ignore_errors=True)
    if find_uv() and call(*find_uv(), "venv", "--seed", "--python", sys.executable, VENV):
        return
    name = f"python{sys.version_info.major}.{sys.version_info.minor}-venv"
    sys.exit(
        f"{sys.executable} cannot make a virtual environment. On Debian and Ubuntu its venv module is a "
        f"package of its own: apt install {name}"
    )


def find_uv() -> list[str]:
    """The command that starts uv, or an empty list. A pyenv shim may be there and not run, so it is tried."""
    candidates = [str(BIN / "uv"), shutil.which("uv") or ""]
    return next(([command] for command in candidates if command and runs(command, "--version")), [])


def install() -> None:
    """Fill .venv through uv, fetched first if need be; through pip where uv cannot be had or fails."""
    pip = [str(PYTHON), "-m", "pip", "--disable-pip-version-check"]
    if not find_uv():
        call(*pip, "install", "--quiet", "-c", CONSTRAINTS, "uv")
    if uv := find_uv():
        pinned = ["-c", str(CONSTRAINTS), "--build-constraints", str(CONSTRAINTS)]
        command = [*uv, "pip", "install", "--python", PYTHON, *pinned, "-e", REQUIREMENT]
        # uv brings its own certificates; behind a proxy only the system's are right.
        if call(*command) or call(*command, UV_SYSTEM_CERTS="true", UV_NATIVE_TLS="true"):
            return
        print("uv could not install minivla; trying pip", flush=True)
    if not call(*pip, "install", "-c", CONSTRAINTS, "-e", REQUIREMENT):
        sys.exit("The installation failed; the lines above say why. Run the same command again to go on.")


def is_done() -> bool:
    """Whether the environment that stands there is the one the input files ask for."""
    return STAMP.is_file() and STAMP.read_text() == digest() and PYTHON.exists()


def main() -> None:
    """Install, unless it has been done. `--check` only asks: the exit status is 0 when it has."""
    if is_done() or "--check" in sys.argv:
        sys.exit(not is_done())
    with one_at_a_time():
        if is_done():  # somebody else did it while we waited
            return
        started = time.monotonic()
        print("Installing minivla and everything it uses into .venv (a few minutes, once)", flush=True)
        make_environment()
        STAMP.unlink(missing_ok=True)
        install()
        STAMP.write_text(digest())
        print(f"Installed in {time.monotonic() - started:.0f} s", flush=True)


if __name__ == "__main__":
    main()
