"""The receipt: what became of every key of a checkpoint, and of every tensor a policy needs.

Both sides are compared by upstream's names and by shape; no data is looked at. A policy says how its own
names become upstream's (CHECKPOINT_NAMES), what older files call the same (`canonical_names`), which keys it
leaves out and why (IGNORED_KEYS), and which one stands for another that a file lacks (STAND_INS).
"""

from __future__ import annotations

import difflib
import re
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

from torch import Tensor

from minivla.checkpoints.stored import StoredTensor
from minivla.data.stats import LEGACY_KEY
from minivla.policies.base import Policy

STATUSES = ("matched", "tied", "ignored", "missing", "unexpected")
LISTED = 12


@dataclass(frozen=True)
class Entry:
    """What became of one key.

    key: the name in the file, or upstream's when it is not there; status: one of STATUSES; ours: our tensor's
    name, if there is one; shape: as stored (when missing: as needed); reason: why it is tied, ignored or
    refused; source: the stored key that fills a tensor of its own, when that is not `key`.
    """

    key: str
    status: str
    ours: str | None
    shape: tuple[int, ...]
    reason: str = ""
    source: str = ""

    def __str__(self) -> str:
        return f"{self.key}  {self.shape}" + (f"  {self.reason}" if self.reason else "")


@dataclass
class Receipt:
    """Every key accounted for. Printing it shows the counts and all that is not simply matched; `table()`
    shows all.

    source, revision: where the checkpoint came from (revision: the hub's commit). notes: what became of
    settings in config.json that no longer exist.
    """

    entries: list[Entry] = field(default_factory=list)
    source: str = ""
    revision: str | None = None
    notes: list[str] = field(default_factory=list)

    @property
    def matched(self) -> list[Entry]:
        """Keys that fill one of our tensors."""
        return self._with("matched")

    @property
    def tied(self) -> list[Entry]:
        """Further names of a tensor that a matched key fills, stored or not."""
        return self._with("tied")

    @property
    def ignored(self) -> list[Entry]:
        """Keys left out on purpose, each with its reason."""
        return self._with("ignored")

    @property
    def missing(self) -> list[Entry]:
        """What the policy needs and the checkpoint lacks."""
        return self._with("missing")

    @property
    def unexpected(self) -> list[Entry]:
        """Keys that nothing explains, or whose shape or kind of number is not ours."""
        return self._with("unexpected")

    @property
    def ok(self) -> bool:
        """Nothing missing and nothing unexpected."""
        return not self.missing and not self.unexpected

    def _with(self, status: str) -> list[Entry]:
        return [entry for entry in self.entries if entry.status == status]

    def __str__(self) -> str:
        counts = " · ".join(f"{len(self._with(status))} {status}" for status in STATUSES)
        lines = [f"{self.source or 'checkpoint'}: {counts}{'' if self.ok else '  → refused'}"]
        for status in STATUSES[1:]:
            entries = self._with(status)
            lines += [f"  {status:<10}  {entry}" for entry in entries[:LISTED]]
            lines += [f"  {status:<10}  … and {len(entries) - LISTED} more"] * (len(entries) > LISTED)
        return "\n".join(lines + [f"  config.json  {note}" for note in self.notes])

    def table(self) -> str:
        """All entries, a line each: upstream's key, our name, shape, status."""
        rows = [(e.key, e.ours or "–", str(e.shape), e.status) for e in self.entries]
        widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
        return "\n".join("  ".join(map(str.ljust, row, widths)).rstrip() for row in rows)


class CheckpointError(ValueError):
    """A checkpoint that does not fit the policy; `receipt` has the whole account."""

    def __init__(self, message: str, receipt: Receipt) -> None:
        super().__init__(message)
        self.receipt = receipt


def needed_tensors(policy: Policy) -> dict[str, tuple[str, Tensor]]:
    """Upstream's name → (our name, the tensor), for each parameter and each buffer that is saved.

    Raises ValueError when CHECKPOINT_NAMES gives two of ours one name.
    """
    ours = policy.state_dict(keep_vars=True)
    needed = {policy.upstream_name(name): (name, tensor) for name, tensor in ours.items()}
    if len(needed) < len(ours):
        count = Counter(map(policy.upstream_name, ours))
        twice = [name for name in ours if count[policy.upstream_name(name)] > 1]
        raise ValueError(
            f"{type(policy).__name__}.CHECKPOINT_NAMES gives {', '.join(twice)} a name in common"
        )
    return needed


