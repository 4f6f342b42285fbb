"""Hadamard matrices of every order that known constructions reach, and the transforms built from them.

A Hadamard matrix has entries +1 and -1 and `H H^T = n I`. `core` constructs one of order n in one step:

| construction | order | symmetric |
|---|---|---|
| Sylvester | 2 | yes |
| Paley II | `2 (q + 1)`, q = 1 mod 4 a prime power | yes |
| Paley I | `q + 1`, q = 3 mod 4 a prime power | yes, in the variant with `chi(a + b)` |
| Williamson | 92, 116, 172 | no |
| Goethals-Seidel | 156 | no |

Products of cores are Hadamard again (Sylvester 1867; Paley 1933; Williamson 1944; Goethals and Seidel 1970), and the
transform of length `n = n_1 n_2 ... n_r` is applied one factor after the other, `n_1 + ... + n_r` multiplications a
value instead of n. Nothing is ever padded: a length without a construction is refused, or gets the orthonormal DCT of
its odd part, or blocks, if the caller says so.
"""

import dataclasses
import itertools
import math
from functools import cache
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int8

from lowbit.errors import InputError

LARGEST_CORE = 1024  # a factor is a dense matrix; longer ones are left to products
MERGED = 64  # powers of two are applied as dense Sylvester matrices of at most this order

# First rows of the circulants, as half rows of symmetric ones (Williamson) and whole rows (Goethals-Seidel). They were
# found by search: sequences that a multiplier of Z_n leaves alone, matched by their power spectra.
WILLIAMSON = {
    23: ("+--+-+-+++++", "+--++-+-+-++", "+++---++--++", "+--+--+++---"),
    29: ("+--+---+-+--+++", "+-+++-+++--+-++", "+--++----+-++++", "++--++-+-++++--"),
    43: ("+---++--++++-+-+++-++-", "++---++++-+--+--++----", "+++-+-++--+-+-++++-+--", "++-++++++----+-+--++-+"),
}
GOETHALS_SEIDEL = {
    39: (
        "+--++--+++++--+-----++--++++-+---+++-+-",
        "+---+-----+-+----+-+-+-++++-+-++-+--+-+",
        "+++-++----+-+++-+----++-+++--++-++-++--",
        "+--++----++--------+-+--+++++--+-+-----",
    )
}


@dataclasses.dataclass(frozen=True)
class Core:
    """A construction of one order; `symmetric` means that the transform is its own inverse."""

    order: int
    name: str
    symmetric: bool

    def matrix(self) -> Int8[np.ndarray, "n n"]:
        """Entries +1 and -1."""
        return _matrix(self)


