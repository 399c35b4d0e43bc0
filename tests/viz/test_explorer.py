"""The explorer in a real browser: what is pointed at lights what the mask says, and shows what was recorded.

Of the page, input events go in and the page's own nodes come out; nothing of its script is called.
"""

import base64
import json
import re
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

import minivla
import minivla.world
from minivla.data.windows import delta_timestamps
from minivla.segments import Segment
from minivla.viz import palette
from minivla.viz.attention import attention_weights
from minivla.viz.explorer import HINT, explore
from minivla.viz.explorer_data import Plan, embedded_bytes, quantise, stretches, weights_of
from tests.browser import Browser
from tests.viz.explorer_view import View, bare, flowing, recorded_shares

CROSS = "decoder.0.cross"
SCRIPTS = re.compile(r"<script.*?</script>", re.S)


@pytest.fixture(scope="module")
def tab():
    """One tab for all tests: a fresh one costs more than most of them."""
    with Browser() as browser:
        yield browser.open("about:blank")


@pytest.fixture(autouse=True)
def _still_once(monkeypatch, explorer):
    """The still picture takes matplotlib most of a second: tests of the live part borrow one."""
    picture = base64.b64decode(re.search('png;base64,([^"]*)', explorer.html)[1])
    monkeypatch.setattr("minivla.viz.explorer._still", lambda *_: (picture, "borrowed"))


@pytest.fixture
def show(tab, tmp_path):
    """Load an explorer, or HTML, in place of what was there; nothing may be fetched, nothing fail."""
    tab.problems.clear()
    tab.requests.clear()

    def load(shown, *, index=0, **options):
        path = tmp_path / "page.html"
        head = "<!doctype html><meta charset=utf-8><meta name=viewport content='width=device-width'>"
        path.write_text(head + shown) if isinstance(shown, str) else shown.save(path)
        tab.load(path.as_uri(), **options)
        return View(tab, index)

    yield load
    assert tab.problems == []
    assert [url[:60] for url in tab.requests if not url.startswith(("file:", "data:"))] == []
    assert any(url.startswith("file:") for url in tab.requests)


@pytest.fixture(scope="module")
def call(seen):
    return seen.trace.calls[-1]


@pytest.fixture(scope="module")
def explorer(seen, call):
    return explore(call, robot=seen.policy.postprocess, names=["dx", "dy", "grip"])


@pytest.fixture(scope="module")
def training(seen):
    """A call of the loss: it has ACT's VAE encoder, and no chunk."""
    seen.policy.train()
    with minivla.trace(seen.policy) as trace:
        seen.policy(seen.batch)
    seen.policy.eval()
    return trace.calls[-1]


# -- pointing ---------------------------------------------------------------------------------------------


