"""Pictures of π0, π0.5 and π0-FAST: words, blocks, absent cameras, caches, steered norms, spelled chunks."""

from __future__ import annotations

import base64
import itertools
import json
import re

import numpy as np
import pytest
import torch
from matplotlib.colors import to_rgb

import minivla
from minivla.nn.masks import segment_mask
from minivla.recorder import Pass
from minivla.segments import Segment, arrange
from minivla.viz import attention, cache, masks, modulation, palette, spelling, tokens, words
from minivla.viz.explorer_data import stretches
from tests.browser import Browser
from tests.policies.fast_small import chunks, fast, fast_batch, tiny_fast
from tests.policies.fast_small import words as gemma_words
from tests.policies.small_vla import statistics, tiny_pi, tiny_raw
from tests.viz.explorer_view import View

pytestmark = [
    pytest.mark.filterwarnings("ignore:said is no chunk"),
    pytest.mark.filterwarnings("ignore:no observation.images.wrist in the batch"),
]


@pytest.fixture(scope="module", params=["pi0", "pi05"])
def trace(request):
    """A trace of a chunk of a policy whose wrist camera is absent."""
    policy = tiny_pi(request.param, statistics())
    raw = tiny_raw()
    del raw["observation.images.wrist"]
    batch = policy.preprocess(raw)
    with minivla.trace(policy) as t:
        policy.predict_action_chunk(batch, generator=torch.Generator().manual_seed(0))
    return t


def parts(figure, gid):
    return [artist for ax in figure.axes for artist in ax.findobj(lambda a: str(a.get_gid()).startswith(gid))]


def texts(figure):
    return [text.get_text() for ax in figure.axes for text in ax.texts]


# --- words -------------------------------------------------------------------------------------------------


def test_words_are_boxes_in_lines_and_a_run_of_padding_is_one():
    said = ["<bos>", " push", " the", " re", "d", "\n", "<pad>", "<pad>"]
    placed = words.place_words(said, 1.2, np.arange(8) < 6)
    assert [w.text for w in placed] == ["<bos>", "push", "the", "re", "d", "↵", "2 tokens of padding"]
    assert [(w.start, w.count, w.padding) for w in placed][-2:] == [(5, 1, False), (6, 2, True)]
    assert placed[-1].line > 0 and all(w.right <= 1.2 or w.left < 0.1 for w in placed)
    for one, other in itertools.pairwise(placed):
        assert other.line > one.line or other.left >= one.right
    ends = {w.text: w for w in words.place_words(said, 9.0)}
    assert ends["d"].left - ends["re"].right < ends["re"].left - ends["the"].right  # one word


def test_words_that_are_more_than_tokens_are_refused():
    with pytest.raises(ValueError, match="there are 2 words and 3 tokens; expected one word for each token"):
        words.place_words(["a", "b"], 2.0, np.ones(3, bool))


def test_the_ribbon_writes_its_words_and_its_blocks(trace):
    figure = trace.plot_tokens()
    assert len(parts(figure, "block")) == len({s.block for s in trace.segments})
    said = texts(figure)
    assert "prompt:" in said and "push" in said and "↵" in said
    padding = [text for text in said if text.endswith("of padding")]
    prompt = trace.words["prompt"][0]
    assert padding == [f"{prompt.count('<pad>')} tokens of padding"]
    assert "block 0" in said
    assert not parts(tokens.plot_tokens(trace.segments[:3]), "block")
    figure = tokens.plot_tokens(trace.segments, mask=trace.mask, words={})
    assert "push" not in texts(figure)


def test_attention_shades_the_words(trace):
    query = trace.segments[-1].start + 2
    figure = trace.plot_attention("joint.2", query=query, head=1)
    weights = attention.attention_weights(trace.calls[0], "joint.2", query=query, head=1).numpy()
    prompt = next(s for s in trace.segments if s.name == "prompt")
    row = weights[prompt.start : prompt.stop]
    drawn = {int(box.get_gid().split()[1]): box.get_facecolor()[:3] for box in parts(figure, "word ")}
    for place in (0, 1, int(row.argmax())):
        strong = palette.blend(
            palette.PAPER, palette.KIND_COLOURS["language"], float(np.sqrt(row[place] / row.max()))
        )
        assert np.allclose(drawn[place], to_rgb(strong), atol=0.01)
    best = words.shown_word(trace.words["prompt"][0][int(row.argmax())])
    assert any(f"“{best}” gets most" in text for text in texts(figure))
    assert any(text.endswith("tokens not seen") for text in texts(figure))


def test_an_absent_camera_is_hatched_and_one_that_is_seen_must_be_there(trace):
    figure = trace.plot_attention("joint.2", query="actions")
    assert len(parts(figure, "absent")) == 1
    keys = trace.sites["joint.2"][1]
    row = torch.full((keys[-1].stop,), 1 / keys[-1].stop)
    with pytest.raises(
        KeyError, match=r"no image for observation\.images\.table, observation\.images\.wrist"
    ):
        attention.plot_look(row, keys, {})


