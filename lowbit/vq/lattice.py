"""The E8 lattice's codebooks: E8P, 2^16 points of 16 bits, and a 256-point one of 8 bits (QuIP#, arXiv 2402.04396,
section 4). Nearest points are found in closed form, and exactly.

E8P holds `signs * s + 1/4` and `signs * s - 1/4` (the same number added to all coordinates) for the 256 rows `s` of a
table of half-integers, with those signs that make the coordinates' sum even. Rows are all 227 with squared norm up to
10 and 29 chosen ones of squared norm 12.

**Nearest point.** For one of the two shifts, let `y` be the vector less the shift and `a = |y|`. A row scores
`a . s - |s|^2 / 2`, less `2 s_i a_i` for the cheapest i if the signs of `y` do not have the parity that `s` needs. The
227 rows are all permutations of seven: 1/2 everywhere but for 0 to 4 times 3/2, or one 5/2, or one 5/2 and one 3/2. The
best permutation has the order of `a`, so these need `a` sorted and no search, and the 29 rows are 29 sums of three
coordinates (those that stay 1/2). It takes about 100 operations a weight, elementwise; the product with all reduced
rows, which is how QuIP# does it, takes several hundred multiplications.

Everything is additions, comparisons and exact scalings, so that no compiler can change a bit by contracting a product
with an addition. Where two points are equally near (as sums round in float32), the positive shift goes before the
negative, the row of smaller norm before the larger, earlier coordinates get the larger magnitude, and zero is positive.

Vectors are the last axis; inside of a search, a list of 8 arrays of the other axes, which a mesh may split as it likes.
"""

import functools
import itertools
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.formats.search import cut

D = 8
# Coordinates that are 3/2 in the rows of squared norm 12, as in QuIP#'s table; the other three are 1/2.
NORM12 = """31113333 13113333 11313333 11133333 33313311 33313131 33311331 33313113 33311313 33311133
33133311 33133131 33131331 33133113 33131313 33131133 31333311 31333131 31331331 31333113
31331313 13331133 13333311 13333131 13331331 13333113 13331313 11331333 33113331""".split()
ORDER = (0, 2, 4, 6, 1, 3, 5, 7)  # coordinate that nibble j of the table and sign bit j of a code belong to
Vector = list[Array]  # 8 arrays float32 of one shape


@functools.cache
def rows() -> Float[np.ndarray, "256 8"]:
    """The table of magnitudes, float32: 227 in ascending lexicographic order, then the 29."""
    half = np.array(list(itertools.product((0.5, 1.5, 2.5), repeat=D)), np.float32)
    short = half[np.sum(half**2, axis=1) <= 10]
    return np.concatenate([short, np.array([[int(c) / 2 for c in row] for row in NORM12], np.float32)])


@functools.cache
def points() -> Float[np.ndarray, "65536 8"]:
    """Every point, by its code, float32 (multiples of 1/4)."""
    code = np.arange(1 << 16)
    odd = np.bitwise_count(code & 0xFF) % 2
    bits = ((code & 0xFF) ^ odd)[:, None] >> np.arange(D)
    negative = np.zeros((1 << 16, D), int)
    negative[:, list(ORDER)] = bits & 1
    s = rows()[code >> 8]
    negative[:, 7] ^= (s.sum(axis=1) % 2).astype(int)
    return (s * (1 - 2 * negative) + np.where(odd, -0.25, 0.25)[:, None]).astype(np.float32)


@functools.cache
def table() -> Int[np.ndarray, " 256"]:
    """QuIP#'s table of 1 KiB, int32: nibble j of a word is `2 v + 8` of coordinate `ORDER[j]`, and coordinate 7 of a
    row with an odd sum is negated, so that the signs of a code always have even parity."""
    s = rows().copy()
    s[:, 7] *= 1 - 2 * (s.sum(axis=1) % 2)
    nibbles = (2 * s[:, list(ORDER)] + 8).astype(np.uint32)
    return np.sum(nibbles << (4 * np.arange(D, dtype=np.uint32)), axis=1, dtype=np.uint32).view(np.int32)


@functools.cache
def points8() -> Float[np.ndarray, "256 8"]:
    """The codebook of 8 bits, by its code: zero and the 240 roots of E8 (integers before half-integers, each in
    ascending lexicographic order), then 2 e_i and all -2 e_i but the last."""
    whole = [v for v in itertools.product((-1, 0, 1), repeat=D) if sum(map(abs, v)) in (0, 2)]
    half = [v for v in itertools.product((-0.5, 0.5), repeat=D) if sum(v) % 2 == 0]
    return np.concatenate([np.array(whole + half), 2 * np.eye(D), -2 * np.eye(D)[:-1]]).astype(np.float32)


