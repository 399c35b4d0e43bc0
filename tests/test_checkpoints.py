"""Loading and its receipt, on a policy of seven tensors: what fits, what does not, and what is said about
it."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
import warnings
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

import minivla
from minivla.checkpoints import POLICIES, CheckpointError, hub, list_checkpoints, load, receipt, write_headers
from minivla.checkpoints.loading import _parameters_on_meta
from minivla.checkpoints.stored import CHUNK_BYTES, read_header, read_tensor
from minivla.data.features import FeatureType, NormalizationMode, PolicyFeature
from minivla.policies.base import Policy, PolicyConfig


@dataclass
class ToyConfig(PolicyConfig):
    """A width, and one field minivla alone knows."""

    type: ClassVar[str] = "toy"
    MINIVLA_FIELDS: ClassVar[tuple[str, ...]] = ("extra",)

    width: int = 4
    pretrained_backbone_weights: str | None = "somewhere-far"
    extra: int = 0


class Toy(Policy):
    """Tied parameters, buffers of three kinds, and a constructor that draws random numbers and would fetch
    weights."""

    name: ClassVar[str] = "toy"
    config_class: ClassVar[type[PolicyConfig]] = ToyConfig
    CHECKPOINT_NAMES: ClassVar[tuple[tuple[str, str], ...]] = ((r"^inner\.", "net."), (r"^", "model."))
    IGNORED_KEYS: ClassVar[dict[str, str]] = {r"model\.unused\..*": "read by nothing upstream"}

    def __init__(self, config: ToyConfig, stats: Mapping[str, Mapping[str, Any]] | None = None) -> None:
        super().__init__(config, stats)
        if config.pretrained_backbone_weights is not None:
            raise AssertionError("weights were to be fetched that the folder has")
        self.embed = nn.Embedding(7, config.width)
        self.head = nn.Linear(config.width, 7, bias=False)
        self.head.weight = self.embed.weight
        self.inner = nn.Linear(3, config.width)
        self.frozen = nn.Parameter(torch.randn(2), requires_grad=False)
        self.register_buffer("scale", torch.ones(2))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))
        self.register_buffer("table", torch.arange(3.0), persistent=False)


FEATURES: dict[str, Any] = {
    "input_features": {"observation.state": PolicyFeature(FeatureType.STATE, (3,))},
    "output_features": {"action": PolicyFeature(FeatureType.ACTION, (2,))},
    "normalization_mapping": dict.fromkeys(("STATE", "ACTION"), NormalizationMode.MEAN_STD),
}
KEYS = ("embed.weight", "net.weight", "net.bias", "frozen", "scale", "count")


def statistics(seed: int = 0) -> dict[str, dict[str, Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    sizes = {"observation.state": 3, "action": 2}
    draw = {k: torch.rand(2, n, generator=generator) + 0.5 for k, n in sizes.items()}
    return {
        k: {"mean": mean, "std": std, "min": mean - 3, "max": mean + 3} for k, (mean, std) in draw.items()
    }


@pytest.fixture(autouse=True)
def _toy_is_known(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setitem(POLICIES, "toy", f"{__name__}:Toy")
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        yield


@pytest.fixture
def tensors() -> dict[str, Tensor]:
    """What upstream would store, by its names."""
    generator = torch.Generator().manual_seed(1)
    shapes = {"embed.weight": (7, 4), "net.weight": (4, 3), "net.bias": (4,), "frozen": (2,), "scale": (2,)}
    drawn = {f"model.{key}": torch.randn(shape, generator=generator) for key, shape in shapes.items()}
    return drawn | {"model.count": torch.tensor(5)}


@pytest.fixture
def folder(tmp_path: Path, tensors: dict[str, Tensor]) -> Path:
    """A whole folder: config, weights, processors."""
    config = ToyConfig(**FEATURES, pretrained_backbone_weights=None)
    policy = Toy(config, statistics())
    del policy.head  # its tensor is stored once
    path = policy.save(tmp_path / "toy")
    save_file(tensors, path / "model.safetensors")
    edit_config(path, pretrained_backbone_weights="somewhere-far", device="cuda")
    return path


def edit_config(folder: Path, **changes: Any) -> None:
    content = json.loads((folder / "config.json").read_text()) | changes
    content = {key: value for key, value in content.items() if value is not ...}
    (folder / "config.json").write_text(json.dumps(content))


def rewrite(folder: Path, change: Callable[[dict[str, Tensor]], Any]) -> None:
    found = load_file(folder / "model.safetensors")
    change(found)
    save_file(found, folder / "model.safetensors")


# --- what fits
# -------------------------------------------------------------------------------------------------


def test_every_tensor_lands_in_its_place(folder: Path, tensors: dict[str, Tensor]) -> None:
    policy = load(folder)
    assert isinstance(policy, Toy)
    state = policy.state_dict()
    for key, value in tensors.items():
        ours = key.removeprefix("model.").replace("net.", "inner.")
        torch.testing.assert_close(state[ours], value, rtol=0, atol=0)
    assert policy.get_parameter("head.weight") is policy.get_parameter("embed.weight")
    assert [name for name, p in policy.named_parameters() if not p.requires_grad] == ["frozen"]
    assert state["count"].dtype == torch.int64
    torch.testing.assert_close(policy.table, torch.arange(3.0))
    assert not policy.training
    assert policy.config.device == "cpu"


def test_receipt_accounts_for_every_name(folder: Path, tensors: dict[str, Tensor]) -> None:
    found = load(folder).receipt
    assert found.ok
    assert {entry.key for entry in found.matched} == set(tensors)
    assert [(e.key, e.ours, e.reason) for e in found.tied] == [
        ("model.head.weight", "head.weight", "not stored, same as model.embed.weight")
    ]
    assert (found.ignored, found.missing, found.unexpected) == ([], [], [])
    assert f"{folder}: 6 matched · 1 tied · 0 ignored · 0 missing · 0 unexpected" in str(found)
    assert "model.net.weight    inner.weight  (4, 3)  matched" in found.table()


def test_ignored_keys_need_a_reason(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.unused.a": torch.ones(1)}))
    found = load(folder).receipt
    assert [(e.key, e.reason) for e in found.ignored] == [("model.unused.a", "read by nothing upstream")]
    assert "ignored     model.unused.a  (1,)  read by nothing upstream" in str(found)


def test_processors_come_along(folder: Path) -> None:
    policy, stats = load(folder), statistics()
    raw = torch.tensor([1.0, 2.0, 3.0])
    expected = (raw - stats["observation.state"]["mean"]) / (stats["observation.state"]["std"] + 1e-8)
    torch.testing.assert_close(
        policy.preprocess({"observation.state": raw})["observation.state"][0], expected
    )
    torch.testing.assert_close(policy.postprocess(torch.zeros(1, 2))[0], stats["action"]["mean"])


def test_random_state_is_left_alone(folder: Path) -> None:
    before = torch.random.get_rng_state()
    load(folder)
    receipt(folder)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_the_file_may_change_after_loading(folder: Path, tensors: dict[str, Tensor]) -> None:
    policy = load(folder)
    (folder / "model.safetensors").write_bytes(b"")
    torch.testing.assert_close(
        policy.get_parameter("embed.weight"), tensors["model.embed.weight"], rtol=0, atol=0
    )


@pytest.mark.parametrize(
    ("stored", "asked", "expected"),
    [
        (torch.float16, None, torch.float32),
        (torch.bfloat16, None, torch.bfloat16),
        (torch.float32, None, torch.float32),
        (torch.float64, None, torch.float64),
        (torch.float32, torch.bfloat16, torch.bfloat16),
        (torch.float16, torch.float16, torch.float16),
    ],
)
def test_dtypes(folder: Path, stored: torch.dtype, asked: torch.dtype | None, expected: torch.dtype) -> None:
    cast = {
        k: v.to(stored) if v.is_floating_point() else v
        for k, v in load_file(folder / "model.safetensors").items()
    }
    save_file(cast, folder / "model.safetensors")
    policy = load(folder, dtype=asked)
    for ours, key in (("embed.weight", "model.embed.weight"), ("scale", "model.scale")):
        assert policy.state_dict()[ours].dtype == expected
        torch.testing.assert_close(policy.state_dict()[ours], cast[key].to(expected), rtol=0, atol=0)
    assert policy.count.dtype == torch.int64
    assert policy.table.dtype == torch.float32


def test_a_cast_in_pieces_is_the_cast_of_the_whole(tmp_path: Path) -> None:
    value = torch.randn(3, CHUNK_BYTES // 8 + 5)  # longer than one piece, and no multiple of it
    save_file({"a": torch.zeros(3), "b": value, "none": torch.zeros(0, 4)}, tmp_path / "f.safetensors")
    stored = read_header(tmp_path / "f.safetensors")
    assert torch.equal(read_tensor(stored["b"], dtype=torch.bfloat16), value.bfloat16())
    assert torch.equal(read_tensor(stored["b"]), value)
    assert read_tensor(stored["none"]).shape == (0, 4)


def shard(folder: Path) -> None:
    found = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    names = {key: f"model-0000{1 + i % 2}-of-00002.safetensors" for i, key in enumerate(found)}
    for name in set(names.values()):
        save_file({key: value for key, value in found.items() if names[key] == name}, folder / name)
    index = {"metadata": {}, "weight_map": names}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def test_shards(folder: Path) -> None:
    whole = load(folder)
    shard(folder)
    sharded = load(folder)
    assert [e.key for e in sharded.receipt.matched] != []
    for key, value in whole.state_dict().items():
        assert torch.equal(sharded.state_dict()[key], value)


def test_overrides_and_minivla_fields(folder: Path) -> None:
    edit_config(folder, minivla={"extra": 2})
    assert load(folder).config.extra == 2
    assert load(folder, extra=3).config.extra == 3
    assert load(folder, n_obs_steps=2).config.n_obs_steps == 2


def test_parameters_on_meta_keep_to_their_thread() -> None:
    import threading

    built: list[nn.Module] = []
    with _parameters_on_meta():
        other = threading.Thread(target=lambda: built.append(nn.Linear(2, 2)))
        other.start()
        other.join()
        ours = nn.Linear(2, 2)
    assert ours.weight.is_meta
    assert not built[0].weight.is_meta
    assert not nn.Linear(2, 2).weight.is_meta


# --- other names
# ---------------------------------------------------------------------------------------------------


def test_older_names_are_read_as_todays(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = classmethod(lambda cls, keys: {key: key.replace("net.", "model.net.") for key in keys})
    monkeypatch.setattr(Toy, "canonical_names", names)
    rewrite(folder, lambda t: t.update({f"net.{n}": t.pop(f"model.net.{n}") for n in ("weight", "bias")}))
    with pytest.raises(CheckpointError, match=r"missing     model\.frozen"):
        rewrite(folder, lambda t: t.pop("model.frozen"))
        load(folder)
    rewrite(folder, lambda t: t.update({"model.frozen": torch.ones(2)}))
    found = load(folder).receipt
    assert [(e.key, e.ours) for e in found.matched if e.key.startswith("net")] == [
        ("net.bias", "inner.bias"),
        ("net.weight", "inner.weight"),
    ]


def test_two_keys_of_one_name_are_refused(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    names = classmethod(lambda cls, keys: {key: key.replace("old.", "model.") for key in keys})
    monkeypatch.setattr(Toy, "canonical_names", names)
    rewrite(folder, lambda t: t.update({"old.frozen": torch.ones(2)}))
    with pytest.raises(CheckpointError, match=r"unexpected  old\.frozen  \(2,\)  model\.frozen is the same"):
        load(folder)


def test_one_tensor_stands_in_for_another(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Stored as one, needed as two: each gets a copy of its own."""
    monkeypatch.setattr(Toy, "STAND_INS", {"model.frozen": "model.scale", "model.net.bias": "model.frozen"})
    rewrite(folder, lambda t: t.pop("model.frozen"))
    policy = load(folder)
    assert [(e.key, e.source) for e in policy.receipt.tied if e.source] == [("model.frozen", "model.scale")]
    assert torch.equal(policy.frozen, policy.scale)
    assert policy.frozen.data_ptr() != policy.scale.data_ptr()
    assert receipt(folder).entries == policy.receipt.entries
    rewrite(folder, lambda t: t.pop("model.net.bias"))
    assert [entry.key for entry in receipt(folder).missing] == ["model.net.bias"]  # no chains