def test_a_patch_that_asks_has_a_dot_on_its_place(trace):
    figure = trace.plot_attention("vision.table.1", query=6)
    (dot,) = parts(figure, "asking")
    x, y = dot.get_data()
    width = figure.axes[0].get_xlim()[1] + 0.5
    assert np.isclose(x[0] + 0.5, width * 2.5 / 4) and np.isclose(y[0] + 0.5, width * 1.5 / 4)
    assert re.search(
        r"looks most at row \d, column \d of table: [\d.]+ % \(even: 6.2 %\)", figure.get_suptitle()
    )
    assert not parts(trace.plot_attention("vision.table.1", query="table"), "asking")


# --- masks -------------------------------------------------------------------------------------------------


def test_the_title_of_a_mask_counts_its_blocks(trace):
    found = masks.mask_title(trace.mask.numpy(), trace.segments, trace.segments)
    if len({s.block for s in trace.segments}) == 3:
        assert found == (
            "Three blocks, each sees itself and those before it: actions → state → table, wrist and prompt"
        )
    else:
        assert found == "Two blocks, each sees itself and those before it: actions → table, wrist and prompt"


def test_a_mask_that_breaks_its_blocks_is_not_called_so(trace):
    broken = trace.mask.numpy().copy()
    broken[0, trace.segments[-1].start] = True
    assert masks.blocks_of(broken, trace.segments) == []
    assert "blocks" not in masks.mask_title(broken, trace.segments, trace.segments)


def test_padding_is_hatched_as_rows_and_columns(trace):
    figure = trace.plot_mask()
    wrist = trace.segments[1]
    padding = masks.padded(trace.mask.numpy(), trace.segments, trace.segments)
    assert padding[wrist.start : wrist.stop].all()
    assert len(parts(figure, "padding")) == 4  # of the camera and of the prompt: a row and a column each
    assert texts(figure).count("padding") == 1


def test_tokens_that_see_themselves_are_no_padding():
    segments = arrange([Segment("words", "language", 3, rule="causal")])
    assert not masks.padded(segment_mask(segments)[0].numpy(), segments, segments).any()


# --- runs of the network -----------------------------------------------------------------------------------

RUNS = [Pass(("prefix",), 800, 0, 800, 1000), *[Pass(("suffix",), 51, 800, 0, 1000)] * 3]


def test_each_run_is_a_bar_of_what_it_reads_and_computes():
    figure = cache.plot_cache(RUNS)
    read = [box.get_height() for box in parts(figure, "read")]
    assert read == [0, 800, 800, 800]
    assert [box.get_height() for box in parts(figure, "written")] == [800]
    assert [(box.get_y(), box.get_height()) for box in parts(figure, "forgotten")] == [(800, 51)] * 3
    assert cache.cache_savings(RUNS) == (800 + 153, 800 + 3 * 851)
    assert figure.get_suptitle() == "953 tokens computed in 4 runs; without the cache it would be 3,353"
    right = figure.axes[0].child_axes[0]
    figure.canvas.draw()
    assert np.allclose(right.get_ylim(), np.array(figure.axes[0].get_ylim()) * 1000 / 1e6)


def test_a_loss_reads_no_cache_and_nothing_recorded_is_refused():
    assert cache.cache_title([Pass(("prefix", "suffix"), 900, 0, 0, 1000)]) == (
        "900 tokens in 1 run, and nothing is read from a cache"
    )
    with pytest.raises(ValueError, match="no run of a decoder was recorded: trace predict_action_chunk"):
        cache.plot_cache([])


def test_a_trace_draws_its_runs(trace):
    assert "without the cache it would be" in trace.plot_cache().get_suptitle()
    assert len(parts(trace.plot_cache(), "forgotten")) == 4


# --- steered norms -----------------------------------------------------------------------------------------


def test_scale_shift_and_gate_are_heatmaps_over_time(trace):
    if "suffix.norm.gate" not in trace.steps:
        with pytest.raises(
            ValueError, match=r"no adaptive norm was recorded: of the policies here only π0\.5"
        ):
            trace.plot_modulation()
        return
    figure = trace.plot_modulation(sample=1)
    for part in modulation.PARTS:
        (image,) = parts(figure, part)
        names, values = modulation.modulations(trace.steps, part)
        assert image.get_array().shape == (7, 4) == values.shape[:2]
        assert np.allclose(image.get_array(), np.sqrt((values**2).mean(-1)))
    assert names[0] == "suffix.0.input_norm" and names[-1] == "suffix.norm"
    labels = [tick.get_text() for tick in figure.axes[0].get_yticklabels()]
    assert labels[:2] == ["0 attention", "0 MLP"] and labels[-1] == "last"
    assert [tick.get_text() for tick in figure.axes[0].get_xticklabels()] == ["1", "0.75", "0.5", "0.25"]


