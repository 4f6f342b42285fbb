"""Reductions over groups whose bits do not depend on how a compiler or a mesh splits them."""

from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float

from lowbit.formats.floats import power_of_two


def over_last(f: Any, x_OGK: Array) -> Array:
    """`f.reduce(x, axis=-1)` of an associative ufunc. Small groups are halved three times first, which is elementwise
    and vectorizes on CPUs (a reduction along a short contiguous axis does not, and takes 3 times longer). Long rows are
    left alone: they may be split over devices, where halving would move data."""
    k = x_OGK.shape[-1]
    if k % 8 == 0 and k <= 512:
        for half in (k // 2, k // 4, k // 8):
            x_OGK = f(x_OGK[..., :half], x_OGK[..., half:])
    return f.reduce(x_OGK, axis=-1)


def order_free_mean(x_OGK: Float[Array, "O G K"], over_rows: bool = False) -> Float[Array, "R G"]:
    """Mean of non-negative values over K (and O), the same bits whatever the order of summation.

    A float sum depends on how a compiler or a mesh splits it, and a scale that differs in the last bit flips codes. So
    values become integers of a common power-of-two step: at least 29 - log2(K) bits of the largest one. A sum over
    rows then drops the low bits that it needs room for, rounded. Relative error below 2^-18 for any K up to 2^20.
    """
    O, _, K = x_OGK.shape
    top = over_last(jnp.maximum, x_OGK)[:, :, None]
    top = jnp.max(top, axis=0, keepdims=True) if over_rows else top
    unit = jnp.maximum(power_of_two(top), 2.0**-90)
    bits = 29 - max(K - 1, 0).bit_length()
    whole = jnp.round(x_OGK * (np.float32(2.0**bits) / unit)).astype(jnp.int32)
    total, drop, n = over_last(jnp.add, whole)[:, :, None], 0, K
    if over_rows:
        drop, n = max(O - 1, 0).bit_length(), O * K
        total = jnp.sum((total + (1 << drop >> 1)) >> drop, axis=0, keepdims=True)
    mean = total.astype(jnp.float32) * np.float32(1 / n) * (unit * np.float32(2.0 ** (drop - bits)))
    return rearrange(mean, "r g 1 -> r g")
