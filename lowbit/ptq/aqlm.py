"""AQLM (arXiv 2401.06118): additive codebooks fitted to the inputs of each linear.

It starts from k-means and the codes of GPTQ's pass over the columns, which the paper does not make. Then codebooks and
codes take turns in making `tr((W - W_hat) H (W - W_hat)^T)` smaller, until one turn gains less than `tol`:

- **codes** by a beam search over whole rows. Groups of columns come in random order, and the codebooks of a group one
  after the other; with everything else fixed, changing a code of a row from b to c changes the row's error, in units of
  its squared scale, by a quadratic in the code vector that needs one column block of `(W - W_hat) H` alone. The best
  `beam` of all states times codes stay; a beam of 1 is iterated conditional modes. Rows are independent.
- **codebooks** by conjugate gradients (`lowbit.ptq.refit`) and scales in closed form; the paper takes 100 Adam steps.

The error never rises: the current code is among those compared, and a refit that gains nothing is dropped.
A search takes a fixed number of states at a time, so its memory is bounded whatever the weight (`sweep`).
What the paper does besides, fine-tuning each block, is training (`docs/vq_codebooks.md`).
"""

from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError
from lowbit.formats.base import Format, Params
from lowbit.ptq import layerwise
from lowbit.ptq.base import register
from lowbit.ptq.blockwise import Solved, solver
from lowbit.ptq.options import AqlmOptions
from lowbit.ptq.refit import HIGHEST, STEPS, refit
from lowbit.ptq.weighing import feedback, finished, weighed
from lowbit.vq import kmeans
from lowbit.vq.additive import Additive

BLOCK = 128  # columns whose pull is computed together
STATES = 256  # that are searched at a time; twice and half as many are slower, out of the caches and in short loops
SPACE = 128 << 20  # bytes that a search may hold


class Beam(NamedTuple):
    """S states of each row; what belongs to columns first. x are the weights in units of the row's scale, y the code
    vectors' sums, y_0 those at the start of the sweep."""

    codes: Int[Array, "G M S O"]
    moved: Float[Array, "I S O"]  # y - y_0
    pull: Float[Array, "I O"]  # H (x - y_0)
    error: Float[Array, "S O"]  # (x - y)^T H (x - y)


def aqlm(
    w_OI: Float[Array | np.ndarray, "O I"],
    H_II: Float[Array | np.ndarray, "_ _"],  # [I, I]
    fmt: Format,
    *,
    beam: int = 1,
    turns: int = 8,
    tol: float = 0.01,
    damping: float = 0.01,
    seed: int = 0,
    name: str = "weight",
    history: list[tuple[str, float]] | None = None,
) -> Solved:
    """`w` as additive codes for the least error in the norm of H. `history`, if given, gets `("init" | "codes" |
    "books", error)` of each turn, the error with damping. Raises `InputError` for other formats and as `weighed` does.
    """
    check_format(fmt, "aqlm")
    own = weighed(w_OI, H_II, fmt, damping, name)
    history = [] if history is None else history
    codes, stored, error = feedback(fmt, own, True, name)
    history.append(("init", float(error)))
    rng = np.random.default_rng(seed)
    for _ in range(turns):
        before = history[-1][1]
        stored, error = refit(fmt, STEPS, own.w_OI, own.H_II, codes, stored, error)
        history.append(("books", float(error)))
        codes, error = sweep(fmt, beam, own.w_OI, own.H_II, codes, stored, order_of(fmt, codes.shape[1], rng))
        history.append(("codes", float(error)))
        if history[-1][1] > (1 - tol) * before:
            break
    stored, error = refit(fmt, STEPS, own.w_OI, own.H_II, codes, stored, error)
    history.append(("books", float(error)))
    return finished(fmt, own, codes, stored)


