"""Scales (and minima) of integer codes by a search of least squares, the same bits in every program.

Least squares need sums of products, and two things change such a sum's last bit from one compiled program to the next:
the order of summation, and the contraction of a product and an addition into one operation. Here every order is spelled
out (`tree_sum`), and no product is ever added as it is (`cut`). Arrays have what is summed over as their first axis:
`x_KON` is `[K, O, N]` for N blocks of K columns each.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

Weight = Any  # importances [K, 1, N], or None where all weights count the same


def cut(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """`x` without its last mantissa bit: a product that no compiler can merge with an addition."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & jnp.int32(-2)
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def tree_sum(x_K: Float[Array, "K *s"]) -> Float[Array, "*s"]:
    """Sum over the first axis, halves first; K must be a power of two."""
    while x_K.shape[0] > 1:
        half = x_K.shape[0] // 2
        x_K = x_K[:half] + x_K[half:]
    return x_K[0]


def blocks(w_OI: Float[Array, "O I"], stats: Any, K: int) -> tuple[Float[Array, "K O N"], Weight]:
    """Blocks of K columns, their columns first, and the same of the columns' importances `stats` `[I]` (or None)."""
    if stats is not None:
        stats = rearrange(stats / jnp.maximum(jnp.max(stats), 1e-30), "(n k) -> k 1 n", k=K)
    return rearrange(w_OI, "o (n k) -> k o n", k=K), stats


def weigh(x_KON: Float[Array, "K O N"], weight: Weight) -> Float[Array, "K O N"]:
    """`x` times the importances, cut."""
    return x_KON if weight is None else cut(x_KON * weight)


def fit(
    x_KON: Float[Array, "K O N"], weight: Weight, levels: tuple[int, int], has_min: bool, steps: int = 19
) -> tuple[Float[Array, "O N"], Float[Array, "O N"]]:
    """`(scale, min)` of each block for the least (weighted) squared error of `codes * scale + min`.

    Tries `steps` scales around the one that spans the block's range, solves for scale and min with the codes that
    each gives, and keeps the best: llama.cpp's `make_qkx3_quants` and `make_qx_quants` with another grid and the plain
    squared error as objective. `min` is at most 0, as ggml's K types need; without `has_min` it is 0 and the scale has
    the sign that puts the entry of largest magnitude on the lowest code.
    """
    lo, hi = map(float, levels)
    high, low = jnp.max(x_KON, axis=0), jnp.min(x_KON, axis=0)
    if has_min:
        base, span = jnp.minimum(low, 0.0), hi
        start = jnp.maximum(high - base, 1e-30) * np.float32(1 / hi)
    else:
        base, span = jnp.zeros_like(low), -lo
        top = jnp.where(high >= -low, high, low)
        start = jnp.where(jnp.abs(top) < 1e-30, 1e-30, top) * np.float32(1 / lo)
    ones = x_KON * 0 + 1 if weight is None else jnp.broadcast_to(weight, x_KON.shape)
    w0, wx = tree_sum(ones), weigh(x_KON, weight)
    sx = tree_sum(wx)

    def step(best: tuple[Array, Array, Array], factor: Array) -> tuple[tuple[Array, Array, Array], None]:
        codes = jnp.clip(jnp.round((x_KON - base) * (factor / start)), lo, hi)
        wc = weigh(codes, weight)
        s2, sxc = tree_sum(cut(wc * codes)), tree_sum(cut(wx * codes))
        scale, shift = sxc / jnp.where(s2 > 0, s2, 1.0), jnp.zeros_like(base)
        ok = s2 > 0
        if has_min:
            s1 = tree_sum(wc)
            det = cut(w0 * s2) - cut(s1 * s1)
            solved = det > cut(np.float32(1e-6) * cut(w0 * s2))
            det = jnp.where(solved, det, 1.0)
            both = (cut(w0 * sxc) - cut(sx * s1)) / det, (cut(s2 * sx) - cut(s1 * sxc)) / det
            solved &= both[1] <= 0
            scale, shift = jnp.where(solved, both[0], scale), jnp.where(solved, both[1], 0.0)
            ok &= scale > 0
        error = total_error(x_KON, weight, codes, scale, shift)
        ok &= error < best[0]
        return tuple(jnp.where(ok, new, old) for new, old in zip((error, scale, shift), best, strict=True)), None

    factors = 1 + np.linspace(-0.9, 0.9, steps, dtype=np.float32) / np.float32(span)
    first = total_error(x_KON, weight, jnp.clip(jnp.round((x_KON - base) / start), lo, hi), start, base)
    (_, scale, shift), _ = jax.lax.scan(step, (first, start, base), jnp.asarray(factors))
    return scale, shift


def total_error(
    x_KON: Float[Array, "K O N"], weight: Weight, codes_KON: Array, scale_ON: Array, min_ON: Array
) -> Float[Array, "O N"]:
    """(Weighted) squared error of `codes * scale + min`."""
    rest = (x_KON - cut(codes_KON * scale_ON)) - min_ON
    return tree_sum(weigh(cut(rest * rest), weight))
