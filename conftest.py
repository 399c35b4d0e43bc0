"""What every pytest run here shares: nothing reaches the network, and the kernels of chapters cannot."""

import os
from pathlib import Path

import pytest

from tools import offline

MUST_FAIL = Path(__file__).parent / "tests" / "notebooks"


def pytest_configure(config: pytest.Config) -> None:
    """Set the environment that tests and the kernels nbval starts inherit."""
    os.environ.update(offline.environment())
    os.environ.pop("MINIVLA_PUBLISHED", None)


def pytest_unconfigure(config: pytest.Config) -> None:
    """Remove the kernels' private IPython folder."""
    offline.forget()


def pytest_ignore_collect(collection_path: Path, config: pytest.Config) -> bool | None:
    """Notebooks among the tests are there to fail: they run only when a test names them."""
    if collection_path.suffix == ".ipynb" and collection_path.parent == MUST_FAIL:
        return not any(Path(name).resolve() == collection_path for name in config.args)
    return None


def pytest_xdist_auto_num_workers(config: pytest.Config) -> int:
    """`-n auto`: a worker a core, four at most, since each one imports torch and may import LeRobot."""
    return min(4, os.cpu_count() or 1)
