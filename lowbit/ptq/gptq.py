"""GPTQ (arXiv 2210.17323): columns are rounded one after the other, and those to come make up for the error.

With `H = 2/n sum x x^T` of a linear's inputs, the error of its outputs is `tr((W - W_hat) H (W - W_hat)^T)`. Factor
`H = R R^T`, R upper triangular (a Cholesky factorization from the last column on); then it is

    sum_k |(W_k + sum_{j<k} (W_j - W_hat_j) R_jk R_kk^-1 - W_hat_k) R_kk|^2

over tiles k of columns, and rounding the bracket's first part for k = 0, 1, ... makes each term as small as its grid
allows. That is LDLQ (QuIP, arXiv 2307.13304), which equals GPTQ: the inverse's upper Cholesky factor, which the paper
computes, is `U = R^-1`. It is never formed here, only its diagonal blocks, and so a third of the arithmetic and no
inverse of an ill-conditioned matrix remain. Inside of a block of columns the update is the paper's,
`W_rest -= (W_k - W_hat_k) U_kk^-1 U_k,rest`; with tiles of several columns this is LDLQ with block feedback.

A format behind random rotations (`lowbit.vq.incoherent`) is solved in its rotated space, where it rounds columns apart.
"""

from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params, QTensor
from lowbit.ptq import layerwise
from lowbit.ptq.base import register
from lowbit.ptq.blockwise import Solved, solver
from lowbit.ptq.options import GptqOptions, LdlqOptions
from lowbit.vq.incoherent import Incoherent

HIGHEST = jax.lax.Precision.HIGHEST
MOST_DAMPING = 1.0


