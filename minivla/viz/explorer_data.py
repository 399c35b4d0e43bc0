"""What the explorer embeds: a recorded call as plain data, small enough for a page.

Attention is kept in one byte a weight: the square root of the weight, as a share of its row's largest, in 255
steps. Softmax rows add up to 1, so no scale is stored: a reader squares the bytes and divides by their sum.
The root keeps small weights apart (the smallest that is not zero is 1/260,000 of the row's largest), which a
row of a thousand tokens needs: most of its sum may lie in weights a hundredth of the largest.
"""

from __future__ import annotations

import base64
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from minivla.recorder import Call
from minivla.segments import Segment, arrange
from minivla.viz import explorer_scene
from minivla.viz.explorer_scene import Encoders, Robot
from minivla.viz.layout import check_segments
from minivla.viz.masks import check_mask
from minivla.viz.pictures import as_array
from minivla.viz.words import shown_word

MAIN = "main sequence"


@dataclass(frozen=True)
class Plan:
    """How much of a call is embedded.

    steps     how many points of a sampler's path, evenly spaced; None for all
    heads     every head, or only the mean of each layer's
    layers    how many layers of each kind ("encoder.*"), evenly spaced; None for all
    patches   image patches as queries too; without them they are still looked at
    side      the longer side of a camera picture, in pixels, at most
    """

    steps: int | None = None
    heads: bool = True
    layers: int | None = None
    patches: bool = True
    side: int = 256


PLANS = (
    *(Plan(steps) for steps in (None, 51, 21)),
    *(Plan(21, heads=False, layers=layers) for layers in (None, 6, 3, 1)),
    Plan(21, patches=False),
    *(Plan(21, heads=False, layers=layers, patches=False) for layers in (None, 6, 3, 1)),
    *(Plan(steps, heads=False, layers=1, patches=False, side=side) for steps, side in ((11, 112), (3, 56))),
)
"""From everything to the least that is still worth a page; the first that fits is taken."""


@dataclass
class Stretch:
    """A sequence of tokens, who may look at whom in it, and where the tokens of its attention sites stand.

    mask (L, L) bool;  sites by name: positions of the site's queries and of its keys in this sequence.
    """

    name: str
    segments: list[Segment]
    mask: np.ndarray
    sites: dict[str, tuple[np.ndarray, np.ndarray]] = field(default_factory=dict)


def stretches(call: Call, sample: int) -> list[Stretch]:
    """The main sequence of a call first, then the ones that sites outside of it have (ACT's VAE encoder).

    None of a call without tokens that has something else to show. Raises ValueError when it has not, or
    when masks and attention do not fit their sequence.
    """
    found = _main(call)
    for site in call.sites:
        queries, keys = _check_site(call, site)
        own = found[0] if found else None
        at = (None, None) if own is None else (places(queries, own.segments), places(keys, own.segments))
        if at[0] is None or at[1] is None:
            own = _other(found, site, queries, keys)
            at = places(queries, own.segments), places(keys, own.segments)
        assert own is not None and at[0] is not None and at[1] is not None
        own.sites[site] = at[0], at[1]
    _open_masks(call, sample, found)
    return found


def _main(call: Call) -> list[Stretch]:
    """The main sequence, in a list that is empty when the call describes none."""
    if not call.segments and call.mask is None and (call.sites or explorer_scene.has_scene(call)):
        return []
    if not call.segments or call.mask is None:
        raise ValueError(
            f"this call of {call.method} describes no token sequence (segments: {len(call.segments)}, "
            f"mask: {'none' if call.mask is None else 'there'}), or has neither chunk, flow nor keypoints; "
            "explore a call of a policy that does"
        )
    segments, mask = check_segments(call.segments), check_mask(call.mask)
    length = segments[-1].stop
    if mask.shape != (length, length):
        told = ", ".join(f"{s.name} {s.length}" for s in segments)
        raise ValueError(
            f"the mask has shape {mask.shape}, the segments ({told}) add up to {length}; "
            f"expected a mask of {length} × {length}"
        )
    return [Stretch(MAIN, segments, mask.copy())]


def _open_masks(call: Call, sample: int, found: Sequence[Stretch]) -> None:
    """Side sequences, and the main one of later samples, are open where one of their sites is.

    The mask that a policy describes is sample 0's; padding may differ in others.
    """
    for stretch in found:
        if stretch.name == MAIN and sample == 0:
            continue
        seen = {site: as_array(call.masks[site][sample]) for site in stretch.sites if site in call.masks}
        for told, seen_at in ((False, seen), (True, seen)):
            for site, mask in seen_at.items():
                queries, keys = stretch.sites[site]
                asked = mask.any(axis=1)  # with a key/value cache, some rows may never have been computed
                place = np.ix_(queries[asked], keys)
                stretch.mask[place] = (stretch.mask[place] | mask[asked]) if told else False


