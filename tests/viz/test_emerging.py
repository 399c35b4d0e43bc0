"""What the first tokens of a chunk say is what they decode to, and the last line is the chunk."""

import pytest
import torch

from minivla.actions.fast import FastTokenizer
from minivla.viz import palette
from minivla.viz.emerging import partial_chunks, plot_emerging


def swings(count=200, horizon=16):
    generator = torch.Generator().manual_seed(0)
    time = torch.linspace(0, 1, horizon)
    pace, phase = 3 * torch.rand(2, count, 1, 3, generator=generator)
    return torch.sin(time[:, None] * pace + phase)


@pytest.fixture(scope="module")
def fast():
    return FastTokenizer.fit(swings(), scale=10, vocab_size=256)


def lines(ax, gid):
    return [line.get_ydata() for line in ax.lines if line.get_gid() == gid]


def test_partial_chunks_end_in_the_chunk_and_begin_in_zeros(fast):
    chunk = swings()[:1]
    (tokens,) = fast.encode(chunk)
    partial = partial_chunks(fast, tokens, 16, 3)
    assert partial.shape == (len(tokens) + 1, 16, 3)
    assert not partial[0].any()
    torch.testing.assert_close(partial[-1:], fast.decode([tokens])[0])


def test_the_first_token_has_the_lowest_frequencies_and_nothing_else(fast):
    (tokens,) = fast.encode(swings()[:1])
    spelled = fast.token_spans(tokens)[0]
    found = fast.codes(partial_chunks(fast, tokens, 16, 3)[1:2]).flatten()
    assert found[: len(spelled)].any()
    assert not found[len(spelled) :].any()


def test_the_lines_are_the_partial_chunks(fast):
    chunk = swings()[3]
    (tokens,) = fast.encode(chunk[None])
    figure = plot_emerging(fast, tokens, chunk, counts=(1, 4, len(tokens)), names=("x", "y", "grip"))
    partial = partial_chunks(fast, tokens, 16, 3)
    for a, ax in enumerate(figure.axes):
        (grey,) = lines(ax, "chunk")
        assert torch.equal(torch.as_tensor(grey), chunk[:, a])
        for count, drawn in zip((1, 4, len(tokens)), lines(ax, "said"), strict=True):
            assert torch.equal(torch.as_tensor(drawn), partial[count, :, a])
    assert [ax.get_title(loc="left") for ax in figure.axes] == ["x", "y", "grip"]
    assert figure.get_size_inches()[0] == palette.WIDTH


def test_the_title_counts_the_tokens_that_nine_tenths_take(fast):
    chunk = swings()[3]
    (tokens,) = fast.encode(chunk[None])
    partial = partial_chunks(fast, tokens, 16, 3)
    left = ((partial - partial[-1]) ** 2).sum((1, 2)) / (partial[-1] ** 2).sum()
    enough = next(count for count in range(len(left)) if left[count] <= 0.1)
    told = f"The first {enough} of {len(tokens)} tokens say nine tenths of the chunk"
    assert plot_emerging(fast, tokens, chunk).get_suptitle() == told


def test_many_dimensions_show_the_first_four():
    chunks = torch.cat((swings(), swings(100).repeat(2, 1, 1)), dim=-1)
    fast = FastTokenizer.fit(chunks, scale=10, vocab_size=256)
    assert len(plot_emerging(fast, fast.encode(chunks[:1])[0], chunks[0]).axes) == 4


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"counts": (99,)}, "counts"),
        ({"counts": ()}, "counts"),
        ({"names": ("x", "y")}, "names are"),
        ({"chunk": torch.zeros(1, 16, 3)}, r"shape \(1, 16, 3\); expected one chunk"),
    ],
)
def test_refuses_what_does_not_fit(fast, options, message):
    chunk = swings()[0]
    (tokens,) = fast.encode(chunk[None])
    with pytest.raises(ValueError, match=message):
        plot_emerging(fast, tokens, options.pop("chunk", chunk), **options)
