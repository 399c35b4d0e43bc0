"""Checkpoints on the hub: from its cache, from a small hub of our own on this machine, and when it says
no."""

from __future__ import annotations

import json
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from huggingface_hub import HfApi, constants, errors
from safetensors.torch import save_file

from minivla.checkpoints import hub, load, receipt
from minivla.data.features import FeatureType, NormalizationMode, PolicyFeature
from minivla.policies.act import ACT, ACTConfig

COMMIT = "0123456789abcdef0123456789abcdef01234567"


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A small ACT, saved."""
    config = ACTConfig(
        input_features={"observation.environment_state": PolicyFeature(FeatureType.ENV, (4,))},
        output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
        normalization_mapping={"ACTION": NormalizationMode.IDENTITY},
        chunk_size=3,
        n_action_steps=3,
        dim_model=64,
        n_heads=2,
        dim_feedforward=64,
        pretrained_backbone_weights=None,
    )
    return ACT(config, {}).save(tmp_path_factory.mktemp("act") / "small")


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty hub cache."""
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


def test_offline_from_the_cache(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    repository = cache / "models--someone--small-act"
    (repository / "refs").mkdir(parents=True)
    (repository / "refs" / "main").write_text(COMMIT)
    (repository / "snapshots").mkdir()
    (repository / "snapshots" / COMMIT).symlink_to(folder)
    policy = load("someone/small-act")
    assert (policy.receipt.source, policy.receipt.revision) == ("someone/small-act", COMMIT)
    assert receipt("someone/small-act").entries == policy.receipt.entries
    assert load("someone/small-act", revision=COMMIT).receipt.revision == COMMIT


def test_offline_and_not_in_the_cache(cache: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    for read in (load, receipt):
        with pytest.raises(FileNotFoundError) as caught:
            read("someone/no-such-act")
        text = str(caught.value)
        assert "'someone/no-such-act' is not in the cache" in text
        assert "(HF_HUB_OFFLINE is set)" in text
        assert "a folder of that name is not here either" in text
        assert "hf download someone/no-such-act --local-dir FOLDER" in text


class Hub(BaseHTTPRequestHandler):
    """As much of the hub as `load` and `receipt` ask for. `files`, `served` and `refusal` are set by the
    fixture."""

    files: dict[str, bytes]
    served: dict[str, int]
    refusal: tuple[int, str] | None

    def do_HEAD(self) -> None:
        self.answer(body=False)

    def do_GET(self) -> None:
        self.answer(body=True)

    def answer(self, *, body: bool) -> None:
        if self.refusal is not None:
            self.respond(self.refusal[0], b"", {"X-Error-Code": self.refusal[1]}, body)
        elif "/resolve/" in self.path:
            self.resolve(self.path.rpartition("/")[-1], body)
        elif "/tree/" in self.path:
            sizes = [{"type": "file", "path": k, "size": len(v), "oid": "0"} for k, v in self.files.items()]
            self.respond(200, json.dumps(sizes).encode(), {}, body)
        else:
            listing = [{"rfilename": name} for name in self.files]
            info = {"id": "someone/small-act", "sha": COMMIT, "siblings": listing}
            self.respond(200, json.dumps(info).encode(), {}, body)

    def resolve(self, name: str, body: bool) -> None:
        if name not in self.files:
            self.respond(404, b"", {"X-Error-Code": "EntryNotFound"}, body)
            return
        content, status = self.files[name], 200
        if wanted := self.headers.get("Range"):
            first, last = wanted.removeprefix("bytes=").split("-")
            content, status = content[int(first) : int(last) + 1], 206
        self.served[name] = self.served.get(name, 0) + len(content) * body
        self.respond(status, content, {"ETag": '"etag-of-' + name + '"', "X-Repo-Commit": COMMIT}, body)

    def respond(self, status: int, content: bytes, headers: dict[str, str], body: bool) -> None:
        self.send_response(status)
        for key, value in (headers | {"Content-Length": str(len(content))}).items():
            self.send_header(key, value)
        self.end_headers()
        if body:
            self.wfile.write(content)

    def log_message(self, *_: object) -> None:
        pass


@pytest.fixture
def server(folder: Path, cache: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[type[Hub]]:
    """The hub's client, online, and talking to a hub on this machine that has one repository."""
    monkeypatch.setattr(Hub, "files", {p.name: p.read_bytes() for p in folder.iterdir()}, raising=False)
    monkeypatch.setattr(Hub, "served", {}, raising=False)
    monkeypatch.setattr(Hub, "refusal", None, raising=False)
    Hub.files["optimizer.safetensors"] = b"x" * 1000
    web = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    address = f"http://127.0.0.1:{web.server_port}"
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", False)
    monkeypatch.setattr(constants, "ENDPOINT", address)
    monkeypatch.setattr(
        constants, "HUGGINGFACE_CO_URL_TEMPLATE", address + "/{repo_id}/resolve/{revision}/{filename}"
    )
    import huggingface_hub.hf_api

    monkeypatch.setattr(huggingface_hub.hf_api.api, "endpoint", address)
    thread = threading.Thread(target=web.serve_forever, args=(0.02,), daemon=True)
    thread.start()
    yield Hub
    web.shutdown()
    web.server_close()


def test_online(server: type[Hub], folder: Path) -> None:
    policy = load("someone/small-act")
    assert (policy.receipt.ok, policy.receipt.revision) == (True, COMMIT)
    assert set(server.served) <= set(server.files) - {"optimizer.safetensors"}  # only what is read
    here = load(folder)
    for key, value in policy.state_dict().items():
        assert torch.equal(value, here.state_dict()[key])


def test_receipt_fetches_headers_alone(server: type[Hub], folder: Path) -> None:
    found = receipt("someone/small-act")
    assert (found.ok, found.revision) == (True, COMMIT)
    assert found.entries == receipt(folder).entries
    size = len(server.files["model.safetensors"])
    assert size > 400_000
    assert 0 < server.served["model.safetensors"] < size / 3


@pytest.mark.parametrize(
    ("status", "code", "message"),
    [
        (403, "GatedRepo", "is gated: accept its licence first"),
        (401, "GatedRepo", "is gated: accept its licence first"),
        (404, "RepoNotFound", "does not exist, or is private"),
        (404, "RevisionNotFound", "has no revision 'v9'"),
        (501, "", "is out of reach"),
    ],
)
def test_refusals(
    server: type[Hub], monkeypatch: pytest.MonkeyPatch, status: int, code: str, message: str
) -> None:
    monkeypatch.setattr(server, "refusal", (status, code))
    for read in (load, receipt):
        with pytest.raises(FileNotFoundError) as caught:
            read("someone/small-act", revision="v9")
        text = str(caught.value)
        assert message in text or (status == 501 and "the hub is out of reach" in text)
        assert (
            f"licence and access: {constants.ENDPOINT}/someone/small-act, then log in with `hf auth login`"
            in text
        )
        assert "hf download someone/small-act --local-dir FOLDER" in text


def test_no_hub_at_all(server: type[Hub], monkeypatch: pytest.MonkeyPatch) -> None:
    """A client that finds nobody at the other end."""
    import httpx

    def nobody(*_: object, **__: object) -> None:
        raise httpx.ConnectError("[Errno 111] Connection refused")

    monkeypatch.setattr(HfApi, "repo_info", nobody)
    with pytest.raises(FileNotFoundError, match=r"the hub is out of reach(.|\n)*Connection refused"):
        load("someone/small-act")


def test_repository_without_weights(server: type[Hub]) -> None:
    del server.files["model.safetensors"]
    with pytest.raises(
        FileNotFoundError, match=r"has neither model\.safetensors nor model\.safetensors\.index\.json"
    ):
        receipt("someone/small-act")
    with pytest.raises(FileNotFoundError, match=r"no model\.safetensors and no"):
        load("someone/small-act")


def test_hub_dtype_unknown_to_torch(server: type[Hub], tmp_path: Path) -> None:
    save_file({"a": torch.zeros(2)}, tmp_path / "f.safetensors")
    server.files["model.safetensors"] = (tmp_path / "f.safetensors").read_bytes().replace(b"F32", b"U3 ")
    with pytest.raises((ValueError, FileNotFoundError), match="U3"):
        receipt("someone/small-act")


@pytest.mark.parametrize("name", ["a/b/c", "/a/b", "./a", "../a", "~/a", "a/", "a b/c"])
def test_names_that_are_no_repository(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")  # where there is no ../a either
    monkeypatch.setattr(hub, "download", None)
    assert hub.HUB_ID.fullmatch(name) is None
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load(name)


def test_gated_is_recognised_before_not_found() -> None:
    assert issubclass(errors.GatedRepoError, errors.RepositoryNotFoundError)  # hence the order of the reasons
