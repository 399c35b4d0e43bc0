"""The explorer of calls without tokens, and what it shows beside tokens: a sampler's path, keypoints, codes.

As in test_explorer.py, only input events go into the page.
"""

import re

import numpy as np
import pytest
import torch

import minivla
from minivla.recorder import Call, Flow
from minivla.viz import palette
from minivla.viz.explorer import explore
from minivla.viz.explorer_scene import condition, rounded
from tests.browser import Browser
from tests.policies.test_diffusion import STATE, TRANSFORMER, WRIST, batch_of, policy_of
from tests.policies.test_vqbet import batch as vqbet_batch
from tests.policies.test_vqbet import vqbet
from tests.viz.explorer_view import View

MARKED = "[...n.querySelectorAll('circle')].filter(c => c.matches('.marked')).length"
CENTRES = (
    "[...n.querySelectorAll('circle')].map(c => [c.getAttribute('cx'), c.getAttribute('cy')].map(Number))"
)


@pytest.fixture(scope="module")
def tab():
    with Browser() as browser:
        yield browser.open("about:blank")


@pytest.fixture
def show(tab, tmp_path):
    """Load an explorer; nothing may be fetched, nothing fail."""
    tab.problems.clear()
    tab.requests.clear()

    def load(explorer, **options):
        tab.load(explorer.save(tmp_path / "page.html").as_uri(), **options)
        return View(tab)

    yield load
    assert tab.problems == []
    assert [url[:60] for url in tab.requests if not url.startswith(("file:", "data:"))] == []


def traced(policy, batch, method="predict_action_chunk"):
    with minivla.trace(policy) as trace:
        getattr(policy, method)(batch) if method != "forward" else policy(batch)
    return trace


@pytest.fixture(scope="module")
def unet():
    """A trace of the U-Net with one encoder for both cameras, which crops."""
    policy = policy_of(crop_shape=(48, 56))
    return traced(policy, batch_of(policy))


@pytest.fixture(scope="module")
def page(unet):
    return unet.explore(names=["dx", "dy"])


@pytest.fixture(scope="module")
def codes():
    policy = vqbet(cameras=2, finished=True, several_cameras=True)
    return traced(policy, vqbet_batch(policy))


# -- the sampler ------------------------------------------------------------------------------------------


def numbers(view):
    return [float(text.replace("−", "-")) for text in view.all(".plot .number", "n.textContent")]


def test_a_call_without_tokens_shows_the_chunk_at_each_step_of_the_sampler(show, unet, page):
    call, view = unet.calls[-1], show(page)
    assert call.segments == [] and view.all(".ribbon, .words, .mask, .attention", "1") == []
    assert view.text("h2") == "predict_action_chunk: from noise to 8 actions in 10 steps"
    drawn = []
    for step in (0, 4, 10):
        view.slide("sampler", step)
        told = "no noise left" if step == 10 else f"time {call.flow.times[step]}"
        assert f"step {step} of 10, {told}" in view.text(".slider output")
        robot = unet.policy.postprocess(call.flow.x[step, :1])[0]
        view.slide("action", 3)
        assert numbers(view) == pytest.approx(robot[3].tolist(), rel=0.06)
        drawn.append(tuple(view.all(".plot .now", "n.getAttribute('d')")))
    assert len(set(drawn)) == 3


def test_the_part_that_the_policy_returned_is_marked_off(show, page):
    view = show(page)
    assert "White: steps 1 to 4, which the policy returned" in view.text(".chunk .scale")
    assert "step 1 of the chunk" in view.text(".slider output")  # what is carried out first
    places = view.all(".plot:first-child circle.dot", "Number(n.getAttribute('cx'))")
    grey = view.all(
        ".plot:first-child .outside", "[n.x.baseVal.value, n.x.baseVal.value + n.width.baseVal.value]"
    )
    inside = [not any(start <= x <= stop for start, stop in grey) for x in places]
    assert inside == [False, True, True, True, True, False, False, False]


