"""What every recipe that trains latent weights shares: a float32 master under fake quantization, and packing it.

Scales are on the stored grid during training, so that conversion writes exactly what was trained. A recipe says only
how a site's `Latent` starts.
"""

import dataclasses
from collections.abc import Callable, Mapping
from typing import Any

import jax
import jax.numpy as jnp

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.activation import ActFormat
from lowbit.formats.base import Coded, Format, Latent, Params, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.kv import KVFormat
from lowbit.models.cache import CacheSite, attach
from lowbit.tree import Tree

INPUT = ":in"
Assignment = Mapping[str, Format | ActFormat | KVFormat]
Stored = Mapping[str, Mapping[str, Any]]
# (format, float32 master [O, I]) -> the format that is trained and its parameters ({}: fitted anew at every use).
# Raises `InputError`, whose message continues "PATH: ", for a format that the recipe is not defined for.
Start = Callable[[Format, jax.Array], tuple[Format, Params]]


def dynamic(fmt: Format, w: jax.Array) -> tuple[Format, Params]:
    """Scales are fitted to the latent at every use."""
    return fmt, {}


def learned(fmt: Format, w: jax.Array) -> tuple[Format, Params]:
    """Scales start from those that fit the latent now, and are trained."""
    return fmt, fmt.fitted(w)


def prepare(params: Tree, assignment: Assignment, start: Start, stored: Stored | None = None) -> Tree:
    """Latents (float32 masters) at the weight sites, `PreparedInput` at the `path:in` sites, cache formats at theirs;
    the rest unchanged. `stored` are the arrays of static activation formats, by path (`lowbit.ptq.rtn.ranges`).

    Raises `InputError` on a site that the parameters lack, is quantized already, or whose format cannot be trained.
    """
    params, assignment = attach(params, assignment)
    stored = stored or {}
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
                fmt.check_params(dict(stored.get(path, {})))
            except InputError as e:
                raise InputError(f"{site}: {e}") from e

    def one(path: str, leaf: Any) -> Any:
        fmt, act = assignment.get(path), assignment.get(path + INPUT)
        w = plain[path]
        if fmt is not None:
            w = w.astype(jnp.float32)
            try:
                fmt, own = start(fmt, w)
            except InputError as e:
                raise InputError(f"{path}: {e}") from e
            w = Latent(w, own, fmt)
        if isinstance(leaf, PreparedInput):  # an online transform stays
            leaf = dataclasses.replace(leaf, w=w if fmt is not None else leaf.w)
            return leaf if act is None else dataclasses.replace(leaf, act=act, params=dict(stored.get(path, {})))
        return w if act is None else PreparedInput(w, act, None, dict(stored.get(path, {})))

    return trees.map_leaves(one, params)


def masters(params: Tree) -> Tree:
    """What `prepare` was given, as it is trained by now: latents as their float32 masters, inputs and caches without
    formats. Online transforms stay."""

    def one(path: str, leaf: Any) -> Any:
        if isinstance(leaf, PreparedInput):
            w = one(path, leaf.w)
            return w if leaf.op is None else PreparedInput(w, op=leaf.op)
        return leaf.w if isinstance(leaf, Latent) else leaf

    caches = {p: s for p, s in trees.items(params) if isinstance(s, CacheSite) and s.op is not None}
    kept = {p: one(p, leaf) for p, leaf in trees.items(params) if not isinstance(leaf, CacheSite)}
    return trees.build(kept | {p: CacheSite(None, s.op) for p, s in caches.items()})


def kept(old: Tree, new: Tree) -> Tree:
    """`new` with what `old` has learned besides latents where a site's format stays: scales, zero points, minima."""
    before = dict(trees.items(old))

    def one(path: str, leaf: Any, was: Any) -> Any:
        if isinstance(leaf, PreparedInput) and isinstance(was, PreparedInput):
            same = leaf.act is not None and leaf.act == was.act
            w = one(path, leaf.w, was.w)
            return dataclasses.replace(leaf, w=w, params=was.params if same else leaf.params)
        if isinstance(leaf, PreparedInput):
            return dataclasses.replace(leaf, w=one(path, leaf.w, was))
        was = was.w if isinstance(was, PreparedInput) else was
        same = isinstance(leaf, Latent) and isinstance(was, Latent) and leaf.format == was.format
        return dataclasses.replace(leaf, params=was.params) if same else leaf

    return trees.map_leaves(lambda path, leaf: one(path, leaf, before.get(path)), new)


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
def _encode(leaf: Latent | Coded) -> QTensor:
    return leaf.encode()
