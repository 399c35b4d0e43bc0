"""What the explorer's tests share: a look at one explorer of a page, and calls made by hand."""

import numpy as np
import torch

from minivla.nn.masks import segment_mask
from minivla.recorder import Call, Flow
from minivla.segments import Segment, arrange
from minivla.viz.attention import attention_shares, attention_weights

ROOT = "document.querySelectorAll('[data-minivla-explorer]')[{index}].shadowRoot"


class View:
    """One explorer on a page."""

    def __init__(self, page, index=0):
        self.page, self.root = page, ROOT.format(index=index)

    def all(self, selector, expression):
        """An expression of `n` for each node."""
        return self.page.evaluate(f"[...{self.root}.querySelectorAll({selector!r})].map(n => {expression})")

    def text(self, selector):
        return " ".join(self.all(selector, "n.textContent"))

    def box(self, selector):
        """Left, top, width and height in the window, after scrolling there."""
        self.page.evaluate(f"{self.root}.querySelector({selector!r}).scrollIntoView({{block: 'center'}})")
        return self.all(selector, "(b => [b.x, b.y, b.width, b.height])(n.getBoundingClientRect())")[0]

    def middle(self, selector):
        left, top, width, height = self.box(selector)
        return left + width / 2, top + height / 2

    def hover(self, selector):
        self.page.move(*self.middle(selector))

    def click(self, selector):
        self.page.click(*self.middle(selector))

    def choose(self, token):
        self.click(f'[data-token="{token}"]')

    def slide(self, label, value):
        """Move a slider to a value with the keyboard."""
        self.page.evaluate(f"{self.root}.querySelector('input[aria-label={label}]').focus()")
        self.page.press("Home")
        for _ in range(value):
            self.page.press("ArrowRight")
        assert self.all(f"input[aria-label={label}]", "Number(n.value)") == [value]

    @property
    def lit(self):
        return np.array(self.all(".ribbon .cell", "n.classList.contains('open')"))

    @property
    def shown(self):
        (token,) = self.all(".ribbon .shown", "Number(n.dataset.token)")
        return token

    @property
    def kept(self):
        (token,) = self.all(".ribbon [aria-selected=true]", "Number(n.dataset.token)")
        return token

    @property
    def shares(self):
        return self.all(".bar", "Number(n.dataset.share)")

    @property
    def strengths(self):
        return np.array(self.all(".ribbon .cell", "Number(n.style.getPropertyValue('--strength'))"))

    @property
    def band(self):
        """The filled places in the mask picture's row."""
        lit = np.zeros(len(self.lit), bool)
        for start, stop in (map(int, run.split("-")) for run in self.all(".band .open", "n.dataset.open")):
            lit[start:stop] = True
        return lit

    @property
    def overlays(self):
        return self.all(".frame canvas", "n.toDataURL()")


def bare(segments, mask=None, **more):
    """A call that holds a sequence and its mask, and nothing else."""
    segments = arrange(segments)
    mask = segment_mask(segments)[0] if mask is None else mask
    return Call("predict_action_chunk", more.pop("batch", {}), segments=segments, mask=mask, **more)


def flowing():
    """Words, a state and a chunk in motion: one joint site of a cached decoder, two samples."""
    segments = arrange([Segment("words", "language", 30), Segment("chunk", "action", 5, block=1)])
    keys = torch.arange(35)
    mask = segment_mask(segments)
    score = torch.sin(keys[None, :] * (1.0 + keys[:, None] / 9)) * 3
    attention = torch.stack([score, -score])[:, None].masked_fill(~mask[:, None], float("-inf")).softmax(-1)
    x = torch.linspace(1, 0, 5)[:, None, None, None] * torch.linspace(-2, 2, 20).view(1, 2, 5, 2) + 0.25
    site = {"joint.0": (segments, segments)}
    call = bare(segments, mask[0], sites=site, masks={"joint.0": mask.expand(2, -1, -1)})
    call.attention["joint.0"] = attention
    call.flow = Flow(torch.linspace(1, 0, 5), x, (x[1:] - x[:-1]) * 4)
    call.chunk = x[-1]
    return call


def recorded_shares(call, site, query, head=None, sample=0):
    weights = attention_weights(call, site, query=query, head=head, sample=sample)
    return list(attention_shares(weights, call.sites[site][1]).values())
