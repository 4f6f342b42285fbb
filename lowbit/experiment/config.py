"""An experiment is a Python file: a docstring that states what to expect, a frozen dataclass `Config`, and `run`.

    \"\"\"What happens at two bits.

    Purpose: ...            (or `Paper: ...`)
    Command: lowbit run experiments/two_bits.py
    Device: 2 CPU cores
    Expected time: 8 minutes
    Expected numbers: KL mean below 0.4
    \"\"\"

    @dataclasses.dataclass(frozen=True)
    class Config: ...

    def run(config: Config, run: lowbit.experiment.run.Run) -> None: ...
    def dry_run(config: Config) -> dict | None: ...         # optional: what would be done, in bytes and formats

Every field of `Config` is a command-line option (`--opt.lr=3e-4`), checked against its type.
"""

import ast
import contextlib
import dataclasses
import hashlib
import importlib.util
import io
import json
import math
import os
import re
import sys
import types
import typing
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any, Literal, TypeVar

from lowbit.errors import InputError, unknown

T = TypeVar("T")
SECTIONS = ("Purpose or Paper", "Command", "Device", "Expected time", "Expected numbers")


@dataclasses.dataclass(frozen=True)
class Experiment:
    """A loaded experiment file. `doc` maps each docstring section to its text."""

    path: Path
    doc: dict[str, str]
    config: type
    run: Callable[[Any, Any], None]
    dry_run: Callable[[Any], Any] | None

    @property
    def name(self) -> str:
        return self.path.stem


def load(path: str | Path) -> Experiment:
    """Imports an experiment by path. Raises `InputError` when it is missing, not Python or breaks the contract.

    The docstring is checked before any code of the file runs.
    """
    path = Path(path)
    try:
        source = path.read_text(encoding="utf-8")
        module_ast = ast.parse(source)
    except OSError as e:
        raise InputError(f"experiment {path}: {e.strerror} (allowed: a Python file)") from e
    except (SyntaxError, ValueError) as e:
        raise InputError(f"experiment {path} is not Python: {e} (allowed: a Python file)") from e
    doc = check_docstring(ast.get_docstring(module_ast), path)
    module = _import(path)
    config = getattr(module, "Config", None)
    if not (isinstance(config, type) and dataclasses.is_dataclass(config) and config.__dataclass_params__.frozen):
        raise InputError(f"experiment {path}: Config is {config!r} (allowed: a frozen dataclass)")
    run = getattr(module, "run", None)
    if not callable(run):
        raise InputError(f"experiment {path}: run is {run!r} (allowed: a function run(config, run))")
    return Experiment(path, doc, config, run, getattr(module, "dry_run", None))


def check_docstring(doc: str | None, path: Path) -> dict[str, str]:
    """The sections of an experiment's docstring, `{title: text}`. Raises `InputError` naming the missing ones."""
    parts = re.split(r"(?m)^(Purpose|Paper|Command|Device|Expected time|Expected numbers):", doc or "")
    found = {title: " ".join(text.split()) for title, text in zip(parts[1::2], parts[2::2])}
    missing = [s for s in SECTIONS if not any(found.get(title) for title in s.split(" or "))]
    if missing:
        have = "has no docstring" if not doc else f"docstring lacks {', '.join(repr(m + ':') for m in missing)}"
        raise InputError(f"experiment {path}: {have} (needed: {', '.join(s + ':' for s in SECTIONS)})")
    return found


def _import(path: Path) -> types.ModuleType:
    name = f"lowbit_experiment_{hashlib.sha256(str(path.resolve()).encode()).hexdigest()[:8]}_{path.stem}"
    spec = importlib.util.spec_from_file_location(name, path)
    if spec is None or spec.loader is None:
        raise InputError(f"experiment {path}: not importable (allowed: a file that ends in .py)")
    module = importlib.util.module_from_spec(spec)
    sys.modules[name] = module  # dataclasses resolve their annotations through sys.modules
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


# -- command line -----------------------------------------------------------------------------------------------------


def parse(cls: type[T], argv: Sequence[str], prog: str, description: str | None = None, also: Sequence[str] = ()) -> T:
    """A `cls` from `--a.b=value` options; `--help` prints and raises `SystemExit(0)`. Raises `InputError`.

    `also` are options that the caller has taken out of `argv`, for suggestions.
    """
    import tyro

    captured = io.StringIO()
    help = "--help" in argv or "-h" in argv
    try:
        with contextlib.redirect_stderr(captured), contextlib.nullcontext() if help else _wide():
            value, rest = tyro.cli(cls, args=list(argv), prog=prog, description=description, return_unknown_args=True)
    except SystemExit as e:
        if not e.code:
            raise
        raise InputError(_one_line(captured.getvalue(), prog)) from None
    for arg in rest:
        if arg.startswith("-"):
            raise unknown("option", arg.split("=")[0], [*options(cls), *also])
        raise InputError(f"unexpected argument {arg!r} (see {prog} --help)")
    return value


def options(cls: type, prefix: str = "--") -> list[str]:
    """Every option that `parse` accepts for a config class."""
    import tyro

    names, hints = [], typing.get_type_hints(cls, include_extras=True)
    for field in dataclasses.fields(cls):
        if _positional(hints[field.name], tyro):
            continue
        nested = [t for t in _members(hints[field.name]) if dataclasses.is_dataclass(t)]
        name = prefix + field.name.replace("_", "-")
        names += [o for t in nested for o in options(t, name + ".")] if nested else [name]
    return names


def _positional(hint: Any, tyro: Any) -> bool:
    return tyro.conf.Positional in getattr(hint, "__metadata__", ()) or hint is tyro.conf.Positional