# -- nearest points ---------------------------------------------------------------------------------------------------
# Jitted, as a search is hundreds of operations: a call outside of a program compiles one.


def _search(x_D: Float[Array, "*s 8"], step: float, shift: Array, offset: Array) -> Int[Array, "*s"]:
    """The code of the nearest point to `x` of those with one shift, of E8P times `step`; `offset = shift step`."""
    step = np.float32(step)
    x = [x_D[..., i] for i in range(D)]
    y = [a - offset for a in x]
    sign = [a < 0 for a in y]
    a = [jnp.abs(v) for v in y]
    odd = functools.reduce(jnp.logical_xor, sign)
    top = _sorted(a)
    least = top[7]
    # Scores less that of eight 1/2 and divided by two; a flipped sign costs twice the least magnitude.
    flip = [jnp.where(odd, least, 0.0), jnp.where(odd, 0.0, least)]  # what rows with even and with odd sum pay
    gain = [v - step for v in top]
    first = top[0] + top[0] - 3 * step  # a 5/2 instead of a 1/2
    above, best, which = jnp.zeros_like(least), -flip[0], jnp.zeros(least.shape, jnp.int32)
    for count in range(1, 5):
        above = above + gain[count - 1]
        best, which = _better(best, which, above - flip[count % 2], count)
    best, which = _better(best, which, first - flip[0], 5)
    best, which = _better(best, which, (first + gain[1]) - flip[1], 6)
    # Five 3/2: all of it less the three that stay; a flip takes the least of those or three times the least of all.
    everything = total(a)
    cost, row = None, None
    thrice = least + (least + least)
    pairs: dict[tuple[int, int], tuple[Array, Array]] = {}
    for mask, (i, j, k) in _kept():
        if (i, j) not in pairs:
            pairs[i, j] = a[i] + a[j], jnp.minimum(jnp.minimum(a[i], a[j]), thrice)
        three, low = pairs[i, j]
        c = (three + a[k]) + jnp.where(odd, 0.0, jnp.minimum(low, a[k]))
        if cost is None:
            cost, row = c, jnp.full(c.shape, mask, jnp.int32)
        else:
            row = jnp.where(c < cost, mask, row)
            cost = jnp.minimum(cost, c)
    best, which = _better(best, which, (everything - cost) - 5 * step, 7)
    return _code(a, sign, odd, which, row, shift)


def _code(a: Vector, sign: Vector, odd: Array, which: Array, row: Array, shift: Array) -> Array:
    """The code of the row that won: 0 to 4 times 3/2, one 5/2 (5), one 5/2 and one 3/2 (6), or the mask `row` (7)."""
    rank = _ranks(a)
    threes = jnp.where(which == 5, 0, jnp.where(which == 6, 2, which))
    has_five = (which == 5) | (which == 6)
    five = [has_five & (r == 0) for r in rank]
    own = [jnp.where(which == 7, (row >> i) & 1 == 1, (r < threes) & ~five[i]) for i, r in enumerate(rank)]
    pays = odd ^ ((which == 7) | (which == 6) | (which == 1) | (which == 3))
    # The sign that is flipped: of the least magnitude times coordinate, the first of equals.
    price = [jnp.where(t | f, v + (v + v), v) for t, f, v in zip(own, five, a)]
    least = functools.reduce(jnp.minimum, price)
    negative, done = [], jnp.zeros(odd.shape, bool)
    for s, p in zip(sign, price):
        hit = (p == least) & ~done
        negative.append(s ^ (hit & pays))
        done = done | hit
    mask, at = _bits(own), functools.reduce(jnp.add, [jnp.where(f, i + 1, 0) for i, f in enumerate(five)])
    index = jnp.take(jnp.asarray(_row_index()), mask + 256 * at, axis=0, mode="clip")
    # In a code, coordinate 7's sign is relative to the table, and bit 0 is flipped where the shift is negative.
    odd_row = (which == 7) | (which == 6) | (which == 1) | (which == 3)
    signs = [*negative[:7], negative[7] ^ odd_row]
    word = _bits([signs[i] for i in ORDER]) ^ (shift < 0).astype(jnp.int32)
    return (index << 8) | word


