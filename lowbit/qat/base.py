"""What a recipe is, and the registry of recipes."""

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, NamedTuple, Protocol

from lowbit.errors import InputError, unknown
from lowbit.formats.activation import ActFormat
from lowbit.formats.base import Format
from lowbit.formats.kv import KVFormat
from lowbit.tree import Tree


class Prepare(Protocol):
    def __call__(self, params: Tree, assignment: Mapping[str, Format | ActFormat | KVFormat]) -> Tree:
        """Parameters in training: what the recipe trains, in float32, at the sites of `assignment` (`Plan.resolve`)."""
        ...


class Convert(Protocol):
    def __call__(self, params: Tree) -> Tree:
        """Packed weights with the trained codes and scales; its forward pass equals that of `params` bit for bit, but
        for what a recipe merges (which says how closely)."""
        ...


class Recipe(NamedTuple):
    """How weights learn to live on the grid. `defaults` are the `TrainConfig` settings that its source recommends."""

    name: str
    prepare: Prepare
    convert: Convert
    defaults: dict[str, Any]


Parse = Callable[[list[str]], Recipe]
_RECIPES: dict[str, Parse] = {}


def register(recipe: Recipe) -> Recipe:
    """Adds a recipe under its name."""
    register_family(recipe.name, partial(_without_keys, recipe))
    return recipe


def register_family(name: str, parse: Parse) -> None:
    """Adds the recipes `NAME[:key...]`; `parse(keys)` gives the one of these keys, or raises `InputError`."""
    _RECIPES[name] = parse


def get(name: str) -> Recipe:
    """The recipe of a name such as `ste` or `qlora:r16`. Raises `InputError` with a suggestion."""
    _load_all()
    family, *keys = str(name).strip().lower().split(":")
    if family not in _RECIPES:
        raise unknown("recipe", name, _RECIPES)
    return _RECIPES[family](keys)


def names() -> list[str]:
    """Names of all recipes, without keys."""
    _load_all()
    return list(_RECIPES)


def _without_keys(recipe: Recipe, keys: list[str]) -> Recipe:
    if keys:
        raise InputError(f"recipe {recipe.name} with key {keys[0]!r} (allowed: none)")
    return recipe


def _load_all() -> None:
    from lowbit.qat import loftq, qa_lora, qlora, ste  # noqa: F401  (each module registers its recipes)