def test_a_stand_in_that_is_not_needed_itself_is_matched(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(Toy, "STAND_INS", {"model.frozen": "model.unused.head"})
    rewrite(folder, lambda t: t.update({"model.unused.head": torch.full((2,), 7.0)}))
    assert [entry.key for entry in load(folder).receipt.ignored] == ["model.unused.head"]
    rewrite(folder, lambda t: t.pop("model.frozen"))
    policy = load(folder)
    assert policy.receipt.ignored == []
    assert policy.frozen.tolist() == [7.0, 7.0]


def test_extra_tensors_are_written_beside_ours(folder: Path, tmp_path: Path, monkeypatch: Any) -> None:
    policy = load(folder)
    extra = {"model.unused.again": policy.frozen, "model.unused.zeros": torch.zeros(()).expand(3, 2)}
    monkeypatch.setattr(policy, "extra_tensors", lambda: extra)
    monkeypatch.setattr(policy.config, "extra", 0)
    found = load_file(policy.save(tmp_path / "again") / "model.safetensors")
    assert torch.equal(found["model.unused.again"], policy.frozen)
    assert torch.equal(found["model.unused.zeros"], torch.zeros(3, 2))
    assert len(load(tmp_path / "again").receipt.ignored) == 2


# --- headers alone
# ---------------------------------------------------------------------------------------------


def test_receipt_from_headers_alone(folder: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    headers = write_headers(folder, tmp_path / "headers")
    data = (folder / "model.safetensors").stat().st_size - (headers / "model.safetensors").stat().st_size
    assert data == 4 * (28 + 12 + 4 + 2 + 2) + 8
    monkeypatch.setattr("minivla.checkpoints.loading.read_tensor", None)  # reading any tensor would raise
    assert receipt(headers).entries == receipt(folder).entries
    assert receipt(headers).ok
    shard(folder)
    shards = write_headers(folder, tmp_path / "shards")
    assert {e.key: e.status for e in receipt(shards).entries} == {
        e.key: e.status for e in receipt(headers).entries
    }


def test_receipt_tells_and_does_not_refuse(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.net.bias"))
    found = receipt(folder)
    assert not found.ok
    assert [entry.key for entry in found.missing] == ["model.net.bias"]
    assert receipt(folder, width=5).unexpected[0].reason == "the policy has shape (7, 5)"


def test_load_refuses_headers_alone(folder: Path, tmp_path: Path) -> None:
    headers = write_headers(folder, tmp_path / "headers")
    with pytest.raises(ValueError, match=r"model.safetensors is cut short: .*the header alone"):
        load(headers)


# --- keys that do not fit
# --------------------------------------------------------------------------------------


def test_missing_and_renamed_keys(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"net.weight": t.pop("model.net.weight")}))
    with pytest.raises(CheckpointError) as caught:
        load(folder)
    text = str(caught.value)
    assert "do not fit the Toy that config.json describes" in text
    assert "missing     model.net.weight  (4, 3)  perhaps stored as net.weight" in text
    assert "unexpected  net.weight  (4, 3)  perhaps meant for model.net.weight" in text
    assert [entry.ours for entry in caught.value.receipt.missing] == ["inner.weight"]


def test_missing_buffer(folder: Path) -> None:
    rewrite(folder, lambda t: t.pop("model.scale"))
    with pytest.raises(CheckpointError, match=r"missing     model\.scale  \(2,\)"):
        load(folder)


def test_unexpected_key(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.more": torch.ones(9)}))
    with pytest.raises(
        CheckpointError, match=r"unexpected  model\.more  \(9,\)  no such tensor in the policy"
    ):
        load(folder)


def test_wrong_shape(folder: Path) -> None:
    with pytest.raises(CheckpointError, match=r"model\.net\.bias  \(4,\)  the policy has shape \(5,\)"):
        load(folder, width=5)


def test_wrong_kind_of_number(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.count": torch.tensor(5.0)}))
    with pytest.raises(CheckpointError, match=r"model\.count .* torch.float32, the policy has torch.int64"):
        load(folder)


def test_both_tied_present(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({"model.head.weight": t["model.embed.weight"].clone()}))
    policy = load(folder)
    assert [entry.reason for entry in policy.receipt.tied] == ["same as model.embed.weight"]
    assert policy.get_parameter("head.weight") is policy.get_parameter("embed.weight")
    rewrite(folder, lambda t: t["model.head.weight"].mul_(2))
    with pytest.raises(
        CheckpointError, match=r"'model\.head\.weight' and 'model\.embed\.weight' are one tensor"
    ):
        load(folder)


def test_tied_under_its_second_name(folder: Path, tensors: dict[str, Tensor]) -> None:
    rewrite(folder, lambda t: t.update({"model.head.weight": t.pop("model.embed.weight")}))
    policy = load(folder)
    assert policy.get_parameter("head.weight") is policy.get_parameter("embed.weight")
    torch.testing.assert_close(
        policy.get_parameter("embed.weight"), tensors["model.embed.weight"], rtol=0, atol=0
    )


def test_long_lists_are_cut(folder: Path) -> None:
    rewrite(folder, lambda t: t.update({f"model.more.{i}": torch.ones(i + 1) for i in range(30)}))
    with pytest.raises(CheckpointError, match="unexpected  … and 18 more"):
        load(folder)


def test_two_names_for_one_key(folder: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(Toy, "CHECKPOINT_NAMES", ((r"\.(weight|bias)$", ""),))
    with pytest.raises(
        ValueError, match=r"CHECKPOINT_NAMES gives inner\.weight, inner\.bias a name in common"
    ):
        receipt(folder)


# --- damaged files
# ---------------------------------------------------------------------------------------------


def damage(folder: Path, change: Callable[[bytes], bytes]) -> None:
    path = folder / "model.safetensors"
    path.write_bytes(change(path.read_bytes()))


def with_header(content: bytes, header: bytes) -> bytes:
    old = int.from_bytes(content[:8], "little")
    return len(header).to_bytes(8, "little") + header + content[8 + old :]


def edited_header(content: bytes, edit: Callable[[dict[str, Any]], Any]) -> bytes:
    length = int.from_bytes(content[:8], "little")
    header = json.loads(content[8 : 8 + length])
    edit(header)
    return with_header(content, json.dumps(header).encode())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c[:-3], r"is cut short: expected ([\d,]+) bytes, found ([\d,]+); copy, download"),
        (
            lambda c: c[:100],
            r"is cut short, or no safetensors file: its header alone should have .*the file has 100",
        ),
        (lambda c: c[:5], r"is cut short, or no safetensors file: .* 8 bytes or more, the file has 5"),
        (lambda c: b"", r"is cut short, or no safetensors file: .* the file has 0"),
        (lambda c: c + b"x", r"is too long: expected"),
        (lambda c: b"\x80\x04garbage" * 9, r"is cut short, or no safetensors file"),
        (lambda c: with_header(c, b"{not json}"), r"is corrupt \(Expecting property name"),
        (lambda c: with_header(c, b'[1, 2, "three"]'), r"is corrupt"),
        (lambda c: with_header(c, b"\xff\xfe" * 10), r"is corrupt"),
        (lambda c: with_header(c, b'{"a": 3}'), r"is corrupt"),
        (
            lambda c: edited_header(c, lambda h: h["model.scale"].update(shape=[3])),
            r"takes 12 bytes, its place has 8",
        ),
        (
            lambda c: edited_header(c, lambda h: h["model.scale"].update(dtype="Q4")),
            r"has dtype Q4; expected one of BOOL",
        ),
        (lambda c: edited_header(c, lambda h: h.pop("model.net.bias")), r"is corrupt \('.*' starts at byte"),
        (
            lambda c: b"version https://git-lfs.github.com/spec/v1\noid sha256:0\n",
            r"Git LFS pointer .* `git lfs pull`",
        ),
    ],
)
def test_damaged_weights(folder: Path, change: Callable[[bytes], bytes], message: str) -> None:
    damage(folder, change)
    with pytest.raises(ValueError, match=message) as caught:
        load(folder)
    assert str(folder / "model.safetensors") in str(caught.value)


def test_truncated_sizes_are_named(folder: Path) -> None:
    size = (folder / "model.safetensors").stat().st_size
    damage(folder, lambda c: c[:-3])
    with pytest.raises(ValueError, match=f"expected {size:,} bytes, found {size - 3:,}"):
        load(folder)


def test_a_file_that_shrinks_while_it_is_read(folder: Path) -> None:
    stored = read_header(folder / "model.safetensors")
    damage(folder, lambda c: c[:-3])
    last = max(stored.values(), key=lambda tensor: tensor.start)
    with pytest.raises(ValueError, match=f"ends inside '{last.key}', 3 bytes early"):
        read_tensor(last)


def test_damaged_shards(folder: Path) -> None:
    shard(folder)
    index, first = folder / "model.safetensors.index.json", folder / "model-00001-of-00002.safetensors"
    text = index.read_text()
    index.write_text(text.replace("model.scale", "model.scale2"))
    with pytest.raises(
        ValueError, match=r"index\.json and the shards disagree about model\.scale, model\.scale2"
    ):
        load(folder)
    index.write_text('{"weight_map": []}')
    with pytest.raises(ValueError, match="has no 'weight_map'"):
        load(folder)
    index.write_text(text)
    shutil.copy(first, folder / "model-00002-of-00002.safetensors")
    with pytest.raises(ValueError, match="and so does another shard"):
        load(folder)
    first.unlink()
    with pytest.raises(FileNotFoundError, match=r"no file model-00001-of-00002\.safetensors"):
        load(folder)


def test_no_weights(folder: Path) -> None:
    (folder / "model.safetensors").rename(folder / "pytorch_model.bin")
    with pytest.raises(
        FileNotFoundError, match=r"no model\.safetensors .* pytorch_model\.bin could run any code"
    ):
        load(folder)


# --- config.json, device, dtype
# --------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"type": "tyo"}, r"config\.json has type 'tyo', did you mean 'toy'; minivla knows act, .*toy"),
        ({"type": "gr00t_n9"}, r"has type 'gr00t_n9'; minivla knows"),
        ({"type": ["act"]}, r"has type \['act'\].*; minivla knows"),
        ({"input_features": [1]}, r"input_features[^$]*expected [^$]*while reading .*config\.json"),
        ({"type": ...}, r"has type None; .* from before LeRobot had types"),
        ({"witdh": 3}, r"no field 'witdh' \(did you mean 'width'\?\)"),
        ({"use_peft": True}, r"has use_peft: the folder holds adapters"),
    ],
)
def test_bad_config(folder: Path, changes: dict[str, Any], message: str) -> None:
    edit_config(folder, **changes)
    for read in (load, receipt):
        with pytest.raises(ValueError, match=message):
            read(folder)


