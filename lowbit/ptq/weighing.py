"""A weight and the Hessian of its inputs, checked and damped; a first round of codes; and the packed weight: what the
solvers share that go over all columns again and again."""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params, QTensor
from lowbit.ptq.blockwise import Solved
from lowbit.ptq.gptq import _divisor, _factor, _solve
from lowbit.ptq.refit import error_of


class Weighed(NamedTuple):
    """All float32."""

    w_OI: Float[Array, "O I"]  # 0 in dead columns
    H_II: Float[Array, "I I"]  # damped
    added_I: Float[Array, " I"]  # what the damping is
    importance_I: Float[Array, " I"]  # the diagonal without damping
    damping: float
    dead: int  # input channels that calibration never excites


def weighed(w_OI: Any, H_II: Any, fmt: Format, damping: float, name: str) -> Weighed:
    """Raises `InputError` on a shape that does not fit, values that are not finite, and an H that has no factor with
    damping 1; where it has none with less, it gets ten times as much (as GPTQ does)."""
    fmt.check(tuple(w_OI.shape))
    O, I = w_OI.shape
    if tuple(H_II.shape) != (I, I):
        raise InputError(f"Hessian of {name} has shape {list(H_II.shape)} (allowed: [{I}, {I}], as its weight's rows)")
    H = jnp.asarray(np.asarray(H_II, np.float32))
    if not bool(jnp.isfinite(H).all()):
        raise InputError(f"Hessian of {name} holds NaN or infinite values (allowed: finite ones)")
    w = jnp.asarray(w_OI, jnp.float32)
    if not bool(jnp.isfinite(w).all()):
        raise InputError(f"{name} holds NaN or infinite values (allowed: finite weights)")
    diagonal = np.asarray(jnp.diagonal(H), np.float64)
    dead = diagonal == 0
    _, added, damping = _factor(H, diagonal, np.arange(I), damping, name)
    w = jnp.where(jnp.asarray(dead), 0.0, w)
    return Weighed(w, H + jnp.diag(added), added, jnp.asarray(diagonal, jnp.float32), damping, int(dead.sum()))


def feedback(
    fmt: Format, own: Weighed, act_order: bool, name: str, block: int = 128
) -> tuple[Int[Array, "P Q"], Params, Float[Array, ""]]:
    """`(codes, stored parameters, damped error)` of GPTQ's pass over the columns, with its order and fits (see
    `lowbit.ptq.gptq.gptq`), for any format."""
    O, I = own.w_OI.shape
    tile, span = fmt.tile[1], fmt.params_span((O, I))
    diagonal = np.asarray(own.importance_I, np.float64)
    order = np.arange(I)
    if act_order:
        tiles = np.argsort(-diagonal.reshape(-1, tile).sum(1), kind="stable")
        order = (tiles[:, None] * tile + np.arange(tile)).reshape(-1)
    H = own.H_II - jnp.diag(own.added_I)
    R, added, _ = _factor(H, diagonal, order, own.damping, name)
    refit = span < I and not act_order
    width = span if refit else tile * _divisor(I // tile, max(1, block // tile))
    codes, params, w_hat, _ = _solve(fmt, width, refit, own.w_OI, R, jnp.asarray(order), own.importance_I, added)
    return codes, fmt.stored(params), error_of(own.w_OI, w_hat, own.H_II)


def finished(fmt: Format, own: Weighed, codes: Array, stored: Params) -> Solved:
    """The packed weight and its error without damping."""
    arrays, w_hat, error = _packed(fmt, own.w_OI, own.H_II, own.added_I, codes, stored)
    fmt.check_values(own.w_OI, stored)
    return Solved(QTensor(arrays, fmt, own.w_OI.shape, "float32"), w_hat, float(error), own.damping, own.dead)


@partial(jax.jit, static_argnums=0)
def _packed(fmt: Format, w: Array, H: Array, added: Array, codes: Array, stored: Params) -> tuple[Any, Array, Array]:
    w_hat = fmt.dequantize(codes, stored)
    error = error_of(w, w_hat, H) - jnp.sum(jnp.square(w - w_hat) * added)
    return fmt.pack(codes, stored), w_hat, error