def gptq(
    w_OI: Float[Array | np.ndarray, "O I"],
    H_II: Float[Array | np.ndarray, "_ _"],  # [I, I]
    fmt: Format,
    *,
    block: int = 128,
    damping: float = 0.01,
    act_order: bool = False,
    sweeps: int = 0,
    name: str = "weight",
) -> Solved:
    """Rounds `w` to `fmt` for the least error in the norm of `H`; codes and parameters are packed as they were chosen.

    Parameters of a format with groups are fitted when their first column is reached, to the weights as updated by
    then; those of a whole row or tensor once, beforehand. `act_order` takes columns by descending `H_ii`; groups stay
    those of neighbouring columns and are fitted beforehand, so the layout is the ordinary one. `diag(H)` is the
    importance that searched fits get.

    After that, `sweeps` times over the columns, each tile is rounded again for the least error that the others leave
    (QuIP#'s coordinate descent, arXiv 2402.04396), and kept as it was in rows where that is no better.

    `damping` times the mean of `diag(H)` is added to the diagonal; where `H` is not positive definite still, ten times
    as much, up to 1.0. Raises `InputError` (with `name`) on values that are not finite, on an `H` of another shape or
    one that even then has no factor, and as the format's `check` and `check_values` do.
    """
    check_format(fmt, "gptq")
    fmt.check(w_OI.shape)
    O, I = w_OI.shape
    if tuple(H_II.shape) != (I, I):
        raise InputError(f"Hessian of {name} has shape {list(H_II.shape)} (allowed: [{I}, {I}], as its weight's rows)")
    diagonal = np.asarray(jnp.diagonal(jnp.asarray(H_II)), np.float64)
    if not np.isfinite(diagonal).all() or not bool(jnp.isfinite(H_II).all()):
        raise InputError(f"Hessian of {name} holds NaN or infinite values (allowed: finite ones)")
    w = jnp.asarray(w_OI, jnp.float32)
    if not bool(jnp.isfinite(w).all()):
        raise InputError(f"{name} holds NaN or infinite values (allowed: finite weights)")
    dead = diagonal == 0
    w = jnp.where(jnp.asarray(dead), 0.0, w)
    if isinstance(fmt, Incoherent):
        more = {"block": block, "damping": damping, "act_order": act_order, "sweeps": sweeps, "name": name}
        return _rotated(fmt, w, H_II, int(dead.sum()), more)
    tile = fmt.tile[1]
    order = np.arange(I)
    if act_order:
        tiles = np.argsort(-diagonal.reshape(-1, tile).sum(1), kind="stable")
        order = (tiles[:, None] * tile + np.arange(tile)).reshape(-1)
    R, added, damping = _factor(H_II, diagonal, order, damping, name)
    span = fmt.params_span((O, I))
    refit = span < I and not act_order
    width = span if refit else tile * _divisor(I // tile, max(1, block // tile))
    importance = jnp.asarray(diagonal, jnp.float32)
    codes, params, w_hat, error = _solve(fmt, width, refit, w, R, jnp.asarray(order), importance, added)
    fmt.check_values(w, params)
    if sweeps:
        codes, w_hat, error = _sweep(fmt, sweeps, w, jnp.asarray(H_II, jnp.float32), added, params, codes, w_hat)
    arrays = _pack(fmt, codes, params)
    return Solved(QTensor(arrays, fmt, (O, I), "float32"), w_hat, float(error), damping, int(dead.sum()))


def _rotated(fmt: Incoherent, w_OI: Array, H_II: Any, dead: int, options: dict[str, Any]) -> Solved:
    """The weight solved by the inner format behind its rotations."""
    own = fmt.signs(jnp.asarray(w_OI))
    r = gptq(_enter(fmt, w_OI, own), fmt.hessian(H_II, own), fmt.inner, **options)
    q = QTensor(_wrap(fmt, r.q.arrays, own), fmt, r.q.shape, "float32")
    w_hat = q.decode()
    error = r.error if not fmt.balanced else float(quadratic_error(w_OI, w_hat, H_II))  # rows had lost their sizes
    return r._replace(q=q, w_hat_OI=w_hat, error=error, dead=dead)


@partial(jax.jit, static_argnums=0)
def _enter(fmt: Incoherent, w_OI: Array, own: Params) -> Array:
    return fmt.enter(w_OI, own)


@partial(jax.jit, static_argnums=0)
def _wrap(fmt: Incoherent, arrays: dict[str, Array], own: Params) -> dict[str, Array]:
    return fmt.wrap(arrays, own)


@partial(jax.jit, static_argnums=0)
def _pack(fmt: Format, codes: Int[Array, "Oc Ic"], params: Params) -> dict[str, Array]:
    return fmt.pack(codes, fmt.stored(params))


def quadratic_error(w_OI: Any, w_hat_OI: Any, H_II: Any) -> float:
    """`tr((W - W_hat) H (W - W_hat)^T)` in float64 on the host."""
    d = np.asarray(w_OI, np.float64) - np.asarray(w_hat_OI, np.float64)
    return float(np.sum((d @ np.asarray(H_II, np.float64)) * d))


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _factor(
    H_II: Any, diagonal: np.ndarray, order: np.ndarray, damping: float, name: str
) -> tuple[Array, Array, float]:
    """`(R, what was added to the diagonal, damping)` with `R R^T = H + diag(added)` in the given order of columns."""
    live = diagonal > 0
    mean = float(diagonal[live].mean()) if live.any() else 1.0
    while True:
        added = jnp.asarray(np.where(live, 0.0, mean) + damping * mean, jnp.float32)
        R = _reverse_cholesky(jnp.asarray(H_II, jnp.float32), jnp.asarray(order), added)
        if bool(jnp.isfinite(R).all()):
            return R, added, damping
        if damping >= MOST_DAMPING:
            raise InputError(
                f"Hessian of {name} is not positive definite with damping {damping:g} (allowed: sums of x x^T)"
            )
        damping = min(MOST_DAMPING, 10 * damping or 0.001)


@jax.jit
def _reverse_cholesky(H_II: Float[Array, "I I"], order_I: Array, added_I: Array) -> Float[Array, "I I"]:
    H = (H_II + jnp.diag(added_I))[order_I][:, order_I]
    return jnp.flip(jax.lax.linalg.cholesky(jnp.flip(H), symmetrize_input=False))


@partial(jax.jit, static_argnums=(0, 1, 2))
def _solve(
    fmt: Format,
    width: int,
    refit: bool,
    w_OI: Float[Array, "O I"],
    R_II: Float[Array, "I I"],
    order_I: Int[Array, " I"],
    importance_I: Float[Array, " I"],
    added_I: Float[Array, " I"],
) -> tuple[Int[Array, "Oc Ic"], Params, Float[Array, "O I"], Float[Array, ""]]:
    """`(codes, params, w_hat, quadratic error)`, blocks of `width` columns; `refit`: each with its own params.

    Works on transposed matrices, in which the columns of a tile are contiguous, and gathers what a tile needs (one
    product) instead of handing on what a tile leaves (a pass over the block): three times as fast on a CPU.
    """
    O, I = w_OI.shape
    t = fmt.tile[1]
    params = None if refit else fmt.fit_block(w_OI, importance_I)
    kept = None if refit else fmt.stored(params)
    w_IO = rearrange(w_OI, "o i -> i o")[order_I]
    chunk = width * _divisor(I // width, max(1, 512 // width))  # of the columns so far, so that none to come are read

    def one_block(carry: tuple[Array, Array], xs: Any) -> tuple[tuple[Array, Array], Any]:
        d_IO, loss_O = carry  # W - W_hat of the columns so far, zero in those to come
        start, columns_W, weight_W = xs
        w_WO = jax.lax.dynamic_slice_in_dim(w_IO, start, width)
        R_IW = jax.lax.dynamic_slice_in_dim(R_II, start, width, axis=1)
        R_WW = jax.lax.dynamic_slice_in_dim(R_IW, start, width)
        tiles = jnp.arange(width // t)
        R_ktt = rearrange(R_WW, "(k t) (j s) -> k j t s", t=t, s=t)[tiles, tiles]
        U_WW = jax.lax.linalg.triangular_solve(R_WW, jnp.eye(width), left_side=True, lower=False)
        F_WW = jnp.einsum("kts,ksw->ktw", R_ktt, rearrange(U_WW, "(k s) w -> k s w", s=t), precision=HIGHEST)
        F_WW = rearrange(F_WW, "k t w -> (k t) w")  # U_kk^-1 U_k,rest in the rows of tile k

        def add(j: Array, far_WO: Array) -> Array:
            R_CW = jax.lax.dynamic_slice_in_dim(R_IW, j * chunk, chunk)
            d_CO = jax.lax.dynamic_slice_in_dim(d_IO, j * chunk, chunk)
            return far_WO + jnp.einsum("cw,co->wo", R_CW, d_CO, precision=HIGHEST)

        far_WO = jax.lax.fori_loop(0, (start + chunk - 1) // chunk, add, jnp.zeros((width, O), jnp.float32))
        now_WO = w_WO + jnp.einsum("vw,vo->wo", U_WW, far_WO, precision=HIGHEST)
        own = fmt.fit_block(rearrange(now_WO, "w o -> o w"), weight_W) if refit else params
        stored = fmt.stored(own) if refit else kept  # a tile has less than what shares a parameter in k-quants

        def params_of(column: Any) -> Params:
            return fmt.params_at(stored, column, width if refit else I)

        spec, _ = jax.eval_shape(fmt.round_block, jax.ShapeDtypeStruct((O, t), jnp.float32), params_of(0))
        rows, per_tile = spec.shape  # of the codes of a tile

        def one_tile(k: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            e_WO, codes_WO, hats_WO, loss_O = state
            F_Wt = jax.lax.dynamic_slice_in_dim(F_WW, k * t, t, axis=1)
            near_tO = jnp.einsum("wt,wo->to", F_Wt, e_WO, precision=HIGHEST)
            w_tO = jax.lax.dynamic_slice_in_dim(now_WO, k * t, t) - near_tO
            at = params_of(k * t if refit else columns_W[k * t])
            code_tO, hat_tO = (rearrange(a, "o t -> t o") for a in fmt.round_block(rearrange(w_tO, "t o -> o t"), at))
            e_tO = w_tO - hat_tO
            loss_O += jnp.sum(jnp.square(jnp.einsum("to,ts->so", e_tO, R_ktt[k], precision=HIGHEST)), axis=0)
            new = ((e_WO, e_tO), (codes_WO, code_tO), (hats_WO, hat_tO))
            return *(jax.lax.dynamic_update_slice_in_dim(a, b, k * len(b), axis=0) for a, b in new), loss_O

        zeros = jnp.zeros((width, O), jnp.float32)
        state = (zeros, jnp.zeros((width // t * per_tile, rows), jnp.int32), zeros, loss_O)
        _, codes_WO, hats_WO, loss_O = jax.lax.fori_loop(0, width // t, one_tile, state)
        d_IO = jax.lax.dynamic_update_slice_in_dim(d_IO, w_WO - hats_WO, start, axis=0)
        return (d_IO, loss_O), (codes_WO, hats_WO, own if refit else {})

    xs = (jnp.arange(0, I, width), order_I.reshape(-1, width), importance_I.reshape(-1, width))
    carry = (jnp.zeros((I, O), jnp.float32), jnp.zeros(O, jnp.float32))
    (d_IO, loss_O), (codes, hats, fitted) = jax.lax.scan(one_block, carry, xs)
    order_K = order_I[::t] // t  # of the tiles
    back_K = jnp.zeros(I // t, order_I.dtype).at[order_K].set(jnp.arange(I // t))
    codes, w_hat_OI = (rearrange(a.reshape(I // t, -1, a.shape[-1])[back_K], "k c o -> o (k c)") for a in (codes, hats))
    if refit:
        params = {k: rearrange(a, "n r p ... -> r (n p) ...") for k, a in fitted.items()}
    error = jnp.sum(loss_O) - jnp.sum(jnp.square(d_IO) * added_I[order_I][:, None])
    return codes, params, w_hat_OI, error


@partial(jax.jit, static_argnums=(0, 1))
def _sweep(
    fmt: Format,
    sweeps: int,
    w_OI: Float[Array, "O I"],
    H_II: Float[Array, "I I"],
    added_I: Float[Array, " I"],
    params: Params,
    codes: Int[Array, "Oc Ic"],
    w_hat_OI: Float[Array, "O I"],
) -> tuple[Int[Array, "Oc Ic"], Float[Array, "O I"], Float[Array, ""]]:
    """`(codes, w_hat, quadratic error)` after going over the tiles of columns `sweeps` times: tile k becomes
    `Q(W_k + sum_{j != k} (W_j - W_hat_j) H_jk H_kk^-1)`, whose rounding error, in the norm of H_kk, is all of the error
    that it can change; so rows (or rows of tiles) where that does not fall stay. H is the damped one throughout."""
    O, I = w_OI.shape
    t, tall = fmt.tile[1], fmt.tile[0]
    stored = fmt.stored(params)
    H = H_II + jnp.diag(added_I)
    K = I // t
    c = codes.shape[1] // K
    H_Ktt = rearrange(H, "(k t) (j s) -> k j t s", t=t, s=t)[jnp.arange(K), jnp.arange(K)]
    inverse_Ktt = jnp.linalg.inv(H_Ktt)

    def one_tile(n: Array, state: tuple[Array, Array]) -> tuple[Array, Array]:
        codes_CR, d_IO = state  # codes and W - W_hat, both with what belongs to a tile of columns together
        k = n % K
        H_It = jax.lax.dynamic_slice_in_dim(H, k * t, t, axis=1)
        w_tO = jax.lax.dynamic_slice_in_dim(w_OI, k * t, t, axis=1).T
        d_tO = jax.lax.dynamic_slice_in_dim(d_IO, k * t, t)
        pull_tO = jnp.einsum("it,io->to", H_It, d_IO, precision=HIGHEST)
        off_tO = jnp.einsum("ts,to->so", inverse_Ktt[k], pull_tO, precision=HIGHEST) - d_tO
        goal_tO = w_tO + off_tO
        code_oc, hat_ot = fmt.round_block(goal_tO.T, fmt.params_at(stored, k * t, I))

        def cost(hat_tO: Array) -> Array:  # of each row of tiles
            e = goal_tO - hat_tO
            each_O = jnp.sum(e * jnp.einsum("ts,so->to", H_Ktt[k], e, precision=HIGHEST), axis=0)
            return jnp.sum(each_O.reshape(-1, tall), axis=1)

        better = cost(hat_ot.T) < cost(w_tO - d_tO)
        d_tO = jnp.where(jnp.repeat(better, tall), w_tO - hat_ot.T, d_tO)
        was = jax.lax.dynamic_slice_in_dim(codes_CR, k * c, c)
        code_cR = jnp.where(jnp.repeat(better, code_oc.shape[0] // better.size), code_oc.T, was)
        return (
            jax.lax.dynamic_update_slice_in_dim(codes_CR, code_cR, k * c, axis=0),
            jax.lax.dynamic_update_slice_in_dim(d_IO, d_tO, k * t, axis=0),
        )

    codes_CR, d_IO = jax.lax.fori_loop(0, sweeps * K, one_tile, (codes.T, (w_OI - w_hat_OI).T))
    error = jnp.sum(jnp.einsum("io,ij->jo", d_IO, H_II, precision=HIGHEST) * d_IO)
    return codes_CR.T, fmt.dequantize(codes_CR.T, stored), error


# -- the solvers ------------------------------------------------------------------------------------------------------


def check_format(fmt: Format, solver: str) -> None:
    """Raises `InputError` for formats whose codes depend on other columns: columns are rounded one after the other."""
    inner = fmt.inner if isinstance(fmt, Incoherent) else fmt
    if not inner.idempotent:
        raise InputError(f"format {fmt.name!r} with solver {solver} (allowed: those whose columns are rounded apart)")


def _solve_weight(w_OI: Any, H_II: Any, fmt: Format, options: Any, name: str) -> Solved:
    o, act = options, options.order == "act"
    return gptq(w_OI, H_II, fmt, block=o.block, damping=o.damping, act_order=act, sweeps=o.sweeps, name=name)


# Of each layer first q, k and v, ...: see `lowbit.ptq.layerwise`. Options are those of `GptqOptions`.
SOLVER = register(solver(layerwise.Method("gptq", GptqOptions, _solve_weight, check_format)))
quantize, quantize_dir = SOLVER.quantize, SOLVER.quantize_dir
# The same with QuIP#'s defaults (see `LdlqOptions`).
register(solver(layerwise.Method("ldlq", LdlqOptions, _solve_weight, check_format)))
