"""`int1` .. `int8`: integers times a scale, with or without a zero point, a float minimum, or a level at 0."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.fake_quant import Clip, Levels, inside
from lowbit.formats.floats import round_to
from lowbit.formats.packing import pack, unpack
from lowbit.formats.uniform import Uniform, parse_keys, signed_max, spread


@dataclasses.dataclass(frozen=True)
class Integer(Uniform):
    """`intN`, N = 1..8. Symmetric: codes -2^(N-1) .. 2^(N-1)-1 and no zero point; asymmetric: 0 .. 2^N-1 and one.

    Scale by calibration (a = largest magnitude of the group):

    - `absmax` (default): `a / 2^(N-1)` up to 4 bits, `a / (2^(N-1) - 1)` from 5 bits on. The first wastes no level but
      clips one positive extreme; measured on normal and Student-t weights it has the lower RTN error at 2 to 4 bits
      (int2 g64: 0.41 against 0.72 relative), and loses from 5 bits on at small groups. int8 is the usual `a / 127`.
    - `signmax`: `v / -2^(N-1)`, v the *signed* entry of largest magnitude (Q4_0's rule): no clipping at the extreme
      and the lowest error of the three, but the scale may be negative, which some runtimes do not expect.
    - `minmax`: symmetric, N >= 2: `a / (2^(N-1) - 1)` and codes up to that on both sides: nothing is clipped, one level
      is not used (LLM-QAT, arXiv 2305.17888). Asymmetric (default there): `(max(w, 0) - min(w, 0)) / (2^N - 1)`,
      `zero = rne(-min / scale)`.
    - `mse`: the default times the factor out of `SHRINK` with the least squared error in each group.
    - `signmse`: the same for `signmax`; the lowest error of all at few bits.

    `midrise` has no level at 0: codes are the odd integers `-(2^N-1) .. 2^N-1`, half of a code's width is `s`, and the
    default is `a / 2^N`, which cuts `-a..a` into equal parts. At two bits it is ParetoQ's stretched elastic grid (SEQ,
    arXiv 2502.02631): `{-3, -1, 1, 3} a / 4`.

    `int1` has two levels, `+s` and `-s` (codes +1 and -1, one bit stored; sign(0) = +1) with `s = mean|w|`, the least
    squares scale for signs (XNOR-Net; BitNet's beta). `centered` gives +s to what is at least the mean of the weights
    (BitNet, arXiv 2310.11453, eqs. 1 to 3; the scale stays that of the uncentered ones). `int1:asym` is the asymmetric
    rule at N = 1: the levels are `{0, s}` or `{-s, 0}`, which suits weights of one sign. Trained scales follow LSQ
    (arXiv 1902.08153), zero points EfficientQAT (arXiv 2407.11062).
    """

    width: int = 4
    asym: bool = False
    midrise: bool = False
    centered: bool = False
    calibration: str = "absmax"

    @property
    def name(self) -> str:
        group = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        default = _default_calibration(self.width, self.asym)
        keys = (
            [group]
            + ["asym"] * self.asym
            + ["midrise"] * self.midrise
            + ["centered"] * self.centered
            + ([] if self.calibration == default else [self.calibration])
        )
        return ":".join([f"int{self.width}", *keys, *self._keys()])

    @property
    def bits(self) -> int:
        return self.width

    @property
    def signs(self) -> bool:
        """Whether the codes are +1 and -1, without a 0 (symmetric int1)."""
        return self.width == 1 and not self.asym

    @property
    def odd(self) -> bool:
        """Whether the codes are the odd integers between the levels."""
        return self.midrise or self.signs

    @property
    def levels(self) -> tuple[int, int]:
        if self.odd:
            return (1 - 2**self.width, 2**self.width - 1)
        half = 2 ** (self.width - 1)
        return (0, 2 * half - 1) if self.asym else (1 - half if self.calibration == "minmax" else -half, half - 1)

    @property
    def has_zero(self) -> bool:
        return self.asym

    @property
    def signed_scale(self) -> bool:
        return self.calibration in ("signmax", "signmse")

    @property
    def searched(self) -> bool:
        return self.calibration in ("mse", "signmse")

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        if self.signs:
            return {"scale": self.mean(jnp.abs(w_OGK))}
        if self.asym:
            low = jnp.minimum(self.reduce(jnp.minimum, w_OGK), 0.0)
            span = jnp.maximum(self.reduce(jnp.maximum, w_OGK), 0.0) - low
            scale = self.stored_scale(span * np.float32(1 / self.levels[1]))
            return {"scale": scale, "zero": -low / scale}
        half = 2 ** (self.width - 1)
        if self.signed_scale:
            return {"scale": signed_max(self, w_OGK) * np.float32(-1 / half)}
        top = self.reduce(jnp.maximum, jnp.abs(w_OGK))
        if self.midrise:
            return {"scale": top * np.float32(1 / (2 * half))}
        return {"scale": top * np.float32(1 / (half if self.width <= 4 and self.calibration != "minmax" else half - 1))}

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O I"]:
        if self.signs:
            return jnp.where(w_OI >= (self.center(w_OI) if self.centered else 0), 1, -1).astype(jnp.int32)
        if not self.midrise:
            return super().quantize(w_OI, stored)
        # Half to even as in ParetoQ: 0 goes to +1, 2 s to +1 and -2 s to -3.
        code = 2 * jnp.round(0.5 * (w_OI / spread(stored["scale"], w_OI.shape)) - 0.5) + 1
        return jnp.clip(code, *map(float, self.levels)).astype(jnp.int32)

    @property
    def idempotent(self) -> bool:
        return not self.centered

    def center(self, w_OI: Float[Array, "O I"]) -> Float[Array, "#O I"]:
        """The mean of what shares a scale, the same bits in any program."""
        blocks = self.blocks(w_OI)
        mean = self.mean(jnp.maximum(blocks, 0)) - self.mean(jnp.maximum(-blocks, 0))
        return spread(mean, w_OI.shape)

    def pack_codes(self, codes_OI: Int[Array, "O I"]) -> Array:
        return pack((codes_OI - self.levels[0]) >> 1, self.width) if self.odd else super().pack_codes(codes_OI)

    def unpack_codes(self, packed: Array, shape: tuple[int, int]) -> Int[Array, "O I"]:
        if not self.odd:
            return super().unpack_codes(packed, shape)
        return 2 * unpack(packed, self.width, shape[1]) + self.levels[0]

    def within(self, w: Array, ratio: Array, zero: Any, levels: Levels, clip: Clip) -> Bool[Array, "..."]:
        if self.midrise and clip in ("rounded", "paretoq"):  # the outermost parts end one half width beyond the codes
            end = float(2**self.width) * (0.99 if clip == "paretoq" else 1.0)
            return inside(w, ratio, zero, (-end, end), "inclusive")
        return super().within(w, ratio, zero, levels, clip)

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        if not self.signs:
            return super().vjp(w_OI, params, g_OI)
        stored = self.stored(params)
        ratio = w_OI / spread(stored["scale"], w_OI.shape)
        gw = g_OI if self.clip == "none" else jnp.where(inside(w_OI, ratio, 0.0, self.levels, self.clip), g_OI, 0.0)
        gs = self.blocks(g_OI * self.quantize(w_OI, stored).astype(jnp.float32))  # ParetoQ: d w_hat / d s = sign(w)
        return gw, {"scale": self.reduce(jnp.add, gs) * self.grad_factor(w_OI.shape)}


@dataclasses.dataclass(frozen=True)
class Offset(Uniform):
    """`intN:gG:min`: `w_hat = c * d + m`, c in 0..2^N-1 and `m` the least weight of the group, a float.

    Stored: `scale` d in fp16, `min` m in fp16 (`min`) or float32 (`min32`): `N + 32/G` or `N + 48/G` bits per weight.
    The decoder adds after multiplying, so the product has to be exact: 11 significant bits times 8 are. `d >= 0` when
    fitted; trained d and m follow LSQ+ (arXiv 2004.09576): m gets the gradient of the saturated elements. ggml's q4_1
    is the grid of `int4:g32:min`.
    """

    granularity: str | int = 32
    width: int = 4
    least: str = "fp16"  # type of the minimum

    @property
    def has_min(self) -> bool:
        return True

    @property
    def min_storage(self) -> str:
        return self.least

    @property
    def name(self) -> str:
        group = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        return ":".join([f"int{self.width}", group, "min" if self.least == "fp16" else "min32", *self._keys()])

    @property
    def bits(self) -> int:
        return self.width

    @property
    def levels(self) -> tuple[int, int]:
        return (0, 2**self.width - 1)

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        low = self.reduce(jnp.minimum, w_OGK)
        span = self.reduce(jnp.maximum, w_OGK) - low
        return {"scale": span * np.float32(1 / self.levels[1]), "min": round_to(low, self.least)}


_ALONE = ("asym", "midrise", "centered", "f32", "bf16")  # keys that an offset excludes


def _default_calibration(width: int, asym: bool) -> str:
    return "minmax" if asym else "absmean" if width == 1 else "absmax"


def _parser(width: int):
    def parse(keys: list[str]) -> Format:
        family = f"int{width}"
        kinds = ["granularity", "zero", "offset", "rise", "center", "calibration", "clip", "storage"]
        found = parse_keys(family, keys, kinds)
        if least := found.pop("offset", None):
            if stray := [key for key in keys if key in _ALONE or key.endswith(("max", "mse"))]:
                raise FormatError(f"{family}: key {stray[0]!r} with {least} (allowed: a group and a gradient policy)")
            found.pop("storage", None)
            found = {"granularity": "channel"} | found
            return Offset(width=width, least="fp16" if least == "min" else "f32", **found)
        asym, midrise = found.pop("zero", False), found.pop("rise", False)
        if midrise and (asym or width == 1):
            what = "asym" if asym else family
            raise FormatError(f"{what} with midrise (allowed: int2 to int8 without asym; int1 is mid-rise already)")
        if found.get("center") and (asym or width != 1):
            raise FormatError(f"centered of {'asymmetric ' if asym else ''}{family} (allowed: int1 without asym)")
        found["centered"] = found.pop("center", False)
        default = _default_calibration(width, asym)
        calibration = found.pop("calibration", default)
        symmetric = [default] if width == 1 else ["absmax", "signmax", "minmax", "mse", "signmse"]
        allowed = ["minmax", "mse"] if asym else ["absmax", "mse"] if midrise else symmetric
        if calibration not in allowed:
            which = "asymmetric " if asym else "mid-rise " if midrise else ""
            raise FormatError(f"calibration {calibration!r} of {which}{family} (allowed: {', '.join(allowed)})")
        return Integer(width=width, asym=asym, midrise=midrise, calibration=calibration, **found)

    return parse


# Every two of width, granularity, zero point and calibration occur together (int1 without a zero point: absmean only).
_EXAMPLES = {
    1: ["int1", "int1:channel:paretoq", "int1:tensor:centered", "int1:g64", "int1:tensor:asym", "int1:g64:asym:mse"],
    2: [
        "int2:channel:midrise",
        "int2:g64:midrise:mse:paretoq",
        "int2",
        "int2:g64",
        "int2:g64:asym",
        "int2:g64:mse",
        "int2:g64:signmse:lsq",
        "int2:tensor:asym:mse",
        "int2:g64:min",
    ],
    3: [
        "int3:g64:midrise:lsq",
        "int3:channel:paretoq",
        "int3:g64",
        "int3:tensor:lsq",
        "int3:g64:asym:rounded",
        "int3:channel:asym:mse",
    ],
    4: [
        "int4",
        "int4:g64",
        "int4:g64:asym",
        "int4:g32:signmax",
        "int4:g64:clip:bf16",
        "int4:g128:mse:f32",
        "int4:tensor:mse",
        "int4:g32:min32",
        "int4:channel:minmax:fixed2",
    ],
    5: ["int5:g64", "int5:tensor:asym", "int5:channel:mse"],
    6: ["int6:g64:fixed2", "int6:channel:asym", "int6:tensor:mse"],
    7: ["int7:g64", "int7:channel:mse", "int7:tensor:asym:mse"],
    8: ["int8", "int8:tensor", "int8:g32:asym", "int8:g64:mse"],
}
for _width, _names in _EXAMPLES.items():
    register(f"int{_width}", _parser(_width), _names)