def test_hovering_a_token_lights_exactly_the_columns_of_the_mask(show, explorer, call):
    view = show(explorer)
    for segment in call.segments:
        for token in sorted({segment.start, segment.start + segment.length // 3, segment.stop - 1}):
            view.hover(f'[data-token="{token}"]')
            row = call.mask[token].numpy()
            assert view.shown == token
            assert (view.lit == row).all()
            assert (view.band == row).all()
            assert f"may look at {row.sum()} of {len(row)}" in view.text(".say")
    assert "not: queries" not in view.text(".say")  # the last was a query, which sees all
    view.hover('[data-token="0"]')
    assert "not: queries" in view.text(".say")


def test_hover_is_for_the_moment_and_a_click_keeps(show, explorer, call):
    view = show(explorer)
    first = call.segments[-1].start
    assert view.kept == view.shown == first
    view.hover('[data-token="40"]')
    assert (view.kept, view.shown) == (first, 40)
    view.hover("h2")
    assert view.shown == first
    view.choose(40)
    view.hover("h2")
    assert view.kept == view.shown == 40


def test_a_patch_of_a_picture_is_its_token(show, explorer, call):
    view = show(explorer)
    for picture, name in ((1, "table"), (2, "wrist")):
        segment = next(s for s in call.segments if s.name == name)
        for row, column in ((0, 0), (2, 5), (7, 7)):
            left, top, width, height = view.box(f"figure:nth-of-type({picture}) .frame")
            view.page.click(left + width * (column + 0.5) / 8, top + height * (row + 0.5) / 8)
            assert view.kept == segment.start + 8 * row + column
            assert view.text(".token") == f"{name}[{8 * row + column}]"
            assert f"row {row}, column {column}" in view.text(".what")


def test_what_is_pointed_at_does_not_move_away(show):
    """Texts differ in length; what lies below them must not jump to and fro under the pointer."""
    call = bare([Segment("a long name " * 30, "language", 1), Segment("table", "image", 4, grid=(2, 2))])
    view = show(explore(call), width=640)
    tops = []
    for token in (1, 0, 1, 0, 1):
        view.choose(token)
        tops.append(view.box(".frame")[1] - view.box(".card")[1])
    assert tops[0] < tops[1] and len(set(tops[1:])) == 1


def test_rows_of_the_mask_picture_and_steps_of_the_chunk_are_tokens_too(show, explorer, call):
    view = show(explorer)
    left, top, width, height = view.box(".mask image")
    view.page.click(left + width / 2, top + height - 2)
    assert view.kept == len(call.mask) - 1
    left, top, width, height = view.box(".plot svg")
    view.page.click(left + width * 0.03, top + height / 2)
    assert view.kept == call.segments[-1].start


@pytest.mark.parametrize("kind", ["step", "sequence"])
def test_buttons(show, explorer, training, kind):
    if kind == "step":
        view = show(explorer)
        before = view.kept
        view.click("button[aria-label='previous token']")
        assert view.kept == before - 1
        view.click("button[aria-label='next token']")
        assert view.kept == before
        return
    view = show(explore(training))
    assert view.all("option", "n.textContent") == ["main sequence, 139 tokens", "vae_encoder, 10 tokens"]
    view.page.evaluate(f"{view.root}.querySelector('select').focus()")
    view.page.press("ArrowDown")
    assert view.all(".group", "n.getAttribute('aria-label')")[0].startswith("class, 1")
    valid = training.masks["vae_encoder.0"][0].numpy()
    view.choose(0)
    assert (view.lit == valid[0]).all() and (view.band == valid[0]).all()
    assert "vae_encoder.0" in view.text(".slider output")
    assert view.shares == pytest.approx(recorded_shares(training, "vae_encoder.0", 0), abs=0.005)


# -- attention --------------------------------------------------------------------------------------------


def test_the_shares_shown_are_the_recorded_ones_at_every_head(show, explorer, call):
    view = show(explorer)
    queries = call.segments[-1]
    view.choose(queries.start + 3)
    pictures = []
    for head in (None, 0, 1, 2, 3):
        view.slide("head", 0 if head is None else head + 1)
        assert view.shares == pytest.approx(recorded_shares(call, CROSS, 3, head), abs=0.005)
        expected = attention_weights(call, CROSS, query=3, head=head).sqrt()
        assert view.strengths[:131] == pytest.approx((expected / expected.max()).numpy(), abs=0.01)
        pictures.append(tuple(view.overlays))
    assert len(set(pictures)) == 5
    assert "head 3" in view.text(".say")


def test_layers_are_those_where_the_token_asks(show, explorer, call):
    view = show(explorer)
    queries = call.segments[-1]
    for token, sites in ((0, ["encoder.0", "encoder.1"]), (queries.start, ["decoder.0.self", CROSS])):
        view.choose(token)
        assert view.all("input[aria-label=layer]", "Number(n.max)") == [len(sites) - 1]
        pictures = []
        for i, site in enumerate(sites):
            view.slide("layer", i)
            assert site in view.text(".say")
            local = token - queries.start if site.startswith("decoder") else token
            assert view.shares == pytest.approx(recorded_shares(call, site, local), abs=0.005)
            pictures.append((*view.overlays, *view.strengths))
        assert pictures[0] != pictures[1]


def test_the_other_direction_shows_who_looks(show, explorer, call):
    view = show(explorer)
    view.choose(1)
    view.click(".choice input[value=from]")
    assert (view.lit == call.mask[:, 1].numpy()).all() and (view.band == view.lit).all()
    assert view.all("input[aria-label=layer]", "Number(n.max)") == [2]
    view.slide("layer", 2)
    towards = call.attention[CROSS][0, :, :, 1].mean(0)
    assert view.shares == pytest.approx([float(towards.mean())], rel=0.03)
    assert "seen most by queries" in view.text(".say")


def test_one_byte_a_weight_is_enough():
    """Rows of a thousand tokens, peaked and flat: no segment's share is off by more than half a percent."""
    generator = torch.Generator().manual_seed(0)
    for sharpness in (0.0, 1.0, 4.0, 12.0):
        rows = (sharpness * torch.randn(64, 1000, generator=generator)).softmax(-1).numpy()
        shares = [x.reshape(64, 10, 100).sum(-1) for x in (rows, weights_of(quantise(rows)))]
        assert np.abs(shares[0] - shares[1]).max() < 0.005
    assert (quantise(np.zeros((1, 4))) == 0).all()
    with pytest.raises(ValueError, match="add up to 2 to 2"):
        quantise(np.full((1, 4), 0.5))


# -- the chunk --------------------------------------------------------------------------------------------


def test_the_flow_slider_moves_the_chunk(show):
    call = flowing()
    view = show(explore(call, sample=1, robot=lambda chunk: 10 * chunk))
    assert view.all("input[aria-label=sampler]", "[Number(n.value), Number(n.max)]") == [[4, 4]]
    view.choose(32)  # step 2 of the chunk
    paths = []
    for step in range(5):
        view.slide("sampler", step)
        paths.append(tuple(view.all(".plot .now", "n.getAttribute('d')")))
        assert f"step {step} of 4, time {1 - step / 4:g}" in view.text(".slider output")
        numbers = [float(text.replace("−", "-")) for text in view.all(".plot .number", "n.textContent")]
        assert numbers == pytest.approx((10 * call.flow.x[step, 1, 2]).tolist(), rel=0.06)
    assert len(set(paths)) == 5
    view.click(".chunk .choice input[value=normalised]")
    assert "normalised" in view.text(".chunk .scale")
    assert float(view.all(".plot .number", "n.textContent")[0]) == pytest.approx(0.25)


def test_a_query_marks_its_step_and_nothing_else_does(show, explorer, call):
    view = show(explorer)
    queries = call.segments[-1]
    places = []
    for h in (0, 4, 7):
        view.choose(queries.start + h)
        assert f"Marked: step {h}" in view.text(".chunk .scale") and f"Step {h} of the chunk" in view.text(
            ".what"
        )
        places.append(float(view.all(".plot circle.mark", "n.getAttribute('cx')")[0]))
    assert places == sorted(set(places))
    view.choose(5)
    assert view.all(".plot circle.mark", "1") == []


# -- keyboard, touch, screen readers ----------------------------------------------------------------------


def test_the_ribbon_is_one_tab_stop_and_the_keys_move_in_it(show, explorer, call):
    view = show(explorer)
    starts = [s.start for s in call.segments]
    view.page.press("Tab")
    focused = f"Number({view.root}.activeElement.dataset.token)"
    assert view.page.evaluate(focused) == starts[-1]
    assert view.page.evaluate(f"getComputedStyle({view.root}.activeElement).outlineStyle") == "solid"
    table = next(s for s in call.segments if s.name == "table")
    steps = [("PageUp", starts[-2]), ("PageUp", table.start), ("ArrowRight", table.start + 1)]
    steps += [("ArrowDown", table.start + 9), ("ArrowUp", table.start + 1), ("ArrowUp", table.start + 1)]
    steps += [("End", table.stop - 1), ("ArrowRight", table.stop), ("ArrowLeft", table.stop - 1)]
    steps += [("Home", table.start), ("PageDown", table.stop)]
    for key, token in steps:
        view.page.press(key)
        assert (view.page.evaluate(focused), view.kept, view.shown) == (token, token, token), key
    view.page.press("Home", control=True)
    assert view.kept == 0
    view.page.press("ArrowLeft")
    assert view.kept == 0
    view.page.press("End", control=True)
    assert view.kept == len(call.mask) - 1
    assert view.all(".ribbon [tabindex='0']", "1") == [1]
    view.page.press("Tab")
    assert view.page.evaluate(f"{view.root}.activeElement.type") == "radio"


def test_a_finger_selects_tokens_and_patches(show, explorer, call):
    view = show(explorer, touch=True, width=390, height=800)
    view.page.tap(*view.middle('[data-token="7"]'))
    assert view.kept == view.shown == 7
    wrist = next(s for s in call.segments if s.name == "wrist")
    left, top, width, height = view.box("figure:nth-of-type(2) .frame")
    view.page.tap(left + width * 3.5 / 8, top + height * 6.5 / 8)
    assert view.kept == wrist.start + 6 * 8 + 3


def test_every_control_has_a_name_and_changes_are_announced(show, training):
    view = show(explore(training))
    view.page.send("Accessibility.enable")
    nodes = view.page.send("Accessibility.getFullAXTree")["nodes"]
    roles = {"slider", "radio", "option", "button", "combobox", "listbox", "image", "img", "group"}
    named = [(n["role"]["value"], n["name"]["value"]) for n in nodes if n["role"]["value"] in roles]
    assert {role for role, _ in named} >= {"slider", "radio", "option", "button", "combobox", "listbox"}
    assert [role for role, name in named if not name.strip()] == []
    live = view.all("[aria-live=polite]", "n.textContent")
    view.choose(9)
    assert live != view.all("[aria-live=polite]", "n.textContent")
    assert "table[6]" in view.text("[aria-live=polite]")


@pytest.mark.parametrize("dark", [False, True])
def test_text_stands_out_on_its_card(show, explorer, dark):
    view = show(explorer, dark=dark)
    colours = """(() => { const out = []; for (const n of ROOT.querySelectorAll('*')) {
        const written = [...n.childNodes].some(c => c.nodeType === 3 && c.textContent.trim());
        if (!written || n.tagName === 'STYLE') continue;
        let under = n; const ground = u => getComputedStyle(u).backgroundColor;
        while (under && ground(under) === 'rgba(0, 0, 0, 0)') under = under.parentElement;
        const style = getComputedStyle(n);
        out.push([n.namespaceURI.endsWith('svg') ? style.fill : style.color, ground(under)]);
    } return out; })()""".replace("ROOT", view.root)
    pairs = {tuple(pair) for pair in view.page.evaluate(colours)}
    hexes = [
        [palette.mpl.colors.to_hex([int(v) / 255 for v in re.findall(r"\d+", c)[:3]]) for c in p]
        for p in pairs
    ]
    assert len(hexes) > 3
    assert min(palette.contrast(*pair) for pair in hexes) >= 4.5
    assert view.all(".card", "getComputedStyle(n).backgroundColor") == ["rgb(250, 250, 250)"]


def test_motion_is_reduced_where_that_is_wished(show, explorer):
    moving = "getComputedStyle(n).transitionDuration"
    assert set(show(explorer).all(".fill", moving)) == {"0.12s"}
    assert set(show(explorer, reduced=True).all(".fill", "getComputedStyle(n).transitionProperty")) == {
        "none"
    }


# -- pages ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("width", [360, 640, 1200])
def test_no_page_is_too_narrow(show, explorer, width):
    view = show(explorer, width=width, touch=width < 500)
    assert view.page.evaluate("document.documentElement.scrollWidth") <= width
    left, _, across, _ = view.box(".card")
    edges = view.all(".card *", "n.getBoundingClientRect().right")
    assert max(edges) <= left + across + 0.5


def test_without_scripts_a_picture_and_one_line_remain(show, explorer):
    view = show(SCRIPTS.sub("", explorer.html))
    assert view.page.evaluate("document.body.innerText").strip() == HINT
    (alt,) = view.page.evaluate(
        "[...document.images].filter(i => i.complete && i.naturalWidth > 300).map(i => i.alt)"
    )
    assert "queries 8" in alt and "attention" in alt
    assert view.page.evaluate("document.querySelectorAll('style, canvas, input, svg').length") == 0
    assert not re.search(r"\son\w+=", SCRIPTS.sub("", explorer.html))


def test_with_scripts_the_still_part_is_gone(show, explorer):
    view = show(explorer)
    assert view.page.evaluate("document.images.length") == 0
    assert HINT not in view.page.evaluate("document.body.innerText")


def test_explorers_on_one_page_do_not_know_each_other(show, explorer):
    """The same one twice, as when a cell is shown in two places, and another."""
    first = show(explorer.html + explorer.html + explore(flowing()).html)
    second, third = View(first.page, 1), View(first.page, 2)
    second.choose(3)
    third.choose(31)
    second.slide("head", 2)
    third.click(".choice input[value=from]")
    assert [view.kept for view in (first, second, third)] == [131, 3, 31]
    assert [view.all("input[value=to]", "n.checked") for view in (first, second, third)] == [
        [True],
        [True],
        [False],
    ]
    assert ["head 1" in view.text(".say") for view in (first, second, third)] == [False, True, False]


def test_a_container_that_comes_after_its_script_is_found(show, explorer):
    """Some notebooks take the script out, put it at the end and run it there, or before the output is in."""
    container, script = re.fullmatch(r"(.*)<script>(.*)</script>\n</div>", explorer.html, re.S).groups()
    late = f"<script>{script}</script><div id=late></div><script>setTimeout(() => {{"
    late += (
        f"document.getElementById('late').innerHTML = {json.dumps(container + '</div>')}.replaceAll('$', '');"
    )
    view = show(late.replace("</script>\\n</div>", "<\\/script></div>") + "}, 60)</script>")
    view.page.wait("document.querySelector('[data-awake]') !== null", "the explorer to find its container")
    assert view.kept == 131


def test_hostile_names_are_only_names(show):
    bad = '</script ><img src=x onerror="alert(1)"></script>&amp;\'"<!--<script>'
    call = bare(
        [Segment(bad, "language", 2), Segment("patch " + bad, "image", 4, grid=(2, 2), image=bad)],
        batch={bad: torch.rand(1, 3, 8, 8), "task": [f"pick {bad}"]},
    )
    call.chunk = torch.zeros(1, 4, 1)
    view = show(explore(call, names=[bad], title=f"title {bad}"))
    assert view.text("h2") == f"title {bad}"
    assert view.text(".plot b") == bad
    view.choose(0)
    assert view.text(".token") == f"{bad}[0]" and f"“pick {bad}”" in view.text(".what")
    assert view.page.evaluate("document.images.length") == 0
    assert show(SCRIPTS.sub("", explore(call).html)).page.evaluate("document.images.length") == 1


# -- other calls ------------------------------------------------------------------------------------------

MASKED = st.lists(
    st.tuples(st.integers(1, 9), st.integers(0, 3), st.sampled_from(["full", "causal"])),
    min_size=1,
    max_size=6,
)


@settings(max_examples=8, deadline=None, suppress_health_check=list(HealthCheck))
@given(laid=MASKED, data=st.data())
def test_any_block_mask_is_shown_as_it_is(show, laid, data):
    kinds = ["image", "language", "state", "action", "time", "latent"]
    segments = [
        Segment(f"part {i}", kinds[i], length, block=block, rule=rule)
        for i, (length, block, rule) in enumerate(laid)
    ]
    call = bare(segments)
    size = len(call.mask)
    call.mask &= torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size)))  # padding
    view = show(explore(call))
    for token in data.draw(st.lists(st.integers(0, size - 1), min_size=1, max_size=3)):
        view.hover("h2")
        view.hover(f'[data-token="{token}"]')
        row = call.mask[token].numpy()
        assert (view.lit == row).all() and (view.band == row).all()
        assert (view.strengths == row).all()
    assert "No attention was recorded" in view.text(".say")
    assert view.all(".pictures, .chunk, .slider:not([hidden])", "n.className") == []


