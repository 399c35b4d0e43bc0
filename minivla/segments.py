"""Segments: the named stretches of a token sequence.

A policy's sequence is a list of segments (image, language, state, action, …). The same list lays out the
tokens, makes the attention mask (`minivla.nn.masks`) and is what a trace shows.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass, replace
from typing import Literal

Kind = Literal["image", "language", "state", "action", "time", "latent", "query", "padding"]


@dataclass(frozen=True)
class Segment:
    """A stretch of tokens of one kind.

    name      what a reader calls it ("table camera")
    kind      image, language, state, action, time, latent, query or padding: its colour in every figure
    length    how many tokens
    start     its first position in the sequence (set by `arrange`)
    block     a token sees its own block and lower ones
    rule      within the segment: "full" (all see all) or "causal" (a token sees itself and earlier ones)
    grid      (rows, columns) when the tokens are patches of an image, in reading order
    image     the batch key of that image
    """

    name: str
    kind: Kind
    length: int
    start: int = 0
    block: int = 0
    rule: Literal["full", "causal"] = "full"
    grid: tuple[int, int] | None = None
    image: str | None = None

    @property
    def stop(self) -> int:
        """One past the last position."""
        return self.start + self.length


def camera_names(keys: Iterable[str]) -> dict[str, str]:
    """What readers call the cameras, by batch key: the last part of the key, or as many as tell them apart.

    >>> camera_names(["observation.images.table", "observation.images.wrist"])
    {'observation.images.table': 'table', 'observation.images.wrist': 'wrist'}
    >>> list(camera_names(["observation.images.left.rgb", "observation.images.right.rgb"]).values())
    ['left.rgb', 'right.rgb']
    """
    parts = {key: key.split(".") for key in keys}
    for count in range(1, 1 + max(map(len, parts.values()), default=0)):
        names = {key: ".".join(part[-count:]) for key, part in parts.items()}
        if len(set(names.values())) == len(names):
            return names
    return {}


def arrange(segments: Iterable[Segment]) -> list[Segment]:
    """Lay segments one after another: each gets its `start`. Empty segments are dropped.

    >>> laid = arrange([Segment("state", "state", 1), Segment("chunk", "action", 3)])
    >>> [(segment.name, segment.start, segment.stop) for segment in laid]
    [('state', 0, 1), ('chunk', 1, 4)]
    """
    laid: list[Segment] = []
    for segment in segments:
        if segment.length > 0:
            laid.append(replace(segment, start=laid[-1].stop if laid else 0))
    return laid
