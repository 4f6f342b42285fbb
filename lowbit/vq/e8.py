"""E8P: eight weights to a code of 16 bits, and residual stages for 3 and 4 bits (QuIP#, arXiv 2402.04396).

    x = w / scale      w_hat = (Q1(x) + c Q2((x - Q1(x)) / c)) scale      scale = rms(w) / rho, one for the matrix

| name | stages | bits per weight | rho | 1/c | error on normal weights | QuIP# ships |
|---|---|---|---|---|---|---|
| `e8p2` | E8P | 2 | 1.03 | | 0.0915 | rho 1.03 |
| `e8p3` | E8P, then 256 points of E8 | 3 | 1.00 | 1.84 | 0.0292 | `e8p3:rho0.98:r2.04` |
| `e8p4` | E8P twice | 4 | 0.89 | 3.75 | 0.0079 | `e8p4:rho1.03:r3.45` |

and 32 bits for the scale. The codebooks and their nearest points are `lowbit.vq.lattice`'s.

The second stage is tried after the nearest points of both shifts, and the better sum is kept (QuIP# follows the nearest
of all): this lowers the error and costs nothing to decode. `rho` and `r = 1/c` are the optimum for normal weights,
which weights are after a randomized Hadamard transform; key `mse` fits the scale to each matrix instead. `c` is a
multiple of 2^-16, so that the sum of the stages is exact and only the scale's product is rounded.

Codes are int32 `[O, I / 8]`: the first stage in the lower 16 bits, in QuIP#'s order, the second above.
"""

import dataclasses
import re
from collections.abc import Mapping
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import unknown
from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.floats import SMALLEST_SCALE, power_of_two
from lowbit.formats.reduce import order_free_mean
from lowbit.formats.search import cut
from lowbit.vq import lattice
from lowbit.vq.lattice import D

RHO = {2: 1.03, 3: 1.0, 4: 0.89}
RESIDUAL = {3: 1.84, 4: 3.75}
PART = 1 << 18  # weights whose nearest points are searched together: a search takes up to 30 bytes for each
SEARCH = tuple(float(np.float32(2.0 ** (k / 8))) for k in range(-6, 7))  # times the scale of `rms(w) / rho`


