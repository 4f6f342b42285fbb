"""The key-value cache: what is kept of past tokens, exact or quantized, and what attention sees of it.

A leaf decides, as everywhere: `layer["self_attn"]["k_cache"]` and `["v_cache"]` may hold a `CacheSite`. Keys are
quantized after RoPE (and QK norm) and after the site's transform, which queries get too; values after their
transform, which the attention's output undoes.

Slots are positions: each row writes at its own length, so what a row sees, and which tokens share a scale, does not
depend on the rows beside it. A quantized side holds packed blocks for all slots and, if its format has a window or
blocks of several tokens, a ring of the last tokens as they were. A block is encoded once, when its last token comes.
"""

import dataclasses
import math
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import stored_bytes
from lowbit.formats.kv import KVFormat, get_kv
from lowbit.linalg import online
from lowbit.linalg.online import Kronecker, Op
from lowbit.models.config import ModelConfig
from lowbit.plan import CACHES
from lowbit.tree import Tree


@partial(jax.tree_util.register_dataclass, data_fields=["op"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class CacheSite:
    """How one layer keeps its keys or its values: transformed by `op`, an *orthogonal* transform of
    `lowbit.linalg.online` over the values of a head (None: as they are), then in `format` (None: exact)."""

    format: KVFormat | None = None
    op: Any = None  # an `Op`; jax rebuilds the node with other things in its place

    @property
    def name(self) -> str:
        """For tables: `int4:token + hadamard:64`."""
        return " + ".join(part.name for part in (self.format, self.op) if part is not None)

    def check(self, head_dim: int) -> None:
        """Raises `InputError` unless heads of this size can be transformed and quantized, and scores survive it."""
        if self.op is not None:
            self.op.check(head_dim)
            t = self.op.dense(head_dim)
            if (off := float(np.abs(t @ t.T - np.eye(head_dim)).max())) > 1e-3:
                raise InputError(f"cache transform {self.op.name} is {off:.3g} off (allowed: orthogonal transforms)")
        if self.format is not None:
            self.format.check(head_dim)


def rotated(site: CacheSite | None, x_BTHD: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """Heads after the site's transform, if it has any."""
    return x_BTHD if site is None or site.op is None else site.op(x_BTHD)


def rotated_back(site: CacheSite | None, x_BTHD: Float[Array, "B T H D"]) -> Float[Array, "B T H D"]:
    """Undoes `rotated`."""
    if site is None or site.op is None:
        return x_BTHD
    op = site.op
    back = Kronecker(op.left.T, op.right.T) if isinstance(op, Kronecker) else op.inverse()
    return back(x_BTHD)


# -- the cache --------------------------------------------------------------------------------------------------------


@partial(jax.tree_util.register_dataclass, data_fields=["arrays", "ring"], meta_fields=["format"])
@dataclasses.dataclass(frozen=True)
class Packed:
    """One quantized side of a layer. `arrays` are the format's, `[B, blocks, ...]`; token s is in block `s // G`, and
    as it was in `ring[:, s % C]`, `[B, C, K, D]`, if it is one of the last C = `format.ring` (0: None)."""

    arrays: dict[str, Any]
    ring: Any
    format: KVFormat


class LayerCache(NamedTuple):
    """Each side `[B, S, K, D]`, or `Packed`."""

    k: Any
    v: Any


@partial(jax.tree_util.register_dataclass, data_fields=["layers", "length"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Cache:
    """Keys (after RoPE and transform) and values of every layer, and how many tokens each row has, int32 `[B]`.

    The caller sees to it that `length` and the new tokens stay within the slots: beyond them, writes are lost.
    """

    layers: tuple[Any, ...]  # of LayerCache
    length: Any


class Seen(NamedTuple):
    """One side as attention sees it, slots being positions: `exact` where `quantized` is None or the rule is False.

    `exact` is None where every query sees every token quantized; the rule is None where one side is.
    """

    exact: Array | None  # [B, S, K, D]
    quantized: Array | None = None  # [B, S, K, D]
    rule: Bool[Array, "#B T S"] | None = None


def init_cache(params: Tree, config: ModelConfig, batch: int, size: int, dtype: Any = jnp.float32) -> Cache:
    """An empty cache for `size` positions, rounded up to whole blocks; `dtype` is that of what is kept exactly."""
    whole = math.lcm(*(site.format.tokens for site in sites(params).values() if site.format is not None))
    shape = (batch, -(-size // whole) * whole, config.num_kv_heads, config.head_dim)

    def side(attn: Tree, name: str) -> Any:
        site = attn.get(name)
        if site is None or site.format is None:
            return jnp.zeros(shape, dtype)
        fmt = site.format
        blocks = (batch, shape[1] // fmt.tokens, fmt.tokens, *shape[2:])
        arrays = jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct(blocks, jnp.float32))
        ring = jnp.zeros((batch, fmt.ring, *shape[2:]), dtype) if fmt.ring else None
        return Packed({k: jnp.zeros(a.shape, a.dtype) for k, a in arrays.items()}, ring, fmt)

    layers = (params["model"]["layers"][str(i)]["self_attn"] for i in range(config.num_layers))
    sides = tuple(LayerCache(side(attn, "k_cache"), side(attn, "v_cache")) for attn in layers)
    return Cache(sides, jnp.zeros(batch, jnp.int32))


def slots(cache: Cache) -> int:
    """Positions that a cache has room for."""
    side = cache.layers[0].k
    return side.arrays["scale"].shape[1] * side.format.tokens if isinstance(side, Packed) else side.shape[1]


def cache_bytes(params: Tree, config: ModelConfig, batch: int, size: int, dtype: Any = jnp.float32) -> int:
    """Bytes of the cache that `init_cache` makes: codes, scales, zero points, rings and what is kept exactly."""
    cache = jax.eval_shape(lambda: init_cache(params, config, batch, size, dtype))
    return sum(stored_bytes(a) for a in jax.tree.leaves(cache.layers))


def fresh(site: CacheSite | None, x_BTKD: Float[Array, "B T K D"], position_BT: Int[Array, "#B T"]) -> Seen:
    """What queries at these positions see of a side that has no past."""
    if site is None or site.format is None:
        return Seen(x_BTKD)
    return _seen(site.format, x_BTKD, site.format.fake_quant(x_BTKD), position_BT)


def append(
    side: Array | Packed, x_BTKD: Float[Array, "B T K D"], length_B: Int[Array, " B"], count_B: Int[Array, " B"]
) -> tuple[Array | Packed, Seen]:
    """The side with the first `count_B` of T new tokens of each row in it, and what the queries there see of it."""
    T = x_BTKD.shape[1]
    position_BT = length_B[:, None] + jnp.arange(T)
    if not isinstance(side, Packed):
        side = _write(side, position_BT, x_BTKD.astype(side.dtype))
        return side, Seen(side.astype(x_BTKD.dtype))
    fmt = side.format
    *_, K, D = x_BTKD.shape
    if side.ring is not None:
        x_BTKD = x_BTKD.astype(side.ring.dtype)

    # Whole blocks that end among the new tokens; those that do not are encoded too, but not written.
    blocks = (T + fmt.tokens - 2) // fmt.tokens + 1
    block_BN = (length_B // fmt.tokens)[:, None] + jnp.arange(blocks)
    new_BSKD = x_BTKD
    if fmt.tokens > 1:
        within_BS = (length_B // fmt.tokens * fmt.tokens)[:, None] + jnp.arange(blocks * fmt.tokens)
        new_BSKD = _recent(side.ring, x_BTKD, within_BS, length_B)
    encoded = fmt.encode(new_BSKD.reshape(-1, blocks, fmt.tokens, K, D))
    whole_BN = (block_BN + 1) * fmt.tokens <= (length_B + count_B)[:, None]
    arrays = {k: _write(a, jnp.where(whole_BN, block_BN, a.shape[1]), encoded[k]) for k, a in side.arrays.items()}

    S = arrays["scale"].shape[1] * fmt.tokens
    quantized = fmt.decode(arrays, K, D).reshape(-1, S, K, D).astype(x_BTKD.dtype)
    if side.ring is None:
        return Packed(arrays, None, fmt), Seen(None, quantized)
    C = side.ring.shape[1]
    exact = _recent(side.ring, x_BTKD, jnp.arange(S)[None], length_B)
    last_B = (length_B + count_B)[:, None]
    kept_BT = (position_BT < last_B) & (position_BT >= last_B - C)
    ring = _write(side.ring, jnp.where(kept_BT, position_BT % C, C), x_BTKD)
    return Packed(arrays, ring, fmt), _seen(fmt, exact, quantized, position_BT)


def _seen(fmt: KVFormat, exact: Array, quantized: Array, position_BT: Array) -> Seen:
    if not fmt.ring:
        return Seen(None, quantized)
    return Seen(exact, quantized, fmt.seen(position_BT, exact.shape[1]))


def _write(a: Array, index_BT: Array, new: Array) -> Array:
    """`a[b, index[b, t]] = new[b, t]`; indices beyond the end write nothing."""
    return a.at[jnp.arange(a.shape[0])[:, None], index_BT].set(new, mode="drop")


def _recent(ring: Array, x_BTKD: Array, position_BS: Array, length_B: Array) -> Array:
    """Tokens at these positions, from the ring or from the new ones; others are of no meaning, but finite."""
    rows = jnp.arange(x_BTKD.shape[0])[:, None]
    old = ring[rows, position_BS % ring.shape[1]]
    at_BS = position_BS - length_B[:, None]
    new = x_BTKD[rows, jnp.clip(at_BS, 0, x_BTKD.shape[1] - 1)]
    return jnp.where((at_BS < 0)[:, :, None, None], old, new)


# -- attention's two products -----------------------------------------------------------------------------------------


def merged(seen: Seen) -> Seen:
    """For one query a row: what it sees, in one array."""
    if seen.rule is None or seen.rule.shape[1] != 1:
        return seen
    return Seen(jnp.where(seen.rule[:, 0, :, None, None], seen.quantized, seen.exact))


def scores(q_BTKGD: Float[Array, "B T K G D"], k: Seen, acc: Any) -> Float[Array, "B K G T S"]:
    """Products of queries and keys, accumulated in `acc`."""
    k = merged(k)
    product = partial(jnp.einsum, "BTKGD,BSKD->BKGTS", q_BTKGD, preferred_element_type=acc)
    if k.rule is None:
        return product(k.exact if k.quantized is None else k.quantized)
    return jnp.where(k.rule[:, None, None], product(k.quantized), product(k.exact))


def mixed(p_BKGTS: Float[Array, "B K G T S"], v: Seen) -> Float[Array, "B T K G D"]:
    """Sums of values, weighted by `p`."""
    v = merged(v)
    product = partial(jnp.einsum, "BKGTS,BSKD->BTKGD")
    if v.rule is None:
        return product(p_BKGTS, v.exact if v.quantized is None else v.quantized)
    rule = v.rule[:, None, None]
    return product(jnp.where(rule, p_BKGTS, 0), v.quantized) + product(jnp.where(rule, 0, p_BKGTS), v.exact)


# -- sites in a tree --------------------------------------------------------------------------------------------------


def paths(config: ModelConfig) -> list[str]:
    """Where a model's cache sites are."""
    return [f"model.layers.{i}.self_attn.{name}" for i in range(config.num_layers) for name in CACHES]


def sites(params: Mapping[str, Any]) -> dict[str, CacheSite]:
    """`{path: site}` of those that a tree has."""
    return {path: leaf for path, leaf in trees.items(params) if isinstance(leaf, CacheSite)}


def without(params: Mapping[str, Any]) -> Tree:
    """The tree without its cache sites."""
    return trees.build({path: leaf for path, leaf in trees.items(params) if not isinstance(leaf, CacheSite)})


def check(assignment: Mapping[str, Any], config: ModelConfig) -> None:
    """Raises `InputError` for cache formats in an assignment (`Plan.resolve`) that the model's heads have no whole
    groups for."""
    for path, fmt in assignment.items():
        if isinstance(fmt, KVFormat):
            try:
                fmt.check(config.head_dim)
            except InputError as e:
                raise InputError(f"{path}: {e}") from e


def attach(params: Tree, assignment: Mapping[str, Any]) -> tuple[Tree, dict[str, Any]]:
    """The tree with the cache formats of an assignment (`Plan.resolve`) in their places, beside the transforms that are
    there, and the rest of the assignment. Raises `InputError` for layers that the tree lacks."""
    flat = dict(trees.items(params))
    caches = {p: f for p, f in assignment.items() if isinstance(f, KVFormat)}
    for path, fmt in caches.items():
        if f"{path[: -len('_cache')]}_proj" not in flat:
            raise InputError(f"cache format {fmt.name} for {path}, whose layer the model lacks (allowed: its layers)")
        flat[path] = dataclasses.replace(flat.get(path, CacheSite()), format=fmt)
    return trees.build(flat), {p: f for p, f in assignment.items() if p not in caches}


def with_caches(
    model: Any, k: str | KVFormat | None = None, v: str | KVFormat | None = None, rotate: bool = False
) -> Any:
    """The `Model` with these cache formats in every layer, in place of those that it has (None: they stay).

    With `rotate`, the sides that have a format also get the Hadamard transform over the head dimension. Raises
    `InputError` for unknown formats, groups that do not divide the head, a head dimension without a Hadamard
    construction, and sides that are transformed already.
    """
    flat, dim = dict(trees.items(model.params)), model.config.head_dim
    for path in paths(model.config):
        name = k if path.endswith("k_cache") else v
        site = flat.get(path, CacheSite())
        if name is not None:
            site = dataclasses.replace(site, format=get_kv(name) if isinstance(name, str) else name)
        if rotate and site.format is not None:
            if site.op is not None:
                raise InputError(f"{path} is transformed already by {site.op.name} (allowed: without rotation)")
            site = dataclasses.replace(site, op=_hadamard(dim))
        if site != CacheSite():
            site.check(dim)
            flat[path] = site
    return model.replace(params=trees.build(flat))


def _hadamard(dim: int) -> Op:
    try:
        return online.get(f"hadamard:{dim}")
    except InputError as e:
        raise InputError(
            f"rotation of heads of {dim} values, of which no Hadamard matrix is known (allowed: no rotation, or a "
            f"CacheSite with another transform, such as hadamard:2 over parts of the head or dct:{dim})"
        ) from e


# -- a site as names and arrays ---------------------------------------------------------------------------------------


def describe(site: CacheSite) -> tuple[dict[str, str], dict[str, Any]]:
    """`{"format": cache format, "online": transform}` (what there is of them) and the arrays they store,
    `online.NAME`."""
    names = {"format": site.format.name} if site.format is not None else {}
    if site.op is None:
        return names, {}
    return names | {"online": site.op.name}, {f"online.{k}": a for k, a in site.op.arrays.items()}


def described_shapes(names: Mapping[str, str]) -> dict[str, tuple[int, ...]]:
    """Shapes of the arrays that `describe` gave for these names. Raises `InputError` for unknown names."""
    if "format" in names:
        get_kv(names["format"])
    own = online.array_shapes(names["online"]) if "online" in names else {}
    return {f"online.{k}": s for k, s in own.items()}


def restore(names: Mapping[str, str], arrays: Mapping[str, Any]) -> CacheSite:
    """Inverse of `describe`."""
    own = {k.removeprefix("online."): a for k, a in arrays.items()}
    op: Op | None = online.get(names["online"], own) if "online" in names else None
    return CacheSite(get_kv(names["format"]) if "format" in names else None, op)
