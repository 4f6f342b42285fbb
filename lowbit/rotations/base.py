"""What a transform is, the names of transforms, and their registry.

`NAME[:PART+PART...][:key...]`, such as `quarot`, `quarot:r1+r4`, `quarot:heads+r3+r4:dct:s1`, `spinquant:r1+r2`,
`smoothquant:a0.8`; or the path of a saved state (`NAME.safetensors`). A transform's `fit` looks at a model (and, if it
`calibrates`, at text) and gives the `State` that `fold.apply` turns into a model computing the same function.
"""

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

from lowbit.errors import InputError, unknown
from lowbit.models.model import Model
from lowbit.rotations.fold import State, apply

Number = int | float


class Fit(Protocol):
    def __call__(
        self, model: Model, documents: Sequence[str] | None = None, assignment: Mapping[str, Any] | None = None
    ) -> State:
        """The state for a model; `documents` are calibration text, `assignment` (see `Plan.resolve`) is what the
        transformed model will be quantized to, for transforms that are learned. Raises `InputError`."""
        ...


class Transform(NamedTuple):
    """A transform with its options set. `learns` says that `fit` trains, for the quantization that follows; it then
    takes `on_step` and `progress` too (see `spinquant.fit`)."""

    name: str
    fit: Fit
    calibrates: bool = False
    learns: bool = False


@dataclasses.dataclass(frozen=True)
class _Family:
    parse: Callable[[str, list[str]], Transform]
    examples: tuple[str, ...]


_FAMILIES: dict[str, _Family] = {}


def register(family: str, parse: Callable[[str, list[str]], Transform], examples: Sequence[str]) -> None:
    """Adds a family: `parse(name, keys)` gives the transform of `FAMILY:key:key`; the conformance suite runs the
    examples."""
    _FAMILIES[family] = _Family(parse, tuple(examples))


def get(name: str) -> Transform:
    """The transform of a name, or of a file that `state_file.save` wrote. Raises `InputError` with what is allowed."""
    _load_all()
    if str(name).endswith(".safetensors"):
        return _saved(str(name))
    family, *keys = str(name).strip().lower().split(":")
    if family not in _FAMILIES:
        raise unknown("transform", name, ["none", *_FAMILIES])
    return _FAMILIES[family].parse(name, keys)


def _saved(path: str) -> Transform:
    from lowbit.rotations import state_file

    state = state_file.load(path)

    def fit(model: Model, documents: Any = None, assignment: Any = None) -> State:
        state_file.check(state, model, path)
        return state

    return Transform(path, fit)


def names() -> list[str]:
    """Examples of every family."""
    _load_all()
    return [e for family in _FAMILIES.values() for e in family.examples]


def transform(
    model: Model,
    name: str,
    documents: Sequence[str] | None = None,
    assignment: Mapping[str, Any] | None = None,
) -> Model:
    """The model after the transform of this name (`none`: itself). Raises `InputError`."""
    if name == "none":
        return model
    found = get(name)
    if found.calibrates and not documents:
        raise InputError(f"transform {name} without calibration text (allowed: with one)")
    return apply(model, found.fit(model, documents, assignment))


def parts_of(name: str, keys: list[str], allowed: Sequence[str], default: Sequence[str]) -> tuple[list[str], list[str]]:
    """The `+`-joined parts among the keys (all of them from `allowed`, `default` if there are none) and the other keys.
    Raises `InputError`."""
    parts, rest = list(default), list(keys)
    for key in keys:
        if all(p in allowed for p in key.split("+")):
            parts = key.split("+")
            rest.remove(key)
            if len(set(parts)) != len(parts):
                raise InputError(f"transform {name!r} names a part twice (allowed: each once)")
            break
        if "+" in key:
            wrong = next(p for p in key.split("+") if p not in allowed)
            raise unknown(f"part of transform {name!r}", wrong, allowed)
    return parts, rest


def number_of(name: str, keys: list[str], letter: str, default: Number, low: Number, high: Number) -> Number:
    """The value of the key `LETTERvalue`, which is removed from `keys`: whole if `default` is. Raises `InputError` out
    of range."""
    for key in keys:
        if key.startswith(letter):
            try:
                value = type(default)(key[len(letter) :])
            except ValueError:
                continue
            if not low <= value <= high:
                raise InputError(f"{key!r} in transform {name!r} (allowed: {letter}{low:g} to {letter}{high:g})")
            keys.remove(key)
            return value
    return default


def no_more(name: str, keys: list[str], allowed: Sequence[str]) -> None:
    """Raises `InputError` for a key that nobody took."""
    if keys:
        raise unknown(f"key of transform {name!r}", keys[0], allowed)


def _load_all() -> None:
    from lowbit.rotations import flatquant, quarot, smoothquant, spinquant  # noqa: F401  (each module registers its transforms)
