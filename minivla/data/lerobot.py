"""LeRobot's datasets, on disk or on the hub, through LeRobot's own class.

Reading video and parquet is LeRobot's business; what is ours is the windows a policy needs, and errors that
say what to do.
"""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from minivla.data.windows import delta_timestamps as windows_of
from minivla.files import read_json

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset


def open_dataset(
    repo_id: str,
    *,
    root: str | Path | None = None,
    episodes: Sequence[int] | None = None,
    config: Any = None,
    delta_timestamps: Mapping[str, Sequence[float]] | None = None,
    **options: Any,
) -> "LeRobotDataset":
    """Open a LeRobotDataset (v3) with the windows of a policy.

    repo_id: its name on the hub.
    root: its folder, if it is on this machine.
    episodes: only these.
    config: a policy's config, which says what to window; or give `delta_timestamps` {key: [seconds]}
    yourself.

    Further options go to LeRobotDataset as they are.
    Raises ImportError without LeRobot, ValueError for a dataset of format v2, for episodes it does not have,
    or config and delta_timestamps both, FileNotFoundError when it is neither here nor within reach.
    """
    if config is not None and delta_timestamps is not None:
        raise ValueError("got config and delta_timestamps; expected one of them. Leave delta_timestamps out.")
    try:
        from lerobot.datasets import LeRobotDataset, LeRobotDatasetMetadata
        from lerobot.datasets.utils import CompatibilityError
    except ImportError as error:
        raise ImportError(
            f"reading LeRobot datasets needs LeRobot 0.6 with its dataset support ({error}); pip install "
            "'minivla[lerobot]'. minivla.world.demonstrations works without."
        ) from error
    _refuse_v2(repo_id, root)
    try:
        meta = LeRobotDatasetMetadata(repo_id, root)
        _check_episodes(repo_id, episodes, meta.total_episodes)
        windows = windows_of(config, meta.fps, meta.features) if config is not None else delta_timestamps
        chosen = None if episodes is None else list(episodes)
        return LeRobotDataset(repo_id, root, episodes=chosen, delta_timestamps=windows or None, **options)
    except (CompatibilityError, NotImplementedError) as error:  # LeRobot's answers to v2.1 and to v2.0
        raise ValueError(_conversion(repo_id, root, "an older format")) from error
    except (OSError, RuntimeError) as error:
        raise FileNotFoundError(_out_of_reach(repo_id, root, error)) from error


def _out_of_reach(repo_id: str, root: str | Path | None, error: Exception) -> str:
    reason = (str(error).strip() or type(error).__name__).splitlines()[0]
    return (
        f"no dataset '{repo_id}' in {_folder(repo_id, root)}, nor within reach on the hub ({reason}); "
        "expected a LeRobotDataset v3: a folder with meta/info.json, data and videos. Check the name, give "
        "root=<its folder>, or, for the hub, check the network, HF_HUB_OFFLINE and `hf auth whoami`."
    )


def _folder(repo_id: str, root: str | Path | None) -> Path:
    from lerobot.utils.constants import HF_LEROBOT_HOME

    return Path(root) if root is not None else Path(HF_LEROBOT_HOME) / repo_id


def _refuse_v2(repo_id: str, root: str | Path | None) -> None:
    info = _folder(repo_id, root) / "meta" / "info.json"
    if info.is_file():
        version = str(read_json(info).get("codebase_version"))
        if version.startswith("v2"):
            raise ValueError(_conversion(repo_id, root, version))


def _conversion(repo_id: str, root: str | Path | None, version: str) -> str:
    local = f" --root={root} --push-to-hub=false" if root is not None else ""
    return (
        f"the dataset '{repo_id}' is in {version}; expected v3.0, the format of LeRobot 0.4 and later. "
        "Convert it:\n"
        f"  python -m lerobot.scripts.convert_dataset_v21_to_v30 --repo-id={repo_id}{local}\n"
        "A v2.0 dataset goes to v2.1 first, with the converter of LeRobot 0.3."
    )


def _check_episodes(repo_id: str, episodes: Sequence[int] | None, total: int) -> None:
    if absent := [episode for episode in episodes or () if not 0 <= episode < total]:
        raise ValueError(
            f"'{repo_id}' has no episodes {absent}; expected numbers in 0…{total - 1}. Leave them out."
        )
