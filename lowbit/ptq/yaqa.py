"""YAQA (arXiv 2505.22988): rounding for the least divergence of the whole model, with feedback on both sides.

The Hessian of the divergence from the full-precision model, as a function of one weight, is taken to be a Kronecker
product `H_O (x) H_I`, so that the error is `tr(H_O D H_I D^T)`, `D = W - W_hat`. With `H_O = U_O D_O U_O^T`,
`H_I = U_I D_I U_I^T` (`lowbit.linalg.block_ldl`, upper) it is `tr(D_O eta D_I eta^T)`, `eta = U_O^T D U_I`, and the
tile (i, j) of `eta` holds errors of tiles up to row i and column j alone. So tiles are rounded from the top left:

    W_hat_ij = Q(W_ij + (U_O^T D U_I)_ij without D_ij itself)

Tiles of an anti-diagonal do not see one another and are rounded together. `H_O = I` is LDLQ.

Sketch B of the paper's two: with G the gradient of one sequence's loss (labels drawn from the model itself, so that the
expected outer product is the Fisher matrix, the Hessian of the divergence), `H_I = E[G^T G] / O`, `H_O = E[G G^T] / I`;
each further round weighs them with the last one's other factor (power iteration).
"""

import math
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, Params, QTensor
from lowbit.linalg.block_ldl import damped
from lowbit.models.config import ModelConfig
from lowbit.models.decoder import forward
from lowbit.ptq import modelwise, rtn
from lowbit.ptq.base import register
from lowbit.ptq.blockwise import Solved, solver
from lowbit.ptq.gptq import check_format
from lowbit.ptq.options import YaqaOptions
from lowbit.tree import Tree
from lowbit.vq.incoherent import Incoherent

HIGHEST = jax.lax.Precision.HIGHEST


class Sketch(NamedTuple):
    """The two factors of a weight's Hessian."""

    H_II: Float[np.ndarray | Array, "I I"]
    H_OO: Float[np.ndarray | Array, "O O"]