@contextlib.contextmanager
def _wide() -> Iterator[None]:
    """tyro breaks its messages, and the values in them, at the terminal's width."""
    before = os.environ.get("COLUMNS")
    os.environ["COLUMNS"] = "100000"
    try:
        yield
    finally:
        if before is None:
            del os.environ["COLUMNS"]
        else:
            os.environ["COLUMNS"] = before


def _one_line(box: str, prog: str) -> str:
    # tyro draws a box: its first paragraph is the message, whatever follows a rule is advice.
    text = [line.strip().strip("│╭╮╰╯").strip() for line in re.sub(r"\x1b\[[0-9;]*m", "", box).splitlines()]
    message = []
    for line in text[1:]:
        if not line or set(line) == {"─"}:
            break
        message.append(line)
    return " ".join(message).rstrip(".") + f" (see {prog} --help)"


# -- JSON -------------------------------------------------------------------------------------------------------------


def to_json(config: Any) -> dict[str, Any]:
    """A config as JSON values; tuples become lists, paths strings. Raises `InputError` on anything else."""
    return {f.name: _plain(getattr(config, f.name), f.name) for f in dataclasses.fields(config)}


def _plain(value: Any, key: str) -> Any:
    if dataclasses.is_dataclass(value) and not isinstance(value, type):
        return {f.name: _plain(getattr(value, f.name), f"{key}.{f.name}") for f in dataclasses.fields(value)}
    if isinstance(value, dict):
        return {str(k): _plain(v, f"{key}.{k}") for k, v in value.items()}
    if isinstance(value, tuple | list):
        return [_plain(v, f"{key}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        raise InputError(f"config {key} is {value} (allowed: a finite number)")
    if value is None or isinstance(value, bool | int | float | str):
        return value
    raise InputError(
        f"config {key} is a {type(value).__name__} (allowed: str, int, float, bool, None, tuple, dataclass)"
    )


def from_json(cls: type[T], data: Any, prefix: str = "") -> T:
    """Inverse of `to_json`. Raises `InputError` on an unknown key or a value of the wrong type; absent keys default."""
    if not isinstance(data, dict):
        raise InputError(f"config {prefix.rstrip('.') or 'file'} is {data!r} (allowed: an object)")
    hints = typing.get_type_hints(cls)
    names = [f.name for f in dataclasses.fields(cls)]
    for key in data:
        if key not in names:
            raise unknown("config key", prefix + key, [prefix + n for n in names])
    return cls(**{key: _typed(hints[key], value, prefix + key) for key, value in data.items()})


def _members(hint: Any) -> tuple[Any, ...]:
    """The alternatives of a type: `X | None` gives `(X, NoneType)`."""
    if typing.get_origin(hint) is typing.Annotated:
        return _members(typing.get_args(hint)[0])
    if typing.get_origin(hint) in (typing.Union, types.UnionType):
        return tuple(m for t in typing.get_args(hint) for m in _members(t))
    return (hint,)


def _typed(hint: Any, value: Any, key: str) -> Any:
    for t in _members(hint):
        origin, args = typing.get_origin(t), typing.get_args(t)
        if dataclasses.is_dataclass(t):
            names = {f.name for f in dataclasses.fields(t)}
            if len(_members(hint)) == 1 or (isinstance(value, dict) and set(value) <= names):
                return from_json(t, value, key + ".")
        elif t is Any or (t is type(None) and value is None):
            return value
        elif origin is Literal:
            if value in args:
                return value
        elif origin is tuple and isinstance(value, list):
            inner = [args[0]] * len(value) if args[1:] == (...,) else args
            if len(inner) == len(value):
                return tuple(_typed(h, v, f"{key}[{i}]") for i, (h, v) in enumerate(zip(inner, value)))
        elif origin is list and isinstance(value, list):
            return [_typed(args[0], v, f"{key}[{i}]") for i, v in enumerate(value)]
        elif origin is dict and isinstance(value, dict):
            return {k: _typed(args[1], v, f"{key}.{k}") for k, v in value.items()}
        elif t is float and isinstance(value, int | float) and not isinstance(value, bool):
            return float(value)
        elif t is Path and isinstance(value, str):
            return Path(value)
        elif isinstance(t, type) and type(value) is t:
            return value
    allowed = ", ".join(getattr(t, "__name__", str(t)) if not typing.get_args(t) else str(t) for t in _members(hint))
    raise InputError(f"config {key} is {value!r} (allowed: {allowed})")


def fingerprint(config: Any, without: Sequence[str] = ()) -> str:
    """16 hex digits that change with any value of the config but those of `without`."""
    data = {k: v for k, v in to_json(config).items() if k not in without}
    return hashlib.sha256(json.dumps(data, sort_keys=True).encode()).hexdigest()[:16]


def flatten(data: dict[str, Any], prefix: str = "") -> dict[str, Any]:
    """`{"opt": {"lr": 1}}` to `{"opt.lr": 1}`."""
    flat: dict[str, Any] = {}
    for key, value in data.items():
        flat |= flatten(value, f"{prefix}{key}.") if isinstance(value, dict) else {prefix + key: value}
    return flat


def differences(old: dict[str, Any], new: dict[str, Any]) -> list[str]:
    """`"opt.lr: 0.1 -> 0.2"` for every key of two JSON configs that differs."""
    a, b = flatten(old), flatten(new)
    missing = "absent"
    return [
        f"{key}: {json.dumps(a[key]) if key in a else missing} -> {json.dumps(b[key]) if key in b else missing}"
        for key in sorted(a | b)
        if key not in a or key not in b or a[key] != b[key]
    ]