def test_samples_of_a_batch_have_their_own_mask_and_attention(show):
    """Later samples take their masks from the sites: sample 1 has padding that sample 0 has not."""
    call = flowing()
    padded = call.masks["joint.0"].clone()
    padded[1, :, 20:30] = False
    call.masks["joint.0"] = padded
    call.attention["joint.0"] = call.attention["joint.0"].masked_fill(~padded[:, None], 0)
    call.attention["joint.0"] /= call.attention["joint.0"].sum(-1, keepdim=True)
    for sample in (0, 1):
        view = show(explore(call, sample=sample))
        view.choose(33)
        assert (view.lit == padded[sample, 33].numpy()).all()
        assert view.shares == pytest.approx(recorded_shares(call, "joint.0", 33, sample=sample), abs=0.005)
    view.choose(25)
    assert "Nobody may look at it" in view.text(".what")


def test_rows_that_a_cache_never_computed_keep_the_mask_of_the_policy():
    call = flowing()
    rows = call.masks["joint.0"].clone()
    rows[:, :30] = False
    call.masks["joint.0"] = rows
    assert (stretches(call, 1)[0].mask == call.mask.numpy()).all()


def test_unnamed_sites_are_a_sequence_of_their_own(show):
    call = flowing()
    call.sites["extra.0"] = ([Segment("queries", "query", 2)], [Segment("keys", "query", 3)])
    call.masks["extra.0"] = torch.ones(2, 2, 3, dtype=torch.bool)
    call.attention["extra.0"] = torch.full((2, 1, 2, 3), 1 / 3)
    found = stretches(call, 0)[1]
    assert [s.name for s in found.segments] == ["keys", "queries"]
    assert found.mask[3:, :3].all() and found.mask.sum() == 6
    view = show(explore(call))
    assert view.all("option", "n.textContent") == ["main sequence, 35 tokens", "extra, 5 tokens"]