def test_config_is_not_json(folder: Path) -> None:
    (folder / "config.json").write_text("{")
    with pytest.raises(ValueError, match=r"config\.json is not JSON"):
        load(folder)
    (folder / "config.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file config\.json"):
        load(folder)


def test_bookkeeping_is_harmless(folder: Path) -> None:
    edit_config(folder, use_amp=False, push_to_hub=True, repo_id=None, private=None, tags=None, license="mit")
    assert load(folder).receipt.ok


def test_unknown_override(folder: Path) -> None:
    with pytest.raises(
        ValueError, match=r"ToyConfig has no field 'widht', did you mean 'width'; it has n_obs_steps"
    ):
        load(folder, widht=3)
    with pytest.raises(ValueError, match="'pretrained_backbone_weights' cannot be overridden"):
        load(folder, pretrained_backbone_weights="x")
    with pytest.raises(TypeError, match=r"input_features is \[1\]; expected a dict such as .*PolicyFeature"):
        load(folder, input_features=[1], stats=statistics())
    with pytest.raises(TypeError, match=r"normalization_mapping is .*'MAD'.*NormalizationMode"):
        load(folder, normalization_mapping={"STATE": "MAD"}, stats=statistics())


def test_bad_device_and_dtype(folder: Path) -> None:
    if not torch.cuda.is_available():
        with pytest.raises(ValueError, match=r"no device 'cuda' on this machine, which offers cpu"):
            load(folder, device="cuda")
    with pytest.raises(ValueError, match=r"dtype is torch\.int8; expected a floating-point type"):
        load(folder, dtype=torch.int8)


