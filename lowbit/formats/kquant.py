"""llama.cpp's k-quants as formats: two levels of scales, trained through and searched.

A super-block of 256 weights keeps fp16 `d` (and `dmin`); each sub-block in it an integer scale `sc` (and minimum `mn`):

    w_hat = (d * sc) * code - dmin * mn

| name | sub-block | codes | `sc` | `mn` | bits per weight |
|---|---|---|---|---|---|
| `q2_k` | 16 | 0..3 | 1..15 | 0..15 | 2.625 |
| `q3_k` | 16 | -4..3 | -32..31 | | 3.4375 |
| `q4_k` | 32 | 0..15 | 1..63 | 0..63 | 4.5 |
| `q5_k` | 32 | 0..31 | 1..63 | 0..63 | 5.5 |
| `q6_k` | 16 | -32..31 | -128..127 | | 6.5625 |

What is trained are the sub-blocks' effective `scale = d * sc` and `min = -dmin * mn`, float32. `stored` makes of them
what the file keeps: `d` is the largest scale of the super-block over the largest `sc`, in fp16, the others are rounded
to multiples of it (`sc` is never 0, which would only lose levels), and the same for the minima, which are 0 or less.
Codes are chosen for the result. Every product is exact in float32: 11 bits of `d`, at most 7 of `sc` and 5 of a code.

`init` searches; its error on normal weights is below that of llama.cpp's quantizers with an importance matrix (see
`docs/formats.md`). Importances of columns weigh the squared error as they are (llama.cpp multiplies them by
`sqrt(sigma^2 + w^2)`). Key `absmax` fits the range instead, for recipes that fit at every step.

Layouts and the sub-block search's source: ggml's `ggml-common.h` and `ggml-quants.c`.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.formats import search
from lowbit.formats.base import Affine, Format, FormatError, Params, QTensor, Super, register, unpacked
from lowbit.formats.floats import round_to
from lowbit.formats.packing import pack, unpack
from lowbit.formats.uniform import Uniform, parse_keys, signed_max, spread

SUPER = 256  # weights of a super-block
ROUNDS = 2  # of refinement


class Kind(NamedTuple):
    """Weights of a sub-block, bits of a code, of a scale and of a minimum (0: the type is symmetric)."""

    sub: int
    bits: int
    scale_bits: int
    min_bits: int


KINDS = {
    "q2_k": Kind(16, 2, 4, 4),
    "q3_k": Kind(16, 3, 6, 0),
    "q4_k": Kind(32, 4, 6, 6),
    "q5_k": Kind(32, 5, 6, 6),
    "q6_k": Kind(16, 6, 8, 0),
}


@dataclasses.dataclass(frozen=True)
class KQuant(Uniform):
    """One k-quant; see the module. `params`: `scale` (and `min`), float32 `[O, I / sub-block]`."""

    granularity: str | int = 32
    type: str = "q4_k"
    cheap: bool = False

    @property
    def name(self) -> str:
        return ":".join([self.type, *["absmax"] * self.cheap, *self._keys()])

    @property
    def kind(self) -> Kind:
        return KINDS[self.type]

    @property
    def bits(self) -> int:
        return self.kind.bits

    @property
    def levels(self) -> tuple[int, int]:
        half = 2 ** (self.bits - 1)
        return (0, 2 * half - 1) if self.has_min else (-half, half - 1)

    @property
    def has_min(self) -> bool:
        return self.kind.min_bits > 0

    @property
    def signed_scale(self) -> bool:
        return not self.has_min

    @property
    def searched(self) -> bool:
        return not self.cheap

    @property
    def top(self) -> int:
        """The `sc` of a super-block's largest scale."""
        return 2**self.kind.scale_bits - 1 if self.has_min else -(2 ** (self.kind.scale_bits - 1))

    def params_span(self, shape: tuple[int, int]) -> int:
        return SUPER

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) == 2 and shape[1] % SUPER:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (rows must be a multiple of {SUPER} long)")
        super().check(shape)

    # -- two levels of scales -----------------------------------------------------------------------------------------

    def grid(self, stored: Params) -> Params:
        """The effective `scale` and `min` of each sub-block."""
        out = {"scale": times(stored["d"], stored["sc"])}
        if self.has_min:
            out["min"] = -times(stored["dmin"], stored["mn"])
        return out

    def stored(self, params: Params) -> Params:
        """`d` (and `dmin`), float32 `[O, I / 256]` exact in fp16, and whole numbers `sc` (and `mn`) per sub-block.
        Of stored ones, `d` and `dmin` are rounded (they may have been trained), `sc` and `mn` stay."""
        if "d" in params:
            out = dict(params) | {"d": self.stored_scale(params["d"])}
            return out | ({"dmin": self._stored_dmin(params["dmin"])} if self.has_min else {})
        scale_OGJ = supers(params["scale"], self.kind.sub)
        if self.has_min:
            d = self.stored_scale(jnp.max(scale_OGJ, axis=-1) * np.float32(1 / self.top))
        else:
            d = self.stored_scale(signed_max(self, scale_OGJ) * np.float32(1 / self.top))
        out = {"d": d, "sc": self.scale_codes(params["scale"], d)}
        if self.has_min:
            most = 2**self.kind.min_bits - 1
            low_OGJ = supers(jnp.minimum(params["min"], 0.0), self.kind.sub)
            dmin = self._stored_dmin(jnp.max(-low_OGJ, axis=-1) * np.float32(1 / most))
            mn = jnp.clip(jnp.round(-params["min"] / spread(dmin, params["min"].shape)), 0.0, most)
            out |= {"dmin": dmin, "mn": mn}
        return out

    def _stored_dmin(self, dmin: Array) -> Array:
        return jnp.maximum(round_to(dmin, "fp16"), 2.0**-24)

    def scale_codes(self, scale_ON: Float[Array, "O N"], d_OG: Float[Array, "O G"]) -> Float[Array, "O N"]:
        """The nearest `sc`, never 0."""
        ratio = scale_ON / spread(d_OG, scale_ON.shape)
        if self.has_min:
            return jnp.clip(jnp.round(ratio), 1.0, self.top)
        sc = jnp.clip(jnp.round(ratio), self.top, -self.top - 1)
        return jnp.where(sc == 0, jnp.where(ratio < 0, -1.0, 1.0), sc)

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        Format.check_values(self, w_OI, params)
        for what, most in (("scale", abs(self.top)), ("min", 2**self.kind.min_bits - 1)):
            if what in params:
                self.check_range(what, params[what] * np.float32(1 / most), self.storage)
        for what in ("d", "dmin"):
            if what in params:
                self.check_range(what, params[what], self.storage)

    # -- fitting ------------------------------------------------------------------------------------------------------

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """Scales (and minima) of the least squared error, weighed by the importances `stats` `[I]` of the columns:
        those of each sub-block first, then, as stored, the neighbouring `sc` and `mn` and a new `d` and `dmin` for the
        codes that they give. Key `absmax`: fitted to the range."""
        x_KON, weight = search.blocks(w_OI, stats, self.kind.sub)
        lo, hi = self.levels
        if self.cheap:
            high, low = jnp.max(x_KON, axis=0), jnp.min(x_KON, axis=0)
            if not self.has_min:
                return {"scale": jnp.where(high >= -low, high, low) * np.float32(1 / lo)}
            low = jnp.minimum(low, 0.0)
            return {"scale": (high - low) * np.float32(1 / hi), "min": low}
        scale, low = search.fit(x_KON, weight, self.levels, self.has_min)
        params = {"scale": scale} | ({"min": low} if self.has_min else {})

        def refine(stored: Params, _: None) -> tuple[Params, None]:
            return self._neighbours(x_KON, weight, self._refit(x_KON, weight, stored)), None

        return self.grid(jax.lax.scan(refine, self.stored(params), None, length=ROUNDS)[0])

    def _codes(self, x_KON: Array, stored: Params) -> tuple[Array, Array, Array]:
        """Codes of the grid, and its scale and min."""
        grid = self.grid(stored)
        low = grid.get("min", jnp.zeros_like(grid["scale"]))
        return jnp.clip(jnp.round((x_KON - low) / grid["scale"]), *map(float, self.levels)), grid["scale"], low

    def _error(self, x_KON: Array, weight: search.Weight, stored: Params) -> Float[Array, "O N"]:
        return search.total_error(x_KON, weight, *self._codes(x_KON, stored))

    def _neighbours(self, x_KON: Array, weight: search.Weight, stored: Params) -> Params:
        """The best `sc` and `mn` of each sub-block out of those next to the given ones. The super-block's largest stay:
        `stored` finds `d` and `dmin` by them."""
        most = 2**self.kind.min_bits - 1

        def step(best: tuple[Array, Array, Array], move: Array) -> tuple[tuple[Array, Array, Array], None]:
            sc, mn = stored["sc"] + move[0], stored.get("mn", 0.0) + move[1]
            ok = (stored["sc"] != self.top) | (move[0] == 0)
            if self.has_min:
                ok &= (sc >= 1) & (sc < self.top + 1) & (mn >= 0) & (mn <= most)
                ok &= (stored["mn"] != most) | (move[1] == 0)
            else:
                ok &= (sc != 0) & (sc >= self.top) & (sc < -self.top)
            trial = {**stored, "sc": jnp.where(ok, sc, 1.0)} | ({"mn": mn} if self.has_min else {})
            error = self._error(x_KON, weight, trial)
            ok &= error < best[0]
            return (jnp.where(ok, error, best[0]), jnp.where(ok, sc, best[1]), jnp.where(ok, mn, best[2])), None

        moves = [(s, m) for s in (-1, 0, 1) for m in ((-1, 0, 1) if self.has_min else (0,)) if (s, m) != (0, 0)]
        start = (self._error(x_KON, weight, stored), stored["sc"], stored.get("mn", jnp.zeros_like(stored["sc"])))
        (_, sc, mn), _ = jax.lax.scan(step, start, jnp.asarray(moves, jnp.float32))
        return {**stored, "sc": sc} | ({"mn": mn} if self.has_min else {})

    def _refit(self, x_KON: Array, weight: search.Weight, stored: Params) -> Params:
        """`d` and `dmin` of the least error for the codes, `sc` and `mn` that there are; where it falls."""
        cut = search.cut
        codes_KON, _, _ = self._codes(x_KON, stored)

        def total(per_block: Array) -> Array:  # over a super-block
            return search.tree_sum(rearrange(per_block, "o (g j) -> j o g", j=SUPER // self.kind.sub))

        a = codes_KON * stored["sc"]  # whole numbers of at most 12 bits
        wa, wx = search.weigh(a, weight), search.weigh(x_KON, weight)
        aa, ax = total(search.tree_sum(cut(wa * a))), total(search.tree_sum(cut(wa * x_KON)))
        if self.has_min:
            mn = stored["mn"]
            count = search.tree_sum(search.weigh(jnp.ones_like(x_KON), weight))
            ab, bb = total(cut(-mn * search.tree_sum(wa))), total(cut(cut(mn * mn) * count))
            bx = total(cut(-mn * search.tree_sum(wx)))
            det = cut(aa * bb) - cut(ab * ab)
            ok = det > cut(np.float32(1e-5) * cut(aa * bb))
            det = jnp.where(ok, det, 1.0)
            d, dmin = (cut(ax * bb) - cut(bx * ab)) / det, (cut(bx * aa) - cut(ax * ab)) / det
            ok &= (d > 0) & (dmin > 0)
            new = {**stored, "dmin": jnp.where(ok, self._stored_dmin(dmin), stored["dmin"])}
        else:
            ok, new = aa > 0, dict(stored)
            d = ax / jnp.where(ok, aa, 1.0)
        new["d"] = jnp.where(ok, self.stored_scale(d), stored["d"])
        better = total(self._error(x_KON, weight, new)) < total(self._error(x_KON, weight, stored))
        return {k: jnp.where(better, new[k], a) if k in ("d", "dmin") else a for k, a in stored.items()}

    # -- bytes --------------------------------------------------------------------------------------------------------

    def pack(self, codes_OI: Int[Array, "O I"], stored: Params) -> dict[str, Array]:
        least = 0 if self.has_min else self.top
        arrays = {
            "codes": self.pack_codes(codes_OI),
            "sc": pack(stored["sc"].astype(jnp.int32) - least, self.kind.scale_bits),
            "d": stored["d"].astype(jnp.float16),
        }
        if self.has_min:
            arrays["mn"] = pack(stored["mn"].astype(jnp.int32), self.kind.min_bits)
            arrays["dmin"] = stored["dmin"].astype(jnp.float16)
        return arrays

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O I"], Params]:
        n, least = shape[1] // self.kind.sub, 0 if self.has_min else self.top
        sc = unpack(arrays["sc"], self.kind.scale_bits, n) + least
        stored = {"sc": sc.astype(jnp.float32), "d": arrays["d"].astype(jnp.float32)}
        if self.has_min:
            stored["mn"] = unpack(arrays["mn"], self.kind.min_bits, n).astype(jnp.float32)
            stored["dmin"] = arrays["dmin"].astype(jnp.float32)
        return self.unpack_codes(arrays["codes"], shape), stored

    def affine(self, q: QTensor) -> Affine:
        stored = {k: np.asarray(a) for k, a in unpacked(q)[1].items()}
        return dataclasses.replace(super().affine(q), super=Super(**stored))


def supers(a_ON: Float[Array, "O N"], sub: int) -> Float[Array, "O G J"]:
    """The sub-blocks of each super-block."""
    return rearrange(a_ON, "o (g j) -> o g j", j=SUPER // sub)


def times(d_OG: Float[Array, "O G"], per_block_ON: Float[Array, "O N"]) -> Float[Array, "O N"]:
    """A super-block's factor times what its sub-blocks have."""
    return spread(d_OG, per_block_ON.shape) * per_block_ON


# -- names ------------------------------------------------------------------------------------------------------------


def _parser(type: str):
    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = parse_keys(type, keys, ["range", "clip"])
        return KQuant(
            granularity=KINDS[type].sub, type=type, cheap="range" in found and bool(found.pop("range")), **found
        )

    return parse


for _type, _names in {
    "q2_k": ["q2_k", "q2_k:absmax:lsq"],
    "q3_k": ["q3_k", "q3_k:absmax:clip"],
    "q4_k": ["q4_k", "q4_k:absmax", "q4_k:lsq"],
    "q5_k": ["q5_k", "q5_k:absmax:rounded"],
    "q6_k": ["q6_k", "q6_k:absmax:fixed2"],
}.items():
    register(_type, _parser(_type), _names)