def test_a_thousand_tokens_answer_at_once(show):
    segments = [Segment(n, "image", 256, grid=(16, 16)) for n in ("base", "left", "right")]
    segments += [Segment("words", "language", 200), Segment("actions", "action", 51, block=1, rule="causal")]
    call = bare(segments)
    view = show(explore(call), width=740)
    view.choose(990)
    assert (view.lit == call.mask[990].numpy()).all() and (view.band == view.lit).all()
    spent = view.page.evaluate(
        f"(() => {{ const start = performance.now(); for (let i = 0; i < 5; i++) {{ {view.root}"
        ".querySelector(`[data-token='${300 + i}']`).click(); } return (performance.now() - start) / 5; })()"
    )
    assert spent < 150, f"a token took {spent:.0f} ms"


# -- size -------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def shipped():
    """Explorers of the shipped ACT: a chunk, and a training step."""
    policy = minivla.load("act-tabletop")
    dataset = minivla.world.demonstrations("pick_place", 1, 0)
    batch = policy.preprocess(dataset.windows(delta_timestamps(policy.config, dataset.fps))[30])
    with minivla.trace(policy) as trace:
        policy.predict_action_chunk(batch)
        policy.train()
        policy(batch)
    pages = [explore(call, robot=policy.postprocess) for call in trace.calls]
    return SimpleNamespace(policy=policy, calls=trace.calls, pages=pages)