@cache
def core(n: int) -> Core | None:
    """The construction of order n in one step, symmetric if there is one; None if there is none."""
    if n == 2:
        return Core(2, "Sylvester", True)
    if n % 4 or not 4 <= n <= LARGEST_CORE:
        return None
    if (q := n // 2 - 1) % 4 == 1 and _prime_power(q):
        return Core(n, f"Paley II, q = {q}", True)
    if (q := n - 1) % 4 == 3 and _prime_power(q):
        return Core(n, f"Paley I, q = {q}", True)
    if n // 4 in WILLIAMSON:
        return Core(n, f"Williamson, n = {n // 4}", False)
    if n // 4 in GOETHALS_SEIDEL:
        return Core(n, f"Goethals-Seidel, n = {n // 4}", False)
    return None


@cache
def cores(n: int) -> tuple[Core, ...] | None:
    """Cores whose orders multiply to n, with the least sum of orders; None if no product of constructions reaches n."""
    if n < 1:
        raise InputError(f"order {n} of a Hadamard matrix (allowed: at least 1)")
    if n == 1:
        return ()
    best: tuple[Core, ...] | None = None
    for d in range(2, min(n, LARGEST_CORE) + 1):
        if n % d == 0 and (first := core(d)) is not None and (rest := cores(n // d)) is not None:
            found = tuple(sorted((first, *rest), key=lambda c: -c.order))
            if best is None or sum(c.order for c in found) < sum(c.order for c in best):
                best = found
    return best


def matrix(n: int) -> Int8[np.ndarray, "n n"]:
    """A Hadamard matrix of order n, the Kronecker product of its cores. Raises `InputError` if none is known here."""
    found = cores(n)
    if found is None:
        raise InputError(f"no Hadamard matrix of order {n} ({_advice(n)})")
    out = np.ones((1, 1), np.int8)
    for c in found:
        out = np.kron(out, c.matrix())
    return out


# -- transforms -------------------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class Transform:
    """An orthonormal transform of vectors of length `n`: a Kronecker product of small factors, on `blocks` equal parts.

    `name` says what it is ("76 (Paley II, q = 37) x 64", "DCT 107 x 128", "12 blocks of 128"). With `symmetric`, the
    transform is its own inverse.
    """

    n: int
    name: str
    factors: tuple[str, ...]  # what `_factor` makes matrices of, in Kronecker order
    blocks: int = 1
    symmetric: bool = True

    def __call__(
        self, x: Float[Array | np.ndarray, "*batch n"], inverse: bool = False
    ) -> Float[Array | np.ndarray, "*batch n"]:
        """`x @ T.T` (or `x @ T`, the inverse) along the last axis, computed in float32 (float64 for float64), in x's
        dtype. The gradient is the transposed transform, by differentiation of the products. A float64 numpy array is
        transformed on the host, where jax would narrow it."""
        if x.shape[-1] != self.n:
            raise InputError(f"transform of length {self.n} on a last axis of {x.shape[-1]} (allowed: {self.n})")
        dtype = jnp.promote_types(x.dtype, jnp.float32)
        mats = [_factor(f) for f in self.factors]
        sizes = [m.shape[0] for m in mats]
        scale = math.sqrt(self.norm)
        y = x.astype(dtype).reshape(*x.shape[:-1], self.blocks, *sizes)
        if isinstance(x, np.ndarray) and dtype == np.float64:
            for i, m in enumerate(mats, y.ndim - len(mats)):
                y = np.moveaxis(np.tensordot(y, m, axes=(i, 0 if inverse else 1)), -1, i)
            return y.reshape(x.shape) / scale
        letters = "abcdefgh"[: len(sizes)]
        for i, m in enumerate(mats):
            out = letters[:i] + "z" + letters[i + 1 :]
            spec = f"...{letters},{letters[i]}z->...{out}" if inverse else f"...{letters},z{letters[i]}->...{out}"
            y = jnp.einsum(spec, y, jnp.asarray(m, dtype), precision=jax.lax.Precision.HIGHEST)
        return (y.reshape(x.shape) * np.asarray(1 / scale, dtype)).astype(x.dtype)

    @property
    def norm(self) -> int:
        """Squared length of a row of the matrix before it is made orthonormal."""
        return math.prod(round(float(m[0] @ m[0])) for m in map(_factor, self.factors))

    def sums(self, x: Float[Array, "n *rest"], inverse: bool = False) -> Float[Array, "n *rest"]:
        """`sqrt(norm)` times the transform (or its inverse) along the *first* axis, in float32.

        Matrix products may add in another order in another program; here every addition is spelled out (butterflies,
        and for other cores one input after the other), so eager, jitted and sharded programs give the same bits. What
        goes in must not be an unrounded product (see `pinned`).
        """
        y = x.astype(jnp.float32)
        large = [f for f in self.factors if not f.startswith("sylvester")]
        sizes = [_factor(f).shape[0] for f in large]
        power = self.n // (self.blocks * math.prod(sizes))
        y = y.reshape(self.blocks, *sizes, power, *x.shape[1:])
        for axis, f in enumerate(large, 1):
            m = _factor(f).T if inverse else _factor(f)
            y = jnp.moveaxis(_rows(m, jnp.moveaxis(y, axis, 0)), 0, axis)
        axis = 1 + len(large)
        return jnp.moveaxis(_butterflies(jnp.moveaxis(y, axis, 0)), 0, axis).reshape(x.shape)

    def dense(self) -> Float[np.ndarray, "n n"]:
        """The matrix T in float64: the transform of x is `x @ T.T`."""
        out = np.ones((1, 1))
        for f in self.factors:
            m = _factor(f)
            out = np.kron(out, m / math.sqrt(float(m[0] @ m[0])))
        return np.kron(np.eye(self.blocks), out)


def pinned(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The same (finite) numbers, out of the reach of a compiler that would merge the multiplication that made them with
    what follows: an addition into one operation of one rounding, or a constant factor into the next one."""
    return jnp.maximum(x, np.float32(np.finfo(np.float32).min))


def _butterflies(x: Float[Array, "n *rest"]) -> Float[Array, "n *rest"]:
    """The Sylvester transform along the first axis: each pass takes sums and differences of the two halves and shuffles
    them, so that all passes are one loop body (unrolled, a compiler fuses them and computes everything many times)."""
    half = x.shape[0] // 2

    def step(_: Any, y: Array) -> Array:
        a, b = y[:half], y[half:]
        return jnp.stack([a + b, a - b], axis=1).reshape(y.shape)

    return jax.lax.fori_loop(0, half.bit_length(), step, x) if half else x


def _rows(m: np.ndarray, x: Float[Array, "k *rest"]) -> Float[Array, "k *rest"]:
    """`m @ x` over the first axis, one input after the other. Products with +1 and -1 are exact; others are pinned."""
    wide = (-1,) + (1,) * (x.ndim - 1)
    exact, columns = bool((np.abs(m) == 1).all()), jnp.asarray(m.T, jnp.float32)

    def step(j: Array, y: Array) -> Array:
        product = columns[j].reshape(wide) * x[j]
        return y + (product if exact else pinned(product))

    return jax.lax.fori_loop(0, len(m), step, jnp.zeros_like(x))


@cache
def transform(n: int, fallback: str = "refuse", block: int | None = None) -> Transform:
    """The orthonormal transform of length n.

    With `block`, the transform of that length on each of `n / block` parts. Where no Hadamard matrix is known,
    `fallback` decides: `refuse` (an `InputError` that names what would work), `dct` (an orthonormal DCT-II of the odd
    part times a Sylvester matrix) or `blocks` (the Sylvester matrix of the largest power of two that divides n, on each
    part).
    """
    if fallback not in ("refuse", "dct", "blocks"):
        raise InputError(f"fallback {fallback!r} of a Hadamard transform (allowed: refuse, dct, blocks)")
    if n < 1:
        raise InputError(f"Hadamard transform of length {n} (allowed: at least 1)")
    if block is not None:
        if block < 1 or n % block:
            raise InputError(f"blocks of {block} in a Hadamard transform of length {n} (allowed: divisors of {n})")
        part = transform(block, fallback)
        blocks = part.blocks * (n // block)
        return dataclasses.replace(part, n=n, blocks=blocks, name=f"{n // block} blocks of {part.name}")
    found = cores(n)
    if found is not None:
        large = [c for c in found if c.order & (c.order - 1)]
        power = n // math.prod(c.order for c in large)
        name = " x ".join([f"{c.order} ({c.name})" for c in large] + ([str(power)] if power > 1 or not large else []))
        factors = (*(f"core {c.order}" for c in large), *_sylvester(power))
        return Transform(n, name, factors, symmetric=all(c.symmetric for c in large))
    power = n & -n
    if fallback == "dct":
        name = f"DCT {n // power} x {power}"
        return Transform(n, name, (f"dct {n // power}", *_sylvester(power)), symmetric=False)
    if fallback == "blocks":
        if power == 1:
            raise InputError(f"blocks in a Hadamard transform of odd length {n} (allowed: fallback dct)")
        return transform(n, block=power)
    raise InputError(f"no Hadamard matrix of order {n} ({_advice(n)})")


def randomized(n: int, key: Any, fallback: str = "refuse", block: int | None = None) -> Float[np.ndarray, "n n"]:
    """A random Hadamard rotation in float64: `transform(n).dense()` with a random sign for each column."""
    signs = np.asarray(jax.random.rademacher(key, (n,), jnp.int8), np.float64)
    return transform(n, fallback, block).dense() * signs


def _advice(n: int) -> str:
    odd = n // (n & -n)
    blocks = "" if odd == n else f", or blocks of {n & -n}"
    return f"not a product of {_CONSTRUCTIONS}; allowed: fallback dct, which takes a DCT of {odd}{blocks}"


_CONSTRUCTIONS = "Sylvester, Paley, Williamson or Goethals-Seidel orders"


def _sylvester(power: int) -> tuple[str, ...]:
    """A power of two in as few equal factors of at most `MERGED` as do: few passes, each of few multiplications."""
    bits = power.bit_length() - 1
    if bits == 0:
        return ()
    count = -(-bits // (MERGED.bit_length() - 1))
    sizes = [bits // count + (i < bits % count) for i in range(count)]
    return tuple(f"sylvester {2**b}" for b in sizes)


@cache
def _factor(name: str) -> np.ndarray:
    kind, _, size = name.partition(" ")
    n = int(size)
    if kind == "core":
        return _matrix(core(n)).astype(np.float64)
    if kind == "sylvester":
        out = np.ones((1, 1))
        for _ in range(n.bit_length() - 1):
            out = np.kron(out, [[1.0, 1.0], [1.0, -1.0]])
        return out
    k, j = np.arange(n)[:, None], np.arange(n)[None, :]
    out = np.cos(np.pi * (j + 0.5) * k / n) * math.sqrt(2.0)
    out[0] = 1.0
    return out  # rows of length sqrt(n), as a Hadamard matrix has


# -- constructions ----------------------------------------------------------------------------------------------------


@cache
def _matrix(c: Core) -> Int8[np.ndarray, "n n"]:
    n = c.order
    kind = c.name.split(",")[0]
    if kind == "Sylvester":
        out = np.array([[1, 1], [1, -1]])
    elif kind == "Paley II":
        out = _paley_two(n // 2 - 1)
    elif kind == "Paley I":
        out = _paley_one(n - 1)
    elif kind == "Williamson":
        out = _williamson(*(_circulant(row + row[:0:-1]) for row in WILLIAMSON[n // 4]))
    else:
        out = _goethals_seidel(*map(_circulant, GOETHALS_SEIDEL[n // 4]))
    out = out.astype(np.int8)
    out.flags.writeable = False
    return out


def _paley_two(q: int) -> np.ndarray:
    chi, minus, _ = _field(q)
    conference = np.ones((q + 1, q + 1), int)
    conference[0, 0] = 0
    conference[1:, 1:] = chi[minus]
    return np.kron(conference, [[1, 1], [1, -1]]) + np.kron(np.eye(q + 1, dtype=int), [[1, -1], [-1, -1]])


def _paley_one(q: int) -> np.ndarray:
    """The symmetric variant: `chi(a + b)` in place of the skew `chi(a - b)`."""
    chi, _, plus = _field(q)
    block = chi[plus]
    block[block == 0] = 1
    out = np.ones((q + 1, q + 1), int)
    out[1:, 1:] = -block
    return out


def _circulant(row: str) -> np.ndarray:
    first = np.array([1 if c == "+" else -1 for c in row])
    n = len(first)
    return first[(np.arange(n)[None, :] - np.arange(n)[:, None]) % n]


def _williamson(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    return np.block([[a, b, c, d], [-b, a, -d, c], [-c, d, a, -b], [-d, -c, b, a]])


def _goethals_seidel(a: np.ndarray, b: np.ndarray, c: np.ndarray, d: np.ndarray) -> np.ndarray:
    r = np.eye(len(a), dtype=int)[::-1]
    return np.block(
        [
            [a, b @ r, c @ r, d @ r],
            [-b @ r, a, d.T @ r, -c.T @ r],
            [-c @ r, -d.T @ r, a, b.T @ r],
            [-d @ r, c.T @ r, -b.T @ r, a],
        ]
    )


def _prime_power(q: int) -> tuple[int, int] | None:
    """`(p, k)` with `q = p^k`, p an odd prime."""
    if q < 3 or q % 2 == 0:
        return None
    p = next(d for d in itertools.chain(range(3, math.isqrt(q) + 1, 2), (q,)) if q % d == 0)
    k = round(math.log(q, p))
    return (p, k) if p**k == q else None


@cache
def _field(q: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Of GF(q): the quadratic character `chi` (0 at 0), and the tables of `a - b` and `a + b`; an element is the number
    whose base-p digits are the coefficients of its polynomial."""
    p, k = _prime_power(q)  # type: ignore[misc]
    for tail in itertools.product(range(p), repeat=k):  # x^k = tail; the first for which x generates all of GF(q)*
        powers, element = [], (1,) + (0,) * (k - 1)
        if k == 1:
            powers = [pow(tail[0], i, p) for i in range(q - 1)] if tail[0] else [0]
        else:
            while not powers or element != (1,) + (0,) * (k - 1):
                powers.append(sum(c * p**i for i, c in enumerate(element)))
                top, shifted = element[-1], (0, *element[:-1])
                element = tuple((s + top * t) % p for s, t in zip(shifted, tail))
                if len(powers) > q or not any(element):
                    break
        if len(powers) == q - 1 == len(set(powers)) and 0 not in powers:
            break
    chi = np.zeros(q, int)
    chi[powers] = 1 - 2 * (np.arange(q - 1) % 2)
    digits = np.arange(q)[:, None] // p ** np.arange(k) % p
    weights = p ** np.arange(k)
    minus = (digits[:, None] - digits[None]) % p @ weights
    plus = (digits[:, None] + digits[None]) % p @ weights
    return chi, minus, plus
