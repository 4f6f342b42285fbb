"""Dispatch on what the weight is: an array, packed codes, or a weight in training."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from lowbit.formats.base import Coded, Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput

Weight = Array | QTensor | Latent | Coded | PreparedInput


def dense(w: Weight) -> Float[Array, "O I"]:
    """The weight matrix that the product uses."""
    if isinstance(w, PreparedInput):
        return dense(w.w)
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

    A `PreparedInput` first transforms and quantizes `x`.
    """
    x_BTI = prepared(x_BTI, w)
    w_OI = dense(w).astype(x_BTI.dtype)
    acc = jnp.promote_types(x_BTI.dtype, jnp.float32)
    dims = (((x_BTI.ndim - 1,), (1,)), ((), ()))
    return jax.lax.dot_general(x_BTI, w_OI, dims, preferred_element_type=acc).astype(x_BTI.dtype)
