"""Words of the command line: values, and names with arguments ("tabletop:reach?size=96&cameras=table")."""

from __future__ import annotations

import ast
import contextlib
from typing import Any
from urllib.parse import parse_qsl


def literal(text: str) -> Any:
    """The value a word on the command line stands for: a number, true, false, none, a tuple, or itself.

    >>> [literal(word) for word in ("64", "1e-4", "true", "none", "table,wrist", "mean")]
    [64, 0.0001, True, None, ('table', 'wrist'), 'mean']
    """
    words = {"true": True, "false": False, "none": None}
    if text.lower() in words:
        return words[text.lower()]
    with contextlib.suppress(ValueError, SyntaxError):
        return ast.literal_eval(text)
    return tuple(literal(part) for part in text.split(",") if part) if "," in text else text


def parse_spec(text: str) -> tuple[str, dict[str, Any]]:
    """A name and its arguments, out of "name?key=value&key=value"; `cameras` is always a tuple.

    Raises ValueError when an argument is not of the form key=value.

    >>> parse_spec("tabletop:reach?size=96&cameras=table")
    ('tabletop:reach', {'size': 96, 'cameras': ('table',)})
    """
    name, _, query = text.partition("?")
    try:
        pairs = parse_qsl(query, strict_parsing=bool(query), keep_blank_values=True)
    except ValueError as error:
        raise ValueError(f"{text!r}: expected NAME?key=value&key=value after the name; {error}") from error
    arguments = {key: literal(value) for key, value in pairs}
    if isinstance(cameras := arguments.get("cameras"), str):
        arguments["cameras"] = (cameras,) if cameras else ()
    return name, arguments
