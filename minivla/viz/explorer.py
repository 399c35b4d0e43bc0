"""The explorer: one call of a policy as a page that answers to the pointer, the finger and the keyboard.

    explorer = explore(trace.calls[-1])     in a notebook: a cell's last expression shows it
    explorer.save("call.html")

Everything is in one fragment of HTML: no network, no kernel. Scripts are what brings it to life; where they
are removed (an untrusted notebook, a site that cleans HTML) a still picture and one line of text remain.
Script and data come in two parts each: explorer.js and explorer_data.py for tokens, explorer_scene.js and
explorer_scene.py for the rest; the style is explorer.css.
"""

from __future__ import annotations

import base64
import hashlib
import html
import io
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from matplotlib.figure import Figure
from PIL import Image

from minivla.files import atomic_write
from minivla.recorder import Call
from minivla.viz import palette
from minivla.viz.animate import figure_frame
from minivla.viz.attention import plot_attention
from minivla.viz.chunks import plot_chunk
from minivla.viz.denoising import plot_denoising
from minivla.viz.explorer_data import (
    PLANS,
    Plan,
    Stretch,
    check_sample,
    embedded_bytes,
    kept_sites,
    left_out,
    payload,
    stretches,
)
from minivla.viz.explorer_scene import (
    Encoders,
    Robot,
    answers,
    describe_scene,
    newest_keypoints,
    seen_cameras,
)
from minivla.viz.frames import plot_cameras
from minivla.viz.keypoints import plot_keypoints
from minivla.viz.masks import plot_mask
from minivla.viz.tokens import plot_tokens, tokens_title

MOST = 950_000  # bytes
STILL = 120_000  # bytes of the picture that remains without scripts, before base64
CODE = ("explorer.js", "explorer_scene.js")
HINT = "This picture stands still: run this cell, or trust the notebook, to explore it."


