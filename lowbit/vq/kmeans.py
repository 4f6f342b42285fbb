"""k-means and the search for code vectors, in whole numbers: the same bits in every program.

Weights and code vectors are rounded to multiples of a power of two, so small that every sum of squares that occurs is
a whole number below 2^24, which float32 holds exactly in any order of summation. A search is therefore the same eager,
jitted, batched and sharded, ties included (the first code wins), and so are the means that k-means takes. What is
lost is the resolution of the *search*: `limit(d, M)` steps from 0 to the largest weight (724 at d = 8, M = 1), where
rounding to a codebook of 2 bits a weight leaves errors of tens of steps. Decoding uses codebooks as they are stored.

`x_BNd` are N vectors of length d for each of B codebooks `book_BKd`, K a power of two.
"""

import math
from functools import partial
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.formats.floats import power_of_two

MOST = 1 << 18  # vectors that a codebook is fitted to; more are sampled evenly
ROUNDS = 12  # of k-means
REFINE = 6  # rounds in which the codebooks of several stages are fitted together
UNROLL = 8  # codes that one pass over the vectors compares


def limit(d: int, stages: int) -> int:
    """Largest magnitude L of a coordinate with `d ((stages + 1) L)^2 < 2^24`: the distance of a vector to any sum of
    `stages` code vectors is then exact in float32."""
    return math.isqrt(((1 << 24) - 1) // d) // (stages + 1)


def unit(x_BNd: Float[Array, "B N d"], books: list[Array], stages: int) -> Float[Array, "B 1 1"]:
    """Powers of two that take the vectors and the code vectors of each codebook to at most `limit`."""
    top = jnp.max(jnp.abs(x_BNd), axis=(1, 2), keepdims=True)
    for book in books:
        top = jnp.maximum(top, jnp.max(jnp.abs(book), axis=(1, 2), keepdims=True))
    return power_of_two((limit(x_BNd.shape[-1], stages) - 1) / jnp.maximum(top, 2.0**-100))


def take(book_BKd: Float[Array, "B K d"], codes_BN: Int[Array, "B N"]) -> Float[Array, "B N d"]:
    """The code vectors of codes."""
    B, K, d = book_BKd.shape
    flat = codes_BN + (jnp.arange(B, dtype=jnp.int32) * K)[:, None]
    return jnp.take(book_BKd.reshape(B * K, d), flat, axis=0, mode="clip")


@partial(jax.jit, static_argnames="keep")
def nearest(
    r_dBN: Float[Array, "d B N"], book_BKd: Float[Array, "B K d"], keep: int = 1, norm_BK: Any = None
) -> list[tuple[Float[Array, "B N"], Int[Array, "B N"]]]:
    """The `keep` least of `|c_k|^2 - 2 <r, c_k>` over codes k, with the codes, the least first; the first of equals.
    `norm_BK`, if given, stands for `|c_k|^2`.

    Loops over codes with the vectors along the fast axis, so nothing of size N K is held.
    """
    _, K, d = book_BKd.shape
    step = min(UNROLL, K)
    book_KBd = rearrange(book_BKd, "b k d -> k b d")
    norm_KB = jnp.sum(jnp.square(book_KBd), axis=-1) if norm_BK is None else norm_BK.T

    def some(i: Array, best: list[tuple[Array, Array]]) -> list[tuple[Array, Array]]:
        best = list(best)
        c = jax.lax.dynamic_slice_in_dim(book_KBd, i * step, step)
        norm = jax.lax.dynamic_slice_in_dim(norm_KB, i * step, step)
        for u in range(step):
            dot = c[u, :, 0, None] * r_dBN[0]
            for v in range(1, d):
                dot = dot + c[u, :, v, None] * r_dBN[v]
            best = _insert(best, norm[u, :, None] - 2 * dot, jnp.full(dot.shape, i * step + u, jnp.int32))
        return best

    inf = jnp.full(r_dBN.shape[1:], jnp.inf)
    return jax.lax.fori_loop(0, K // step, some, [(inf, jnp.zeros(inf.shape, jnp.int32))] * keep)


def _insert(best: list[tuple[Array, Array]], score: Array, code: Array) -> list[tuple[Array, Array]]:
    """The same number of least scores, in order, with one more to choose from."""
    out = []
    for low, kept in best:
        better = score < low
        out.append((jnp.minimum(score, low), jnp.where(better, code, kept)))
        score, code = jnp.maximum(score, low), jnp.where(better, kept, code)
    return out


@partial(jax.jit, static_argnames="beam")  # one program for a shape, even where every operation is its own
def search(x_BNd: Float[Array, "B N d"], books: list[Array], beam: int) -> list[Int[Array, "B N"]]:
    """Codes, one array a stage, whose code vectors' sum is near to x: exactly the nearest for one stage, by a beam
    search for several. Vectors and books are whole numbers (see the module)."""
    B, N, _ = x_BNd.shape
    r, total = rearrange(x_BNd, "b n d -> d b 1 n"), jnp.zeros((B, 1, N), jnp.float32)  # of the states so far
    codes: list[Array] = []  # [B, S, N] of each stage so far
    for m, book in enumerate(books):
        S, K = r.shape[2], book.shape[1]
        keep = min(beam, S * K) if m + 1 < len(books) else 1
        found = nearest(rearrange(r, "d b s n -> d b (s n)"), book, min(keep, K))
        best = [(jnp.full((B, N), jnp.inf), jnp.zeros((B, N), jnp.int32))] * keep
        for score, code in found:
            score, code = score.reshape(B, S, N) + total, code.reshape(B, S, N)
            for s in range(S):
                best = _insert(best, score[:, s], code[:, s] + s * K)
        total = jnp.stack([b[0] for b in best], axis=1)
        chosen = jnp.stack([b[1] for b in best], axis=1)
        parent, chosen = chosen // K, chosen % K
        codes = [_of_parent(c, parent) for c in codes] + [chosen]
        taken = rearrange(take(book, chosen.reshape(B, -1)), "b (s n) d -> d b s n", n=N)
        r = _of_parent(r, parent) - taken
    return [c[:, 0] for c in codes]


def _of_parent(a: Array, parent_BSN: Int[Array, "B S N"]) -> Array:
    """States `[..., S, N]` in the order of `parent`, elementwise."""
    out = jnp.broadcast_to(a[..., :1, :], (*a.shape[:-2], *parent_BSN.shape[-2:]))
    for s in range(1, a.shape[-2]):
        out = jnp.where(parent_BSN == s, a[..., s : s + 1, :], out)
    return out


def means(
    x_BNd: Float[Array, "B N d"], codes_BN: Int[Array, "B N"], old_BKd: Float[Array, "B K d"], weight_BN: Any = None
) -> tuple[Float[Array, "B K d"], Float[Array, "B K"]]:
    """`(the mean of the vectors of each code, their number or weight)`; a code without any keeps its vector. Without
    weights, whole numbers (sums in int32), rounded to whole numbers."""
    B, K, d = old_BKd.shape
    flat = (codes_BN + (jnp.arange(B, dtype=jnp.int32) * K)[:, None]).reshape(-1)
    x, ones = x_BNd.reshape(-1, d), jnp.ones(flat.shape, jnp.int32)
    if weight_BN is None:
        x = x.astype(jnp.int32)
    else:
        ones = weight_BN.reshape(-1)
        x = x * ones[:, None]
    total = jnp.zeros((B * K, d), x.dtype).at[flat].add(x).reshape(B, K, d).astype(jnp.float32)
    count = jnp.zeros(B * K, ones.dtype).at[flat].add(ones).reshape(B, K).astype(jnp.float32)
    there = (count > 0)[..., None]
    return jnp.where(there, jnp.round(total / jnp.where(there, count[..., None], 1.0)), old_BKd), count


def lloyd(x_BNd: Float[Array, "B N d"], K: int, key: Any, weight_BN: Any = None) -> Float[Array, "B K d"]:
    """Codebooks of K vectors by `ROUNDS` rounds of k-means on whole numbers.

    They start from the quantiles of normal weights at which levels of density f^(1/3) lie (d = 1; Panter and Dite), or
    from one vector, drawn by `key`, of each of K equal parts of the vectors. After a round, the first code that has no
    vector gets the one that is farthest from its own code.
    """
    B, N, d = x_BNd.shape
    if d == 1:
        normal = NormalDist()
        at = [normal.cdf(math.sqrt(3) * normal.inv_cdf((k + 0.5) / K)) for k in range(K)]
        at = np.minimum(np.asarray(at) * N, N - 1).astype(np.int32)
        book = jnp.sort(x_BNd, axis=1)[:, at]
    else:
        at = np.arange(K) * N // K + jax.random.randint(key, (K,), 0, max(N // K, 1))
        book = jnp.take(x_BNd, at, axis=1, mode="clip")
    x_dBN = rearrange(x_BNd, "b n d -> d b n")
    square_BN = jnp.sum(jnp.square(x_BNd), axis=-1)

    def round_(book: Array, _: None) -> tuple[Array, None]:
        ((score_BN, codes_BN),) = nearest(x_dBN, book)
        new, count = means(x_BNd, codes_BN, book, weight_BN)
        far_BN = score_BN + square_BN
        lone = jnp.argmax(far_BN, axis=1)
        first = jnp.argmax(count == 0, axis=1)[:, None] == jnp.arange(K)
        swap = (first & (count == 0) & (jnp.max(far_BN, axis=1, keepdims=True) > 0))[..., None]
        return jnp.where(swap, jnp.take_along_axis(x_BNd, lone[:, None, None], axis=1), new), None

    return jax.lax.scan(round_, book, None, length=ROUNDS)[0]


def residual(
    x_BNd: Float[Array, "B N d"], sizes: tuple[int, ...], beam: int, key: Any, weight_BN: Any = None
) -> list[Float[Array, "B K d"]]:
    """Codebooks of stages: k-means of the vectors, k-means of what is left, and so on; then `REFINE` rounds of search
    and means, one stage after the other with the others' share taken off. In the units of x."""
    N, M = x_BNd.shape[1], len(sizes)
    if N > MOST:
        at = np.arange(MOST) * N // MOST
        x_BNd, weight_BN = x_BNd[:, at], None if weight_BN is None else weight_BN[:, at]
    u = unit(x_BNd, [], M)
    x = jnp.round(x_BNd * u)
    top = float(limit(x.shape[-1], M))
    books, rest = [], x
    for m, K in enumerate(sizes):
        book = lloyd(jnp.clip(rest, -top, top), K, jax.random.fold_in(key, m), weight_BN)
        books.append(book)
        rest = rest - take(book, search(rest, [book], 1)[0])

    def refine(books: list[Array], _: None) -> tuple[list[Array], None]:
        books = list(books)
        codes = search(x, books, beam)
        parts = [take(b, c) for b, c in zip(books, codes)]
        for m in range(M):
            others = sum(parts[n] for n in range(M) if n != m)
            books[m] = jnp.clip(means(x - others, codes[m], books[m], weight_BN)[0], -top, top)
            parts[m] = take(books[m], codes[m])
        return books, None

    if M > 1:
        books = jax.lax.scan(refine, books, None, length=REFINE)[0]
    return [b / u for b in books]