def account(policy: Policy, stored: Mapping[str, StoredTensor], superseded: str = "") -> list[Entry]:
    """Compare what `policy` needs with what is `stored`, an entry for each name on either side.

    superseded: what is used in place of statistics among the weights, if anything is.
    """
    needed, kind = needed_tensors(policy), type(policy)
    keys, entries = _by_name(kind, stored, needed)
    for name, key in keys.items():
        entries[key] = _explain(kind, stored[key], name, needed.get(name), superseded)
    shared: dict[int, list[str]] = {}
    for name, (_, tensor) in needed.items():
        shared.setdefault(id(tensor), []).append(name)
    for names in shared.values():
        present = [keys[name] for name in names if name in keys]
        for name in names:
            if name not in keys:
                entries[name] = _absent(kind, name, needed[name], present, keys)
            elif keys[name] != present[0] and entries[keys[name]].status == "matched":
                tied = replace(entries[keys[name]], status="tied", reason=f"same as {present[0]}")
                entries[keys[name]] = tied
    return _with_hints(list(entries.values()))


def _by_name(
    policy: type[Policy], stored: Mapping[str, StoredTensor], needed: Mapping[str, tuple[str, Tensor]]
) -> tuple[dict[str, str], dict[str, Entry]]:
    """Upstream's name → stored key; and an entry for each key whose name another one has already.

    A key that stands in for an absent name, and is not needed itself, goes by that name.
    """
    names = policy.canonical_names(stored)
    keys: dict[str, str] = {}
    twice: dict[str, Entry] = {}
    for key, found in stored.items():
        first = keys.setdefault(names[key], key)
        if first != key:
            twice[key] = Entry(key, "unexpected", None, found.shape, f"{first} is the same tensor")
    for name, other in policy.STAND_INS.items():
        if name in needed and name not in keys and other in keys and other not in needed:
            keys[name] = keys.pop(other)
    return keys, twice


def _absent(
    policy: type[Policy],
    name: str,
    needed: tuple[str, Tensor],
    present: list[str],
    keys: Mapping[str, str],
) -> Entry:
    """A name that is not stored: another name of its tensor is, or one that stands in; or it is missing."""
    ours, shape = needed[0], tuple(needed[1].shape)
    if present:
        return Entry(name, "tied", ours, shape, f"not stored, same as {present[0]}")
    if source := keys.get(policy.STAND_INS.get(name, "")):
        return Entry(name, "tied", ours, shape, f"not stored, same as {source}", source)
    return Entry(name, "missing", ours, shape)


def _explain(
    policy: type[Policy],
    found: StoredTensor,
    upstream: str,
    ours: tuple[str, Tensor] | None,
    superseded: str,
) -> Entry:
    if ours is not None:
        name, tensor = ours
        if found.shape != tuple(tensor.shape):
            return Entry(
                found.key, "unexpected", name, found.shape, f"the policy has shape {tuple(tensor.shape)}"
            )
        if found.dtype.is_floating_point != tensor.is_floating_point():
            return Entry(
                found.key, "unexpected", name, found.shape, f"{found.dtype}, the policy has {tensor.dtype}"
            )
        return Entry(found.key, "matched", name, found.shape)
    for pattern, reason in policy.IGNORED_KEYS.items():
        if re.fullmatch(pattern, upstream):
            return Entry(found.key, "ignored", None, found.shape, reason)
    if LEGACY_KEY.match(found.key):
        what = f"superseded by {superseded}" if superseded else "read into the preprocessor"
        return Entry(found.key, "ignored", None, found.shape, f"statistics, {what}")
    return Entry(found.key, "unexpected", None, found.shape, "no such tensor in the policy")


def _with_hints(entries: list[Entry]) -> list[Entry]:
    """Beside the first missing and unexplained keys, the likest name on the other side of the same shape."""
    missing = [entry for entry in entries if entry.status == "missing"]
    unexplained = [entry for entry in entries if entry.status == "unexpected" and entry.ours is None]
    hints = {entry.key: _hint(entry, unexplained, "perhaps stored as") for entry in missing[:LISTED]}
    hints |= {entry.key: _hint(entry, missing, "perhaps meant for") for entry in unexplained[:LISTED]}
    return [replace(entry, reason=hints[entry.key]) if hints.get(entry.key) else entry for entry in entries]


def _hint(entry: Entry, others: list[Entry], words: str) -> str:
    names = [other.key for other in others if other.shape == entry.shape]
    near = difflib.get_close_matches(entry.key, names, n=1, cutoff=0.5)
    return f"{words} {near[0]}" if near else ""
