"""Codebooks of fixed codes for the least error `tr((W - W_hat) H (W - W_hat)^T)`: a linear least-squares problem.

A decoder is linear in its codebooks, so the error is a quadratic in them; conjugate gradients go to its minimum without
forming its matrix (M K d unknowns), at one product with H a step. AQLM (arXiv 2401.06118) and GPTVQ (arXiv 2402.15319)
take Adam steps instead, LNQ (arXiv 2505.07004) solves for each row; `docs/vq_codebooks.md` compares.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from lowbit.formats.base import Params
from lowbit.vq.codebook import Codebooks

HIGHEST = jax.lax.Precision.HIGHEST
STEPS = 8
FIXED = ("scale", "outlier")


def error_of(w_OI: Any, w_hat_OI: Any, H_II: Any) -> Float[Array, ""]:
    """`tr((W - W_hat) H (W - W_hat)^T)` in float32."""
    d = w_OI - w_hat_OI
    return jnp.sum(jnp.matmul(d, H_II, precision=HIGHEST) * d)


@partial(jax.jit, static_argnums=(0, 1))
def refit(
    fmt: Codebooks,
    steps: int,
    w_OI: Float[Array, "O I"],
    H_II: Float[Array, "I I"],
    codes: Int[Array, "P Q"],
    stored: Params,
    error: Float[Array, ""],
) -> tuple[Params, Float[Array, ""]]:
    """`(stored parameters, their error)` after `steps` of conjugate gradients on the codebooks, preconditioned by the
    diagonal that each entry would have alone, and, where each row has a scale, the best scale. What is found
    is rounded to fp16, and dropped where the error is then not below `error`, which is that of `stored`."""
    parts = fmt.parts(w_OI.shape)
    own = {k: a for k, a in stored.items() if k not in FIXED}
    decode, pull = jax.vjp(lambda p: fmt.dequantize(codes, {**stored, **p}), own)

    def dot(a: Params, b: Params) -> Array:  # of each part of the rows, which have nothing in common
        axes = None if parts[0] == 1 else (1, 2, 3)
        return sum(jnp.sum(a[k] * b[k], axis=axes, keepdims=True) for k in a)

    def normal(p: Params) -> Params:
        w_hat = fmt.dequantize(codes, {**stored, **p})
        return pull(jnp.matmul(w_hat, H_II, precision=HIGHEST))[0]

    scale = stored.get("scale", jnp.ones((1, 1)))
    alone = pull(jnp.broadcast_to(scale * jnp.diagonal(H_II), w_OI.shape))[0]
    alone = {k: jnp.maximum(a, 1e-20 + 1e-7 * jnp.max(a)) for k, a in alone.items()}
    r = pull(jnp.matmul(w_OI - decode, H_II, precision=HIGHEST))[0]
    z = {k: r[k] / alone[k] for k in r}

    enough = 1e-8 * dot(r, z)

    def step(state: Any, _: None) -> tuple[Any, None]:
        x, r, p, rz = state
        ap = normal(p)
        curve = dot(p, ap)
        on = (curve > 0) & (rz > enough)  # beyond that, float32's noise would grow
        a = jnp.where(on, rz / jnp.where(on, curve, 1.0), 0.0)
        x, r = ({k: u[k] + c * v[k] for k in u} for u, c, v in ((x, a, p), (r, -a, ap)))
        z = {k: r[k] / alone[k] for k in r}
        new = dot(r, z)
        b = jnp.where(on, new / jnp.where(on, rz, 1.0), 0.0)
        return (x, r, {k: z[k] + b * p[k] for k in p}, new), None

    (found, *_), _ = jax.lax.scan(step, (own, r, z, dot(r, z)), None, length=steps)
    new = {**stored, **found}
    if fmt.scaled == 1:
        y = fmt.dequantize(codes, {**new, "scale": jnp.ones_like(scale)})
        yh = jnp.matmul(y, H_II, precision=HIGHEST)
        top, bottom = (jnp.sum(yh * a, axis=1, keepdims=True) for a in (w_OI, y))
        new["scale"] = jnp.where((bottom > 0) & (top > 0), top / jnp.where(bottom > 0, bottom, 1.0), scale)
    new = fmt.stored(new)
    e = error_of(w_OI, fmt.dequantize(codes, new), H_II)
    return {k: jnp.where(e < error, new[k], a) for k, a in stored.items()}, jnp.minimum(e, error)
