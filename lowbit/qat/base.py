"""What a recipe is, and the registry of recipes."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any, NamedTuple, Protocol

from lowbit.errors import InputError, unknown
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.ptq.calibrate import Readers
from lowbit.qat import latents
from lowbit.qat.latents import Assignment, Start, Stored
from lowbit.train.block_options import BlockOptions
from lowbit.train.loop import Moment, Record
from lowbit.train.step import Wrap
from lowbit.tree import Tree


class Prepare(Protocol):
    def __call__(self, params: Tree, assignment: Assignment, *, stored: Stored | None = None) -> Tree:
        """Parameters in training: what the recipe trains, in float32, at the sites of `assignment` (`Plan.resolve`);
        `stored` are the arrays of static activation formats, by path."""
        ...


class Convert(Protocol):
    def __call__(self, params: Tree) -> Tree:
        """Packed weights with the trained codes and scales; its forward pass equals that of `params` bit for bit, but
        for what a recipe merges (which says how closely)."""
        ...


class RunBefore(Protocol):
    def __call__(
        self,
        model: Model,
        assignment: Assignment,
        tokens_BT: Any,
        options: BlockOptions,
        directory: str | Path | None = None,
        on_block: Callable[[dict[str, Any], int], None] | None = None,
        stored: Stored | None = None,
        read: Readers | None = None,
        teacher: Model | None = None,
    ) -> Tree:
        """The parameters that `prepare` gets; state lies in `directory`, and the same call goes on where one was
        interrupted. `on_block(report, blocks)` is called after each block, also those done earlier. With `read`, which
        gives the model's leaves one at a time, `model.params` may be abstract. `teacher` gives the labels (default: the
        model)."""
        ...


class Before(NamedTuple):
    """Work block by block before end-to-end training; with `alone`, no training follows. `start` puts a layer into
    training, as `Prepare` does the model."""

    run: RunBefore
    start: Prepare
    alone: bool = False


# What `lowbit.train.loop.train` takes as `revise`, of a model of this shape.
Revised = Callable[[ModelConfig, Tree, Moment], tuple[Tree, Record]]


class Recipe(NamedTuple):
    """How weights learn to live on the grid. `defaults` are the `TrainConfig` settings that its source recommends."""

    name: str
    prepare: Prepare
    convert: Convert
    defaults: dict[str, Any]
    wrap: Wrap | None = None  # of the optimizer (`lowbit.train.loop.train`)
    restarts: bool = False  # whether `prepare` takes `latents.masters` of what it made: stages with other formats
    before: Before | None = None
    revise: Revised | None = None  # of codes, between steps


Parse = Callable[[list[str]], Recipe]
_RECIPES: dict[str, Parse] = {}


def register(recipe: Recipe) -> Recipe:
    """Adds a recipe under its name."""
    register_family(recipe.name, partial(_without_keys, recipe))
    return recipe


def register_family(name: str, parse: Parse) -> None:
    """Adds the recipes `NAME[:key...]`; `parse(keys)` gives the one of these keys, or raises `InputError`."""
    _RECIPES[name] = parse


def register_start(name: str, start: Start, defaults: dict[str, Any] | None = None) -> Recipe:
    """Adds a recipe that trains latent weights, given how a latent starts (see `lowbit.qat.latents`)."""
    prepare = partial(latents.prepare, start=start)
    return register(Recipe(name, prepare, latents.convert, defaults or {}, restarts=True))


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
    # Each module registers its recipes.
    from lowbit.qat import (  # noqa: F401
        bitnet,
        dorefa,
        efficientqat,
        finetune,
        llm_qat,
        loftq,
        lsq,
        paretoq,
        proximal,
        pv,
        qa_lora,
        qlora,
        ste,
    )
