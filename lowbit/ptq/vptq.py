"""VPTQ (arXiv 2409.17066), GPTVQ's small codebooks (arXiv 2402.15319) and LNQ (arXiv 2505.07004): codebooks of vectors
along the outputs, for the least error `tr((W - W_hat) H (W - W_hat)^T)`.

1. Codebooks by k-means of the weights, each column weighed by its `H_ii`.
2. Columns are rounded one after the other, and those to come make up for the error (GPTQ). A vector lies in one
   column, so its nearest code vector is the best one, and no coupling inside of a vector is neglected. Outlier columns
   come first.
3. Turns, until one gains less than `tol`: codebooks of least error for the codes (`lowbit.ptq.refit`), then `cycles` of
   coordinate descent over the codes, column by column, given all others.

Step 3 is LNQ's for a codebook of scalars in each row (`nuqN`): there the solver `lnq` runs it with the paper's 3 turns
of 4 cycles. VPTQ stops after step 2.
"""

import dataclasses
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params
from lowbit.ptq import layerwise
from lowbit.ptq.base import register
from lowbit.ptq.blockwise import Solved, solver
from lowbit.ptq.options import LnqOptions, VptqOptions
from lowbit.ptq.refit import HIGHEST, STEPS, error_of, refit
from lowbit.ptq.weighing import Weighed, feedback, finished, weighed
from lowbit.vq.vector import Vector


def vptq(
    w_OI: Float[Array | np.ndarray, "O I"],
    H_II: Float[Array | np.ndarray, "_ _"],  # [I, I]
    fmt: Format,
    *,
    order: str = "act",
    turns: int = 4,
    cycles: int = 2,
    tol: float = 0.01,
    damping: float = 0.01,
    name: str = "weight",
    history: list[tuple[str, float]] | None = None,
) -> Solved:
    """`w` as codes of vectors for the least error in the norm of H; see the module. `history`, if given, gets
    `("init" | "books" | "codes", error)`, the error with damping. Raises `InputError` for other formats and as
    `weighed` does.
    """
    check_format(fmt, "vptq")
    own = weighed(w_OI, H_II, fmt, damping, name)
    history = [] if history is None else history
    first = _with_outliers if fmt.outliers else feedback
    codes, stored, error = first(fmt, own, order == "act", name)
    history.append(("init", float(error)))
    for _ in range(turns):
        before = history[-1][1]
        stored, error = refit(fmt, STEPS, own.w_OI, own.H_II, codes, stored, error)
        history.append(("books", float(error)))
        codes, error = descend(fmt, cycles, own.w_OI, own.H_II, codes, stored)
        history.append(("codes", float(error)))
        if history[-1][1] > (1 - tol) * before:
            break
    if turns:
        stored, error = refit(fmt, STEPS, own.w_OI, own.H_II, codes, stored, error)
        history.append(("books", float(error)))
    return finished(fmt, own, codes, stored)


def _with_outliers(fmt: Vector, own: Weighed, act_order: bool, name: str) -> tuple[Array, Params, Array]:
    """`feedback` with the outlier columns first: they are rounded to nearest, the others make up for their error at
    once, `W_rest += (W_out - W_hat_out) H_out,rest H_rest,rest^-1`, and are rounded one after the other."""
    stored = fmt.stored(_fitted(fmt, own.w_OI, own.importance_I))
    out = np.asarray(stored["outlier"][0], np.int64)
    rest = np.setdiff1d(np.arange(own.w_OI.shape[1]), out)
    at, inner, _ = fmt._outlier(stored, own.w_OI.shape[1])
    w_out = own.w_OI[:, at]
    out_codes = fmt.apart.quantize(w_out, inner)
    missed = w_out - fmt.apart.dequantize(out_codes, inner)
    H_rr, H_or = own.H_II[rest][:, rest], own.H_II[out][:, rest]
    moved = own.w_OI[:, rest] + jnp.linalg.solve(H_rr, H_or.T @ missed.T).T
    part = own._replace(w_OI=moved, H_II=H_rr, added_I=own.added_I[rest], importance_I=own.importance_I[rest])
    codes, plain, _ = feedback(fmt.plain, part, act_order, name)
    if "scale" in plain:
        plain["scale"] = stored["scale"].at[:, rest].set(plain["scale"])
    stored = {**stored, **plain}
    whole = jnp.zeros((codes.shape[0], own.w_OI.shape[1]), jnp.int32).at[:, rest].set(codes).at[:, out].set(out_codes)
    return whole, stored, error_of(own.w_OI, fmt.dequantize(whole, stored), own.H_II)


