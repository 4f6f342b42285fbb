"""What the states of a trellis stand for: codes of QTIP (arXiv 2406.11235, section 3.2, its code) and EXL3.

A computed code turns a state into a value by a few integer operations on it, and needs no table; `hyb` looks up pairs
of values in a small one; `lut` has a value (or V) for each state. With x the state as uint32, all modulo 2^32:

| code | V | value |
|---|---|---|
| `1mad` | 1 | the bytes of `34038481 x + 76625530` summed, less 510; QTIP divides by 147.800537109375 |
| `3inst` | 1 | two halves of `(89226354 x + 64248484) & 0x8FFF8FFF ^ 0x3B603B60`, added in fp16 |
| `mcg` | 1 | the same of `0xCBAC1FED x` (EXL3) |
| `mul1` | 1 | the bytes of `0x83DCD12D x` summed, times 0.00677 less 10.39, in fp16 with one rounding (EXL3) |
| `hyb` | 2 | with `h = x (x + 1)`: row `h >> (15 - Q)` modulo 2^Q, Q = 9, of a table; bit 15 of h flips the first |
| `lut` | any | the state's row of a table |
| `latin` | 1 | a level of a table of 2^10 normal quantiles, chosen as below (ours) |

`latin` keeps the branches of a path apart. With k the bits of a step, the first k bits of a level's index are the
state's newest k bits, XOR its oldest k, XOR k bits of a hash of those between; the other bits are a hash of the state.
So the 2^k branches that leave a state lie in different 2^k-quantiles of the normal distribution, and so do the 2^k that
meet in one: what Ungerboeck's set partitioning (IEEE Trans. Inf. Theory 28, 1982) asks of a trellis code, where the
codes above are random. Its error is lower at every rate (docs/vq_trellis.md).

Values are exact in float32 with at most 11 significant bits, in eager and in jitted programs and whatever a compiler
contracts: fp16 sums are made in float32, where they are exact, and rounded by integer arithmetic. `1mad`'s divisor is
left to the scale, which is why its values are whole numbers here (`UNITS`).
"""

import functools
from statistics import NormalDist

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.formats.base import FormatError
from lowbit.vq.viterbi import Trellis, short

CODES = ("1mad", "3inst", "mcg", "mul1", "hyb", "lut", "latin")
COMPUTED = ("1mad", "3inst", "mcg", "mul1")
UNITS = {"1mad": 147.800537109375}  # published value = ours / unit
HYB_BITS, LATIN_BITS = 9, 10  # of an index into their tables
HYB_STD = 0.9682458365518543  # sqrt(1 - 2^-4), as QTIP scales its table
# fp16 numbers of EXL3's mul1, and the 1024 that it adds to the sum of bytes by writing the sum into a mantissa.
MUL1_STEP, MUL1_START = (float(np.uint16(u).view(np.float16)) for u in (0x1EEE, 0xC931))


def values(
    code: str, trellis: Trellis, states: Int[Array, "*s"], codebook: Float[Array, "R V"] | None = None
) -> Float[Array, "V *s"]:
    """What the states give, float32; the published values times `UNITS`. `codebook` is the table where there is one."""
    x = states.astype(jnp.uint32)
    match code:
        case "1mad":
            return (_bytes(x * np.uint32(34038481) + np.uint32(76625530)) - 510).astype(jnp.float32)[None]
        case "3inst":
            return _halves(x * np.uint32(89226354) + np.uint32(64248484))[None]
        case "mcg":
            return _halves(x * np.uint32(0xCBAC1FED))[None]
        case "mul1":
            # A product of 22 bits and a sum of 20: exact, contracted or not.
            level = (_bytes(x * np.uint32(0x83DCD12D)) + 1024).astype(jnp.float32)
            return short(level * np.float32(MUL1_STEP) + np.float32(MUL1_START), 11)[None]
        case "hyb":
            row, sign = hyb_row(x)
            pair = jnp.take(codebook, row, axis=0, mode="clip")
            return jnp.stack([pair[..., 0] * sign, pair[..., 1]])
        case "lut":
            return jnp.moveaxis(jnp.take(codebook, states, axis=0, mode="clip"), -1, 0)
        case "latin":
            return jnp.take(codebook[:, 0], latin_row(trellis, x), axis=0, mode="clip")[None]
    raise FormatError(f"trellis code {code!r} (allowed: {', '.join(CODES)})")


def hyb_row(x: Array) -> tuple[Int[Array, "*s"], Float[Array, "*s"]]:
    """`(row, sign of its first value)` of a state of `hyb`."""
    h = x.astype(jnp.uint32) * (x.astype(jnp.uint32) + 1)
    row = (h >> (15 - HYB_BITS)) & np.uint32(2**HYB_BITS - 1)
    return row.astype(jnp.int32), jnp.where((h >> 15) & 1 == 1, -1.0, 1.0)