@dataclasses.dataclass(frozen=True)
class E8P(Format):
    """`e8p2`, `e8p3`, `e8p4`; see the module. Parameter: `scale`, float32 `[1, 1]`.

    The gradient of a weight passes everywhere. The scale's is `level - w / scale`, and `level` in vectors whose error
    is beyond the covering radius of E8 (1, of its second stage c): those that only the codebook's end stops, which is
    LSQ's rule (arXiv 1902.08153) in eight dimensions.
    """

    width: int = 2
    rho: float = RHO[2]
    residual: float = 0.0
    searched: bool = False

    @property
    def name(self) -> str:
        keys = [] if self.rho == RHO[self.width] else [f"rho{self.rho:.9g}"]
        keys += [] if self.width == 2 or self.residual == RESIDUAL[self.width] else [f"r{self.residual:.9g}"]
        return ":".join([f"e8p{self.width}", *keys, *["mse"] * self.searched])

    @property
    def tile(self) -> tuple[int, int]:
        return (1, D)

    @property
    def step(self) -> float:
        """c, the second stage's codebook in units of the first's: exact, of at most 16 bits."""
        return round(2**16 / self.residual) / 2**16

    @property
    def radius(self) -> float:
        """Largest error, over the scale, of a vector that the codebook does not stop: E8's covering radius."""
        return 1.0 if self.width == 2 else self.step

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (must be [out, in])")
        if min(shape) < 1 or shape[1] % D:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (rows must be a multiple of {D} long)")

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        super().check_values(w_OI, params)
        if not bool(jnp.isfinite(params["scale"]).all()):
            raise FormatError(f"{self.name}: scale is {params['scale'].item()} (must be finite)")

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """`rms(w) / rho`, or with key `mse` the best of 13 around it by the squared error, which importances `stats`
        `[I]` of the columns weigh."""
        unit = jnp.maximum(power_of_two(jnp.max(jnp.abs(w_OI))), np.float32(SMALLEST_SCALE["f32"]))
        scale = jnp.sqrt(_mean(jnp.square(w_OI / unit))) * unit * np.float32(1 / self.rho)
        if not self.searched:
            return {"scale": scale}
        weight = 1.0 if stats is None else stats / jnp.maximum(jnp.max(stats), 1e-30)

        def trial(best: tuple[Array, Array], factor: Array) -> tuple[tuple[Array, Array], None]:
            own = self.stored({"scale": scale * factor})
            off = (w_OI - cut(self.dequantize(self.quantize(w_OI, own), own))) / unit
            error = _mean(jnp.square(off) * weight)
            return (jnp.minimum(error, best[0]), jnp.where(error < best[0], own["scale"], best[1])), None

        start = (jnp.full((1, 1), jnp.inf), scale)
        return {"scale": jax.lax.scan(trial, start, jnp.asarray(SEARCH, jnp.float32))[0][1]}

    def stored(self, params: Params) -> Params:
        return {"scale": jnp.maximum(params["scale"], np.float32(SMALLEST_SCALE["f32"]))}

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O G"]:
        """Besides its result it holds 30 bytes for each of `PART` weights, or of one row if that is longer."""
        return (self._codes if w_OI.size <= PART else partial(_in_parts, self))(w_OI, stored)

    def _codes(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O G"]:
        # Cut: XLA makes a product of a division by one number, and LLVM merges it with the subtraction that follows.
        x = rearrange(cut(w_OI / stored["scale"]), "o (g d) -> o g d", d=D)
        if self.width == 2:
            return lattice.nearest(x)
        first = lattice.both(x)
        e = x - lattice.decode(first)
        second = (lattice.nearest8 if self.width == 3 else lattice.nearest)(e, self.step)
        error = lattice.squares(e - np.float32(self.step) * self._second(second))
        codes = first | (second << 16)
        return jnp.where(error[1] < error[0], codes[1], codes[0])

    def _second(self, codes: Int[Array, "*s"]) -> Float[Array, "*s 8"]:
        return (lattice.decode8 if self.width == 3 else lattice.decode)(codes)

    def dequantize(self, codes_OG: Int[Array, "O G"], stored: Params) -> Float[Array, "O I"]:
        return self._level(codes_OG) * stored["scale"]

    def _level(self, codes_OG: Int[Array, "O G"]) -> Float[Array, "O I"]:
        """`w_hat / scale`, exactly."""
        level = lattice.decode(codes_OG)
        if self.width > 2:
            level = level + np.float32(self.step) * self._second(jax.lax.shift_right_logical(codes_OG, 16))
        return rearrange(level, "o g d -> o (g d)")

    def pack(self, codes_OG: Int[Array, "O G"], stored: Params) -> dict[str, Array]:
        # Not a stack of bytes: a compiler would repeat the search, which it fuses into this, for each of them.
        parts = (codes_OG[..., None] >> np.arange(0, 8 * self.width, 8, dtype=np.int32)) & 0xFF
        codes = rearrange(parts, "o g b -> o (g b)")
        return {"codes": codes.astype(jnp.uint8), "scale": stored["scale"]}

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O G"], Params]:
        packed, wanted = arrays["codes"], (shape[0], shape[1] // D * self.width)
        if tuple(packed.shape) != wanted or packed.dtype != jnp.uint8:
            found = f"{packed.dtype} {list(packed.shape)}"
            raise FormatError(
                f"{self.name}: codes of a {shape[0]} x {shape[1]} weight are {found} (must be uint8 {list(wanted)})"
            )
        if arrays["scale"].shape != (1, 1):
            raise FormatError(f"{self.name}: scale of shape {list(arrays['scale'].shape)} (must be [1, 1])")
        parts = rearrange(packed.astype(jnp.int32), "o (g b) -> b o g", b=self.width)
        codes = parts[0]
        for k in range(1, self.width):
            codes = codes | (parts[k] << (8 * k))
        return codes, {"scale": arrays["scale"]}

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        stored = self.stored(params)
        ratio, level = w_OI / stored["scale"], self._level(self.quantize(w_OI, stored))
        far = jnp.sum(jnp.square(rearrange(level - ratio, "o (g d) -> o g d", d=D)), axis=-1) > self.radius**2
        each = level - jnp.where(jnp.repeat(far, D, axis=1), 0.0, ratio)
        return g_OI, {"scale": jnp.sum(g_OI * each, keepdims=True)}


@partial(jax.jit, static_argnums=0)
def _in_parts(fmt: E8P, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O G"]:
    """`_codes` of every n-th row, n times: a mesh that splits the rows splits those of each time."""
    O, I = w_OI.shape
    least = min(O, -(-O * I // PART))
    n = next(n for n in range(least, O + 1) if O % n == 0)
    w = rearrange(w_OI, "(r n) i -> r n i", n=n)

    def part(k: Array, codes: Array) -> Array:
        own = fmt._codes(jax.lax.dynamic_index_in_dim(w, k, axis=1, keepdims=False), stored)
        return jax.lax.dynamic_update_index_in_dim(codes, own, k, axis=1)

    codes = jax.lax.fori_loop(0, n, part, jnp.zeros((O // n, n, I // D), jnp.int32))
    return rearrange(codes, "r n g -> (r n) g")


def _mean(x_OI: Float[Array, "O I"]) -> Float[Array, "1 1"]:
    """Of non-negative values, the same bits in every program."""
    return order_free_mean(rearrange(x_OI, "o i -> o 1 i"), over_rows=True)


# -- QuIP#'s layouts, on the host -------------------------------------------------------------------------------------


def pack_gemv(codes: Int[np.ndarray, "O G"]) -> Int[np.ndarray, "O g"]:
    """E8P codes (16 bits each) as the int64 words `[O, G / 4]` that QuIP#'s matrix-vector kernel reads.

    A word holds the codes of 2 rows x 2 vectors, row first: its lower half their bytes of the table, its upper half
    sign bit j of code k at bit 4 j + k. Words of 16 rows and 8 vectors, 8 x 4 of them, lie together, block after block
    of vectors. Raises `FormatError` for other shapes and for codes out of range.
    """
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[0] % 16 or codes.shape[1] % 8 or not codes.size:
        raise FormatError(f"codes of shape {list(codes.shape)} for the e8p kernel (allowed: 16 m rows of 8 n codes)")
    if codes.min() < 0 or codes.max() >= 1 << 16:
        raise FormatError(f"e8p code {codes.min() if codes.min() < 0 else codes.max()} (allowed: 0 to 65535)")
    four = rearrange(codes.astype(np.uint64), "(m a r) (n b c) -> m n a b (c r)", a=8, r=2, b=4, c=2)
    k, j = np.arange(4, dtype=np.uint64), np.arange(8, dtype=np.uint64)
    words = np.bitwise_or.reduce((four >> np.uint64(8)) << (8 * k), axis=-1)
    bits = (four[..., None, :] >> j[:, None]) & np.uint64(1)
    words |= np.bitwise_or.reduce(bits << (32 + 4 * j[:, None] + k), axis=(-1, -2))
    return words.reshape(len(codes), -1).view(np.int64)


def unpack_gemv(words: Int[np.ndarray, "O g"]) -> Int[np.ndarray, "O G"]:
    """Inverse of `pack_gemv`: int32 codes `[O, 4 g]`. Raises `FormatError` for another shape or type."""
    words = np.asarray(words)
    if words.dtype != np.int64 or words.ndim != 2 or words.shape[0] % 16 or words.shape[1] % 2 or not words.size:
        what = f"{words.dtype} {list(words.shape)}"
        raise FormatError(f"words of the e8p kernel are {what} (allowed: int64, 16 m rows of 2 n words)")
    blocks = words.view(np.uint64).reshape(len(words) // 16, -1, 8, 4)
    k, j = np.arange(4, dtype=np.uint64), np.arange(8, dtype=np.uint64)
    four = ((blocks[..., None] >> (8 * k)) & np.uint64(0xFF)) << np.uint64(8)
    bits = (blocks[..., None, None] >> (32 + 4 * j[:, None] + k)) & np.uint64(1)
    four |= np.bitwise_or.reduce(bits << j[:, None], axis=-2)
    return rearrange(four, "m n a b (c r) -> (m a r) (n b c)", r=2).astype(np.int32)


def pack_gemv8(codes: Int[np.ndarray, "O G"]) -> Int[np.ndarray, "O g"]:
    """Codes of the 256-point codebook as QuIP#'s int64 words `[O, G / 8]`: code i of a word in its byte i. Raises
    `FormatError` for other shapes and for codes out of range."""
    codes = np.asarray(codes)
    if codes.ndim != 2 or codes.shape[1] % 8 or not codes.size:
        raise FormatError(f"codes of shape {list(codes.shape)} for the e8 kernel (allowed: rows of 8 n codes)")
    if codes.min() < 0 or codes.max() > 255:
        raise FormatError(f"e8 code {codes.min() if codes.min() < 0 else codes.max()} (allowed: 0 to 255)")
    return np.ascontiguousarray(codes.astype(np.uint8)).view("<i8")


def unpack_gemv8(words: Int[np.ndarray, "O g"]) -> Int[np.ndarray, "O G"]:
    """Inverse of `pack_gemv8`: int32 codes `[O, 8 g]`. Raises `FormatError` for another type."""
    words = np.asarray(words)
    if words.dtype != np.int64 or words.ndim != 2:
        raise FormatError(f"words of the e8 kernel are {words.dtype} {list(words.shape)} (allowed: int64 rows)")
    return np.ascontiguousarray(words).astype("<i8").view(np.uint8).astype(np.int32)


# -- names ------------------------------------------------------------------------------------------------------------


def _parser(width: int):
    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = {}
        for key in keys:
            match = re.fullmatch(r"(rho|r)(\d+(?:\.\d+)?)", key)
            if key != "mse" and not (match and (width > 2 or match[1] == "rho")):
                allowed = [f"rho{RHO[width]}", *[f"r{RESIDUAL[width]}" for _ in range(width > 2)], "mse"]
                raise FormatError(str(unknown(f"key of e8p{width}", key, allowed)))
            kind = "searched" if match is None else "residual" if match[1] == "r" else "rho"
            if kind in found:
                raise FormatError(f"e8p{width}: key {key!r} gives a second {kind} (allowed: one)")
            found[kind] = True if match is None else float(match[2])
        for kind, low, high in (("rho", 0.1, 10.0), ("residual", 1.0, 16.0)):
            if kind in found and not low <= found[kind] <= high:
                raise FormatError(f"e8p{width}: {kind} {found[kind]:g} (allowed: {low:g} to {high:g})")
        return E8P(width, **{"rho": RHO[width], "residual": RESIDUAL.get(width, 0.0)} | found)

    return parse


for _width, _names in {
    2: ["e8p2", "e8p2:mse"],
    3: ["e8p3", "e8p3:rho0.98:r2.04"],
    4: ["e8p4", "e8p4:rho1.03:r3.45"],
}.items():
    register(f"e8p{_width}", _parser(_width), _names)