@partial(jax.jit, static_argnums=1)
def both(x: Float[Array, "*s 8"], step: float = 1.0) -> Int[Array, "2 *s"]:
    """Codes of the nearest points of either shift, +1/4 first, of E8P times `step` (of at most 16 significant bits)."""
    # A loop, with codes alone for its output: XLA:CPU repeats a computation for each of its outputs, and fuses it, once
    # for each use, into what follows.
    shift = np.array([0.25, -0.25], np.float32)
    each = jnp.asarray(shift), jnp.asarray(shift * np.float32(step))
    return jax.lax.scan(lambda _, s: (None, _search(x, step, *s)), None, each)[1]


def nearest(x: Float[Array, "*s 8"], step: float = 1.0) -> Int[Array, "*s"]:
    """Code of the nearest point of E8P times `step`."""
    codes = both(x, step)
    error = squares(x - np.float32(step) * decode(codes))
    return jnp.where(error[1] < error[0], codes[1], codes[0])


def squares(x: Float[Array, "*s 8"]) -> Float[Array, "*s"]:
    """`|x|^2`, the same bits in every program."""
    return total([cut(a * a) for a in (x[..., i] for i in range(D))])


@partial(jax.jit, static_argnums=1)
def nearest8(x: Float[Array, "n *s 8"], step: float = 1.0) -> Int[Array, "n *s"]:
    """Code of the nearest point of the codebook of 8 bits times `step`; of equals 0, half-integers, integers, 2 e_i.
    Vectors are taken one entry of the first axis at a time."""
    return jax.lax.map(lambda part: _search8(part, step), x)


def _search8(x_D: Float[Array, "*s 8"], step: float) -> Int[Array, "*s"]:
    step = np.float32(step)
    x = [x_D[..., i] for i in range(D)]
    sign = [v < 0 for v in x]
    a = [jnp.abs(v) for v in x]
    odd = functools.reduce(jnp.logical_xor, sign)
    rank = _ranks(a)
    top = _sorted(a)
    # Half the scores: x.v - |v|^2 / 2 over 1, 1 and 2.
    half = 0.5 * total(a) - jnp.where(odd, top[7], 0.0) - step
    pair = (top[0] + top[1]) - step
    # 2 e_i takes the largest coordinate; the last one only where it is positive.
    lone = [jnp.where(x[7] < 0, -1.0, a[7]) if i == 7 else a[i] for i in range(D)]
    tallest = functools.reduce(jnp.maximum, lone)
    double = (tallest + tallest) - 2 * step
    best, which = _better(jnp.zeros_like(half), jnp.zeros(half.shape, jnp.int32), half, 1)
    best, which = _better(best, which, pair, 2)
    best, which = _better(best, which, double, 3)
    negative = [s ^ (odd & (r == 7)) for s, r in zip(sign, rank)]
    taken, done = [], jnp.zeros(odd.shape, bool)
    for v in lone:
        taken.append((v == tallest) & ~done)
        done = done | taken[-1]
    first, second = _bits([r == 0 for r in rank]), _bits([r == 1 for r in rank])
    pairs, halves = _index8()
    s = _bits(sign)
    two = first | second
    key = jnp.take(jnp.asarray(pairs), two, axis=0, mode="clip") * 4
    low = (s & two & -two) != 0  # the sign of the first of the two
    high = (s & (two & (two - 1))) != 0
    code2 = jnp.take(jnp.asarray(_pair_codes()), key + 2 * low.astype(jnp.int32) + high, axis=0, mode="clip")
    code1 = jnp.take(jnp.asarray(halves), _bits(negative), axis=0, mode="clip")
    at = functools.reduce(jnp.add, [jnp.where(t, i, 0) for i, t in enumerate(taken)])
    minus = functools.reduce(jnp.logical_or, [t & n for t, n in zip(taken, sign)])
    code3 = 241 + at + jnp.where(minus, D, 0)
    zero = int(np.flatnonzero(~points8().any(axis=1))[0])
    code = jnp.where(which == 0, zero, jnp.where(which == 1, code1, jnp.where(which == 2, code2, code3)))
    return code.astype(jnp.int32)


# -- decoding ---------------------------------------------------------------------------------------------------------


def decode(code: Int[Array, "*s"]) -> Float[Array, "*s 8"]:
    """E8P's points, float32, from the 1 KiB table; the upper 16 bits of a code do not count."""
    code = code & 0xFFFF
    word = jnp.take(jnp.asarray(table()), code >> 8, axis=0, mode="clip")
    b = code & 0xFF
    odd = b ^ (b >> 4)
    odd = odd ^ (odd >> 2)
    odd = (odd ^ (odd >> 1)) & 1
    shift = jnp.where(odd == 1, -0.25, 0.25)
    at = np.argsort(ORDER).astype(np.int32)  # nibble and sign bit of each coordinate
    twice = ((word[..., None] >> (4 * at)) & 15) - 8
    sign = ((b ^ odd)[..., None] >> at) & 1
    return 0.5 * jnp.where(sign == 1, -twice, twice).astype(jnp.float32) + shift[..., None]