def test_gates_that_do_not_change_are_said_not_to():
    still = np.ones((3, 5, 4))
    assert (
        modulation.modulation_title(still) == "Along the flow a gate of the 3 norms varies by 0 % of its size"
    )
    steps = {"suffix.norm.gate": torch.ones(5, 2, 4)}
    with pytest.raises(ValueError, match="part is 'size', expected one of scale, shift, gate"):
        modulation.modulations(steps, "size")
    with pytest.raises(ValueError, match="sample is 2; there are 2: expected 0 to 1"):
        modulation.modulations(steps, "gate", sample=2)


# --- FAST --------------------------------------------------------------------------------------------------


def test_each_token_covers_the_codes_it_spells():
    chunk = chunks(1)[0]
    figure = spelling.plot_spelling(fast(), chunk)
    (said,) = fast().encode(chunk[None])
    spans = fast().token_spans(said)
    for i, span in enumerate(spans):
        boxes = {
            (round(b.get_x() + 0.5), round(b.get_y() + 0.5))
            for b in parts(figure, f"token {i}")
            if b.get_gid() == f"token {i}"
        }
        assert boxes == {divmod(place, 4) for place in span}
    (codes,) = parts(figure, "codes")
    assert np.array_equal(codes.get_array(), fast().codes(chunk[None])[0].numpy().T)
    assert len(parts(figure, "chunk")) == len(parts(figure, "decoded")) == 4
    assert figure.get_suptitle().startswith(f"6 × 4 = 24 numbers in {len(said)} tokens; off by 0.")


def test_what_is_no_chunk_is_refused():
    with pytest.raises(ValueError, match=r"chunk has shape \(2, 6, 4\); expected \(H, A\), one sample"):
        spelling.plot_spelling(fast(), chunks(2))
    with pytest.raises(ValueError, match="names has 1 entries"):
        spelling.plot_spelling(fast(), chunks(1)[0], names=["x"])


def test_a_trace_of_fast_shows_what_was_said_and_what_is_taught(trace):
    policy = tiny_fast()
    batch = fast_batch(policy)
    with minivla.trace(policy, tokenizer=gemma_words()) as t:
        policy.predict_action_chunk(batch)
        policy(batch)
    taught = t.plot_spelling(sample=2)
    (said,) = policy.sentences.fast.encode(batch["action"][2:])
    assert f"in {len(said)} tokens" in taught.get_suptitle()
    t.plot_spelling(call=0), t.plot_tokens(call=0), t.plot_mask(call=0), t.explore(call=0)
    with pytest.raises(ValueError, match=r"PI0.* says no actions in words; trace π0-FAST"):
        trace.plot_spelling()
    with pytest.raises(ValueError, match="sample is 3; this call holds 3"):
        t.plot_spelling(sample=3)


# --- the explorer ------------------------------------------------------------------------------------------


def test_the_explorer_has_the_words_and_each_camera_its_vision(trace):
    page = trace.explore(sample=1)
    data = json.loads(re.search(r'<script type="application/json">(.*?)</script>', page.html, re.DOTALL)[1])
    (prompt,) = [s for s in data["sequences"][0]["segments"] if s["name"] == "prompt"]
    said = [words.shown_word(w) for w in trace.words["prompt"][1]]
    real = trace.masks["joint.0"][1].any(0)[32:56].tolist()
    assert prompt["words"] == [w if valid else "" for w, valid in zip(said, real, strict=True)]
    sites = [site["name"] for site in data["sequences"][0]["sites"]]
    assert sites[:2] == ["vision.table.0", "vision.table.1"] and "joint.2" in sites
    (main,) = stretches(trace.calls[0], 1)
    assert main.mask.shape == tuple(trace.mask.shape)
    assert data["condition"] == [] and base64.b64decode(data["sequences"][0]["sites"][0]["weights"])


def test_on_the_page_a_word_is_read_and_pointed_at(trace, tmp_path):
    with Browser() as browser:
        page = browser.open(trace.explore().save(tmp_path / "page.html").as_uri())
        view = View(page)
        said = view.all(".cell[data-word]", "n.dataset.word")
        assert said == [words.shown_word(w) for w in trace.words["prompt"][0] if w != "<pad>"]
        view.click('.cell[data-word="red"]')
        place = trace.words["prompt"][0].index(" red")
        assert view.text(".token") == f"prompt[{place}] “red”"
        assert view.kept == 32 + place and page.problems == []


def test_words_that_do_not_fit_are_refused_by_name(trace):
    trace.calls[0].words["state" if trace.segments[3].name == "state" else "actions"] = [["a", "b"]]
    with pytest.raises(ValueError, match=r"segment '(state|actions)' has \d tokens and 2 words"):
        trace.explore()
