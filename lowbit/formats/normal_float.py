"""NormalFloat: a codebook of quantiles of the normal distribution times one absmax per block (QLoRA, arXiv 2305.14314,
section 3; NF2 and NF3 by the same rule as in LoftQ, arXiv 2310.08659).

    codes = nearest of levels to w / absmax          w_hat = level[code] * absmax

`nfN` has 2^N levels in -1..1, an exact 0 among them: `2^(N-1)` quantiles above it, at probabilities from 0.9677083 down
to 0.5 (left out) in equal steps, `2^(N-1) - 1` below it, their mirror with larger steps; all divided by the largest.
Those of `nf4` are the sixteen float32 values of bitsandbytes, whose decoder is the same product of two float32 values.

| name | block | bits per weight | absmax |
|---|---|---|---|
| `nf4` (`nf2`, `nf3`) | 64 | 4.5 | float32 |
| `nf4:gG` | G columns of a row | 4 + 32/G | float32 |
| `nf4:dq` | 64 | 4.127 | 8 bits: double quantization |

Double quantization: `absmax_hat = offset + code * step`, `offset` the mean absmax of the matrix, codes -127..127, one
float32 `step` for 256 absmax. It differs from bitsandbytes' in two ways. The codes are evenly spaced instead of its
"dynamic" 8-bit floats (relative error of the absmax of normal weights 0.14 % instead of 0.20 %, of Student-t(4) ones
0.83 % instead of 0.70 %), and steps have 16 significant bits, so that `code * step` is exact and no compiler can change
a bit by contracting it with the addition. And the 256 are rows of one column of blocks rather than neighbours in a
row: a solver can then round a column without the others.
"""

import dataclasses
import re
from collections.abc import Mapping
from statistics import NormalDist
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Float, Int

from lowbit.errors import unknown
from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.floats import SMALLEST_SCALE
from lowbit.formats.packing import pack, unpack
from lowbit.formats.reduce import order_free_mean, over_last
from lowbit.formats.uniform import spread

OFFSET = 0.9677083  # the largest probability: QLoRA's, half a step of sixteen levels from 1
SPAN = 256  # absmax that share a step
TOP = 127  # largest code of an absmax
BLOCK = 64


def normal_levels(bits: int) -> Float[np.ndarray, " n"]:
    """The `2^bits` levels in ascending order, float32. Probabilities and the division are in float32, which is what
    gives bitsandbytes' bits."""
    inverse, half = NormalDist().inv_cdf, 2 ** (bits - 1)
    top = float(np.float32(OFFSET))
    above = [inverse(float(p)) for p in np.linspace(top, 0.5, half + 1).astype(np.float32)[:-1]]
    below = [-inverse(float(p)) for p in np.linspace(top, 0.5, half).astype(np.float32)[:-1]]
    levels = np.sort(np.array([*below, 0.0, *above])).astype(np.float32)
    return levels / levels[-1]


LEVELS = {bits: normal_levels(bits) for bits in (2, 3, 4)}