# --- statistics
# ------------------------------------------------------------------------------------------------


def drop_processors(folder: Path) -> None:
    for path in folder.glob("policy_*"):
        path.unlink()


def drop_statistics(folder: Path) -> None:
    """Processors that were written without statistics, as LeRobot does when it is given none."""
    for path in folder.glob("policy_*.safetensors"):
        path.unlink()
    for path in folder.glob("policy_*.json"):
        content = json.loads(path.read_text())
        for step in content["steps"]:
            step.pop("state_file", None)
        path.write_text(json.dumps(content))


@pytest.mark.parametrize("drop", [drop_processors, drop_statistics])
def test_statistics_absent(folder: Path, drop: Callable[[Path], None]) -> None:
    drop(folder)
    with pytest.raises(
        ValueError, match=r"lacks statistics to normalise with .*stats=dataset\.stats.*stats=None"
    ):
        load(folder)
    policy = load(folder, stats=statistics(3))
    torch.testing.assert_close(policy.postprocess(torch.zeros(1, 2))[0], statistics(3)["action"]["mean"])
    bare = load(folder, stats=None)
    assert bare.receipt.ok
    with pytest.raises((ValueError, KeyError), match="no statistics"):
        bare.preprocess({"observation.state": torch.zeros(3)})
    with pytest.raises((ValueError, KeyError), match="no statistics"):
        bare.postprocess(torch.zeros(1, 2))


