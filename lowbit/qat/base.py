"""What a recipe is, and the registry of recipes."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

from lowbit.errors import unknown
from lowbit.tree import Tree

if TYPE_CHECKING:  # `lowbit train --help` reads a recipe's options and imports no jax
    from lowbit.formats.activation import ActFormat
    from lowbit.formats.base import Format
    from lowbit.formats.kv import KVFormat
    from lowbit.models.model import Model
    from lowbit.qat.options import BlockOptions


class Prepare(Protocol):
    def __call__(self, params: Tree, assignment: Mapping[str, Format | ActFormat | KVFormat]) -> Tree:
        """Parameters in training: float32 latents at the sites of `assignment` (see `Plan.resolve`)."""
        ...


class Convert(Protocol):
    def __call__(self, params: Tree) -> Tree:
        """Packed weights with the trained codes and scales; its forward pass equals that of `params` bit for bit."""
        ...


class RunBefore(Protocol):
    def __call__(
        self,
        model: Model,
        assignment: Mapping[str, Format | ActFormat | KVFormat],
        tokens_BT: Any,
        options: BlockOptions,
        directory: str | Path | None = None,
        on_block: Callable[[dict[str, Any], int], None] | None = None,
    ) -> Tree:
        """The parameters that `prepare` gets; state lies in `directory`, and the same call goes on where one was
        interrupted. `on_block(report, blocks)` is called after each block, also those done earlier."""
        ...


class Before(NamedTuple):
    """Work block by block before end-to-end training; with `alone`, no training follows."""

    run: RunBefore
    alone: bool = False


class Recipe(NamedTuple):
    """How weights learn to live on the grid. `defaults` are the `TrainConfig` settings that its source recommends."""

    name: str
    prepare: Prepare
    convert: Convert
    defaults: dict[str, Any]
    before: Before | None = None


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
    from lowbit.qat import efficientqat, ste  # noqa: F401  (each module registers its recipes)
