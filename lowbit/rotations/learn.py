"""What learned transforms share: the network with a plan put on it, differentiable in everything, and its batches."""

import dataclasses
import re
from collections.abc import Mapping, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, Latent
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.plan import INPUT, Plan, Rule
from lowbit.ptq import calibrate
from lowbit.tree import Tree

CACHE = re.compile(r".*\.[kv]_cache")


def default_assignment(config: ModelConfig) -> dict[str, Any]:
    """W4A4: per-channel weights, per-token inputs of every linear inside blocks."""
    return Plan((Rule(r"model\.layers\..*:in", "int4:token"),), "int4").resolve(config.shapes())


def activations_only(assignment: Mapping[str, Any]) -> dict[str, Any]:
    """The sites of inputs and caches, without those of weights."""
    return {s: f for s, f in assignment.items() if s.endswith(INPUT) or CACHE.fullmatch(s)}


def dress(params: Tree, assignment: Mapping[str, Any]) -> Tree:
    """`params` as the plan quantizes them, straight-through: weights as `Latent`s with scales fitted at each use,
    inputs prepared, caches quantized. Online transforms stay."""

    def one(path: str, leaf: Any) -> Any:
        fmt, act = assignment.get(path), assignment.get(path + INPUT)
        if not isinstance(fmt, Format) and act is None:
            return leaf
        prepared = leaf if isinstance(leaf, PreparedInput) else PreparedInput(leaf)
        w = prepared.w if fmt is None else Latent(prepared.w, {}, fmt)
        return dataclasses.replace(prepared, w=w, act=act)

    return trees.map_leaves(one, params)


def batches(
    model: Model, documents: Sequence[str], steps: int, batch: int, length: int | None, seed: int
) -> Int[np.ndarray, "steps batch T"]:
    """Rows of calibration text for `steps` steps; a text with fewer rows comes around again, in another order.

    Raises `InputError` for a text with fewer rows than one batch.
    """
    length = min(length or calibrate.CONTEXT, model.config.max_position)
    eos = len(model.tokenizer.eos_ids[:1]) if model.tokenizer is not None else 0
    there = sum(len(model.tokenizer.encode(d)) + eos for d in documents if d.strip()) // length if documents else 0
    rows = calibrate.tokenize(documents, model.tokenizer, max(batch, min(there, steps * batch)), length, seed)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * batch // len(rows)))])
    return rows[order[: steps * batch]].reshape(steps, batch, length)


def finite(loss: Any, step: int, name: str) -> float:
    """The loss as a number. Raises `InputError` if it is not finite."""
    value = float(loss)
    if not np.isfinite(value):
        raise InputError(f"{name}: loss {value} at step {step} (allowed: finite; a smaller learning rate may do)")
    return value


def as_jax(params: Tree) -> Tree:
    """Float32 arrays on the device."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