@dataclasses.dataclass(frozen=True)
class NormalFloat(Format):
    """`nfN`: the nearest of 2^N normal quantiles times an absmax per `block` columns; see the module.

    A weight goes to the level above if `w / absmax` is greater than the midpoint between two levels, computed in
    float32; on the midpoint itself, to the level below. Parameters: `scale`, the absmax, float32 `[O, G]`; with
    `double` also `step [ceil(O/256), G]` and `offset [1, 1]`, which `init` fits and nothing trains. The gradient of a
    weight passes everywhere. A trained `scale` gets `level - w/scale`, and `level` of a weight beyond the ends, which
    is LSQ's rule (arXiv 1902.08153) for a grid with uneven steps.
    """

    width: int = 4
    block: int = BLOCK
    double: bool = False

    @property
    def name(self) -> str:
        keys = [] if self.block == BLOCK else [f"g{self.block}"]
        return ":".join([f"nf{self.width}", *keys, *["dq"] * self.double])

    def params_span(self, shape: tuple[int, int]) -> int:
        return shape[1] if self.double else self.block  # the offset is a mean over the matrix

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (must be [out, in])")
        if min(shape) < 1 or shape[1] % self.block:
            raise FormatError(
                f"{self.name}: weight of shape {tuple(shape)} (rows must be a multiple of {self.block} long)"
            )

    def blocks(self, w_OI: Array) -> Array:
        return rearrange(w_OI, "o (g k) -> o g k", k=self.block)

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        scale = over_last(jnp.maximum, self.blocks(jnp.abs(w_OI)))
        if not self.double:
            return {"scale": scale}
        offset = order_free_mean(rearrange(scale, "o g -> o 1 g"), over_rows=True)
        far = jnp.pad(jnp.abs(scale - offset), ((0, -scale.shape[0] % SPAN), (0, 0)))
        far = rearrange(far, "(n k) g -> n k g", k=SPAN)
        return {"scale": scale, "step": jnp.max(far, axis=1) * np.float32(1 / TOP), "offset": offset}

    def stored(self, params: Params) -> Params:
        """The absmax as it decodes; with `double` also `codes8`, `step` and `offset`, from which it does."""
        least = np.float32(SMALLEST_SCALE["f32"])
        if not self.double:
            return {"scale": jnp.maximum(params["scale"], least)}
        step, offset = jnp.maximum(_short(params["step"]), least), params["offset"]
        rows = params["scale"].shape[0]
        codes8 = jnp.clip(jnp.round((params["scale"] - offset) / _rows(step, rows)), -TOP, TOP).astype(jnp.int32)
        return self._absmax(codes8, step, offset)

    def _absmax(self, codes8: Array, step: Array, offset: Array) -> Params:
        scale = offset + codes8.astype(jnp.float32) * _rows(step, codes8.shape[0])
        return {"scale": scale, "codes8": codes8, "step": step, "offset": offset}

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O I"]:
        scale = stored["scale"]
        ratio = w_OI / spread(jnp.where(scale == 0, 1.0, scale), w_OI.shape)
        levels = LEVELS[self.width]
        codes = jnp.zeros(w_OI.shape, jnp.int32)
        for middle in (levels[1:] + levels[:-1]) * np.float32(0.5):
            codes = codes + (ratio > middle).astype(jnp.int32)
        return codes

    def dequantize(self, codes_OI: Int[Array, "O I"], stored: Params) -> Float[Array, "O I"]:
        return self._level(codes_OI) * spread(stored["scale"], codes_OI.shape)

    def _level(self, codes_OI: Int[Array, "O I"]) -> Float[Array, "O I"]:
        return jnp.take(jnp.asarray(LEVELS[self.width]), codes_OI, axis=0, mode="clip")

    def pack(self, codes_OI: Int[Array, "O I"], stored: Params) -> dict[str, Array]:
        codes = pack(codes_OI, self.width)
        if not self.double:
            return {"codes": codes, "scale": stored["scale"]}
        codes8 = (stored["codes8"] + (TOP + 1)).astype(jnp.uint8)  # stored unsigned: see `lowbit.formats.packing`
        return {"codes": codes, "scale": codes8, "step": stored["step"], "offset": stored["offset"]}

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O I"], Params]:
        codes = unpack(arrays["codes"], self.width, shape[1])
        if not self.double:
            return codes, {"scale": arrays["scale"]}
        codes8 = arrays["scale"].astype(jnp.int32) - (TOP + 1)
        return codes, self._absmax(codes8, arrays["step"], arrays["offset"])

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        stored = self.stored(params)
        scale = spread(jnp.where(stored["scale"] == 0, 1.0, stored["scale"]), w_OI.shape)
        ratio = w_OI / scale
        each = self._level(self.quantize(w_OI, stored)) - jnp.where(jnp.abs(ratio) <= 1, ratio, 0.0)
        grads = {k: jnp.zeros_like(a) for k, a in params.items()}
        return g_OI, {**grads, "scale": over_last(jnp.add, self.blocks(g_OI * each))}


def _short(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Rounded half to even to 16 significant bits."""
    u = jax.lax.bitcast_convert_type(x.astype(jnp.float32), jnp.uint32)
    return jax.lax.bitcast_convert_type((u + 0x7F + ((u >> 8) & 1)) & np.uint32(0xFFFFFF00), jnp.float32)


def _rows(step: Float[Array, "N G"], rows: int) -> Float[Array, "O G"]:
    """The step of every absmax."""
    return repeat(step, "n g -> (n k) g", k=SPAN)[:rows]


# -- names ------------------------------------------------------------------------------------------------------------


def _parser(width: int):
    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = {}
        for key in keys:
            kind = "double" if key == "dq" else "block"
            if kind in found:
                raise FormatError(f"nf{width}: key {key!r} gives a second {kind} (allowed: one)")
            if kind == "block" and not re.fullmatch(r"g[1-9]\d*", key):
                raise FormatError(str(unknown(f"key of nf{width}", key, ["g64", "dq"])))
            found[kind] = True if kind == "double" else int(key[1:])
        return NormalFloat(width, **found)

    return parse


for _width, _names in {4: ["nf4", "nf4:dq"], 3: ["nf3:g32:dq"], 2: ["nf2"]}.items():
    register(f"nf{_width}", _parser(_width), _names)
