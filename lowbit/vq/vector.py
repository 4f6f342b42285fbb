"""Vector codebooks along the outputs (VPTQ, arXiv 2409.17066), small codebooks for blocks (GPTVQ, arXiv 2402.15319),
and a codebook of scalars for each row (SqueezeLLM, arXiv 2306.07629; LNQ, arXiv 2505.07004).

    w_hat[nV : (n+1)V, i] = book[code_ni mod K] + residual[code_ni div K]            (times scale_i)

A vector is V neighbouring outputs of one column, so that a solver that goes through columns rounds whole vectors and
feeds their errors back exactly.

| name | codebooks | bits per weight |
|---|---|---|
| `vptq:vV:kK` | one of K vectors | `log2 K / V + 16 V K / (O I)` |
| `vptq:...:rR` | a second one of R vectors for what is left | `+ log2 R / V + 16 V R / (O I)` |
| `vptq:...:oN` | N columns have codebooks of their own | `+ 16 (V (K + R) + N) / (O I)` |
| `vptq:...:s` | a scale for each column | `+ 16 / O` |
| `gptvq:vV:kK:cC[:nN]` | one for each block of C columns and N rows (all) | `log2 K / V + 16 V K / (C N)` |
| `nuqN` | one of 2^N scalars for each row | `N + 16 2^N / I` |

`vptq` keeps both codes of a vector in one, `residual << log2 K | index`, packed to `log2 K + log2 R` bits, least
significant first; the residual is masked with *its* bits (VPTQ's own unpacker uses the index's, which loses bits where
R > K). GPTVQ has its vectors along the inputs, and codebooks in 8 bits: here they are along the outputs and in fp16.
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import unknown
from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.packing import pack, unpack
from lowbit.formats.reduce import order_free_mean
from lowbit.vq.codebook import Codebooks, power


@dataclasses.dataclass(frozen=True)
class Vector(Codebooks):
    """See the module. `params`: `codebook` `[A, P, K, V]`, with a residual `residual` `[A, P, R, V]`, with outliers
    `outlier.codebook` (and `outlier.residual`) `[1, 1, K, V]` and `outlier` `[1, N]`, their columns, which are not
    trained; with `column_scale` `scale` `[1, I]`. Codes are int32 `[O / V, I]`."""

    size: int = 4
    entries: int = 16
    rest: int = 0  # entries of the residual codebook
    columns: int = 0  # that share a codebook; 0: all
    rows: int = 0
    outliers: int = 0
    column_scale: bool = False

    @property
    def name(self) -> str:
        if self.rows == self.size == 1:
            return f"nuq{self.entries.bit_length() - 1}"
        vector = [f"v{self.size}", f"k{self.entries}"]
        if self.columns:
            return ":".join(["gptvq", *vector, f"c{self.columns}", *[f"n{self.rows}"] * (self.rows > 0)])
        more = [f"{k}{n}" for k, n in (("r", self.rest), ("o", self.outliers)) if n]
        return ":".join(["vptq", *vector, *more, *["s"] * self.column_scale])

    @property
    def tile(self) -> tuple[int, int]:
        return (self.size, 1)

    @property
    def idempotent(self) -> bool:
        return not (self.rest or self.outliers)

    @property
    def stages(self) -> tuple[int, ...]:
        return (self.entries, self.rest) if self.rest else (self.entries,)

    @property
    def scaled(self) -> int | None:
        return 0 if self.column_scale else None

    @property
    def bits(self) -> int:
        """Of a code."""
        return sum(k.bit_length() - 1 for k in self.stages)

    def params_span(self, shape: tuple[int, int]) -> int:
        return self.columns or shape[1]

    def parts(self, shape: tuple[int, ...]) -> tuple[int, int]:
        return shape[0] // (self.rows or shape[0]), shape[1] // (self.columns or shape[1])

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (must be [out, in])")
        (O, I), rows, columns = shape, self.rows or self.size, self.columns or 1
        if O % rows or I % columns:
            raise FormatError(
                f"{self.name}: weight of shape {tuple(shape)} (rows must be a multiple of {rows}, columns of {columns})"
            )
        if self.outliers >= min(I, 1 << 16):
            raise FormatError(
                f"{self.name}: {self.outliers} outlier columns of {I} (allowed: fewer, and 65535 at most)"
            )
        A, P = self.parts(shape)
        self.check_size(shape, (A * P + (self.outliers > 0)) * sum(self.stages) * self.size)

    def split(self, w_OI: Array, parts: tuple[int, int]) -> Array:
        A, P = parts
        return rearrange(w_OI, "(a r v) (p c) -> (a p) (r c) v", a=A, p=P, v=self.size)

    def join(self, x_BNd: Array, parts: tuple[int, int], shape: tuple[int, int]) -> Array:
        A, P = parts
        return rearrange(x_BNd, "(a p) (r c) v -> (a r v) (p c)", a=A, p=P, c=shape[1] // P)

    def join_codes(self, codes: list[Array], parts: tuple[int, int], shape: tuple[int, int]) -> Array:
        A, P = parts
        joint = codes[0] if len(codes) == 1 else codes[0] | codes[1] << (self.entries.bit_length() - 1)
        return rearrange(joint, "(a p) (r c) -> (a r) (p c)", a=A, p=P, c=shape[1] // P)

    def split_codes(self, codes: Array, parts: tuple[int, int]) -> list[Array]:
        A, P = parts
        joint = rearrange(codes, "(a r) (p c) -> (a p) (r c)", a=A, p=P)
        if not self.rest:
            return [joint]
        return [joint & (self.entries - 1), joint >> (self.entries.bit_length() - 1) & (self.rest - 1)]

    def shape_of(self, codes: Array) -> tuple[int, int]:
        return codes.shape[0] * self.size, codes.shape[1]

    def books(self, params: Params) -> list[Float[Array, "A P K d"]]:
        return [params["codebook"], *([params["residual"]] if self.rest else [])]

    def params_of(self, books: list[Array]) -> Params:
        return dict(zip(("codebook", "residual"), books))

    # -- outlier columns: codes of the same size in codebooks of their own --------------------------------------------

    @property
    def plain(self) -> "Vector":
        """The same without outlier columns."""
        return dataclasses.replace(self, outliers=0)

    @property
    def apart(self) -> "Vector":
        """What outlier columns are stored in."""
        return dataclasses.replace(self, outliers=0, column_scale=False)

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """As `Codebooks.init`. Outliers are the columns of largest mean square times importance; the other columns'
        codebooks are fitted without them."""
        if not self.outliers:
            return super().init(w_OI, stats, key)
        size = order_free_mean(jnp.square(w_OI).T[:, None])[:, 0]
        at = jax.lax.top_k(size if stats is None else size * stats, self.outliers)[1]
        mask = jnp.zeros(w_OI.shape[1], bool).at[at].set(True)
        order = jnp.argsort(mask, stable=True)  # the others, then the outliers in ascending order
        usual, outer = order[: -self.outliers], order[-self.outliers :]
        own = self.plain.init(w_OI[:, usual], None if stats is None else stats[usual], key)
        if self.column_scale:
            own["scale"] = jnp.ones((1, w_OI.shape[1])).at[:, usual].set(own["scale"])
        own |= {f"outlier.{k}": a for k, a in self.apart.init(w_OI[:, outer], None, key).items()}
        return {**own, "outlier": outer.astype(jnp.float32)[None]}

    def _outlier(self, stored: Params, columns: int) -> tuple[Array, Params, Params]:
        """Their columns, their parameters and those of the others."""
        at = jnp.clip(stored["outlier"][0].astype(jnp.int32), 0, columns - 1)
        inner = {k.removeprefix("outlier."): a for k, a in stored.items() if k.startswith("outlier.")}
        return at, inner, {k: a for k, a in stored.items() if not k.startswith("outlier")}

    def stored(self, params: Params) -> Params:
        out = super().stored(params)
        if self.outliers:
            out["outlier"] = jnp.clip(jnp.round(params["outlier"]), 0.0, 65535.0)
        return out

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "P Q"]:
        if not self.outliers:
            return super().quantize(w_OI, stored)
        at, inner, usual = self._outlier(stored, w_OI.shape[1])
        return self.plain.quantize(w_OI, usual).at[:, at].set(self.apart.quantize(w_OI[:, at], inner))

    def dequantize(self, codes_PQ: Int[Array, "P Q"], stored: Params) -> Float[Array, "O I"]:
        if not self.outliers:
            return super().dequantize(codes_PQ, stored)
        at, inner, usual = self._outlier(stored, codes_PQ.shape[1])
        w_OI = self.plain.dequantize(codes_PQ, usual)
        return w_OI.at[:, at].set(self.apart.dequantize(codes_PQ[:, at], inner))

    def pack(self, codes_PQ: Int[Array, "P Q"], stored: Params) -> dict[str, Array]:
        arrays = {"codes": pack(codes_PQ, self.bits), **self.pack_params(stored)}
        if self.outliers:
            arrays["outlier"] = stored["outlier"].astype(jnp.uint16)
        return arrays

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "P Q"], Params]:
        return unpack(arrays["codes"], self.bits, shape[1]), self.unpack_params(arrays)


# -- names ------------------------------------------------------------------------------------------------------------

_KEYS = {
    "vptq": {"v": "size", "k": "entries", "r": "rest", "o": "outliers", "s": "column_scale"},
    "gptvq": {"v": "size", "k": "entries", "c": "columns", "n": "rows"},
}
_SAMPLES = {"vptq": ["v4", "k256", "r16", "o8", "s"], "gptvq": ["v2", "k16", "c256", "n64"]}


def _parser(family: str):
    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = {"columns": 256} if family == "gptvq" else {}
        given = set()
        for key in keys:
            m = re.fullmatch(r"(s)|([a-z])([1-9]\d*)", key)
            what = _KEYS[family].get((m[1] or m[2]) if m else "")
            if what is None or (what == "column_scale") != bool(m[1]):
                raise FormatError(str(unknown(f"key of {family}", key, _SAMPLES[family])))
            if what in given:
                raise FormatError(f"{family}: key {key!r} gives a second {key[0]} (allowed: one)")
            given.add(what)
            found[what] = True if m[1] else int(m[3])
        fmt = Vector(**found)
        if fmt.size > 32:
            raise FormatError(f"{family}: vectors of {fmt.size} weights (allowed: 1 to 32)")
        power(family, "codebook", fmt.entries, 1 << 16)
        if fmt.rest:
            power(family, "residual codebook", fmt.rest, 1 << 16)
        if fmt.bits > 24:
            raise FormatError(f"{family}: {fmt.bits} bits of codes for a vector (allowed: at most 24)")
        if fmt.rows % fmt.size:
            raise FormatError(f"{family}: codebooks for {fmt.rows} rows (allowed: multiples of {fmt.size})")
        return fmt

    return parse


def _nuq(bits: int):
    def parse(keys: list[str]) -> Format:
        if keys:
            raise FormatError(f"unknown key {keys[0]!r} of nuq{bits} (allowed: none)")
        return Vector(size=1, entries=2**bits, rows=1)

    return parse


register("vptq", _parser("vptq"), ["vptq:v4:k16", "vptq:v4:k16:r32", "vptq:v2:k16:o8", "vptq:v4:k16:s"])
register("gptvq", _parser("gptvq"), ["gptvq:v2:k16:c64", "gptvq:v1:k4:c64:n4"])
for _bits in range(1, 5):
    register(f"nuq{_bits}", _nuq(_bits), [f"nuq{_bits}"])