def test_statistics_not_needed(folder: Path) -> None:
    drop_processors(folder)
    edit_config(folder, normalization_mapping={"STATE": "IDENTITY", "ACTION": "IDENTITY"})
    action = torch.rand(1, 2)
    assert torch.equal(load(folder).postprocess(action), action)


def test_statistics_replaced(folder: Path) -> None:
    policy = load(folder, stats=statistics(3))
    torch.testing.assert_close(policy.postprocess(torch.zeros(1, 2))[0], statistics(3)["action"]["mean"])


def test_constant_statistics_given(folder: Path) -> None:
    flat = statistics()
    flat["action"] |= {"std": torch.tensor([0.0, 1.0])}
    for drop in (None, drop_processors):
        if drop:
            drop(folder)
        with pytest.raises(ValueError, match=r"action\[0\]: constant, std = 0"):
            load(folder, stats=flat)
        assert load(folder, stats=flat, allow_constant=True).postprocess(torch.ones(1, 2))[
            0, 0
        ] == pytest.approx(flat["action"]["mean"][0].item())


def change_steps(folder: Path, name: str, change: Callable[[list[dict[str, Any]]], Any]) -> None:
    path = folder / f"policy_{name}.json"
    content = json.loads(path.read_text())
    change(content["steps"])
    path.write_text(json.dumps(content))


