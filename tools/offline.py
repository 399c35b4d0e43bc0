"""The environment of tests and chapters: no network, one thread, nobody's personal IPython settings.

A kernel is a process of its own, so forbidding sockets here would not reach it. It runs the start-up files of
its IPython profile, though, and the profile made here holds one that replaces the calls by which Python opens
connections. Loopback stays open (torch.distributed and the kernel itself use it).
"""

import shutil
import tempfile
from pathlib import Path

STARTUP = Path(__file__).with_name("no_network.py")
_folder: Path | None = None


def environment() -> dict[str, str]:
    """Variables for this process and for the kernels it starts. The first call makes the profile's folder."""
    global _folder
    if _folder is None:
        _folder = Path(tempfile.mkdtemp(prefix="minivla-ipython-"))
        startup = _folder / "profile_default" / "startup"
        startup.mkdir(parents=True)
        shutil.copy(STARTUP, startup / "00_no_network.py")
        (_folder / "profile_default" / "ipython_kernel_config.py").write_text(
            "c.HistoryManager.enabled = False\n"
        )
    return {
        "IPYTHONDIR": str(_folder),
        "HF_HUB_OFFLINE": "1",
        "HF_HUB_DISABLE_TELEMETRY": "1",
        "TOKENIZERS_PARALLELISM": "false",
        "OMP_NUM_THREADS": "1",  # the last bits of a matrix product depend on the number of threads
        "PYDEVD_DISABLE_FILE_VALIDATION": "1",
    }


def forget() -> None:
    """Remove the profile's folder."""
    global _folder
    if _folder is not None:
        shutil.rmtree(_folder, ignore_errors=True)
        _folder = None
