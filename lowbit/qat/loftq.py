"""LoftQ (Li et al. 2023, arXiv 2310.08659): a packed weight and an adapter that together start near to the weight.

QLoRA starts from the rounded weights, which at 2 or 3 bits are far from the model. LoftQ's Algorithm 1 alternates, from
`A = B = 0`, T times,

    Q = quant(W - B A)
    B, A = the best rank-r approximation of W - Q

Two departures: the best of the T pairs is kept (the paper keeps the last; the second step never raises the error, the
first may), and `alpha / r` is divided out of the factors in equal parts: any alpha starts from the same weights. Where
`W - Q` has a lower rank than r, the rest of A is random and of B zero, as in QLoRA, so that all of it can learn. The
weights have to be float: a base that is packed already has lost what LoftQ looks at.
"""

from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit.errors import InputError
from lowbit.formats.adapter import HIGHEST, Adapter, check
from lowbit.formats.base import Format, QTensor
from lowbit.qat.adapters import DEFAULT, Options, convert, parse, random_a
from lowbit.qat.adapters import prepare as put
from lowbit.qat.base import Recipe, register_family
from lowbit.qat.latents import Stored
from lowbit.tree import Tree


class Found(NamedTuple):
    """The best pair, and the Frobenius norms of `W - Q` and of `W - Q - B A` in each round, float32 `[T]`."""

    q: QTensor
    b: Float[Array, "O r"]
    a: Float[Array, "r I"]
    before: Float[Array, " T"]
    after: Float[Array, " T"]


def low_rank(x_OI: Float[Array, "O I"], rank: int) -> tuple[Float[Array, "O r"], Float[Array, "r I"]]:
    """`B [O, r]`, `A [r, I]` whose product is the best approximation of `x` of this rank, singular values split evenly.

    From the eigenvectors of the smaller of `x x^T` and `x^T x`, in float32: the other factor is a projection on them,
    so that their rounding hardly costs error, and a weight of 4096 columns takes seconds where an SVD takes minutes.
    """
    O, I = x_OI.shape
    if O > I:
        b, a = low_rank(x_OI.T, rank)
        return a.T, b.T
    _, vectors = jnp.linalg.eigh(jnp.matmul(x_OI, x_OI.T, precision=HIGHEST))  # ascending
    u_Or = vectors[:, ::-1][:, :rank]
    a_rI = jnp.matmul(u_Or.T, x_OI, precision=HIGHEST)
    values = jnp.linalg.norm(a_rI, axis=1)
    values = jnp.where(values > 1e-6 * values[0], values, 0.0)  # what float32 cannot tell from a lower rank
    root = jnp.sqrt(values)
    return u_Or * root, a_rI / jnp.where(root > 0, root, jnp.inf)[:, None]


@partial(jax.jit, static_argnums=(0, 2, 3))
def loftq(fmt: Format, w_OI: Float[Array, "O I"], rank: int, rounds: int) -> Found:
    """Algorithm 1 for one float32 weight: the round with the least error. The shape must fit format and rank."""
    norm = jnp.linalg.norm

    def one(best: tuple[Any, ...], _: None) -> tuple[tuple[Any, ...], tuple[Array, Array]]:
        b, a, kept = best[0], best[1], best[2:]
        target = w_OI - jnp.matmul(b, a, precision=HIGHEST)
        params = fmt.init(target)
        codes, w_hat = fmt.round_block(target, params)
        left = w_OI - w_hat
        b, a = low_rank(left, rank)
        error = norm(left - jnp.matmul(b, a, precision=HIGHEST))
        new = (error, fmt.pack(codes, fmt.stored(params)), b, a)
        kept = jax.tree.map(lambda old, now: jnp.where(error < kept[0], now, old), kept, new)
        return (b, a, *kept), (norm(left), error)

    O, I = w_OI.shape
    zeros = jnp.zeros((O, rank)), jnp.zeros((rank, I))
    arrays = jax.tree.map(lambda s: jnp.zeros(s.shape, s.dtype), jax.eval_shape(lambda w: fmt.encode(w).arrays, w_OI))
    (_, _, _, arrays, b, a), (before, after) = jax.lax.scan(
        one, (*zeros, jnp.float32(jnp.inf), arrays, *zeros), length=rounds
    )
    return Found(QTensor(arrays, fmt, (O, I), "float32"), b, a, before, after)


def prepare(
    params: Tree, assignment: Mapping[str, Any], *, options: Options = DEFAULT, stored: Stored | None = None
) -> Tree:
    """Adapters over packed weights, both from Algorithm 1. Raises `InputError` as `adapters.prepare` does, for a rank
    beyond a weight's sides and for weights that are packed already."""
    return put(params, assignment, options, partial(start, options), stored)


def start(options: Options, path: str, w: Any, fmt: Format) -> Adapter:
    """The adapter of one weight."""
    if isinstance(w, QTensor):
        raise InputError(f"{path} is packed already (allowed: float weights; LoftQ rounds them itself)")
    fmt.check(w.shape)
    check(path, w.shape, options.rank)
    w = w.astype(jnp.float32)
    if not isinstance(w, jax.core.Tracer):
        fmt.check_values(w, fmt.init(w))
    found = loftq(fmt, w, options.rank, options.rounds)
    share = options.scaling**-0.5
    spare = random_a(path, options.rank, w.shape[1], 1, options.seed)
    a = jnp.where(jnp.any(found.b != 0, axis=0)[:, None], found.a * share, spare)
    return Adapter(found.q, a, found.b * share, options.scaling)


def _parse(keys: list[str]) -> Recipe:
    name, options = parse("loftq", keys, rounds=True)
    return Recipe(name, partial(prepare, options=options), convert, {})


register_family("loftq", _parse)
