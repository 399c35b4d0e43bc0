"""Demonstrations on disk: a `LeRobotDataset` (v3, with video) that LeRobot and minivla read alike."""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from typing import TYPE_CHECKING, Any

from tqdm import tqdm

from minivla.data.lerobot import open_dataset
from minivla.files import atomic_folder
from minivla.world.demonstrations import COUNTERS, Demonstrations, demonstrations

if TYPE_CHECKING:
    from lerobot.datasets import LeRobotDataset


def record(
    task: str,
    episodes: int,
    seed: int,
    root: str | Path,
    *,
    repo_id: str | None = None,
    overwrite: bool = False,
    progress: bool = True,
    **options: Any,
) -> "LeRobotDataset":
    """Write the episodes that `demonstrations(task, episodes, seed, **options)` gives to a folder, and open
    it.

    root: the folder, which appears when it is whole, and not at all after an error.
    repo_id: the name it would have on the hub, "minivla/tabletop-<task>" by default.
    overwrite: replace what is there. `delta_timestamps` among the options is for the dataset returned.

    Raises FileExistsError when there is something at `root`, ImportError without LeRobot.
    """
    if Path(root).exists() and not overwrite:
        raise FileExistsError(
            f"{root} exists; expected a new folder. Choose another root, or pass overwrite=True."
        )
    windows = options.pop("delta_timestamps", None)
    name = repo_id or f"minivla/tabletop-{task.replace('_', '-')}"
    dataset = demonstrations(task, episodes, seed, progress=progress, **options)
    with atomic_folder(root) as fresh:
        fresh.rmdir()  # LeRobot insists on making it
        _write(dataset, fresh, name, progress)
    return open_dataset(name, root=root, delta_timestamps=windows)


def _write(dataset: Demonstrations, folder: Path, repo_id: str, progress: bool) -> None:
    try:
        from lerobot.configs.video import RGBEncoderConfig
        from lerobot.datasets import LeRobotDataset
    except ImportError as error:
        raise ImportError(
            f"record writes with LeRobot 0.6 and its dataset support ({error}); pip install "
            "'minivla[lerobot]'. minivla.world.demonstrations works without."
        ) from error
    recorded = {key: feature for key, feature in dataset.features.items() if key not in COUNTERS}
    writer = LeRobotDataset.create(
        repo_id,
        fps=dataset.fps,
        features=recorded,
        root=folder,
        robot_type="tabletop",
        use_videos=any(feature["dtype"] == "video" for feature in recorded.values()),
        # Colour at full resolution, since at 64 pixels a block is six pixels wide.
        rgb_encoder=RGBEncoderConfig(vcodec="h264", pix_fmt="yuv444p", crf=12),
    )
    with _quiet_video():
        for start, stop in tqdm(dataset.episodes, desc="writing episodes", disable=not progress):
            task = dataset.tasks[dataset.columns["task_index"][start]]
            for index in range(start, stop):
                writer.add_frame({key: dataset.columns[key][index] for key in recorded} | {"task": task})
            writer.save_episode(parallel_encoding=False)
        writer.finalize()


@contextlib.contextmanager
def _quiet_video() -> Iterator[None]:
    """The encoder sums up each film on stderr; let it speak of errors only."""
    import av

    av.logging.set_libav_level(av.logging.ERROR)
    try:
        yield
    finally:
        av.logging.set_libav_level(av.logging.INFO)  # where it starts