def test_the_shipped_policy_takes_less_than_a_megabyte(shipped):
    for explorer in shipped.pages:
        assert len(explorer.html.encode()) < 300_000
        assert explorer.left_out == ()
        assert len(re.search(r'src="data:image/png;base64,([^"]*)"', explorer.html)[1]) < 160_000


def test_what_does_not_fit_is_left_out_and_said(show, shipped):
    call = shipped.calls[0]
    whole = len(explore(call).html)
    said = []
    for most in (whole - 1, whole - 80_000):
        explorer = explore(call, most_bytes=most)
        assert len(explorer.html.encode()) <= most
        said.append(explorer.left_out)
    assert said[0] == ("Heads: only the mean of each layer's heads is here.",)
    view = show(explorer)
    assert view.all(".left-out + ul li", "n.textContent") == list(explorer.left_out)
    view.choose(call.segments[-1].start)
    assert "mean of 4 heads" in view.text(".say")
    assert view.shares == pytest.approx(recorded_shares(call, CROSS, 0), abs=0.005)
    with pytest.raises(ValueError, match="raise most_bytes"):
        explore(call, most_bytes=20_000)


def test_layers_are_thinned_evenly_and_patches_last():
    call = flowing()
    for i in range(1, 9):
        for kept in (call.sites, call.masks, call.attention):
            kept[f"joint.{i}"] = kept["joint.0"]
    found = stretches(call, 0)
    whole = embedded_bytes(found, call, Plan())
    assert embedded_bytes(found, call, Plan(layers=3)) == pytest.approx(whole / 3, rel=0.01)
    page = explore(call, most_bytes=len(explore(call).html) - 2_000)
    assert page.left_out == (
        "Layers: 6 of 9 are here (joint.0, joint.2, joint.3, joint.5, joint.6, joint.8).",
    )