def _other(found: list[Stretch], site: str, queries: Sequence[Segment], keys: Sequence[Segment]) -> Stretch:
    """The side sequence a site belongs to: its keys, then its queries where they are other tokens."""
    own = [*keys, *(s for s in queries if places([s], keys) is None)]
    for stretch in found:
        if [_kin(s) for s in stretch.segments] == [_kin(s) for s in own]:
            return stretch
    segments = arrange(own)
    length = segments[-1].stop
    name = site.split(".")[0] if len(segments) > 1 else re.sub(r"\.\d+$", "", site).replace(".", ", ", 1)
    found.append(Stretch(name, segments, np.zeros((length, length), bool)))
    return found[-1]


def _kin(segment: Segment) -> tuple[str, str, int]:
    return segment.name, segment.kind, segment.length


def places(segments: Sequence[Segment], sequence: Sequence[Segment]) -> np.ndarray | None:
    """Where the tokens of `segments` stand in `sequence`; None when one of the segments is not in it."""
    free, found = list(sequence), []
    for s in segments:
        same = next((other for other in free if _kin(other) == _kin(s)), None)
        if same is None:
            return None
        free.remove(same)
        found.append(np.arange(same.start, same.stop))
    return np.concatenate(found)


def _check_site(call: Call, site: str) -> tuple[list[Segment], list[Segment]]:
    """A site's query and key segments, once its mask and its attention are known to fit them."""
    queries, keys = (
        check_segments(segments, None, f"{site} {what} ")
        for segments, what in zip(call.sites[site], ("query", "key"), strict=True)
    )
    expected = queries[-1].stop, keys[-1].stop
    for what, kept in (("mask", call.masks), ("attention", call.attention)):
        if site in kept and tuple(kept[site].shape[-2:]) != expected:
            raise ValueError(
                f"the {what} of site {site!r} has shape {tuple(kept[site].shape)}; its segments add up to "
                f"{expected[0]} queries and {expected[1]} keys"
            )
    return queries, keys


def check_sample(call: Call, sample: int) -> None:
    """Raises ValueError when the call holds no such sample."""
    kept = [*call.masks.values(), *call.attention.values(), *([] if call.chunk is None else [call.chunk])]
    kept += [call.hidden[explorer_scene.POINTS + key] for key in explorer_scene.seen_cameras(call)]
    sizes = {len(value) for value in kept} | ({call.flow.x.shape[1]} if call.flow else set())
    size = min(sizes, default=1)
    if not 0 <= sample < size:
        raise ValueError(f"sample is {sample}; this call holds {size}: expected 0 to {size - 1}")


def payload(
    call: Call,
    found: Sequence[Stretch],
    plan: Plan,
    *,
    sample: int,
    robot: Robot | None,
    names: Any,
    encoders: Encoders | None = None,
) -> dict[str, Any]:
    """All that the page shows, as JSON holds it."""
    kept, main = kept_sites(found, call, plan), main_segments(found)
    scene: dict[str, Any] = {"sample": sample, "robot": robot}
    return {
        "method": call.method,
        "task": explorer_scene.instruction(call.batch, sample),
        "sequences": [_sequence(stretch, kept, call, plan, sample) for stretch in found],
        "images": explorer_scene.images(call.batch, _patched(call, found), sample, plan.side),
        "chunk": explorer_scene.chunk_steps(call, **scene, names=names, most=plan.steps),
        "answers": explorer_scene.answers(call, main, **scene),
        "views": explorer_scene.views(call, main, sample=sample, side=plan.side, encoders=encoders),
        "condition": explorer_scene.condition(call, sample),
        "asked": _asked(call) if kept else None,
    }


def main_segments(found: Sequence[Stretch]) -> list[Segment]:
    """The segments of the main sequence; none of a call without tokens."""
    return found[0].segments if found and found[0].name == MAIN else []


def _patched(call: Call, found: Sequence[Stretch]) -> list[str]:
    """Cameras whose patches are tokens."""
    wanted = {s.image for stretch in found for s in stretch.segments if s.grid and s.image in call.batch}
    return [key for key in wanted if key]


def _asked(call: Call) -> str | None:
    """Which of a sampler's many calls of the network the attention is from: a call keeps the last."""
    if call.flow is None or len(call.flow.v) < 2:
        return None
    return f"Of the sampler's {len(call.flow.v)} steps this is the last, at time {call.flow.times[-2]:.4g}."


def kept_sites(found: Sequence[Stretch], call: Call, plan: Plan) -> list[str]:
    """Sites whose attention is embedded: all, or `plan.layers` of each kind, evenly spaced."""
    kinds: dict[str, list[str]] = {}
    for site in (site for stretch in found for site in stretch.sites if site in call.attention):
        kinds.setdefault(re.sub(r"\.\d+(?=\.|$)", ".*", site), []).append(site)
    kept: list[str] = []
    for sites in kinds.values():
        most = len(sites) if plan.layers is None else min(plan.layers, len(sites))
        kept += [
            sites[i] for i in np.unique(np.linspace(len(sites) - 1, 0, most).round().astype(int)).tolist()
        ]
    return kept


def embedded_bytes(found: Sequence[Stretch], call: Call, plan: Plan) -> int:
    """How long the attention of a plan is in base64, without making it."""
    total = 0
    for site in kept_sites(found, call, plan):
        stretch = next(s for s in found if site in s.sites)
        heads = call.attention[site].shape[1] if plan.heads else 1
        queries, keys = stretch.sites[site]
        total += heads * int(_kept_rows(stretch, queries, plan).sum()) * len(keys)
    return total * 4 // 3