@dataclass(frozen=True)
class Explorer:
    """A page about one call: `html`, a fragment to put anywhere; `left_out`, what was too large for it."""

    html: str
    title: str
    left_out: tuple[str, ...] = ()

    def _repr_html_(self) -> str:
        return self.html

    def __repr__(self) -> str:
        less = f", {len(self.left_out)} things left out" if self.left_out else ""
        return f"Explorer({self.title}: {len(self.html.encode()) / 1000:.0f} kB{less})"

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write a whole page to `path` (.html or .htm), at once or not at all. Returns the path.

        Raises ValueError for another ending.
        """
        if Path(path).suffix.lower() not in (".html", ".htm"):
            raise ValueError(f"path is {os.fspath(path)!r}; expected a name ending in .html")
        return atomic_write(path, _page(self.html, self.title))


def explore(
    call: Call,
    *,
    sample: int = 0,
    robot: Robot | None = None,
    names: Sequence[str] | None = None,
    encoders: Encoders | None = None,
    title: str | None = None,
    most_bytes: int = MOST,
) -> Explorer:
    """One call, to be looked at token by token: what each is, may look at and does look at. Of a call without
    tokens: the chunk on its way from noise, the pictures with their keypoints, what the network was told.

    call, sample: a call of a trace (`trace.calls[-1]`), and which one of its batch.
    robot: turns a normalised chunk (1, H, A) into robot units (`policy.postprocess`).
    names: of the action's dimensions (A).
    encoders: by camera, what its pictures were made into keypoints with; without, none are drawn.
    most_bytes: of the fragment; to stay below it steps of the sampler are left out, then heads averaged, then
    layers, image patches as queries and at last picture sizes left out, and the page says so.

    The same input gives the same bytes. Raises ValueError for a call that has segments without a mask, a mask
    without segments, or nothing to show; for masks and attention that do not fit, a sample out of range, a
    wrong number of names, and a page that stays too large.
    """
    check_sample(call, sample)
    found = stretches(call, sample)
    about = tokens_title(found[0].segments) if found else describe_scene(call)
    title = f"{call.method}: {about}" if title is None else title
    site, token = _start(call, found, sample)
    picture, alt = _still(call, found, site, token, sample, encoders)
    size = 0
    for plan in PLANS:
        if embedded_bytes(found, call, plan) > most_bytes and plan != PLANS[-1]:
            continue
        said = left_out(found, call, plan)
        data = payload(call, found, plan, sample=sample, robot=robot, names=names, encoders=encoders)
        fragment = _fragment(data | {"title": title, "start": token, "left_out": said}, picture, alt)
        size = len(fragment.encode())
        if size <= most_bytes:
            return Explorer(fragment, title, tuple(said))
    raise ValueError(
        f"the page takes {size:,} bytes even with one mean layer of each kind and small pictures, expected "
        f"at most {most_bytes:,}; raise most_bytes, or keep fewer sites: minivla.trace(policy, attention=[…])"
    )


def _start(call: Call, found: Sequence[Stretch], sample: int) -> tuple[str | None, int]:
    """The last attention site of the main sequence, and the token that is shown first: the query whose chunk
    the policy returned, or the first that asks there, of those that become actions if there are any. None
    and 0 without tokens.
    """
    if not found:
        return None, 0
    sites = [site for site in found[0].sites if site in kept_sites(found, call, Plan())]
    if not sites:
        return None, found[0].segments[-1].start
    asking = found[0].sites[sites[-1]][0]
    if said := answers(call, found[0].segments, sample=sample, robot=None):
        return sites[-1], said["tokens"][said["of"]]
    actions = [s.start for s in found[0].segments if s.kind in ("query", "action") and s.start in asking]
    return sites[-1], actions[0] if actions else int(asking[0])


def _looks() -> dict[str, Any]:
    """Style sheet and colours, which the script puts in: nothing of them remains where it is removed."""
    colours = {"ink": palette.INK, "muted": palette.MUTED, "paper": palette.PAPER, "faint": palette.FAINT}
    css = files("minivla.viz").joinpath("explorer.css").read_text(encoding="utf-8")
    kinds = {kind: [palette.KIND_COLOURS[kind], palette.KIND_NAMES[kind]] for kind in palette.KIND_COLOURS}
    return {"css": css, "colours": colours, "kinds": kinds}


def _fragment(data: dict[str, Any], picture: bytes, alt: str) -> str:
    """The container: a still part, the data and the script, which finds its container by the data's hash.

    No id: several explorers, or the same one twice, may be on a page; and where notebooks run a script it may
    not know which element it came from.
    """
    code = "\n".join(files("minivla.viz").joinpath(name).read_text(encoding="utf-8") for name in CODE)
    told = _json(data | _looks())
    key = hashlib.sha256((code + told).encode()).hexdigest()[:16]
    source = f"data:image/png;base64,{base64.b64encode(picture).decode('ascii')}"
    card = f"background-color: {palette.PAPER}; color: {palette.INK}; padding: 8px; max-width: 650px"
    return (
        f'<div class="minivla-explorer" data-minivla-explorer="{key}">\n'
        f'<div style="{card}"><img src="{source}" alt="{html.escape(alt, quote=True)}" '
        f'style="max-width: 100%"><p>{HINT}</p></div>\n'
        f'<script type="application/json">{told}</script>\n'
        f"<script>(() => {{\n{code}\nawaken({json.dumps(key)});\n}})();</script>\n"
        "</div>"
    )


def _json(data: Any) -> str:
    """JSON that HTML cannot misread: no bracket or ampersand is left in it, whatever names it holds."""
    text = json.dumps(data, separators=(",", ":"), sort_keys=True, allow_nan=False)
    return text.replace("&", "\\u0026").replace("<", "\\u003c").replace(">", "\\u003e")


def _page(fragment: str, title: str) -> str:
    return (
        '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">\n'
        '<meta name="viewport" content="width=device-width, initial-scale=1">\n'
        f"<title>{html.escape(title)}</title>\n"
        "<style>:root { color-scheme: light dark } body { margin: 0 auto; padding: 8px; max-width: 920px }"
        "</style>\n"
        f"</head>\n<body>\n{fragment}\n</body>\n</html>\n"
    )


def _still(
    call: Call,
    found: Sequence[Stretch],
    site: str | None,
    token: int,
    sample: int,
    encoders: Encoders | None,
) -> tuple[bytes, str]:
    """The picture that remains without scripts, as PNG, and what is seen on it in words."""
    if not found:
        figures = list(_scene_figures(call, sample, encoders))
        titles = ". ".join(figure.get_suptitle() for figure in figures)
        return _small(figures), f"{call.method}, {describe_scene(call)}: {titles}".replace("\n", " ")
    main = found[0]
    figures = [plot_tokens(main.segments)]
    told = [", ".join(f"{s.name} {s.length}" for s in main.segments)]
    if site is not None and _has_pictures(call, site):
        query = int(np.flatnonzero(main.sites[site][0] == token)[0])
        figures.append(plot_attention(call, site, query=query, sample=sample))
    else:
        figures.append(plot_mask(main.mask, main.segments, main.segments))
    told += [figure.get_suptitle() or "who may look at whom" for figure in figures[1:]]
    return _small(figures), f"The tokens of {call.method}: {'. '.join(told)}".replace("\n", " ")


def _scene_figures(call: Call, sample: int, encoders: Encoders | None) -> Iterator[Figure]:
    """Of a call without tokens: the pictures it saw, the way of its first dimension, or its chunk."""
    if marked := newest_keypoints(call, sample, encoders):
        yield plot_keypoints(*({name: pair[i] for name, pair in marked.items()} for i in (0, 1)))
    elif cameras := seen_cameras(call):
        yield plot_cameras(call.batch, cameras, sample=sample)
    if call.flow is not None:
        yield plot_denoising(call.flow, sample=sample)
    elif call.chunk is not None:
        yield plot_chunk(call.chunk[sample])


def _has_pictures(call: Call, site: str) -> bool:
    return all(s.image in call.batch for s in call.sites[site][1] if s.grid is not None)


def _small(figures: Sequence[Figure]) -> bytes:
    """Figures one below the other in few colours, closed again. PNG."""
    frames = [figure_frame(figure) for figure in figures]
    for figure in figures:
        plt.close(figure)
    width = max(frame.shape[1] for frame in frames)
    paper = tuple(int(palette.PAPER[i : i + 2], 16) for i in (1, 3, 5))
    sheet = Image.new("RGB", (width, sum(frame.shape[0] for frame in frames)), paper)
    top = 0
    for frame in frames:
        sheet.paste(Image.fromarray(frame), (0, top))
        top += frame.shape[0]
    for colours in (160, 64, 24, 12):
        buffer = io.BytesIO()
        few = sheet.quantize(colours, method=Image.Quantize.MEDIANCUT, dither=Image.Dither.NONE)
        few.save(buffer, "PNG", optimize=True)
        if len(buffer.getvalue()) <= STILL:
            break
    return buffer.getvalue()
