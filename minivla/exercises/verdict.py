"""The one line a self-check prints."""

from __future__ import annotations

from collections.abc import Callable


def verdict(complaint: Callable[[], str | None]) -> None:
    """Run a check and print its result.

    `complaint` calls the reader's function and returns what is wrong, or None when all is right.
    NotImplementedError means that the starter is still there; any other error is the reader's and is shown as
    one line, since a traceback through our code would not help.
    """
    try:
        wrong = complaint()
    except NotImplementedError:
        print("not attempted yet")
    except Exception as error:
        print(f"not yet: your function stopped with {type(error).__name__}: {error}")
    else:
        print("correct" if wrong is None else f"not yet: {wrong}")
