"""Where a checkpoint is: shipped with minivla, in a folder, or on the hub (then kept in the hub's cache)."""

from __future__ import annotations

import difflib
import re
from collections.abc import Callable
from pathlib import Path

from minivla.checkpoints.stored import INDEX, WEIGHTS, StoredTensor, stored_tensor

CHECKPOINTS = Path(__file__).parents[1] / "zoo" / "checkpoints"
HUB_FILES = [
    "config.json", WEIGHTS, INDEX, "model-*.safetensors", "policy_*.json", "policy_*.safetensors",
    "tokenizer/*", "action_tokenizer/*",
]  # fmt: skip
HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")


def list_checkpoints() -> list[str]:
    """The names of the checkpoints shipped with minivla, each a `source` for `load`."""
    return sorted(path.parent.name for path in CHECKPOINTS.glob("*/config.json"))


def locate(
    source: str | Path, revision: str | None, fetch: Callable[[str, str | None], tuple[Path, str]]
) -> tuple[Path, str | None]:
    """The folder of a checkpoint, and its commit if it comes from the hub, in which case `fetch` is what gets
    it.

    Raises FileNotFoundError when there is no such thing, ValueError for a file, for an empty name, for one
    that means two things, and for a revision where there are none, TypeError for anything but a name or path.
    """
    what = "a shipped checkpoint's name (minivla.list_checkpoints()), a folder, or a hub 'owner/name'"
    if not isinstance(source, str | Path):
        raise TypeError(f"source is {source!r}; expected {what}")
    if not str(source).strip():
        raise ValueError(f"source is empty, {source!r}; expected {what}. The folder you are in is '.'")
    folder = Path(source).expanduser()
    shipped = CHECKPOINTS / source if source in list_checkpoints() else None
    if shipped and folder.is_dir() and not folder.samefile(shipped):
        raise ValueError(
            f"'{source}' is a shipped checkpoint and a folder here; write './{source}' for the folder"
        )
    if isinstance(source, str) and HUB_ID.fullmatch(source) and not folder.exists():
        return fetch(source, revision)
    found = shipped or (folder if folder.is_dir() else None)
    if found and revision is not None:
        raise ValueError(
            f"revision={revision!r} is for hub repositories, and {found} is a folder; leave it out"
        )
    if found:
        return found, None
    if folder.is_file():
        raise ValueError(f"{folder} is a file; give the folder it is in, {folder.parent}")
    near = difflib.get_close_matches(str(source), list_checkpoints(), n=1)
    raise FileNotFoundError(
        f"no checkpoint '{source}'{f', did you mean {near[0]!r}' if near else ''}: shipped are "
        f"{', '.join(list_checkpoints()) or 'none'}, and there is no such folder. "
        "Hub repositories read 'owner/name'."
    )


def download(repository: str, revision: str | None) -> tuple[Path, str]:
    """Fetch what `load` reads of a hub repository. Returns (folder, commit).

    Raises FileNotFoundError, which says why it cannot be had and what to do about it.
    """
    from huggingface_hub import constants, snapshot_download

    offline = constants.HF_HUB_OFFLINE  # told, the client takes a pinned commit from the cache without asking
    try:
        path = snapshot_download(
            repository, revision=revision, allow_patterns=HUB_FILES, local_files_only=offline
        )
    except Exception as error:
        raise _unreachable(repository, revision, error) from error
    return Path(path), Path(path).name


def download_headers(repository: str, revision: str | None) -> tuple[Path, str, dict[str, StoredTensor]]:
    """Fetch `config.json` and the first bytes of the weights. Returns (folder, commit, tensors); errors as
    `download`.

    With HF_HUB_OFFLINE the whole repository must be in the cache; then the tensors are left for the caller to
    read.
    """
    from huggingface_hub import constants, get_safetensors_metadata, hf_hub_download

    if constants.HF_HUB_OFFLINE:
        return *download(repository, revision), {}
    try:
        folder = Path(hf_hub_download(repository, "config.json", revision=revision)).parent
        files = get_safetensors_metadata(repository, revision=folder.name).files_metadata
    except Exception as error:
        raise _unreachable(repository, revision, error) from error
    tensors = {
        key: stored_tensor(Path(repository, name), key, info.dtype, info.shape, info.data_offsets[0])
        for name, metadata in files.items()
        for key, info in metadata.tensors.items()
    }
    return folder, folder.name, tensors


def _unreachable(repository: str, revision: str | None, error: Exception) -> FileNotFoundError:
    from huggingface_hub import constants, errors

    kinds: dict[type[Exception], str] = {  # the first that fits: gated and private count as not found, too
        errors.GatedRepoError: "is gated: accept its licence first",
        errors.RepositoryNotFoundError: "does not exist, or is private",
        errors.RevisionNotFoundError: f"has no revision '{revision}'",
        errors.NotASafetensorsRepoError: f"has neither {WEIGHTS} nor {INDEX}",
        errors.EntryNotFoundError: "is not in the cache, or lacks a file, and the hub is out of reach",
    }
    causes = (error, error.__cause__)
    said = (text for kind, text in kinds.items() if any(isinstance(cause, kind) for cause in causes))
    reason = next(said, "is out of reach") + (" (HF_HUB_OFFLINE is set)" if constants.HF_HUB_OFFLINE else "")
    detail = next(iter(str(error).strip().splitlines()), "")
    return FileNotFoundError(
        f"hub repository '{repository}' {reason}; a folder of that name is not here either.\n"
        f"  licence and access: {constants.ENDPOINT}/{repository}, then log in with `hf auth login`\n"
        f"  without the hub: `hf download {repository} --local-dir FOLDER` where it can be reached, "
        f"copy FOLDER here, minivla.load('FOLDER')\n  the hub said: {type(error).__name__}: {detail}"
    )