def last_identity(steps: list[dict[str, Any]]) -> None:
    steps[-1]["config"]["norm_map"]["STATE"] = "IDENTITY"


@pytest.mark.parametrize(
    ("name", "change", "key"),
    [
        ("preprocessor", lambda steps: steps.clear(), "observation.state"),
        ("preprocessor", lambda steps: steps[-1]["config"]["features"].clear(), "observation.state"),
        ("preprocessor", last_identity, "observation.state"),
        ("postprocessor", lambda steps: steps.clear(), "action"),
        (
            "postprocessor",
            lambda steps: steps[0].update(registry_name="normalizer_processor"),
            "action",
        ),
    ],
)
def test_processors_that_pass_a_feature_by(
    folder: Path, name: str, change: Callable[[list[dict[str, Any]]], Any], key: str
) -> None:
    change_steps(folder, name, change)
    with pytest.raises(
        ValueError, match=rf"'{key}' \(MEAN_STD\): no step of .*policy_{name}\.json[^$]*stats=dataset\.stats"
    ):
        load(folder)
    policy = load(folder, stats=statistics())  # the mend that the message gives
    raw = torch.tensor([1.0, 2.0, 3.0])
    table = statistics()["observation.state"]
    torch.testing.assert_close(
        policy.preprocess({"observation.state": raw})["observation.state"][0],
        (raw - table["mean"]) / table["std"],
    )
    torch.testing.assert_close(policy.postprocess(torch.zeros(1, 2))[0], statistics()["action"]["mean"])
    with pytest.raises(ValueError, match="no statistics"):
        load(folder, stats=None).postprocess(torch.zeros(1, 2))


