"""A weight whose product also tells what its outputs' errors cost, as a gradient."""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@partial(jax.tree_util.register_dataclass, data_fields=["w", "sums_GII"], meta_fields=[])
@dataclasses.dataclass(frozen=True)
class Probe:
    """`w`, and zeros whose gradient is `sum_t c_tg x_t x_t^T`, `[G, I, I]` in float32: x are inputs, `c_tg` the mean of
    `(dloss / dz_to)^2` over the outputs z of group g, one of G equal groups in order. The weight itself gets none."""

    w: Any
    sums_GII: Float[Array, "*layers G I I"]


@jax.custom_vjp
def probed(x_BTI: Array, w_OI: Array, sums_GII: Array) -> Array:
    """`x @ w.T`."""
    acc = jnp.promote_types(x_BTI.dtype, jnp.float32)
    return jax.lax.dot_general(x_BTI, w_OI, (((x_BTI.ndim - 1,), (1,)), ((), ())), preferred_element_type=acc)


def _fwd(x_BTI: Array, w_OI: Array, sums_GII: Array) -> tuple[Array, Any]:
    return probed(x_BTI, w_OI, sums_GII), (x_BTI, w_OI, sums_GII)


def _bwd(residuals: Any, g_BTO: Array) -> tuple[Array, Array, Array]:
    x_BTI, w_OI, sums_GII = residuals
    x_NI = x_BTI.reshape(-1, x_BTI.shape[-1]).astype(jnp.float32)
    cost_NG = jnp.square(g_BTO.astype(jnp.float32)).reshape(len(x_NI), len(sums_GII), -1).mean(axis=-1)
    own_GII = jnp.einsum("ng,ni,nj->gij", cost_NG, x_NI, x_NI, precision=jax.lax.Precision.HIGHEST)
    g = g_BTO.astype(w_OI.dtype)
    dx = jax.lax.dot_general(g, w_OI, (((g.ndim - 1,), (0,)), ((), ())), preferred_element_type=jnp.float32)
    return dx.astype(x_BTI.dtype), jnp.zeros_like(w_OI), own_GII


probed.defvjp(_fwd, _bwd)