def latin_row(trellis: Trellis, x: Array) -> Int[Array, "*s"]:
    """Which level a state of `latin` has; see the module."""
    x, k, L = x.astype(jnp.uint32), max(trellis.widths), trellis.L
    between = (x >> k) & np.uint32(2 ** (L - 2 * k) - 1)
    first = (x ^ (x >> (L - k)) ^ (_hash(between) >> 20)) & np.uint32(2**k - 1)
    rest = LATIN_BITS - k
    return ((first << rest) | (_hash(x ^ np.uint32(0x5BD1)) >> (32 - rest))).astype(jnp.int32)


def _hash(x: Array) -> Array:
    """Multiplications and shifts (the constants of xxHash32), uint32."""
    x = x * np.uint32(0x9E3779B1) + np.uint32(0x7F4A7C15)
    x = (x ^ (x >> 15)) * np.uint32(0x85EBCA77)
    return x ^ (x >> 13)


def rows_of(code: str, trellis: Trellis, states: Int[Array, "*s"]) -> tuple[Int[Array, "*s"], Float[Array, "*s V"]]:
    """`(row of the codebook, its factor)` of each state's values, for codes that have one."""
    ones = jnp.ones((*states.shape, trellis.V), jnp.float32)
    if code == "hyb":
        row, sign = hyb_row(states)
        return row, ones.at[..., 0].multiply(sign)
    return (states if code == "lut" else latin_row(trellis, states)), ones


def _bytes(y: Array) -> Int[Array, "*s"]:
    """Sum of the four bytes."""
    return sum((y >> shift) & 0xFF for shift in (0, 8, 16, 24)).astype(jnp.int32)


def _halves(y: Array) -> Float[Array, "*s"]:
    """The sum, in fp16, of the two fp16 numbers of sign, two bits of exponent and mantissa that `y` leaves of them."""
    y = (y & np.uint32(0x8FFF8FFF)) ^ np.uint32(0x3B603B60)

    def wide(half: Array) -> Array:  # exponents are 12..15: normal numbers
        bits = ((half & 0x8000) << 16) | (((half & 0x7FFF) << 13) + np.uint32(112 << 23))
        return jax.lax.bitcast_convert_type(bits, jnp.float32)

    # Multiples of 2^-13 below 4: the sum is exact in float32 and 0 or a normal number in fp16.
    return short(wide(y >> 16) + wide(y & 0xFFFF), 11)


# -- tables -----------------------------------------------------------------------------------------------------------


@functools.cache
def codebook_of(code: str, L: int, V: int) -> Float[np.ndarray, "R V"] | None:
    """The table that a format starts with, float32 values exact in fp16; None for computed codes.

    `hyb`: centres of a k-means of 2^16 normal pairs, scaled as QTIP does; `lut`: normal values (both are seeded);
    `latin`: normal quantiles."""
    if code == "lut":
        return np.random.default_rng(0).standard_normal((2**L, V)).astype(np.float16).astype(np.float32)
    if code == "latin":
        n = 2**LATIN_BITS
        quantiles = [NormalDist().inv_cdf((i + 0.5) / n) for i in range(n)]
        return np.array(quantiles)[:, None].astype(np.float16).astype(np.float32)
    if code == "hyb":
        rows = _normal_pairs(2**HYB_BITS)
        return (rows * (HYB_STD / rows.std())).astype(np.float16).astype(np.float32)
    return None


def _normal_pairs(n: int, samples: int = 2**16, rounds: int = 12) -> Float[np.ndarray, "n 2"]:
    """Centres of a k-means of normal pairs (Lloyd's rounds from the first samples)."""
    x = np.random.default_rng(0).standard_normal((samples, 2))
    centres = x[:n].copy()
    for _ in range(rounds):
        nearest = np.argmax(x @ centres.T - 0.5 * np.sum(centres**2, axis=1), axis=1)
        count = np.bincount(nearest, minlength=n)
        sums = np.stack([np.bincount(nearest, x[:, i], n) for i in (0, 1)], axis=1)
        centres = np.where(count[:, None] > 0, sums / np.maximum(count, 1)[:, None], centres)
    return centres


@functools.cache
def rms_of(code: str, trellis: Trellis) -> float:
    """Root mean square of what the 2^L states give."""
    with jax.ensure_compile_time_eval():
        table = table_of(code, trellis)
    return float(np.sqrt(np.mean(np.asarray(table, np.float64) ** 2)))


@functools.partial(jax.jit, static_argnums=(0, 1))
def table_of(code: str, trellis: Trellis) -> Float[Array, "V S"]:
    """What the 2^L states give, with the table that a format starts with."""
    book = codebook_of(code, trellis.L, trellis.V)
    return values(code, trellis, jnp.arange(2**trellis.L, dtype=jnp.int32), None if book is None else jnp.asarray(book))