def test_steps_of_the_chunk_are_pointed_at_and_kept(show, page):
    view = show(page)
    left, top, width, height = view.box(".plot svg")
    view.page.move(left + width - 4, top + height / 2)
    assert "step 7 of the chunk" in view.text(".slider output")
    view.hover("h2")
    assert "step 1 of the chunk" in view.text(".slider output")
    view.page.click(left + width - 4, top + height / 2)
    view.hover("h2")
    assert "step 7 of the chunk" in view.text(".slider output")
    assert view.all("input[aria-label=action]", "Number(n.value)") == [7]


def test_the_sampler_runs_by_itself_and_stops(show, page):
    view = show(page)
    value = f"Number({view.root}.querySelector('input[aria-label=sampler]').value)"
    view.click(".play")
    view.page.wait(f"{value} < 10", "the sampler to start again")
    assert view.all(".play", "n.getAttribute('aria-label')") == ["stop the sampler"]
    view.page.wait(f"{value} === 10", "the sampler to end")
    view.page.wait(f"{view.root}.querySelector('.play').textContent === 'play'", "the button to come up")


def path(steps=101, horizon=16, actions=3):
    """A call of a long sampler, by hand, that returns all it made."""
    x = torch.randn(steps, 1, horizon, actions, generator=torch.Generator().manual_seed(0))
    flow = Flow(torch.arange(steps - 2, -2, -1), x, x[1:], "predicted noise")
    return Call("predict_action_chunk", {}, chunk=x[-1], flow=flow)


def test_a_long_sampler_is_thinned_out_and_the_page_says_so(show):
    whole = explore(path())
    assert whole.left_out == ()
    few = explore(path(), most_bytes=len(whole.html.encode()) - 10_000)
    assert few.left_out == ("Sampler: 51 of 101 points of its path are here, evenly spread.",)
    view = show(few)
    assert view.all(".left-out + ul li", "n.textContent") == list(few.left_out)
    assert view.all("input[aria-label=sampler]", "Number(n.max)") == [50]
    view.slide("sampler", 10)
    assert "step 20 of 100, time 79" in view.text(".slider output")
    assert "White" not in view.text(".chunk")
    large = explore(path(horizon=64, actions=14), robot=lambda chunk: 100 * chunk)
    assert len(large.html.encode()) < 1_000_000 and "Sampler: 51 of 101" in large.left_out[0]


def test_what_is_not_a_number_is_a_gap(show):
    call = path(steps=3, horizon=4, actions=2)
    call.flow.x[-1, 0, 2, 0] = float("nan")
    call.flow.x[:, :, :, 1] = float("inf")
    call.hidden["condition"] = torch.tensor([[[0.5, float("nan")]]])
    view = show(explore(call))
    first, second = view.all(".plot .now", "n.getAttribute('d')")
    assert first.count("M") == 2 and second == ""
    view.slide("action", 2)
    assert view.all(".plot .number", "n.textContent") == ["–", "–"]


# -- keypoints --------------------------------------------------------------------------------------------


def test_keypoints_lie_where_the_encoder_says(show, unet, page):
    view = show(page)
    dots = np.array(view.all(".views .frame svg", CENTRES))
    encoder, batch = unet.policy.rgb_encoder, unet.batch
    for i, (camera, time) in enumerate((c, t) for c in encoder.cameras for t in (0, 1)):
        kept = unet.hidden[f"keypoints.{camera}"][0, time]
        expected = (encoder.pixels(kept, batch[camera].shape[-2:]) + 0.5) / 64
        assert dots[i] / 100 == pytest.approx(expected.numpy(), abs=0.001)
    names = view.all(".views figcaption", "n.textContent")
    assert names == ["table 1 step before", "table now", "wrist 1 step before", "wrist now"]