# -- from Python ------------------------------------------------------------------------------------------


def test_the_same_call_makes_the_same_bytes(explorer, seen, call, monkeypatch):
    monkeypatch.undo()  # the still picture included
    assert explore(call, robot=seen.policy.postprocess, names=["dx", "dy", "grip"]).html == explorer.html
    assert explorer._repr_html_() is explorer.html
    assert re.fullmatch(r"Explorer\(predict_action_chunk: .* patches: \d+ kB\)", repr(explorer))


def test_a_page_is_written_whole(tmp_path, explorer):
    path = explorer.save(tmp_path / "folder" / "call.html")
    assert explorer.html in path.read_text(encoding="utf-8")
    assert path.read_text(encoding="utf-8").startswith("<!doctype html>")
    assert [p.name for p in path.parent.iterdir()] == ["call.html"]
    with pytest.raises(ValueError, match=r"ending in \.html"):
        explorer.save(tmp_path / "call.png")


def broken(change):
    call = flowing()
    change(call)
    return call


@pytest.mark.parametrize(
    ("change", "options", "told"),
    [
        (lambda c: c.segments.clear(), {}, "describes no token sequence"),
        (lambda c: setattr(c, "mask", None), {}, "mask: none"),
        (lambda c: setattr(c, "mask", c.mask[:, :30]), {}, r"expected a mask of 35 × 35"),
        (
            lambda c: c.masks.update({"joint.0": torch.ones(2, 3, 35).bool()}),
            {},
            r"mask of site 'joint.0' has shape",
        ),
        (lambda c: c.attention.update({"joint.0": torch.ones(2, 1, 35, 9)}), {}, "35 queries and 35 keys"),
        (lambda c: None, {"sample": 2}, "sample is 2; this call holds 2: expected 0 to 1"),
        (lambda c: None, {"sample": -1}, "sample is -1"),
        (lambda c: None, {"names": ["dx"]}, r"names has 1 entries \(dx\), the chunk 2 dimensions"),
        (lambda c: None, {"robot": lambda chunk: chunk[..., :1]}, "robot turned a chunk"),
        (lambda c: setattr(c.flow, "times", torch.zeros(3)), {}, "3 times and 5 points"),
    ],
)
def test_what_cannot_be_explored_is_refused_with_a_reason(change, options, told):
    with pytest.raises(ValueError, match=told):
        explore(broken(change), **options)