def decode8(code: Int[Array, "*s"]) -> Float[Array, "*s 8"]:
    """The points of the codebook of 8 bits, float32."""
    nibbles = (2 * points8() + 8).astype(np.uint32)  # 4..12
    words = np.sum(nibbles << (4 * np.arange(D, dtype=np.uint32)), axis=1, dtype=np.uint32).view(np.int32)
    word = jnp.take(jnp.asarray(words), code & 0xFF, axis=0, mode="clip")
    return 0.5 * (((word[..., None] >> np.arange(0, 4 * D, 4, dtype=np.int32)) & 15) - 8).astype(jnp.float32)


# -- parts ------------------------------------------------------------------------------------------------------------


def _better(best: Array, which: Array, score: Array, name: int) -> tuple[Array, Array]:
    return jnp.maximum(best, score), jnp.where(score > best, name, which)


def total(x: Vector) -> Array:
    """The sum of the coordinates, in one order."""
    return ((x[0] + x[1]) + (x[2] + x[3])) + ((x[4] + x[5]) + (x[6] + x[7]))


def _bits(flags: list[Any]) -> Array:
    """Bit i is flag i."""
    return functools.reduce(jnp.bitwise_or, [f.astype(jnp.int32) << i for i, f in enumerate(flags)])


def _sorted(a: Vector) -> Vector:
    """Descending, by the network of 19 comparators for 8 inputs."""
    a = list(a)
    for i, j in (
        *((0, 2), (1, 3), (4, 6), (5, 7), (0, 4), (1, 5), (2, 6), (3, 7), (0, 1), (2, 3), (4, 5), (6, 7)),
        *((2, 4), (3, 5), (1, 4), (3, 6), (1, 2), (3, 4), (5, 6)),
    ):
        a[i], a[j] = jnp.maximum(a[i], a[j]), jnp.minimum(a[i], a[j])
    return a


def _ranks(a: Vector) -> list[Array]:
    """How many are larger, or as large and before."""
    out = [jnp.zeros(a[0].shape, jnp.int32) for _ in range(D)]
    for i, j in itertools.combinations(range(D), 2):
        behind = (a[j] > a[i]).astype(jnp.int32)
        out[i], out[j] = out[i] + behind, out[j] + (1 - behind)
    return out


@functools.cache
def _kept() -> list[tuple[int, tuple[int, int, int]]]:
    """`(mask of the five 3/2, the three that are 1/2)` of the rows of squared norm 12, in their order."""
    out = []
    for row in NORM12:
        i, j, k = (n for n, c in enumerate(row) if c == "1")
        out.append((sum(1 << n for n, c in enumerate(row) if c == "3"), (i, j, k)))
    return out


@functools.cache
def _row_index() -> Int[np.ndarray, " 2304"]:
    """Row of the table by the mask of its 3/2, plus 256 (1 + i) if coordinate i is 5/2."""
    out = np.zeros(256 * (D + 1), np.int32)
    for index, s in enumerate(rows()):
        five = np.flatnonzero(s == 2.5)
        out[sum(1 << n for n in np.flatnonzero(s == 1.5)) + (256 * (1 + five[0]) if five.size else 0)] = index
    return out


@functools.cache
def _index8() -> tuple[np.ndarray, np.ndarray]:
    """Number of a pair of coordinates by their mask, and the code of a half-integer root by the mask of its signs."""
    pairs, halves = np.zeros(256, np.int32), np.zeros(256, np.int32)
    for n, (i, j) in enumerate(itertools.combinations(range(D), 2)):
        pairs[(1 << i) | (1 << j)] = n
    for code, v in enumerate(points8()):
        if (np.abs(v) == 0.5).all():
            halves[sum(1 << n for n in np.flatnonzero(v < 0))] = code
    return pairs, halves


@functools.cache
def _pair_codes() -> Int[np.ndarray, " 112"]:
    """Code of `+-e_i +- e_j` by 4 times the pair's number, plus 2 if e_i is negative and 1 if e_j is."""
    found = {tuple(v): code for code, v in enumerate(points8())}
    out = []
    for i, j in itertools.combinations(range(D), 2):
        for a, b in itertools.product((1, -1), repeat=2):
            v = np.zeros(D, np.float32)
            v[i], v[j] = a, b
            out.append(found[tuple(v)])
    return np.array(out, np.int32)