def test_a_keypoint_is_marked_in_every_picture(show, page):
    view = show(page)
    dots = view.all(".views .frame svg", CENTRES)
    left, top, width, height = view.box(".views .history:last-of-type figure:last-child .frame")
    x, y = dots[-1][2]
    at = (left + width * x / 100, top + height * y / 100)
    view.page.move(*at)
    assert view.all(".views .frame svg", MARKED) == [1, 1, 1, 1]
    assert re.search(
        r"Keypoint 2, .* table 1 step before: \d+, \d+; table now: .*wrist now: ", view.text(".views .scale")
    )
    view.hover("h2")
    assert view.all(".views .frame svg", MARKED) == [0, 0, 0, 0]
    view.page.click(*at)
    view.hover("h2")
    assert view.all(".views .frame svg", MARKED) == [1, 1, 1, 1]
    assert view.all("input[aria-label=keypoint]", "Number(n.value)") == [3]
    view.slide("keypoint", 1)
    assert "Keypoint 0" in view.text("[aria-live=polite]") and "own encoder" not in view.text(".views")


def test_a_finger_marks_a_keypoint_too(show, page):
    view = show(page, touch=True, width=400)
    x, y = view.all(".views .frame svg", CENTRES)[0][1]
    left, top, width, height = view.box(".views figure .frame")
    view.page.tap(left + width * x / 100, top + height * y / 100)
    assert view.all(".views .frame svg", MARKED) == [1, 1, 1, 1]


def test_encoders_of_their_own_are_said(show):
    policy = policy_of(use_separate_rgb_encoder_per_camera=True)
    view = show(traced(policy, batch_of(policy)).explore(sample=1))
    assert "Each camera has its own encoder" in view.text(".views .scale")


def test_a_training_pass_with_a_random_crop_draws_no_keypoints(show, unet):
    policy, batch = unet.policy, batch_of(unet.policy)
    policy.train()
    trace = traced(policy, batch, "forward")
    policy.eval()
    view = show(trace.explore())
    assert view.text("h2") == "forward: what is seen of table, wrist"
    assert view.all(".views circle, .chunk", "1") == []
    assert "nobody knows where" in view.text(".views .scale")
    assert len(view.all(".views img", "1")) == 4


# -- the condition ----------------------------------------------------------------------------------------


def test_the_condition_is_told_apart_part_by_part(show, unet, page):
    parts = {part["name"]: part["values"] for part in condition(unet.calls[-1], 1)}
    assert {name: np.shape(values) for name, values in parts.items()} == {
        "state": (2, 3),
        "table": (2, 8),
        "wrist": (2, 8),
        "instruction": (2, 64),
    }
    assert parts["state"] == rounded(unet.batch[STATE][1])
    told = unet.policy.instruction(unet.batch["task"])[1]
    assert parts["instruction"] == rounded(told.expand(2, -1))
    view = show(page)
    assert view.all(".told-part b", "n.textContent") == list(parts)
    assert "“put the red block on the square”" in view.text(".part-name")
    assert view.all(".told-part canvas", "[n.width, n.height]") == [[3, 2], [8, 2], [8, 2], [64, 2]]


def test_each_camera_moves_its_own_part_of_the_condition(unet):
    batch = dict(unet.batch)
    batch[WRIST] = batch[WRIST].flip(-1)
    moved = condition(traced(unet.policy, batch).calls[-1], 0)
    changed = [
        new["name"]
        for new, old in zip(moved, condition(unet.calls[-1], 0), strict=True)
        if new["values"] != old["values"]
    ]
    assert changed == ["wrist"]


# -- tokens as well ---------------------------------------------------------------------------------------


def test_each_query_shows_its_codes_and_its_chunk(show, codes):
    call, view = codes.calls[-1], show(codes.explore())
    queries = [t for s in call.segments if s.kind == "query" for t in range(s.start, s.stop)]
    assert view.kept == queries[2]  # three observations: the current one's chunk is returned
    view.click(".chunk .choice input[value=normalised]")
    chunks = (call.hidden["decoded"] + call.hidden["offsets"])[0]
    assert torch.allclose(chunks[2], call.chunk[0])
    for i in (0, 3):
        view.choose(queries[i])
        view.slide("action", 1)
        assert numbers(view) == pytest.approx(chunks[i, 1].tolist(), rel=0.06)
        first, second = call.hidden["codes"][0, i].tolist()
        assert view.text(".codes h3").endswith(f": {first} · {second}")
        share = float(call.hidden["logits"][0, i, 0].softmax(-1)[first])
        assert f"code {first} of 5, {100 * share:.0f}" in view.text(".level:first-child .ends")
        assert len(view.all(".code.drawn", "1")) == 2
    view.choose(0)  # no query: what the policy returned
    assert numbers(view) == pytest.approx(chunks[2, 1].tolist(), rel=0.06)
    assert "Step" not in view.text(".what")


