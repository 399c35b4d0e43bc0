"""minivla: robot-policy families from scratch, compact, and equal to upstream.

`import minivla` pulls in torch and nothing heavier; each public name is imported when it is first used.
"""

from __future__ import annotations

from importlib import import_module
from typing import TYPE_CHECKING, Any

import torch as torch  # the one heavy import, made here so that its cost is where one expects it

if TYPE_CHECKING:
    from minivla.checkpoints import list_checkpoints, load
    from minivla.policies.base import Policy
    from minivla.preflight import doctor
    from minivla.proof import prove_masks
    from minivla.tracing import trace
    from minivla.training import evaluate, train

__version__ = "0.1.0"
__all__ = [
    "Policy",
    "__version__",
    "doctor",
    "evaluate",
    "list_checkpoints",
    "load",
    "prove_masks",
    "trace",
    "train",
]

_HOME = {
    "Policy": "minivla.policies.base",
    "doctor": "minivla.preflight",
    "evaluate": "minivla.training",
    "list_checkpoints": "minivla.checkpoints",
    "load": "minivla.checkpoints",
    "prove_masks": "minivla.proof",
    "trace": "minivla.tracing",
    "train": "minivla.training",
}


def __getattr__(name: str) -> Any:
    """Import a public name on first use (PEP 562)."""
    if name not in _HOME:
        raise AttributeError(f"module 'minivla' has no attribute {name!r}; it offers {', '.join(__all__)}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """The public names, whether or not they have been imported yet."""
    return sorted(set(globals()) | set(__all__))
