"""Each check of chapter 9 rejects plausible mistakes, each by its name; test_every_chapter has the rest."""

import re
from pathlib import Path

import torch

from minivla.exercises import chapter09

CHAPTER = Path(__file__).parents[2] / "notebooks" / "09_pi05.ipynb"


def read_state(prompt, q01, q99):
    numbers = prompt.rsplit("State: ", 1)[1].split(";")[0].split()
    scaled = (torch.tensor([int(n) for n in numbers]) + 0.5) / 128 - 1
    return q01 + (scaled + 1) / 2 * (q99 - q01)


def start_plain(norm, weight):
    with torch.no_grad():
        norm.dense.weight.zero_()
        norm.dense.bias.copy_(torch.cat((weight, torch.zeros_like(weight), torch.ones_like(weight))))


def midpoint(field, x, steps):
    for k in range(steps):
        now, size = torch.tensor([1 - k / steps]), 1 / steps
        half = x - size / 2 * field(x, now)
        x = x - size * field(half, now - size / 2)
    return x


CHECKS = [
    (chapter09.check_read_state, read_state),
    (chapter09.check_start_plain, start_plain),
    (chapter09.check_midpoint, midpoint),
]


def lower_edge(prompt, q01, q99):
    return read_state(prompt, q01, q99) - (q99 - q01) / 512


def normalised(prompt, q01, q99):
    return 2 * (read_state(prompt, q01, q99) - q01) / (q99 - q01) - 1


def all_numbers(prompt, q01, q99):
    return torch.tensor([float(number) for number in re.findall(r"-?\d+", prompt)])


def first_state(prompt, q01, q99):
    numbers = prompt.split("State: ", 1)[1].split(";")[0].split()
    scaled = (torch.tensor([int(n) for n in numbers if n.isdigit()]) + 0.5) / 128 - 1
    return q01 + (scaled + 1) / 2 * (q99 - q01) if len(scaled) == 3 else scaled


def left_closed(norm, weight):
    with torch.no_grad():
        norm.dense.weight.zero_()
        norm.dense.bias.copy_(torch.cat((weight, torch.zeros_like(weight), torch.zeros_like(weight))))


def scale_at_one(norm, weight):
    with torch.no_grad():
        norm.dense.weight.zero_()
        norm.dense.bias.copy_(torch.cat((1 + weight, torch.zeros_like(weight), torch.ones_like(weight))))


def bias_alone(norm, weight):
    with torch.no_grad():
        norm.dense.bias.copy_(torch.cat((weight, torch.zeros_like(weight), torch.ones_like(weight))))


def gate_first(norm, weight):
    with torch.no_grad():
        norm.dense.weight.zero_()
        norm.dense.bias.copy_(torch.cat((torch.ones_like(weight), torch.zeros_like(weight), weight)))


def nothing(norm, weight):
    return norm


def euler(field, x, steps):
    for k in range(steps):
        x = x - field(x, torch.tensor([1 - k / steps])) / steps
    return x


def upwards(field, x, steps):
    for k in range(steps):
        now, size = torch.tensor([k / steps]), 1 / steps
        x = x + size * field(x + size / 2 * field(x, now), now + size / 2)
    return x


def wrong_sign(field, x, steps):
    for k in range(steps):
        now, size = torch.tensor([1 - k / steps]), 1 / steps
        x = x + size * field(x + size / 2 * field(x, now), now - size / 2)
    return x


def goes_on_from_the_middle(field, x, steps):
    for k in range(steps):
        now, size = torch.tensor([1 - k / steps]), 1 / steps
        x = x - size / 2 * field(x, now)
        x = x - size * field(x, now - size / 2)
    return x


MISTAKES = [
    (chapter09.check_read_state, lower_edge, "the bin's lower edge"),
    (chapter09.check_read_state, normalised, "expected 0.2988"),
    (chapter09.check_read_state, all_numbers, "expected 0.2988"),
    (chapter09.check_read_state, first_state, "expected (3,)"),
    (chapter09.check_start_plain, left_closed, "the gate is (0.00, 0.00, 0.00, …), expected 1"),
    (chapter09.check_start_plain, scale_at_one, "the scale is 1 too large"),
    (chapter09.check_start_plain, bias_alone, "`dense.weight` must be zero"),
    (chapter09.check_start_plain, gate_first, "expected 1 everywhere"),
    (chapter09.check_start_plain, nothing, "still depends on the condition"),
    (chapter09.check_midpoint, euler, "call the field 1 times, expected 2"),
    (chapter09.check_midpoint, upwards, "asked at time 0.000, expected 1.000"),
    (chapter09.check_midpoint, wrong_sign, "a step is negative"),
    (chapter09.check_midpoint, goes_on_from_the_middle, "from where it began"),
]
