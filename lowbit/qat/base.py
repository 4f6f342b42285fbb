"""What a recipe is, and the registry of recipes."""

from collections.abc import Mapping
from typing import Any, NamedTuple, Protocol

from lowbit.errors import unknown
from lowbit.formats.activation import ActFormat
from lowbit.formats.base import Format
from lowbit.formats.kv import KVFormat
from lowbit.tree import Tree


class Prepare(Protocol):
    def __call__(self, params: Tree, assignment: Mapping[str, Format | ActFormat | KVFormat]) -> Tree:
        """Parameters in training: float32 latents at the sites of `assignment` (see `Plan.resolve`)."""
        ...


class Convert(Protocol):
    def __call__(self, params: Tree) -> Tree:
        """Packed weights with the trained codes and scales; its forward pass equals that of `params` bit for bit."""
        ...


class Recipe(NamedTuple):
    """How weights learn to live on the grid. `defaults` are the `TrainConfig` settings that its source recommends."""

    name: str
    prepare: Prepare
    convert: Convert
    defaults: dict[str, Any]


_RECIPES: dict[str, Recipe] = {}


def register(recipe: Recipe) -> Recipe:
    """Adds a recipe under its name."""
    _RECIPES[recipe.name] = recipe
    return recipe


def get(name: str) -> Recipe:
    """The recipe of this name. Raises `InputError` with a suggestion."""
    _load_all()
    if name not in _RECIPES:
        raise unknown("recipe", name, _RECIPES)
    return _RECIPES[name]


def names() -> list[str]:
    """Names of all recipes."""
    _load_all()
    return list(_RECIPES)


def _load_all() -> None:
    from lowbit.qat import llm_qat, ste  # noqa: F401  (each module registers its recipes)