@partial(jax.jit, static_argnums=0)
def _fitted(fmt: Format, w_OI: Array, importance_I: Array) -> Params:
    return fmt.init(w_OI, importance_I)


@partial(jax.jit, static_argnums=(0, 1))
def descend(
    fmt: Vector,
    cycles: int,
    w_OI: Float[Array, "O I"],
    H_II: Float[Array, "I I"],
    codes: Int[Array, "Q I"],
    stored: Params,
) -> tuple[Int[Array, "Q I"], Float[Array, ""]]:
    """`(codes, error)` after `cycles` over the columns: given all others, the error of column i is `H_ii` times the
    squared distance to `W_i + sum_{j != i} (W_j - W_hat_j) H_ji / H_ii`; a vector takes the code nearest to that if it
    is nearer than the one that it has. Works on transposed matrices, in which a column is contiguous."""
    O, I = w_OI.shape
    w_IO, diagonal = w_OI.T, jnp.maximum(jnp.diagonal(H_II), 1e-30)
    plain, mask, inner = stored, None, None
    if fmt.outliers:
        at, inner, plain = fmt._outlier(stored, I)
        mask = jnp.zeros(I, bool).at[at].set(True)

    def column(n: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes_IQ, d_IO = state
        i = n % I
        d_O = d_IO[i]
        pull_O = jnp.matmul(H_II[i], d_IO, precision=HIGHEST) / diagonal[i]
        goal_O = w_IO[i] - d_O + pull_O
        code, hat = fmt.plain.round_block(goal_O[:, None], fmt.params_at(plain, i, I))
        if mask is not None:
            other, far = fmt.apart.round_block(goal_O[:, None], inner)
            code, hat = jnp.where(mask[i], other, code), jnp.where(mask[i], far, hat)

        def distance(hat_O: Array) -> Array:
            return jnp.sum(jnp.square(goal_O - hat_O).reshape(-1, fmt.size), axis=1)

        better = distance(hat[:, 0]) < distance(w_IO[i] - d_O)
        d_O = jnp.where(jnp.repeat(better, fmt.size), w_IO[i] - hat[:, 0], d_O)
        return codes_IQ.at[i].set(jnp.where(better, code[:, 0], codes_IQ[i])), d_IO.at[i].set(d_O)

    start = codes.T, (w_OI - fmt.dequantize(codes, stored)).T
    codes_IQ, d_IO = jax.lax.fori_loop(0, cycles * I, column, start)
    return codes_IQ.T, error_of(w_OI, w_OI - d_IO.T, H_II)


# -- the solvers ------------------------------------------------------------------------------------------------------


def check_format(fmt: Format, solver: str) -> None:
    """Raises `InputError` for formats that are no vectors along the outputs."""
    if not isinstance(fmt, Vector):
        raise InputError(f"format {fmt.name!r} with solver {solver} (allowed: vptq, gptvq and nuqN)")


def _check_lnq(fmt: Format, solver: str) -> None:
    if not (isinstance(fmt, Vector) and fmt.rows == fmt.size == 1):
        raise InputError(f"format {fmt.name!r} with solver {solver} (allowed: nuq1 .. nuq4)")


def _solve_weight(w_OI: Any, H_II: Any, fmt: Format, options: Any, name: str) -> Solved:
    own = {f.name: getattr(options, f.name) for f in dataclasses.fields(options)}
    return vptq(w_OI, H_II, fmt, name=name, **{k: own[k] for k in ("order", "turns", "cycles", "tol", "damping")})


register(solver(layerwise.Method("vptq", VptqOptions, _solve_weight, check_format)))
register(solver(layerwise.Method("lnq", LnqOptions, _solve_weight, _check_lnq)))
