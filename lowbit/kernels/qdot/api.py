"""Dispatch on what the weight is: an array, packed codes, a weight in training, one with an adapter, or a probe."""

from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Coded, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.kernels.qdot.probe import Probe, probed

Weight = Array | QTensor | Latent | Coded | Adapter | PreparedInput | Probe
EXACT = 2**24  # whole numbers up to here are exact in float32


def dense(w: Weight) -> Float[Array, "O I"]:
    """The weight matrix that the product uses; an adapter's update is added in float32."""
    if isinstance(w, PreparedInput):
        return dense(w.w)
    if isinstance(w, Adapter):
        return dense(w.w).astype(jnp.float32) + w.update()
    if isinstance(w, QTensor):
        return w.decode()
    if isinstance(w, Latent | Coded):
        return w.value()
    return w


def prepared(x_BTI: Float[Array, "*batch I"], w: Weight) -> Float[Array, "*batch I"]:
    """The input as the product takes it: after the weight's online transform and activation format, if it has any."""
    return w.prepare(x_BTI) if isinstance(w, PreparedInput) else x_BTI


def qdot(x_BTI: Float[Array, "*batch I"], w: Weight) -> Float[Array, "*batch O"]:
    """`x @ decode(w).T` in `x`'s dtype, accumulated in float32 at least.

    A `PreparedInput` first transforms and quantizes `x`. Where inputs and weights are both integers times one scale
    (per token; per row or matrix), the product is that of the integers, `(x_codes @ w_codes.T) * (s_x * s_w)`, as long
    as no sum can leave the integers that float32 holds: the same bits as any int8 kernel, in training too. An `Adapter`
    adds its low-rank product to that of its weight before the result is rounded to `x`'s dtype.
    """
    whole = _integers(x_BTI, w)
    if whole is not None:
        return whole
    x_BTI = prepared(x_BTI, w)
    w = w.w if isinstance(w, PreparedInput) else w
    if isinstance(w, Adapter):
        # Nothing trains the weight, so a gradient would keep it decoded from the forward pass to the backward one; it
        # is decoded twice instead, and stays packed in between.
        return (jax.checkpoint(_product)(x_BTI, w.w) + w.low_rank(x_BTI)).astype(x_BTI.dtype)
    return _product(x_BTI, w).astype(x_BTI.dtype)


def _product(x_BTI: Array, w: Weight) -> Array:
    if isinstance(w, Probe):
        return probed(x_BTI, dense(w.w).astype(x_BTI.dtype), w.sums_GII)
    return _dot(x_BTI, dense(w).astype(x_BTI.dtype))


def _dot(x: Array, w_OI: Array) -> Array:
    acc = jnp.promote_types(x.dtype, jnp.float32)
    return jax.lax.dot_general(x, w_OI, (((x.ndim - 1,), (1,)), ((), ())), preferred_element_type=acc)


# -- products of integers ---------------------------------------------------------------------------------------------


def _integers(x: Array, leaf: Weight) -> Array | None:
    """The product by integers, or None where there is no such product."""
    if not isinstance(leaf, PreparedInput) or leaf.act is None or x.dtype == jnp.float64:
        return None
    w = leaf.w
    if not isinstance(w, QTensor | Latent | Coded) or leaf.mix is not None or not w.format.whole:
        return None
    if isinstance(w, Latent) and (w.mix is not None or w.soft):
        return None
    largest = max(map(abs, leaf.act.levels)) * max(map(abs, w.format.levels))
    if x.shape[-1] * largest >= EXACT:
        return None
    codes, stored = w.codes()
    ints = w.format.integers(codes, stored)
    x = x if leaf.op is None else leaf.op(x)
    found = None if ints is None else leaf.act.codes(x, leaf.params)
    if found is None:
        return None
    # The gradient is that of the product of the values; both carry their own straight-through rule.
    values = leaf.act.fake_quant(x, leaf.params), dense(w).astype(x.dtype)
    return _by_integers(values, jax.lax.stop_gradient((*found, *ints))).astype(x.dtype)


@jax.custom_vjp
def _by_integers(values: tuple[Array, Array], parts: tuple[Array, Array, Array, Array]) -> Array:
    x, s_x, w_OI, s_w = parts
    return _dot(x, w_OI) * (_pinned(s_x) * s_w)


def _pinned(scale: Array) -> Array:
    """The same numbers, none negative, which a compiler does not see to be products: jitted XLA:CPU would compute
    `(top * (1 / 127)) * s_w` as `top * ((1 / 127) * s_w)`, another last bit."""
    bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
    return jax.lax.bitcast_convert_type(jnp.maximum(bits, 0), jnp.float32)


def _fwd(values: tuple[Array, Array], parts: Any) -> tuple[Array, Any]:
    return _by_integers(values, parts), values


def _bwd(residuals: Any, g: Array) -> tuple[Any, Any]:
    x, w_OI = residuals
    g = g.astype(x.dtype)
    rows = g.reshape(-1, g.shape[-1])
    return (_dot(g, w_OI.T).astype(x.dtype), _dot(rows.T, x.reshape(rows.shape[0], -1).T).astype(w_OI.dtype)), None


_by_integers.defvjp(_fwd, _bwd)
