"""Each check of chapter 2 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

import math
from pathlib import Path

import torch

from minivla.exercises import chapter02

CHAPTER = Path(__file__).parents[2] / "notebooks" / "02_act.ipynb"


def queued(chunks, n):
    step = torch.arange(len(chunks))
    return chunks[step - step % n, step % n]


def newest_share(m, count):
    return math.exp(-m * (count - 1)) / sum(math.exp(-m * i) for i in range(count))


def active(mean, log_variance, nats=0.05):
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    return int((kl.mean(0) > nats).sum())


CHECKS = [
    (chapter02.check_queued, queued),
    (chapter02.check_newest_share, newest_share),
    (chapter02.check_active, active),
]


def always_the_newest(chunks, n):
    return chunks[:, 0]


def chunks_counted_not_steps(chunks, n):
    step = torch.arange(len(chunks))
    return chunks[step // n, step % n]


def one_chunk_only(chunks, n):
    return chunks[0]


def newest_counted_as_first(m, count):
    return 1 / sum(math.exp(-m * i) for i in range(count))


def not_normalised(m, count):
    return math.exp(-m * (count - 1))


def one_number_too_many(m, count):
    return math.exp(-m * count) / sum(math.exp(-m * i) for i in range(1, count + 1))


def of_the_mean_mean(mean, log_variance, nats=0.05):
    return active(mean.mean(0, keepdim=True), log_variance.mean(0, keepdim=True), nats)


def without_the_variance(mean, log_variance, nats=0.05):
    return int((0.5 * (mean**2).mean(0) > nats).sum())


def of_the_sum(mean, log_variance, nats=0.05):
    kl = 0.5 * (mean**2 + log_variance.exp() - 1 - log_variance)
    return int((kl.sum(0) > nats).sum())


MISTAKES = [
    (chapter02.check_queued, always_the_newest, "expected action 1 of the chunk of step 0"),
    (chapter02.check_queued, chunks_counted_not_steps, "expected action 0 of the chunk of step 4"),
    (chapter02.check_queued, one_chunk_only, "returns shape (6, 2); expected (20, 2)"),
    (chapter02.check_newest_share, newest_counted_as_first, "i = 0 is the oldest"),
    (chapter02.check_newest_share, not_normalised, "expected 0.25"),
    (chapter02.check_active, of_the_mean_mean, "dimension 0 by its mean"),
    (chapter02.check_active, without_the_variance, "expected 3"),
    (chapter02.check_active, of_the_sum, "falls below the threshold"),
]


def test_a_reader_may_count_the_weights_from_one(capsys):
    chapter02.check_newest_share(one_number_too_many)
    assert capsys.readouterr().out == "correct\n"