def test_a_picture_that_is_one_token_is_pointed_at_and_says_what_it_gets(show, codes):
    call, view = codes.calls[-1], show(codes.explore())
    tokens = [s.start for s in call.segments if s.kind == "image"]
    left, top, _, height = view.box(".views .history:nth-of-type(1) figure:nth-child(2) .frame")
    view.page.click(left + 3, top + height - 3)
    assert view.kept == tokens[2]  # table, of the second observation; each has two cameras
    assert "A whole camera picture" in view.text(".what")
    closed = view.all(".views .frame", "n.classList.contains('shut')")
    assert closed == [False, False, True, False, True, True]  # table's three, then wrist's: all is causal
    weights = call.attention["gpt.0"][0, :, tokens[2], tokens[0]].mean()
    assert f"gets {100 * weights:.0f}" in view.all(".views figcaption", "n.textContent")[0]


def test_the_transformer_says_which_step_its_attention_is_from(show):
    policy = policy_of(**TRANSFORMER)
    trace = traced(policy, batch_of(policy))
    view = show(trace.explore())
    assert "Of the sampler's 10 steps this is the last, at time 0." in view.text(".attention")
    view.slide("sampler", 2)
    chunk = trace.segments[-1]
    view.choose(chunk.start + 5)
    robot = policy.postprocess(trace.flow.x[2, :1])[0]
    assert numbers(view) == pytest.approx(robot[5].tolist(), rel=0.06)
    assert "White: steps 1 to 4" in view.text(".chunk") and view.all("input[aria-label=action]", "1") == []
    assert len(view.all(".told-part", "1")) == 4


# -- pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [400, 1000])
@pytest.mark.parametrize("which", ["unet", "codes"])
def test_no_page_is_too_narrow_and_text_stands_out(show, page, codes, which, width):
    view = show(page if which == "unet" else codes.explore(), width=width, touch=width < 500, dark=True)
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    left, _, across, _ = view.box(".card")
    assert max(view.all(".card *", "n.getBoundingClientRect().right")) <= left + across + 0.5
    inks = set(view.all(".scale, .ends, figcaption, .part-name, .play", "getComputedStyle(n).color"))
    hexes = [palette.mpl.colors.to_hex([int(v) / 255 for v in re.findall(r"\d+", ink)]) for ink in inks]
    assert min(palette.contrast(ink, "#fafafa") for ink in hexes) >= 4.5


def test_every_control_has_a_name(show, page):
    view = show(page)
    view.page.send("Accessibility.enable")
    nodes = view.page.send("Accessibility.getFullAXTree")["nodes"]
    named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if "name" in n]
    controls = {role: name for role, name in named if role in {"slider", "radio", "button", "image", "img"}}
    assert set(controls) >= {"slider", "radio", "button"} and all(name.strip() for name in controls.values())


def test_the_same_call_makes_the_same_bytes_and_a_still_picture(unet, page):
    assert unet.explore(names=["dx", "dy"]).html == page.html
    (alt,) = re.findall(r'<img src="data:image/png;base64,[^"]+" alt="([^"]*)"', page.html)
    assert alt.startswith("predict_action_chunk, from noise to 8 actions in 10 steps: 4 keypoints sit on")
    assert len(page.html.encode()) < 300_000


def test_a_call_with_nothing_to_show_is_refused():
    with pytest.raises(ValueError, match="has neither chunk, flow nor keypoints"):
        explore(Call("forward", {}))
    with pytest.raises(ValueError, match="sample is 2; this call holds 2"):
        policy = policy_of()
        traced(policy, batch_of(policy), "forward").explore(sample=2)
