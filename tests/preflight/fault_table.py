"""Every fault, and what the doctor must call it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from tests.preflight.faults import (
    NEGATIVE,
    Dark,
    Exchanged,
    OneEyed,
    Reversed,
    Speechless,
    Weak,
    breaking,
    column,
    constant,
    dead_gripper,
    doubled,
    drop,
    drop_stats,
    exchanged,
    extra_camera,
    flags,
    forgotten,
    identity,
    identity_far,
    leaky,
    making_nan,
    nan_in_dataset,
    nan_loss,
    near_constant,
    no_reset,
    no_statistics,
    normalised,
    padded,
    places,
    quantiles,
    raw,
    refusing,
    rename,
    set_stats,
    silenced,
    thawing,
    weights,
    with_step,
    wrapped,
    wrong_env,
    wrong_seeds,
)
from tests.preflight.patients import STATE, TABLE, WRIST, Patient


@dataclass(frozen=True)
class Fault:
    """code: what the doctor must say. given: "d" dataset, "e" environment, "t" a trained policy.
    so: errors that follow from it.
    """

    name: str
    code: str
    make: Callable[[Patient], None]
    given: str = ""
    so: tuple[str, ...] = field(default=())


FAULTS = [
    Fault("no statistics at all", "statistics-absent", no_statistics),
    Fault("statistics of the state missing", "statistics-absent", drop_stats),
    Fault("mean is infinite", "statistics-not-finite", set_stats(STATE, "mean", lambda m: m * float("inf"))),
    Fault("a dimension hardly moves", "statistics-near-constant", near_constant, "", ("trainable-stuck",)),
    Fault("a dimension never moves", "statistics-constant", constant, "", ("trainable-stuck",)),
    Fault("statistics of another kind", "statistics-kind", quantiles),
    Fault("normalisation skipped", "statistics-mode", identity),
    Fault("nothing scales the state", "statistics-identity", identity_far),
    Fault(
        "statistics of another dataset",
        "statistics-other-dataset",
        set_stats(STATE, "mean", lambda m: m + 2),
        "dt",
        ("replay-error", "action-sign"),
    ),
    Fault("state in degrees", "statistics-scale", raw(STATE, lambda x: x * 57.3)),
    Fault(
        "postprocessor of another dataset",
        "processors-disagree",
        set_stats("action", "std", lambda s: s * 2, "postprocessor"),
    ),
    Fault(
        "cameras under other names",
        "camera-names",
        rename({TABLE: "observation.images.tabletop", WRIST: "observation.images.hand"}),
    ),
    Fault("a camera is absent", "camera-absent", drop(WRIST)),
    Fault("a camera too many", "camera-extra", extra_camera),
    Fault("cameras exchanged, dataset given", "camera-order", rename({TABLE: WRIST, WRIST: TABLE}), "d"),
    Fault("cameras exchanged, batch only", "camera-order", rename({TABLE: WRIST, WRIST: TABLE})),
    Fault("pictures in 0…255", "image-range", raw(TABLE, lambda x: x * 255)),
    Fault("pictures in [-1, 1]", "image-range", raw(TABLE, lambda x: x * 2 - 1)),
    Fault("pictures already normalised", "image-range", normalised),
    Fault("float pictures, channels last", "image-layout", raw(TABLE, lambda x: x.movedim(1, -1))),
    Fault("uint8 pictures, channels first", "image-layout", raw(TABLE, lambda x: (x * 255).round().byte())),
    Fault("whole numbers 0 and 1", "image-range", raw(TABLE, lambda x: (x.movedim(1, -1) > 0.5).byte())),
    Fault("pictures of another size", "image-size", raw(TABLE, lambda x: x[..., ::2, ::2])),
    Fault("padded with -1", "image-pad-value", raw(TABLE, padded(-1.0))),
    Fault(
        "padded, then rescaled to -3",
        "image-pad-value",
        raw(TABLE, padded(-3.0, lambda x: 2 * x - 1)),
        "",
        ("image-range",),
    ),
    Fault("upside down", "image-flipped", raw(TABLE, lambda x: x.flip(-2)), "d"),
    Fault("mirrored", "image-flipped", raw(WRIST, lambda x: x.flip(-1)), "d"),
    Fault("red and blue exchanged", "image-colours", raw(TABLE, lambda x: x.flip(1)), "d"),
    Fault("black pictures", "image-blank", raw(TABLE, torch.zeros_like)),
    Fault(
        "NaN pixels",
        "image-not-finite",
        raw(TABLE, lambda x: x.index_fill(-1, torch.tensor([5]), float("nan"))),
    ),
    Fault("a state too short", "state-size", raw(STATE, lambda x: x[:, :2])),
    Fault("a state padded to 32", "state-size", raw(STATE, lambda x: torch.nn.functional.pad(x, (0, 29)))),
    Fault(
        "a dimension of the state filled with zeros",
        "state-padding",
        raw(STATE, lambda x: x.index_fill(-1, torch.tensor([2]), 0.0)),
    ),
    Fault(
        "NaN in the state",
        "state-not-finite",
        raw(STATE, lambda x: x.index_fill(-1, torch.tensor([1]), float("nan"))),
    ),
    Fault("state under another name", "state-name", rename({STATE: "observation.joints"})),
    Fault("no instruction", "instruction-absent", drop("task")),
    Fault("padding flags under another name", "padding-flags", rename({"action_is_pad": "actions_id_pad"})),
    Fault(
        "a chunk of another length",
        "action-horizon",
        lambda p: (raw("action", lambda x: x[:, :7])(p), raw("action_is_pad", lambda x: x[:, :7])(p)),
    ),
    Fault("padding leaks into the loss", "padding-leaks", leaky, "", ("trainable-stuck",)),
    Fault("blind", "ignores-image", silenced("encoder_img_feat_input_proj"), "", ("trainable-stuck",)),
    Fault("numb", "ignores-state", silenced("encoder_robot_state_input_proj")),
    Fault("deaf", "ignores-instruction", silenced("instruction.neighbours"), "", ("trainable-stuck",)),
    Fault("a constant chunk", "constant-chunk", silenced("action_head"), "", ("trainable-stuck",)),
    Fault("frozen, but train() thaws", "frozen-moves", thawing),
    Fault("not in the optimiser", "trainable-stuck", forgotten),
    Fault("a loss of NaN", "loss-not-finite", nan_loss, "", ("padding-leaks",)),
    Fault("reset clears nothing", "queue-not-reset", no_reset),
    Fault("a probe breaks", "check-failed", breaking),
    Fault(
        "an environment of another size",
        "environment-mismatch",
        wrong_env("tabletop:pick_place?size=96"),
        "e",
    ),
    Fault(
        "an environment of another body",
        "action-size",
        wrong_env("tabletop:pick_place?embodiment=bimanual"),
        "e",
        ("environment-mismatch",),
    ),
    Fault("recorded beyond the bounds", "action-out-of-range", column(lambda a, s: a * 1.5), "det"),
    Fault("places where changes are wanted", "action-absolute", column(places), "det", ("replay-error",)),
    Fault("an axis reversed", "action-sign", column(lambda a, s: a * [1, -1, 1]), "det"),
    Fault("axes exchanged", "action-frame", column(lambda a, s: a[:, [1, 0, 2]]), "det", ("replay-error",)),
    Fault(
        "table widths, not shares",
        "action-units",
        column(lambda a, s: a * [0.04, 0.04, 1]),
        "det",
        ("replay-error", "statistics-other-dataset"),
    ),
    Fault("gripper reversed", "gripper-sign", column(lambda a, s: a * [1, 1, -1]), "det", ("replay-error",)),
    Fault("recorded from another start", "replay-fails-in-env", wrong_seeds, "det"),
    Fault("one state too few", "preprocessing-fails", raw(STATE, lambda x: x[:1])),
    Fault("an axis of time for one camera", "preprocessing-fails", raw(TABLE, lambda x: x[:, None])),
    Fault("a preprocessor that raises", "preprocessing-fails", with_step(refusing)),
    Fault("a preprocessor that makes NaN", "preprocessing-not-finite", with_step(making_nan)),
    *(
        Fault(name, "image-unlike-dataset", raw(TABLE, change), "d")
        for name, change in {
            "inverted": lambda x: 1 - x,
            "dark": lambda x: x * 0.2,
            "shifted": lambda x: x.roll(8, -1),
            "another moment's picture": lambda x: x[:1].expand_as(x).clone(),
        }.items()
    ),
    *(
        Fault(name, "image-flipped", raw(TABLE, change), "d")
        for name, change in {
            "a quarter to the left": lambda x: x.rot90(1, (-2, -1)),
            "a quarter to the right": lambda x: x.rot90(-1, (-2, -1)),
            "rows and columns exchanged": lambda x: x.transpose(-2, -1),
        }.items()
    ),
    Fault(
        "red and green exchanged",
        "image-colours",
        raw(TABLE, lambda x: x[:, [1, 0, 2]]),
        "d",
    ),
    Fault("one camera read twice", "camera-repeated", doubled),
    Fault("one camera read twice, dataset given", "camera-repeated", doubled, "d"),
    Fault("one camera read twice in the environment", "camera-repeated", wrapped(OneEyed), "det"),
    Fault("a dark environment", "image-unlike-dataset", wrapped(Dark), "det"),
    Fault("a dead gripper", "action-constant", dead_gripper, "", ("trainable-stuck",)),
    Fault(
        "a dead gripper, dataset given",
        "replay-error",
        dead_gripper,
        "dt",
        ("action-constant", "trainable-stuck"),
    ),
    Fault("the environment turns an axis round", "action-sign", wrapped(Reversed), "e"),
    Fault("the environment exchanges axes", "action-frame", wrapped(Exchanged), "e"),
    Fault("the environment moves too little", "action-units", wrapped(Weak), "e"),
    Fault("an environment without instructions", "instruction-absent", wrapped(Speechless), "e"),
    Fault("NaN among the weights", "weights-not-finite", weights("action_head.weight", float("nan"))),
    Fault("inf among the weights", "weights-not-finite", weights("action_head.bias", float("inf"))),
    Fault("NaN in the dataset's actions", "dataset-not-finite", nan_in_dataset, "det"),
    Fault("the state's signs turned", "statistics-scale", raw(STATE, lambda x: -x)),
    Fault("the state exchanged", "state-unlike-dataset", raw(STATE, lambda x: x[:, [1, 0, 2]]), "d"),
    Fault("a state of mm", "statistics-scale", raw(STATE, lambda x: x * 1000)),
    Fault("a negative spread", "statistics-negative", NEGATIVE),
    Fault("padding flags inverted", "padding-flags", flags(lambda pad: ~pad)),
    Fault("all is padding", "padding-flags", flags(torch.ones_like)),
    Fault("processors exchanged", "processors-exchanged", exchanged),
]
