"""Dispatch on what the weight is: an array, packed codes, a latent weight in training, or one with an adapter."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit.formats.adapter import Adapter
from lowbit.formats.base import Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput

Weight = Array | QTensor | Latent | Adapter | PreparedInput


def dense(w: Weight) -> Float[Array, "O I"]:
    """The weight matrix that the product uses; an adapter's update is added in float32."""
    if isinstance(w, PreparedInput):
        return dense(w.w)
    if isinstance(w, Adapter):
        return dense(w.w).astype(jnp.float32) + w.update()
    if isinstance(w, QTensor):
        return w.decode()
    if isinstance(w, Latent):
        return w.value()
    return w


def prepared(x_BTI: Float[Array, "*batch I"], w: Weight) -> Float[Array, "*batch I"]:
    """The input as the product takes it: after the weight's online transform and activation format, if it has any."""
    return w.prepare(x_BTI) if isinstance(w, PreparedInput) else x_BTI


def qdot(x_BTI: Float[Array, "*batch I"], w: Weight) -> Float[Array, "*batch O"]:
    """`x @ decode(w).T` in `x`'s dtype, accumulated in float32 at least.

    A `PreparedInput` first transforms and quantizes `x`. An `Adapter` adds its low-rank product to that of its weight
    before the result is rounded to `x`'s dtype.
    """
    x_BTI = prepared(x_BTI, w)
    w = w.w if isinstance(w, PreparedInput) else w
    if isinstance(w, Adapter):
        # Nothing trains the weight, so a gradient would keep it decoded from the forward pass to the backward one; it
        # is decoded twice instead, and stays packed in between.
        return (jax.checkpoint(_product)(x_BTI, w.w) + w.low_rank(x_BTI)).astype(x_BTI.dtype)
    return _product(x_BTI, w).astype(x_BTI.dtype)


def _product(x_BTI: Array, w: Weight) -> Array:
    w_OI = dense(w).astype(x_BTI.dtype)
    acc = jnp.promote_types(x_BTI.dtype, jnp.float32)
    dims = (((x_BTI.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_BTI, w_OI, dims, preferred_element_type=acc)
