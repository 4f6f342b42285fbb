"""What learned transforms share: the network with a plan put on it, differentiable in everything, and its batches."""

import dataclasses
import hashlib
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Latent
from lowbit.formats.fake_quant import PreparedInput
from lowbit.models.cache import attach
from lowbit.models.config import ModelConfig
from lowbit.models.model import Model
from lowbit.plan import INPUT, Plan, Rule
from lowbit.ptq import calibrate
from lowbit.rotations import state_file
from lowbit.rotations.fold import State
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

    params, assignment = attach(params, assignment)

    def one(path: str, leaf: Any) -> Any:
        fmt, act = assignment.get(path), assignment.get(path + INPUT)
        if fmt is None and act is None:
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
    rows = calibrate.tokenize(documents, model.tokenizer, steps * batch, length, seed, least=batch)
    rng = np.random.default_rng(seed)
    order = np.concatenate([rng.permutation(len(rows)) for _ in range(-(-steps * batch // len(rows)))])
    return rows[order[: steps * batch]].reshape(steps, batch, length)


def finite(loss: Any, step: int, name: str) -> float:
    """The loss as a number. Raises `InputError` if it is not finite."""
    value = float(loss)
    if not np.isfinite(value):
        raise InputError(f"{name}: loss {value} at step {step} (allowed: finite; a smaller learning rate may do)")
    return value


class Progress:
    """A learned transform's file: written while it is learned, so that the same call goes on after an interruption.

    It is a state like any other (`state_file`), whose name says how far it is and of what it is a part: another model,
    text, plan or option starts anew. Without a path, nothing is kept.
    """

    def __init__(self, path: str | Path | None, *of: Any):
        self.path = None if path is None else Path(path)
        self.key = hashlib.sha256(b"".join(_bytes(x) for x in of)).hexdigest()[:16]

    def load(self) -> tuple[int, State] | None:
        """`(steps done, state)` of an earlier, interrupted call with the same arguments."""
        if self.path is None or not self.path.exists():
            return None
        state = state_file.load(self.path)
        done, _, key = state.name.partition(" ")
        return (int(done), state) if key == self.key else None

    def save(self, done: int, state: State) -> None:
        """Keeps a state."""
        if self.path is not None:
            state_file.save(dataclasses.replace(state, name=f"{done} {self.key}"), self.path)


def _bytes(x: Any) -> bytes:
    if isinstance(x, Model):
        h = hashlib.sha256(repr(x.config).encode())
        for leaf in jax.tree.leaves(x.params):
            h.update(np.ascontiguousarray(leaf).tobytes())
        return h.digest()
    if isinstance(x, Mapping):
        return json.dumps({site: fmt.name for site, fmt in x.items()}, sort_keys=True).encode()
    return x.tobytes() if isinstance(x, np.ndarray) else repr(x).encode()


def as_jax(params: Tree) -> Tree:
    """Float32 arrays on the device."""
    return jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), params)