def yaqa(
    w_OI: Float[Array | np.ndarray, "O I"],
    sketch: Sketch,
    fmt: Format,
    *,
    damping: float = 0.01,
    name: str = "weight",
) -> Solved:
    """Rounds `w` to `fmt` for the least `tr(H_O D H_I D^T)`; parameters are fitted to the weight beforehand.

    Both factors get `damping` times the mean of their diagonal, ten times as much where there is no factorization
    still, up to 1.0. A format behind random rotations is solved in its rotated space. Raises `InputError` (with `name`)
    on values that are not finite and shapes that do not fit, and as the format's `check` does.
    """
    check_format(fmt, "yaqa")
    fmt.check(w_OI.shape)
    O, I = w_OI.shape
    for side, H, n in (("input", sketch.H_II, I), ("output", sketch.H_OO, O)):
        if tuple(H.shape) != (n, n):
            raise InputError(f"{side} Hessian of {name} has shape {list(H.shape)} (allowed: [{n}, {n}])")
    H_II, H_OO = (np.asarray(H, np.float64) for H in sketch)
    w = jnp.asarray(w_OI, jnp.float32)
    if not bool(jnp.isfinite(w).all()):
        raise InputError(f"{name} holds NaN or infinite values (allowed: finite weights)")
    dead = np.diagonal(H_II) == 0
    w = jnp.where(jnp.asarray(dead), 0.0, w)
    if isinstance(fmt, Incoherent):
        own = fmt.signs(w)
        rotated = Sketch(fmt.hessian(H_II, own), fmt.output_hessian(H_OO, own))
        r = yaqa(jax.jit(fmt.enter)(w, own), rotated, fmt.inner, damping=damping, name=name)
        q = QTensor(jax.jit(fmt.wrap)(r.q.arrays, own), fmt, (O, I), "float32")
        return r._replace(q=q, w_hat_OI=q.decode(), dead=int(dead.sum()))
    U_OO, _, damping_o = damped(H_OO, fmt.tile[0], damping, f"the outputs of {name}")
    U_II, _, damping_i = damped(H_II, fmt.tile[1], damping, f"the inputs of {name}")
    params = fmt.fitted(w)
    fmt.check_values(w, params)
    sizes = tuple(t * _divisor(n // t, max(1, _block(t) // t)) for n, t in zip((O, I), fmt.tile))
    U = (jnp.asarray(a, jnp.float32) for a in (U_OO, U_II))
    arrays, w_hat = _solve(fmt, sizes, w, *U, params)
    d = np.asarray(w, np.float64) - np.asarray(w_hat, np.float64)
    error = float(np.sum((H_OO @ d @ H_II) * d))
    q = QTensor(arrays, fmt, (O, I), "float32")
    return Solved(q, w_hat, error, max(damping_o, damping_i), int(dead.sum()))


def _block(tile: int) -> int:
    """Rows or columns that are kept up to date tile by tile (their number times this is the work there); all the rest
    by products of matrices."""
    return 32 if tile == 1 else 8 * tile


def _divisor(n: int, most: int) -> int:
    return max(d for d in range(1, min(n, most) + 1) if n % d == 0)


def _diagonal(step: Any, rows: int, columns: int) -> tuple[Array, Array]:
    """Row and column of the cells of an anti-diagonal, as many as the longest has; `rows` and `columns` (out of range)
    in place of those that there are not."""
    row = jnp.maximum(0, step - (columns - 1)) + jnp.arange(min(rows, columns))
    there = row <= jnp.minimum(rows - 1, step)
    return jnp.where(there, row, rows), jnp.where(there, step - row, columns)


@partial(jax.jit, static_argnums=(0, 1))
def _solve(
    fmt: Format,
    sizes: tuple[int, ...],
    w_OI: Float[Array, "O I"],
    U_OO: Float[Array, "O O"],
    U_II: Float[Array, "I I"],
    params: Params,
) -> tuple[dict[str, Array], Float[Array, "O I"]]:
    """`(packed arrays, w_hat)`. Blocks of `sizes` go along anti-diagonals, and inside of each so do tiles: what other
    blocks add comes from `P = D U_I`, kept up to date, in one product `U_O^T P` for a block."""
    (O, I), (s, t), (bo, bi) = w_OI.shape, fmt.tile, sizes
    M, N, m, n = O // bo, I // bi, bo // s, bi // t  # blocks, and tiles in each
    stored = fmt.stored(params)
    w_MbNc = w_OI.reshape(M, bo, N, bi)
    U_ObM, U_cNI = U_OO.reshape(O, M, bo), U_II.reshape(N, bi, I)
    wide = {"mode": "fill", "fill_value": 0}  # cells that there are not
    count = min(m, n) * min(M, N)  # tiles that are rounded at once
    spec, _ = jax.eval_shape(fmt.round_block, jax.ShapeDtypeStruct((count * s, t), jnp.float32), _at(fmt, stored, O, I))
    r, c = spec.shape[0] // count, spec.shape[1]  # codes of a tile

    def one_block(carry: tuple[Array, Array, Array], step: Array) -> tuple[tuple[Array, Array, Array], None]:
        P_MbI, hats, codes = carry
        A, J = _diagonal(step, M, N)
        P_OKc = P_MbI.reshape(O, N, bi).at[:, J].get(**wide)
        U_OKb = U_ObM.at[:, A].get(**wide)
        w_Kbc = w_MbNc.at[A, :, J].get(**wide)
        base_Kbc = w_Kbc + jnp.einsum("okb,okc->kbc", U_OKb, P_OKc, precision=HIGHEST)
        uo_Kbb = U_ObM.reshape(M, bo, M, bo).at[A, :, A].get(**wide)
        ui_Kcc = U_cNI.reshape(N, bi, N, bi).at[J, :, J].get(**wide)

        def one_tile(step: Array, state: tuple[Array, Array, Array, Array]) -> tuple[Array, Array, Array, Array]:
            P_Kbc, d_Kbc, hats_K, codes_K = state
            a, b = _diagonal(step, m, n)
            goal_Kbc = base_Kbc + jnp.einsum("kab,kac->kbc", uo_Kbb, P_Kbc, precision=HIGHEST)
            cells = jnp.stack([goal_Kbc, w_Kbc]).reshape(2, -1, m, s, n, t)
            goal, w = cells.at[:, :, a, :, b].get(**wide).transpose(1, 0, 2, 3, 4)  # [tiles, K, s, t]
            row = (A * bo)[None, :, None] + (a * s)[:, None, None] + jnp.arange(s)
            column = (J * bi)[None, :] + (b * t)[:, None]
            at = _at(fmt, stored, O, I, row.reshape(-1), jnp.repeat(column.reshape(-1), s))
            code, hat = fmt.round_block(goal.reshape(-1, t), at)
            there = ((A < M) & (a < m)[:, None])[:, :, None, None]
            hat = jnp.where(there, hat.reshape(goal.shape), 0.0)
            d = jnp.where(there, w - hat, 0.0)
            u_aKtc = ui_Kcc.reshape(-1, n, t, bi).at[:, b].get(**wide)
            add = jnp.einsum("akst,katc->kasc", d, u_aKtc, precision=HIGHEST)
            P_Kbc = P_Kbc.reshape(-1, m, s, bi).at[:, a].add(add, mode="drop").reshape(P_Kbc.shape)
            code = code.reshape(len(a), -1, r, c)

            def put(whole: Array, part: Array, rows: int, columns: int) -> Array:
                cells = whole.reshape(-1, m, rows, n, columns)
                return cells.at[:, a, :, b].set(part, mode="drop").reshape(whole.shape)

            return P_Kbc, put(d_Kbc, d, s, t), put(hats_K, hat, s, t), put(codes_K, code, r, c)

        zeros = jnp.zeros_like(w_Kbc)
        state = (zeros, zeros, zeros, jnp.zeros((len(A), m * r, n * c), jnp.int32))
        _, d_Kbc, hats_K, codes_K = jax.lax.fori_loop(0, m + n - 1, one_tile, state)
        add = jnp.einsum("kbc,kci->kbi", d_Kbc, U_cNI.at[J].get(**wide), precision=HIGHEST)
        return (
            P_MbI.at[A].add(add, mode="drop"),
            hats.at[A, :, J].set(hats_K, mode="drop"),
            codes.at[A, :, J].set(codes_K, mode="drop"),
        ), None

    start = (
        jnp.zeros((M, bo, I), jnp.float32),
        jnp.zeros_like(w_MbNc),
        jnp.zeros((M, m * r, N, n * c), jnp.int32),
    )
    (_, hats, codes), _ = jax.lax.scan(one_block, start, jnp.arange(M + N - 1))
    return fmt.pack(codes.reshape(M * m * r, N * n * c), stored), hats.reshape(O, I)


def _at(fmt: Format, stored: Params, O: int, I: int, row: Any = 0, column: Any = 0) -> Params:
    """Parameters of rows of weights from anywhere in the matrix: each row's own, and of single columns each column's
    (see `Format.params_at`)."""
    scalar = fmt.tile == (1, 1)

    def part(a: Array) -> Array:
        if not scalar:
            return a.at[row].get(mode="clip") if a.shape == (O, 1) else a
        at = row if a.shape[0] == O else jnp.zeros_like(row)
        return a.at[at, column * a.shape[1] // I].get(mode="clip").reshape(-1, 1)

    return {k: part(a) for k, a in stored.items()}


# -- the Hessians -----------------------------------------------------------------------------------------------------


def sketches(
    config: ModelConfig,
    params: Tree,
    paths: tuple[str, ...],
    tokens_BT: Int[np.ndarray, "B T"],
    rounds: int = 1,
    seed: int = 0,
) -> dict[str, Sketch]:
    """The Kronecker factors (sketch B) of these weights of a model, from one backward pass for each row and round.

    Raises `InputError` naming the weight whose gradient is not finite, or is 0 throughout.
    """
    flat = dict(trees.items(params))
    weights = {p: jnp.asarray(modelwise.weight(flat[p]), jnp.float32) for p in paths}
    found: dict[str, Sketch] | None = None
    for _ in range(rounds):
        sums = {p: Sketch(*(jnp.zeros((n, n), jnp.float32) for n in w.shape[::-1])) for p, w in weights.items()}
        for i, row in enumerate(tokens_BT):
            key = jax.random.fold_in(jax.random.key(seed), i)
            sums = _add_sequence(config, weights, flat, jnp.asarray(row), key, sums, found)
        found = {}
        for path, (H_II, H_OO) in sums.items():
            size = float(jnp.trace(H_II)) + float(jnp.trace(H_OO))
            if not math.isfinite(size) or size == 0:
                what = "0 on all of the text" if size == 0 else "not finite"
                raise InputError(f"the gradient of {path} is {what} (allowed: finite, not 0)")
            found[path] = Sketch(H_II / jnp.mean(jnp.diagonal(H_II)), H_OO / jnp.mean(jnp.diagonal(H_OO)))
    return found or {}


@partial(jax.jit, static_argnums=0, donate_argnums=5)
def _add_sequence(
    config: ModelConfig,
    weights: dict[str, Array],
    rest: dict[str, Any],
    tokens_T: Int[Array, " T"],
    key: Array,
    sums: dict[str, Sketch],
    last: dict[str, Sketch] | None,
) -> dict[str, Sketch]:
    """`sums` plus one sequence's `G^T H_O G` and `G H_I G^T`."""

    def loss(weights: dict[str, Array]) -> Array:
        leaves = {**rest, **{p: rtn.with_weight(rest[p], w) for p, w in weights.items()}}
        logits_TV = forward(trees.build(leaves), tokens_T[None], config)[0]
        drawn_T = jax.random.categorical(key, jax.lax.stop_gradient(logits_TV))
        logp_TV = jax.nn.log_softmax(logits_TV)
        return -jnp.sum(jnp.take_along_axis(logp_TV, drawn_T[:, None], axis=1)) / len(tokens_T)

    out = {}
    for p, g in jax.grad(loss)(weights).items():
        left, right = (g, g) if last is None else (jnp.dot(last[p].H_OO, g, precision=HIGHEST), None)
        if last is not None:
            right = jnp.dot(g, last[p].H_II, precision=HIGHEST)
        H_II = jnp.einsum("oi,oj->ij", g, left, precision=HIGHEST)
        H_OO = jnp.einsum("oi,pi->op", right, g, precision=HIGHEST)
        out[p] = Sketch(sums[p].H_II + H_II, sums[p].H_OO + H_OO)
    return out


# -- the solver -------------------------------------------------------------------------------------------------------


def _find(
    config: ModelConfig, params: Tree, paths: tuple[str, ...], tokens_BT: Any, options: YaqaOptions
) -> dict[str, Sketch]:
    return sketches(config, params, paths, tokens_BT, options.rounds, options.seed)


def _solve_weight(w_OI: Any, sketch: Sketch, fmt: Format, options: YaqaOptions, name: str) -> Solved:
    return yaqa(w_OI, sketch, fmt, damping=options.damping, name=name)


register(solver(modelwise.Method("yaqa", YaqaOptions, _find, _solve_weight, check_format)))