def test_observations_left_out_on_purpose(folder: Path) -> None:
    change_steps(
        folder, "preprocessor", lambda s: s[-1]["config"].update(normalize_observation_keys=["observation.x"])
    )
    raw = torch.tensor([1.0, 2.0, 3.0])
    assert torch.equal(load(folder).preprocess({"observation.state": raw})["observation.state"][0], raw)


def test_one_processor_absent(folder: Path) -> None:
    (folder / "policy_postprocessor.json").unlink()
    with pytest.raises(FileNotFoundError, match=r"no file policy_postprocessor\.json"):
        load(folder)


def test_normalisation_overridden(folder: Path) -> None:
    identity = {"STATE": NormalizationMode.IDENTITY, "ACTION": NormalizationMode.IDENTITY}
    with pytest.raises(ValueError, match="normalization_mapping cannot be overridden alone"):
        load(folder, normalization_mapping=identity)
    policy = load(folder, normalization_mapping=identity, stats=statistics())
    action = torch.rand(1, 2)
    assert torch.equal(policy.postprocess(action), action)


def legacy(folder: Path, stats: Mapping[str, Mapping[str, Tensor]]) -> None:
    """Put the statistics where LeRobot had them before 0.4."""
    drop_processors(folder)
    places = {
        "normalize_inputs": "observation.state",
        "normalize_targets": "action",
        "unnormalize_outputs": "action",
    }
    buffers = {
        f"{place}.buffer_{key.replace('.', '_')}.{name}": stats[key][name].clone()
        for place, key in places.items()
        for name in ("mean", "std")
        if name in stats.get(key, {})
    }
    rewrite(folder, lambda t: t.update(buffers))


def test_legacy_statistics(folder: Path) -> None:
    raw = {"observation.state": torch.tensor([1.0, 2.0, 3.0])}
    new = load(folder)
    legacy(folder, statistics())
    policy = load(folder)
    assert len(policy.receipt.ignored) == 6
    assert {e.reason for e in policy.receipt.ignored} == {"statistics, read into the preprocessor"}
    assert torch.equal(policy.preprocess(raw)["observation.state"], new.preprocess(raw)["observation.state"])
    assert torch.equal(policy.postprocess(torch.ones(1, 2)), new.postprocess(torch.ones(1, 2)))


def test_legacy_statistics_that_are_superseded(folder: Path, tmp_path: Path) -> None:
    whole = shutil.copytree(folder, tmp_path / "whole")
    legacy(folder, statistics(3))
    given = {entry.reason for entry in load(folder, stats=statistics()).receipt.ignored}
    assert given == {"statistics, superseded by the statistics given"}
    shutil.copy(folder / "model.safetensors", whole)
    policy = load(whole)
    assert {e.reason for e in policy.receipt.ignored} == {
        "statistics, superseded by policy_preprocessor.json"
    }
    assert receipt(whole).entries == policy.receipt.entries
    torch.testing.assert_close(policy.postprocess(torch.zeros(1, 2))[0], statistics()["action"]["mean"])


def test_legacy_statistics_never_set(folder: Path) -> None:
    unset = {
        key: {name: torch.full_like(v, torch.inf) for name, v in t.items()} for key, t in statistics().items()
    }
    legacy(folder, unset)
    with pytest.raises(ValueError, match="lacks statistics to normalise with"):
        load(folder)


def test_legacy_statistics_in_part(folder: Path) -> None:
    legacy(folder, {"observation.state": statistics()["observation.state"]})
    with pytest.raises(ValueError, match=r"lacks statistics to normalise with .*'action'"):
        load(folder)


def test_legacy_constant_dimension_warns(folder: Path) -> None:
    stats = statistics()
    stats["observation.state"]["std"][1] = 0
    legacy(folder, stats)
    with pytest.warns(UserWarning, match=r"observation\.state\[1\]: constant"):
        load(folder)


# --- where it is
# -----------------------------------------------------------------------------------------------