def order_of(fmt: Additive, width: int, rng: np.random.Generator) -> Int[np.ndarray, "B n"]:
    """Random order of the groups: blocks of about `BLOCK` neighbouring columns, and the groups inside of each."""
    G = width // fmt.number
    n = max(d for d in range(1, min(G, max(1, BLOCK // fmt.size)) + 1) if G % d == 0)
    blocks = rng.permutation(G // n)
    return np.stack([b * n + rng.permutation(n) for b in blocks]).astype(np.int32)


def rows_at_once(fmt: Additive, beam: int, width: int) -> int:
    """Rows searched together: `STATES` states, fewer where those and their scores would take more than `SPACE`."""
    scores = 6 * beam * 2**fmt.bits if beam > 1 else 0
    each = 4 * (2 * beam * width * (1 + fmt.number / fmt.size) + 4 * width + scores)
    return max(1, min(STATES // beam, int(SPACE / each)))


@partial(jax.jit, static_argnums=(0, 1))
def sweep(
    fmt: Additive,
    beam: int,
    w_OI: Float[Array, "O I"],
    H_II: Float[Array, "I I"],
    codes_OQ: Int[Array, "O Q"],
    stored: Params,
    order_Bn: Int[Array | np.ndarray, "B n"],
) -> tuple[Int[Array, "O Q"], Float[Array, ""]]:
    """`(codes, error)` after one search over all groups in this order, `rows_at_once` rows after the other.

    Besides arguments and results it holds no more than `SPACE` bytes, whatever the number of rows, or what one row
    takes: `8 beam I (1 + M / G) + 16 I` and, beyond a beam of 1, `24 beam 2^B`.
    """
    O, I = w_OI.shape
    R = min(O, rows_at_once(fmt, beam, I))
    order = jnp.asarray(order_Bn, jnp.int32)
    books = stored["codebook"][:, 0]

    def some(c: Array, found: tuple[Array, Array]) -> tuple[Array, Array]:
        at = jnp.minimum(c * R, O - R)  # the last rows may be searched twice
        w, start, scale = (jax.lax.dynamic_slice_in_dim(a, at, R) for a in (w_OI, codes_OQ, stored["scale"]))
        own = {**stored, "scale": scale}
        state = start_of(fmt, beam, w, H_II, start, own)
        state = jax.lax.fori_loop(0, len(order), lambda i, s: search_block(s, books, H_II, order, i), state)
        best = jnp.argmin(state.error, axis=0)
        codes = jnp.take_along_axis(state.codes, best[None, None, None], axis=2)[:, :, 0]
        codes = rearrange(codes, "j m o -> o (j m)")
        d = w - fmt.dequantize(codes, own)
        each = codes, jnp.sum(jnp.matmul(d, H_II, precision=HIGHEST) * d, axis=1)
        return tuple(jax.lax.dynamic_update_slice_in_dim(a, part, at, 0) for a, part in zip(found, each))

    codes, error_O = jax.lax.fori_loop(0, -(-O // R), some, (jnp.zeros_like(codes_OQ), jnp.zeros(O)))
    return codes, jnp.sum(error_O)


def start_of(fmt: Additive, beam: int, w_OI: Array, H_II: Array, codes_OQ: Array, stored: Params) -> Beam:
    """The codes as the first of `beam` states; the others wait with an infinite error."""
    O, I = w_OI.shape
    y_OI = fmt.dequantize(codes_OQ, {**stored, "scale": jnp.ones_like(stored["scale"])})
    off_OI = w_OI / stored["scale"] - y_OI
    pull_OI = jnp.matmul(off_OI, H_II, precision=HIGHEST)
    error_SO = jnp.full((beam, O), jnp.inf).at[0].set(jnp.sum(pull_OI * off_OI, axis=1))
    codes_GMO = rearrange(codes_OQ, "o (j m) -> j m o", m=fmt.number)
    codes = jnp.repeat(codes_GMO[:, :, None], beam, axis=2)
    return Beam(codes, jnp.zeros((I, beam, O)), pull_OI.T, error_SO)


def search_block(
    state: Beam, books_MKd: Float[Array, "M K d"], H_II: Float[Array, "I I"], order_Bn: Int[Array, "B n"], i: Any
) -> Beam:
    """The states after searching the groups of block i of `order`, whose columns are neighbours, in this order. Blocks
    before it have been searched; those after it are as they were, in all states, which saves half of the products."""
    M, K, d = books_MKd.shape
    S, O = state.error.shape
    n = order_Bn.shape[1]
    W = n * d
    firsts = jnp.min(order_Bn, axis=1)
    first, groups_n = firsts[i], order_Bn[i]
    H_WI = jax.lax.dynamic_slice_in_dim(H_II, first * d, W)
    H_WW = jax.lax.dynamic_slice_in_dim(H_WI, first * d, W, axis=1)

    def pulled(k: Array, near: Array) -> Array:
        shift = jax.lax.dynamic_slice_in_dim(state.moved, firsts[k] * d, W)
        H_Ww = jax.lax.dynamic_slice_in_dim(H_WI, firsts[k] * d, W, axis=1)
        return near - jnp.einsum("vw,wso->vso", H_Ww, shift, precision=HIGHEST)

    near = jax.lax.dynamic_slice_in_dim(state.pull, first * d, W)
    near = jnp.broadcast_to(near[:, None], (W, S, O))  # H (x - y) of the block's columns
    near = jax.lax.fori_loop(0, i, pulled, near)
    codes = jax.lax.dynamic_slice_in_dim(state.codes, first, n)  # [n, M, S, O]
    origin = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[:, None], (S, O))  # the state at the block's start

    def group(g: Array, carry: tuple[Array, ...]) -> tuple[Array, ...]:
        codes, near, moved, error, origin = carry
        j = groups_n[g] - first
        H_dW = jax.lax.dynamic_slice_in_dim(H_WW, j * d, d)
        H_dd = jax.lax.dynamic_slice_in_dim(H_dW, j * d, d, axis=1)
        q_MK = jnp.einsum("mkv,vu,mku->mk", books_MKd, H_dd, books_MKd, precision=HIGHEST)
        mine = jax.lax.dynamic_index_in_dim(codes, j, keepdims=False)  # [M, S, O]
        pull = jax.lax.dynamic_slice_in_dim(near, j * d, d)  # [d, S, O], of the group, up to date
        went = jnp.zeros_like(pull)  # y of the group minus y before
        parents = jnp.broadcast_to(jnp.arange(S, dtype=jnp.int32)[:, None], (S, O))
        for m in range(M):
            old = jnp.take(books_MKd[m].T, mine[m], axis=1)  # [d, S, O]
            pull = pull + jnp.einsum("vu,uso->vso", H_dd, old, precision=HIGHEST)
            without = error - (jnp.take(q_MK[m], mine[m]) - 2 * jnp.sum(old * pull, axis=0))
            if S == 1:
                ((score, code),) = kmeans.nearest(pull, books_MKd[m][None], 1, q_MK[m][None])
                error, chosen = score + without, code
            else:
                dot = jnp.einsum("vso,kv->osk", pull, books_MKd[m], precision=HIGHEST)
                gain = (2 * dot - q_MK[m]) - without.T[..., None]
                most, at = jax.lax.top_k(rearrange(gain, "o s k -> o (s k)"), S)
                error, parent, chosen = -most.T, at.T // K, at.T % K
                mine, pull, went, parents, old = (_reorder(a, parent) for a in (mine, pull, went, parents, old))
            new = jnp.take(books_MKd[m].T, chosen, axis=1)
            pull = pull - jnp.einsum("vu,uso->vso", H_dd, new, precision=HIGHEST)
            went = went + new - old
            mine = mine.at[m].set(chosen)
        if S > 1:
            codes, near, moved, origin = (_reorder(a, parents) for a in (codes, near, moved, origin))
        near = near - jnp.einsum("vw,vso->wso", H_dW, went, precision=HIGHEST)
        codes = jax.lax.dynamic_update_index_in_dim(codes, mine, j, 0)
        moved = jax.lax.dynamic_update_slice_in_dim(moved, went, j * d, axis=0)
        return codes, near, moved, error, origin

    start = (codes, near, jnp.zeros_like(near), state.error, origin)
    codes, _, moved, error, origin = jax.lax.fori_loop(0, n, group, start)

    def follow(k: Array, both: tuple[Array, Array]) -> tuple[Array, Array]:
        new = []
        for a, at, size in zip(both, (firsts[k], firsts[k] * d), (n, W)):
            part = _reorder(jax.lax.dynamic_slice_in_dim(a, at, size), origin)
            new.append(jax.lax.dynamic_update_slice_in_dim(a, part, at, axis=0))
        return tuple(new)

    every, shifts = state.codes, state.moved
    if S > 1:
        every, shifts = jax.lax.fori_loop(0, i, follow, (every, shifts))
    every = jax.lax.dynamic_update_slice_in_dim(every, codes, first, axis=0)
    shifts = jax.lax.dynamic_update_slice_in_dim(shifts, moved, first * d, axis=0)
    return Beam(every, shifts, state.pull, error)


def _reorder(a: Array, which_SO: Int[Array, "S O"]) -> Array:
    """States `[..., S, O]` by the index of the state that each comes from."""
    return jnp.take_along_axis(a, which_SO.reshape((1,) * (a.ndim - 2) + which_SO.shape), axis=-2)


# -- the solver -------------------------------------------------------------------------------------------------------


def check_format(fmt: Format, solver: str) -> None:
    """Raises `InputError` for formats without additive codebooks."""
    if not isinstance(fmt, Additive):
        raise InputError(f"format {fmt.name!r} with solver {solver} (allowed: aqlm:MxB:gG)")


def _solve_weight(w_OI: Any, H_II: Any, fmt: Format, options: Any, name: str) -> Solved:
    o = options
    return aqlm(w_OI, H_II, fmt, beam=o.beam, turns=o.turns, tol=o.tol, damping=o.damping, seed=o.seed, name=name)


register(solver(layerwise.Method("aqlm", AqlmOptions, _solve_weight, check_format)))
