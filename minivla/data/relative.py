"""Actions as differences to the state, and back: two steps that belong together.

    before the network   action − state, where the policy is trained (in use there is no action yet)
    after it             action + state, the state that the chunk was predicted from

The first step, `RelativeActions`, keeps the state that passes through it; the second, `AbsoluteActions`, adds
it. A policy that serves a queue of actions sees new states meanwhile, and all actions of a chunk are relative
to the one before it: `Policy.select_action` puts that one back. (LeRobot 0.6 adds the newest state instead,
so that a queue of more than one action drifts there.) Statistics of `action` must be those of differences.
Source: `lerobot/processor/relative_action_processor.py`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any, ClassVar

from torch import Tensor

from minivla.data.features import ACTION, OBS_STATE, MissingKey
from minivla.data.steps import Batch, Step, register


@register
@dataclass(repr=False)
class RelativeActions(Step):
    """action − state, but for joints that stay absolute.

    enabled: False lets all pass. exclude_joints: names, or parts of names, upper or lower case alike, of
    `action_names` that stay absolute; where there are no `action_names`, none do. `reference` is the state
    (B, S) that actions are relative to, that of the last batch until it is set.
    """

    registry_name: ClassVar[str] = "relative_actions_processor"
    enabled: bool = False
    exclude_joints: list[str] | None = None
    action_names: list[str] | None = None

    def __post_init__(self) -> None:
        self.exclude_joints = list(self.exclude_joints or ())
        self.action_names = None if self.action_names is None else list(self.action_names)
        self.reference: Tensor | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Raises ValueError for a state shorter than the action."""
        state = batch.get(OBS_STATE)
        if state is None:
            return batch
        self.reference = state
        if not self.enabled or batch.get(ACTION) is None:
            return batch
        return {**batch, ACTION: batch[ACTION] - self.offset(batch[ACTION])}

    def offset(self, action: Tensor) -> Tensor:
        """What separates relative from absolute: the state where an action (…, A) has it, 0 elsewhere.

        Raises ValueError without a reference, and where its size does not fit.
        """
        if self.reference is None:
            raise ValueError(
                "these actions are relative to a state, and none was seen; call policy.preprocess(raw) first"
            )
        size = action.shape[-1]
        if self.reference.shape[-1] < size:
            raise ValueError(
                f"the state has {self.reference.shape[-1]} numbers, the action {size}; relative actions need "
                "one of the state for each of the action, in the same order. Set use_relative_actions=False"
            )
        state = self.reference.to(action.device, action.dtype)[..., :size]
        moved = state * action.new_tensor(self.relative(size))
        return moved.unsqueeze(-2) if action.ndim == 3 else moved

    def relative(self, size: int) -> list[bool]:
        """For each of `size` dimensions, whether it is relative; those without a name are."""
        absolute = [part.lower() for part in self.exclude_joints or () if part]
        names = [name.lower() for name in self.action_names or ()][:size]
        known = [not any(part in name for part in absolute) for name in names]
        return known + [True] * (size - len(known))

    def describe(self) -> list[str]:
        """One line."""
        if not self.enabled:
            return ["actions stay absolute"]
        kept = ", ".join(self.exclude_joints or ()) if self.action_names else ""
        return ["action - state" + (f", but for {kept}" if kept else "")]

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings."""
        settings = ("enabled", "exclude_joints", "action_names")
        return {name: getattr(self, name) for name in settings}


@register
@dataclass(repr=False)
class AbsoluteActions(Step):
    """action + state, for the same joints. `source` is the step that keeps the state (`link`)."""

    registry_name: ClassVar[str] = "absolute_actions_processor"
    enabled: bool = False
    source: RelativeActions | None = None

    def __call__(self, batch: Batch) -> Batch:
        """Raises MissingKey for a step without its pair, ValueError as `RelativeActions.offset`."""
        if not self.enabled or batch.get(ACTION) is None:
            return batch
        if self.source is None:
            raise MissingKey(
                "absolute actions need the state, which the preprocessor's step 'relative_actions_processor' "
                "keeps, and the two are not linked; minivla.data.relative.link(before.steps, after.steps)"
            )
        return {**batch, ACTION: batch[ACTION] + self.source.offset(batch[ACTION])}

    def describe(self) -> list[str]:
        """One line."""
        return ["action + state, where relative" if self.enabled else "actions are absolute already"]

    def to_json(self) -> dict[str, Any]:
        """LeRobot's settings."""
        return {"enabled": self.enabled}


def source_of(steps: Iterable[Step]) -> RelativeActions | None:
    """The step that keeps the state, if actions are relative."""
    found = (step for step in steps if isinstance(step, RelativeActions))
    return next((step for step in found if step.enabled), None)


def link(before: Iterable[Step], after: Iterable[Step]) -> None:
    """Let the postprocessor's step find the state that the preprocessor's keeps: no file can say so."""
    source = next((step for step in before if isinstance(step, RelativeActions)), None)
    for step in after:
        if isinstance(step, AbsoluteActions):
            step.source = source