def left_out(found: Sequence[Stretch], call: Call, plan: Plan) -> list[str]:
    """What a plan leaves out of this call, one sentence each, for the page to say."""
    said = []
    steps, of = (len(explorer_scene.sampler_steps(call, most)) for most in (plan.steps, None))
    if steps < of:
        said.append(f"Sampler: {steps} of {of} points of its path are here, evenly spread.")
    sites = kept_sites(found, call, Plan())
    kept = kept_sites(found, call, plan)
    if not plan.heads and any(call.attention[site].shape[1] > 1 for site in kept):
        said.append("Heads: only the mean of each layer's heads is here.")
    if len(kept) < len(sites):
        said.append(f"Layers: {len(kept)} of {len(sites)} are here ({', '.join(kept)}).")
    grids = any(s.grid for stretch in found for s in stretch.segments)
    if not plan.patches and grids and sites:
        said.append("Image patches: who looks at them is here, what they look at is not.")
    if plan.side < PLANS[0].side and (_patched(call, found) or explorer_scene.seen_cameras(call)):
        said.append(f"Pictures: at most {plan.side} pixels wide.")
    return said


def _kept_rows(stretch: Stretch, queries: np.ndarray, plan: Plan) -> np.ndarray:
    """Which queries of a site keep their row."""
    patch = np.concatenate([np.full(s.length, s.grid is not None) for s in stretch.segments])
    return np.ones(len(queries), bool) if plan.patches else ~patch[queries]


def _sequence(stretch: Stretch, kept: Sequence[str], call: Call, plan: Plan, sample: int) -> dict[str, Any]:
    rows, which = np.unique(stretch.mask, axis=0, return_inverse=True)
    sites = []
    for site in (site for site in stretch.sites if site in kept):
        queries, keys = stretch.sites[site]
        rows_kept = _kept_rows(stretch, queries, plan)
        weights = as_array(call.attention[site][sample])[:, rows_kept]
        heads = weights.shape[0]
        if rows_kept.any():
            weights = weights if plan.heads else weights.mean(axis=0, keepdims=True)
            sites.append(
                {
                    "name": site,
                    "heads": heads,
                    "kept": len(weights),
                    "queries": _ranges(queries[rows_kept]),
                    "keys": _ranges(keys),
                    "weights": _text(quantise(weights, site)),
                }
            )
    return {
        "name": stretch.name,
        "segments": [
            {"name": s.name, "kind": s.kind, "length": s.length, "grid": s.grid, "image": s.image}
            | _words(stretch, s, call, sample)
            for s in stretch.segments
        ],
        "mask": {"rows": which.ravel().tolist(), "bits": _text(np.packbits(rows, axis=1))},
        "sites": sites,
    }


def _words(stretch: Stretch, segment: Segment, call: Call, sample: int) -> dict[str, list[str]]:
    """The texts of a segment's tokens, where they are known; those of padding are left out.

    Raises ValueError where there are more or fewer words than tokens.
    """
    rows = call.words.get(segment.name, [])
    if sample >= len(rows):
        return {}
    if len(rows[sample]) != segment.length:
        raise ValueError(
            f"segment {segment.name!r} has {segment.length} tokens and {len(rows[sample])} words; expected "
            "one for each"
        )
    seen = np.asarray(stretch.mask.any(axis=0))[segment.start : segment.stop]
    return {"words": [shown_word(w) if real else "" for w, real in zip(rows[sample], seen, strict=True)]}


def quantise(weights: np.ndarray, site: str = "") -> np.ndarray:
    """Softmax rows (…, K) as uint8: 255 · √(weight / the row's largest). A row that sees nothing becomes 0.

    Raises ValueError for rows that do not add up to 1.
    """
    weights = np.nan_to_num(weights.astype(np.float64))
    total = weights.sum(axis=-1)
    if not np.all((total == 0) | (np.abs(total - 1) < 1e-2)):
        raise ValueError(
            f"attention rows of site {site!r} add up to {total.min():.3g} to {total.max():.3g}; "
            "expected softmax rows, which add up to 1"
        )
    largest = np.maximum(weights.max(axis=-1, keepdims=True), 1e-300)
    return np.rint(255 * np.sqrt(weights / largest)).astype(np.uint8)


def weights_of(quantised: np.ndarray) -> np.ndarray:
    """What a reader makes of `quantise`: rows (…, K) that add up to 1, or to 0 where nothing is seen."""
    squares = quantised.astype(np.float64) ** 2
    return squares / np.maximum(squares.sum(axis=-1, keepdims=True), 1)


def _ranges(positions: np.ndarray) -> list[list[int]]:
    """Positions as [start, length] of their unbroken runs."""
    breaks = np.flatnonzero(np.diff(positions) != 1) + 1
    return [[int(run[0]), len(run)] for run in np.split(positions, breaks) if len(run)]


def _text(array: np.ndarray) -> str:
    return base64.b64encode(np.ascontiguousarray(array).tobytes()).decode("ascii")