@pytest.fixture
def shipped(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A package that ships two checkpoints; the working directory is elsewhere."""
    checkpoints = folder.parent / "zoo" / "checkpoints"
    for name in ("toy-tabletop", "other-tabletop"):
        shutil.copytree(folder, checkpoints / name)
    (checkpoints / "no-checkpoint").mkdir()
    monkeypatch.setattr(hub, "CHECKPOINTS", checkpoints)
    (folder.parent / "elsewhere").mkdir()
    monkeypatch.chdir(folder.parent / "elsewhere")
    return checkpoints


def test_shipped(shipped: Path) -> None:
    assert minivla.list_checkpoints() == ["other-tabletop", "toy-tabletop"]
    policy = minivla.load("toy-tabletop")
    assert policy.receipt.source == "toy-tabletop"
    assert policy.receipt.revision is None
    with pytest.raises(
        FileNotFoundError, match="no checkpoint 'toy-tabeltop', did you mean 'toy-tabletop': shipped are "
    ):
        load("toy-tabeltop")
    with pytest.raises(ValueError, match=r"revision='main' is for hub repositories"):
        load("toy-tabletop", revision="main")


def test_shipped_and_a_folder(shipped: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    shutil.copytree(shipped / "toy-tabletop", "toy-tabletop")
    with pytest.raises(
        ValueError, match=r"is a shipped checkpoint and a folder here; write '\./toy-tabletop'"
    ):
        load("toy-tabletop")
    assert load("./toy-tabletop").receipt.ok
    monkeypatch.chdir(shipped)
    assert load("toy-tabletop").receipt.ok


@pytest.mark.parametrize(
    ("source", "error", "message"),
    [
        ("", ValueError, r"source is empty, ''; expected a shipped .* is '\.'"),
        (" ", ValueError, "source is empty"),
        (None, TypeError, r"source is None; expected a shipped checkpoint's name"),
        (3, TypeError, "source is 3; expected"),
    ],
)
def test_no_source(
    folder: Path, source: Any, error: type[Exception], message: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(folder)  # where an empty name would have meant this folder
    for read in (load, receipt):
        with pytest.raises(error, match=message):
            read(source)


def test_no_such_folder(folder: Path) -> None:
    with pytest.raises(FileNotFoundError, match=r"no checkpoint '/no/such/folder'.* there is no such folder"):
        load("/no/such/folder")
    with pytest.raises(FileNotFoundError, match="there is no such folder"):
        load(folder.parent / "nowhere")
    with pytest.raises(ValueError, match=r"config\.json is a file; give the folder it is in"):
        load(folder / "config.json")


def test_what_is_shipped_loads() -> None:
    for name in list_checkpoints():
        assert receipt(name).ok


# --- memory
# ----------------------------------------------------------------------------------------------------

MEASURE = """
import sys, minivla
from pathlib import Path
def kib(field):
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(field))
minivla.load(sys.argv[1], stats=None)  # a small one first, so that every import is done
for folder in sys.argv[2:]:
    before = kib("VmRSS")
    policy = minivla.load(folder, stats=None)
    print(kib("VmHWM") - before, sum(p.numel() * p.element_size() for p in policy.parameters()) // 1024)
    del policy
assert "torch._dynamo" not in sys.modules, "some seconds were spent on importing torch's compiler"
"""


def write_zeros(folder: Path, config: PolicyConfig, policy: Policy, dtype: str) -> None:
    """A checkpoint of nothing but zeros, which takes no room on disk."""
    header: dict[str, Any] = {}
    end = 0
    for name, tensor in policy.state_dict().items():
        size = tensor.numel() * (4 if dtype == "F32" else 2)
        offsets = [end, end + size]
        header[policy.upstream_name(name)] = {
            "dtype": dtype,
            "shape": list(tensor.shape),
            "data_offsets": offsets,
        }
        end += size
    text = json.dumps(header).encode()
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config.to_json()))
    with open(folder / "model.safetensors", "wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + end)


@pytest.mark.skipif(not Path("/proc/self/status").exists(), reason="measures memory where Linux tells it")
def test_peak_memory_is_near_one_copy(tmp_path: Path) -> None:
    """370 MB of float32 in memory, stored as float16 and as such: the peak stays under 1.3 copies."""
    from minivla.policies.act import ACT, ACTConfig

    for name, width, dtype in (("small", 8, "F32"), ("half", 1024, "F16"), ("full", 1024, "F32")):
        config = ACTConfig(
            input_features={"observation.environment_state": PolicyFeature(FeatureType.ENV, (4,))},
            output_features={"action": PolicyFeature(FeatureType.ACTION, (2,))},
            dim_model=width,
            dim_feedforward=4 * width,
            n_encoder_layers=3,
            n_vae_encoder_layers=3,
        )
        with _parameters_on_meta():
            write_zeros(tmp_path / name, config, ACT(config), dtype)
    for name in ("half", "full"):  # a process each: what an earlier load has freed would be used again
        call = [sys.executable, "-c", MEASURE, str(tmp_path / "small"), str(tmp_path / name)]
        # Pages of the file count as the process's as long as the kernel leaves them mapped, which a busy
        # machine does for longer: that only adds, so the least of three is what loading needs.
        runs = [subprocess.run(call, check=True, capture_output=True, text=True).stdout for _ in range(3)]
        peak, size = min(tuple(map(int, out.split())) for out in runs)
        assert size > 350 * 1024
        assert 0.9 * size < peak < 1.3 * size
