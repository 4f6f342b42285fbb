"""The one error type that a user's input can cause, and the one way to stop early.

The command line prints it as one line and exits with code 2; everything else is a bug and keeps its traceback.
"""

import difflib
from collections.abc import Iterable


class InputError(ValueError):
    """Bad input: names the thing, its value and what is allowed."""


class Stopped(Exception):
    """The run was asked to stop (SIGTERM, Ctrl-C) and has saved its state: the command ends with exit code 0."""


def unknown(kind: str, value: object, allowed: Iterable[str]) -> InputError:
    """An `InputError` for a name that is not in `allowed`, with the nearest allowed name suggested."""
    names = sorted(map(str, allowed))
    near = difflib.get_close_matches(str(value), names, n=1)
    hint = f"; did you mean {near[0]!r}?" if near else ""
    return InputError(f"unknown {kind} {value!r}{hint} (allowed: {', '.join(names) or 'none'})")
