"""Straight-through quantization-aware training.

The forward pass sees `w_hat = decode(encode(w))`, the gradient goes to the float32 latent `w` (Bengio et al. 2013,
arXiv 1308.3432; the clip policy is the format's). Recipe `ste` recomputes scales from the latent at every step, as
BitNet and most fake-quant trainers do; recipe `ste-learned` starts from the same scales and learns them (Esser et al.
2020, LSQ, arXiv 1902.08153).

Both keep scales on the stored grid during training, so that conversion writes exactly what was trained.
"""

import dataclasses
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.activation import ActFormat
from lowbit.formats.base import Coded, Format, Latent, Params, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.kv import KVFormat
from lowbit.models.cache import attach
from lowbit.qat.base import Recipe, register
from lowbit.tree import Tree

INPUT = ":in"


def prepare(params: Tree, assignment: Mapping[str, Format | ActFormat | KVFormat], learned: bool = False) -> Tree:
    """Latents (float32 masters) at the weight sites, `PreparedInput` at the `path:in` sites, cache formats at theirs;
    the rest unchanged.

    Raises `InputError` on a site that the parameters lack, is quantized already, or whose format cannot be trained.
    """
    params, assignment = attach(params, assignment)
    paths = dict(trees.items(params))
    plain = {p: a.w if isinstance(a, PreparedInput) and a.act is None else a for p, a in paths.items()}
    for site, fmt in assignment.items():
        path = site.removesuffix(INPUT)
        if path not in paths:
            raise InputError(f"no parameter {path!r} for format {fmt.name!r} (there are {len(paths)})")
        if not isinstance(plain[path], jax.Array):
            kind = type(plain[path]).__name__
            raise InputError(f"{path} is a {kind} already (allowed: a float array; decode it first)")
        if isinstance(fmt, Format) and not fmt.trainable:
            raise InputError(f"format {fmt.name!r} of {path} has no gradient (use it with a solver instead)")
        if isinstance(fmt, ActFormat):
            try:
                fmt.check_params({})
            except InputError as e:
                raise InputError(f"{site}: {e}") from e

    def one(path: str, leaf: Any) -> Any:
        fmt, act = assignment.get(path), assignment.get(path + INPUT)
        w = plain[path]
        if fmt is not None:
            w = w.astype(jnp.float32)
            w = Latent(w, _init(fmt, w) if learned else {}, fmt)
        if isinstance(leaf, PreparedInput):  # an online transform stays
            return dataclasses.replace(leaf, w=w if fmt is not None else leaf.w, act=leaf.act if act is None else act)
        return w if act is None else PreparedInput(w, act)

    return trees.map_leaves(one, params)


def convert(params: Tree) -> Tree:
    """Every weight in training as packed codes and scales (those of the last forward pass); other leaves unchanged."""

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, PreparedInput):
            return dataclasses.replace(leaf, w=one(path, leaf.w))
        if not isinstance(leaf, Latent | Coded):
            return leaf
        try:
            leaf.check_values()
        except InputError as e:
            raise InputError(f"{path}: {e}") from e
        return _encode(leaf)

    return trees.map_leaves(one, params)


@jax.jit
def _encode(weight: Latent | Coded) -> QTensor:
    return weight.encode()


@partial(jax.jit, static_argnums=0)
def _init(fmt: Format, w: jax.Array) -> Params:
    return fmt.init(w)


register(Recipe("ste", prepare, convert, {}))
register(Recipe("ste-learned", partial(prepare, learned=True), convert, {"scale_lr": 0.1}))
