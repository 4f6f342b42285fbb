"""What a recipe is, and the registry of recipes."""

from functools import partial
from typing import Any, NamedTuple, Protocol

from lowbit.errors import unknown
from lowbit.qat import latents
from lowbit.qat.latents import Assignment, Start, Stored
from lowbit.tree import Tree


class Prepare(Protocol):
    def __call__(self, params: Tree, assignment: Assignment, *, stored: Stored | None = None) -> Tree:
        """Parameters in training: float32 latents at the sites of `assignment` (see `Plan.resolve`); `stored` are the
        arrays of static activation formats, by path."""
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


def register_start(name: str, start: Start, defaults: dict[str, Any] | None = None) -> Recipe:
    """Adds a recipe that trains latent weights, given how a latent starts (see `lowbit.qat.latents`)."""
    return register(Recipe(name, partial(latents.prepare, start=start), latents.convert, defaults or {}))


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
    # Each module registers its recipes.
    from lowbit.qat import bitnet, dorefa, lsq, paretoq, ste  # noqa: F401
