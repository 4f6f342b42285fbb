"""Gradient descent on orthogonal matrices: Cayley SGD as an optax transformation.

Li, Fuxin and Todorovic (2020, arXiv 2002.01113), as SpinQuant (arXiv 2405.16406) uses it. For an orthogonal X with the
gradient G and the momentum M,

    M = momentum * M - G
    W_hat = M X^T - 1/2 X X^T M X^T,  W = W_hat - W_hat^T        (skew: the direction along the manifold)
    Y = (I - a/2 W)^-1 (I + a/2 W) X,  a = min(lr, 1 / (||W||_1 + 1e-8))
    M = W X

so Y is orthogonal, of the same determinant. The inverse is solved exactly for matrices of at most `exact` rows; larger
ones iterate `Y = X + a/2 W (X + Y)`, which converges as `||a/2 W|| <= 1/2`. What rounding adds up to is removed by a QR
decomposition every `orthonormalize` steps.
"""

from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError

HIGHEST = jax.lax.Precision.HIGHEST


class CayleyState(NamedTuple):
    """Steps done, and the momentum of each matrix (None without momentum)."""

    count: Int[Array, ""]
    momentum: Any


def cayley_sgd(
    learning_rate: optax.ScalarOrSchedule,
    momentum: float = 0.0,
    *,
    exact: int = 256,
    iterations: int = 5,
    orthonormalize: int = 100,
) -> optax.GradientTransformation:
    """The transformation for a pytree of float32 (or float64) orthogonal matrices `[..., n, n]`.

    `exact` is the largest n whose Cayley transform is solved, `iterations` those of the fixed point above it,
    `orthonormalize` the steps between QR decompositions. `init` raises `InputError` for leaves that are not square, not
    wide enough or not orthogonal (outside of jit) and for options out of range.
    """
    if not 0 <= momentum < 1:
        raise InputError(f"momentum of cayley_sgd is {momentum} (allowed: from 0, below 1)")
    if iterations < 1 or orthonormalize < 1:
        raise InputError(f"cayley_sgd: {iterations} iterations, QR every {orthonormalize} steps (allowed: 1 or more)")

    def init(params: Any) -> CayleyState:
        for x in jax.tree.leaves(params):
            _check(x)
        return CayleyState(jnp.zeros((), jnp.int32), jax.tree.map(jnp.zeros_like, params) if momentum else None)

    def update(grads: Any, state: CayleyState, params: Any = None) -> tuple[Any, CayleyState]:
        if params is None:
            raise InputError("cayley_sgd without params (allowed: update(grads, state, params))")
        lr = learning_rate(state.count) if callable(learning_rate) else learning_rate
        old = jax.tree.map(jnp.zeros_like, grads) if state.momentum is None else state.momentum
        again = (state.count + 1) % orthonormalize == 0

        def one(x: Array, g: Array, m: Array) -> tuple[Array, Array]:
            y, m = step(x, momentum * m - g, lr, exact, iterations)
            return jax.lax.cond(again, nearest_qr, lambda y: y, y) - x, m

        pairs = jax.tree.map(one, params, grads, old)
        updates, kept = jax.tree.transpose(jax.tree.structure(params), jax.tree.structure((0, 0)), pairs)
        return updates, CayleyState(state.count + 1, None if state.momentum is None else kept)

    return optax.GradientTransformation(init, update)


def step(
    x: Float[Array, "*batch n n"], m: Float[Array, "*batch n n"], lr: Any, exact: int = 256, iterations: int = 5
) -> tuple[Float[Array, "*batch n n"], Float[Array, "*batch n n"]]:
    """The point that one step along `m` (minus the gradient, with momentum) leads to, and `m` made tangent there."""
    mxt = _matmul(m, _t(x))
    half = mxt - 0.5 * _matmul(x, _matmul(_t(x), mxt))
    w = half - _t(half)
    norm = jnp.max(jnp.sum(jnp.abs(w), axis=-2), axis=-1)[..., None, None]
    a = 0.5 * jnp.minimum(lr, 1 / (norm + 1e-8)) * w
    along = _matmul(w, x)
    if x.shape[-1] <= exact:
        eye = jnp.eye(x.shape[-1], dtype=x.dtype)
        return jnp.linalg.solve(eye - a, x + _matmul(a, x)), along
    y = x + 2 * _matmul(a, x)
    for _ in range(iterations):
        y = x + _matmul(a, x + y)
    return y, along


def nearest_qr(y: Float[Array, "*batch n n"]) -> Float[Array, "*batch n n"]:
    """The orthogonal factor of a QR decomposition with a positive diagonal: close to `y` if that is nearly orthogonal,
    and of the same determinant."""
    q, r = jnp.linalg.qr(y)
    return q * jnp.sign(jnp.diagonal(r, axis1=-2, axis2=-1))[..., None, :]


def _check(x: Any) -> None:
    if x.ndim < 2 or x.shape[-1] != x.shape[-2] or x.dtype not in (jnp.float32, jnp.float64):
        raise InputError(f"cayley_sgd of {x.dtype} {list(x.shape)} (allowed: square matrices in float32 or float64)")
    if isinstance(x, jax.core.Tracer):
        return
    off = float(jnp.max(jnp.abs(_matmul(x, _t(x)) - jnp.eye(x.shape[-1], dtype=x.dtype))))
    if not off < 1e-3:
        raise InputError(f"cayley_sgd of a matrix that is {off:.2g} off an orthogonal one (allowed: orthogonal ones)")


def _t(x: Array) -> Array:
    return jnp.swapaxes(x, -1, -2)


def _matmul(a: Array, b: Array) -> Array:
    return jnp.matmul(a, b, precision=HIGHEST)
