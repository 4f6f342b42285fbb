"""Activation formats: what a linear's input is rounded to before the product (`path:in` in a plan).

Names are `NAME:SPAN[:key...]`, keys in any order:

| part | choices |
|---|---|
| NAME | `int2` .. `int8`; `fp8` (e4m3fn) |
| SPAN, what shares a scale | `token` (the last axis), with `gG` every G features of it; `tensor`: one stored scale |
| | `lsq`, `pact`: one that is trained (`lowbit.formats.learned`) |
| `asym` | an integer zero point, from the least and the largest value, 0 included (integers only) |
| `rR` | the range is cut to R of itself (0.1 to 1), as QuaRot's `a_clip_ratio` |
| `bitnet` | the formulas of BitNet b1.58 (int8) and a4.8 (int4); per token, without the keys above |
| `topP` | only the P percent of a token's values with the largest magnitudes, the rest 0 (BitNet a4.8: 50) |
| `clip`, `rounded`, `fixedC` | where the gradient passes (see `lowbit.formats.fake_quant`); everywhere by default |

Scales of `token` are dynamic, in float32. `tensor` is static: its scale (and zero point) are stored arrays that
`ActFormat.fit` makes of calibration statistics.
"""

import dataclasses
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from lowbit.errors import unknown
from lowbit.formats.base import FormatError
from lowbit.formats.fake_quant import Clip, inside
from lowbit.formats.floats import round_e4m3
from lowbit.formats.reduce import order_free_mean, over_last

FP8_MAX = 448.0


@dataclasses.dataclass(frozen=True)
class Grid:
    """Levels that a group of values shares the scale of: `x_hat = (code - zero) * scale`, code in `levels`.

    Integers of `width` bits, symmetric (`scale = ratio * max|x| / (2^(b-1) - 1)`) or with a zero point
    (`ratio * (max - min) / (2^b - 1)`, `zero = rne(-ratio * min / scale)`, 0 in the range), or the values of e4m3fn
    (`ratio * max|x| / 448`). Never `a / (b / c)` and never a sum of floats: a compiler rewrites the one and reorders
    the other, and then jitted programs would see other bits than eager ones.
    """

    width: int = 8
    fp8: bool = False
    asym: bool = False
    ratio: float = 1.0

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        half = 2.0 ** (self.width - 1)
        return (-FP8_MAX, FP8_MAX) if self.fp8 else (0.0, 2 * half - 1) if self.asym else (-half, half - 1)

    def range(self, x: Float[Array, "*batch n"]) -> tuple[Float[Array, "*batch 1"], Float[Array, "*batch 1"]]:
        """`(low, high)` of each group, the last axis; 0 lies between them."""
        if not self.asym:
            top = over_last(jnp.maximum, jnp.abs(x))[..., None]
            return -top, top
        low, high = over_last(jnp.minimum, x), over_last(jnp.maximum, x)
        return jnp.minimum(low, 0.0)[..., None], jnp.maximum(high, 0.0)[..., None]

    def scale(self, low: Array, high: Array) -> Array:
        """The value of one code, before any rounding to what is stored; never 0."""
        wide = jnp.maximum(high - low if self.asym else high, 1e-30)
        return wide * np.float32(self.ratio / self.levels[1])

    def zero(self, low: Array, scale: Array) -> Array | float:
        """The code of 0, a whole number in float32."""
        if not self.asym:
            return 0.0
        return jnp.clip(jnp.round(low * np.float32(-self.ratio) / scale), *self.levels)

    def round(self, ratio: Array, zero: Any) -> Array:
        """Codes of `x / scale`, in float32: whole numbers, or values of e4m3fn."""
        if self.fp8:
            return round_e4m3(ratio)
        code = jnp.round(ratio)  # adding 0 would turn -0.0 into 0.0, in some programs
        return jnp.clip(code + zero if self.asym else code, *self.levels)

    def dequantize(self, codes: Array, scale: Array, zero: Any) -> Array:
        """The values of codes."""
        return (codes - zero) * scale if self.asym else codes * scale


@dataclasses.dataclass(frozen=True)
class ActFormat:
    """One activation format; see the module for what the fields mean. The value is the same bits eager, jitted and
    inside of a larger program, the gradient straight-through under `clip`; scales get none.

    `params` of the methods are the stored arrays of a static format, `{"scale": float32 []}` and with `asym` also
    `"zero"`; dynamic formats have none. A static format's contract is multiplication by `1 / scale`, which is what a
    compiler makes of a division by a scalar anyway.
    """

    grid: Grid
    static: bool = False
    group: int | None = None
    bitnet: bool = False
    clip: Clip = "none"
    top: int | None = None

    @property
    def name(self) -> str:
        keys = ["fp8" if self.grid.fp8 else f"int{self.grid.width}", "tensor" if self.static else "token"]
        keys += [f"g{self.group}"] * (self.group is not None) + ["asym"] * self.grid.asym
        keys += [f"r{shown(self.grid.ratio)}"] * (self.grid.ratio != 1.0) + ["bitnet"] * self.bitnet
        keys += [f"top{self.top}"] * (self.top is not None)
        clip = f"fixed{shown(self.clip)}" if isinstance(self.clip, float) else self.clip
        return ":".join([*keys, *{"none": [], "inclusive": ["clip"]}.get(clip, [clip])])

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        return self.grid.levels

    @property
    def bits(self) -> int:
        """Of a code; a dynamic scale adds 32 for every token or group, a zero point the bits of a code."""
        return self.grid.width

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises `FormatError` when an input of this shape has no tokens or features, or no whole groups of them."""
        if len(shape) < 1 or shape[-1] < 1:
            raise FormatError(f"{self.name}: input of shape {tuple(shape)} (must be [..., features], 1 or more)")
        if self.group is not None and shape[-1] % self.group:
            raise FormatError(f"{self.name}: input of {shape[-1]} features (allowed: multiples of {self.group})")

    def array_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what a checkpoint stores for inputs of this length: nothing where the scale is dynamic."""
        return ({"scale": (), "zero": ()} if self.grid.asym else {"scale": ()}) if self.static else {}

    def check_params(self, params: dict[str, Any]) -> None:
        """Raises `FormatError` unless `params` are the arrays that this format stores."""
        if (need := set(self.array_shapes(1))) == set(params):
            return
        if need and not params:
            raise FormatError(
                f"activation format {self.name} stores its {' and '.join(sorted(need))}, which calibration gives "
                "(allowed: a solver with a calibration text, or ActFormat.fit; or a dynamic format such as "
                f"{self.name.replace('tensor', 'token', 1)})"
            )
        raise FormatError(f"{self.name}: arrays {sorted(params)} (allowed: {sorted(need)})")

    def fit(self, high_I: Any, low_I: Any = None, absmean_I: Any = None) -> dict[str, Array]:
        """The stored arrays of a static format, from the largest value of each feature over calibration data and the
        least one, float arrays of any shape; without `low_I` it is `-high_I`, so largest magnitudes alone do. The mean
        magnitudes are for formats that start from them.

        A dynamic format stores nothing: `{}`. Raises `FormatError` on statistics that are not finite.
        """
        if not self.static:
            return {}
        low, high = self.range_of(high_I, low_I)
        low, high = (low, high) if self.grid.asym else (-max(-low, high), max(-low, high))
        scale = self.grid.scale(jnp.float32(low), jnp.float32(high))
        return {"scale": scale} | ({"zero": self.grid.zero(jnp.float32(low), scale)} if self.grid.asym else {})

    def range_of(self, high_I: Any, low_I: Any = None) -> tuple[float, float]:
        """The least and the largest of all features, 0 between them. Raises `FormatError` unless they are finite."""
        high_I = np.asarray(high_I, np.float32)
        low_I = -high_I if low_I is None else np.asarray(low_I, np.float32)
        low, high = min(float(low_I.min()), 0.0), max(float(high_I.max()), 0.0)
        if not (np.isfinite(low) and np.isfinite(high)):
            raise FormatError(f"{self.name}: calibration range {low} to {high} (must be finite)")
        return low, high

    def gradient_fraction(self, x: Float[Array, "*batch I"], params: dict[str, Any] | None = None) -> float:
        """The declared share of the inputs whose gradient is not blocked (see `Format.gradient_fraction`)."""
        return float(jnp.mean(self.passes(x, params or {})))

    def passes(self, x: Float[Array, "*batch I"], params: dict[str, Any]) -> Array:
        """Which inputs get a gradient, bool `[*batch I]`."""
        x32 = self.grouped(x)
        ratio, _, zero = self.ratio(x32, params)
        return inside(x32, ratio, zero, self.grid.levels, self.clip).reshape(x.shape)

    def fake_quant(self, x: Float[Array, "*batch I"], params: dict[str, Any] | None = None) -> Float[Array, "*batch I"]:
        """Quantized and dequantized in float32, returned in `x`'s dtype.

        Raises `FormatError` on a shape that `check` refuses, on missing `params` and, outside of jit, on NaN or
        infinity; inside of it, where nothing can raise, they turn what shares their scale (for a static one,
        themselves) to NaN.
        """
        self.check(x.shape)
        params = params or {}
        self.check_params(params)
        if not isinstance(x, jax.core.Tracer):
            values = np.asarray(x, np.float32)  # numpy: a constant inside of jit is concrete, but jnp would trace it
            if not np.isfinite(values).all():
                at = np.argwhere(~np.isfinite(values))[0]
                raise FormatError(f"{self.name}: input {at.tolist()} is {values[tuple(at)]} (must be finite)")
        return self.value(x, params)

    def value(self, x: Float[Array, "*batch I"], params: dict[str, Any]) -> Float[Array, "*batch I"]:
        """`fake_quant` without its checks."""
        return _fake_quant(self, x, params)

    def kept(self, x: Float[Array, "*batch I"], y: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
        """`y` where x is among the `top` percent of its token (rounded up; all that tie with the last), else 0."""
        if self.top is None:
            return y
        size = jnp.abs(x)
        least = jax.lax.top_k(size, -(-x.shape[-1] * self.top // 100))[0][..., -1:]
        return jnp.where((size < least) & ~jnp.isnan(y), 0.0, y)

    def codes(
        self, x: Float[Array, "*batch I"], params: dict[str, Any]
    ) -> tuple[Float[Array, "*batch I"], Float[Array, "*scales"]] | None:
        """`(codes, scale)` with `value = codes * scale`, float32, the scale `[*batch, 1]` or `[]`; None for
        formats that are more than integers times one scale for a token (groups, zero points, fp8)."""
        if self.grid.fp8 or self.grid.asym or self.group is not None:
            return None
        x32 = x.astype(jnp.float32)
        ratio, scale, zero = self.ratio(x32, params)
        codes = self.kept(x32, self.grid.round(ratio, zero))
        return jnp.where(jnp.isfinite(x32), codes, jnp.nan) if self.static else codes, scale

    def grouped(self, x: Array) -> Array:
        """float32, with what shares a scale along the last axis."""
        x = x.astype(jnp.float32)
        return x if self.group is None else x.reshape(*x.shape[:-1], -1, self.group)

    def ratio(self, x: Array, params: dict[str, Any]) -> tuple[Array, Array, Any]:
        """Of grouped `x`: `x / scale` (neither rounded nor shifted), the value of one code, and the zero point."""
        if self.static:
            scale = jnp.asarray(params["scale"], jnp.float32)
            return x * (1.0 / scale), scale, params.get("zero", 0.0)
        if self.bitnet and self.grid.width == 4:
            mean = absmean(x)
            return x * (np.float32(7**0.5) / (mean + 1e-5)), mean * np.float32(7**-0.5), 0.0
        low, high = self.grid.range(x)
        if self.bitnet:
            top = jnp.maximum(high, 1e-5)
            return x * (127 / top), top * np.float32(1 / 127), 0.0
        scale = self.grid.scale(low, high)
        return x / scale, scale, self.grid.zero(low, scale)


def absmean(x: Float[Array, "*batch I"]) -> Float[Array, "*batch 1"]:
    """Mean magnitude of each token, the same bits in any program."""
    tokens_OGK = jnp.abs(x).reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])
    return order_free_mean(tokens_OGK).reshape(*x.shape[:-1], 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quant(act: ActFormat, x: Array, params: dict[str, Any]) -> Array:
    x32 = act.grouped(x)
    ratio, scale, zero = act.ratio(x32, params)
    y = act.grid.dequantize(act.grid.round(ratio, zero), scale, zero)
    if act.static:  # an infinity would saturate without a trace
        y = jnp.where(jnp.isfinite(x32), y, jnp.nan)
    y = y.reshape(x.shape)
    return act.kept(x32, y).astype(x.dtype) if act.top is not None else y.astype(x.dtype)


def _fwd(act: ActFormat, x: Array, params: dict[str, Any]):
    return _fake_quant(act, x, params), (None if act.clip == "none" else x, params)


def _bwd(act: ActFormat, residuals, g: Array):
    x, params = residuals
    gx = g if x is None else jnp.where(act.passes(x, params), g, 0.0)
    return gx, jax.tree.map(jnp.zeros_like, params)


_fake_quant.defvjp(_fwd, _bwd)


# The names that `lowbit formats` lists and that the conformance suite runs; each takes any of the gradient policies.
ACTS = (
    "int8:token",
    "int4:token",
    "int2:token",
    "int6:token:asym",
    "int4:token:r0.9",
    "int4:token:g64",
    "int4:token:g64:asym:r0.95:clip",
    "int8:token:bitnet",
    "int4:token:bitnet",
    "int8:token:bitnet:top50",
    "int8:token:fixed2",
    "int4:token:rounded",
    "int4:token:bitnet:clip",
    "fp8:token",
    "fp8:token:g32:r0.5:clip",
    "int8:tensor",
    "int8:tensor:asym",
    "int4:tensor:r0.8:clip",
    "fp8:tensor",
)
_NUMBER = r"\d+(?:\.\d+)?"
_CLIP = rf"(?P<clip>clip|rounded|fixed{_NUMBER})"
_KEYS = rf"(?P<group>g[1-9]\d*)|(?P<asym>asym)|(?P<ratio>r{_NUMBER})|(?P<bitnet>bitnet)|(?P<top>top[1-9]\d?)|{_CLIP}"


def parse_keys(kind: str, name: str, keys: list[str], pattern: str, examples: tuple[str, ...]) -> dict[str, str]:
    """`{group of the pattern: its text}` of the keys of a format name, each at most once. Raises `FormatError`."""
    found: dict[str, str] = {}
    for key in keys:
        m = re.fullmatch(pattern, key)
        if m is None:
            raise FormatError(str(unknown(kind, name, examples)))
        if m.lastgroup in found:
            raise FormatError(f"{kind} {name!r}: {found[str(m.lastgroup)]} and {key} (allowed: one of them)")
        found[str(m.lastgroup)] = key
    return found


def make_grid(kind: str, name: str, family: str, keys: dict[str, str]) -> Grid:
    """The grid of `intN` or `fp8` with the keys `asym` and `rR`. Raises `FormatError`."""
    ratio = float(keys["ratio"][1:]) if "ratio" in keys else 1.0
    if not 0.1 <= ratio <= 1.0:
        raise FormatError(f"{kind} {name!r}: clip ratio {ratio:g} (allowed: 0.1 to 1)")
    if family == "fp8" and "asym" in keys:
        raise FormatError(f"{kind} {name!r}: asym (allowed: for integers)")
    return Grid(8 if family == "fp8" else int(family[3:]), family == "fp8", "asym" in keys, ratio)


def get_act(name: str) -> ActFormat:
    """The activation format of a name (see the module). Raises `FormatError`."""
    kind, text = "activation format", str(name).strip().lower()
    if re.fullmatch(r"int\d+:(lsq|pact)(:.*)?", text):
        from lowbit.formats import learned  # it builds on this file

        return learned.get(text)
    m = re.fullmatch(r"(int[2-8]|fp8):(token|tensor)((?::[^:]+)*)", text)
    if m is None:
        raise FormatError(str(unknown(kind, name, ACTS)))
    keys = parse_keys(kind, str(name), m[3].split(":")[1:], _KEYS, ACTS)
    grid, static = make_grid(kind, text, m[1], keys), m[2] == "tensor"
    clip: Clip = {"clip": "inclusive"}.get(keys.get("clip", "none"), keys.get("clip", "none"))
    clip = float(clip[5:]) if clip.startswith("fixed") else clip
    if static and "group" in keys:
        raise FormatError(f"{kind} {text!r}: {keys['group']} (allowed: with token)")
    if "bitnet" in keys and (m[1] not in ("int8", "int4") or static or keys.keys() - {"bitnet", "clip", "top"}):
        raise FormatError(f"{kind} {text!r}: bitnet (allowed: int8:token:bitnet, int4:token:bitnet)")
    if "top" in keys and (static or grid.asym or "group" in keys):
        raise FormatError(f"{kind} {text!r}: {keys['top']} (allowed: with token, without groups and asym)")
    if grid.fp8 and clip == "rounded":
        raise FormatError(f"{kind} {text!r}: rounded (allowed for fp8: clip, fixedC)")
    group = int(keys["group"][1:]) if "group" in keys else None
    top = int(keys["top"][3:]) if "top" in keys else None
    return ActFormat(grid, static, group, "bitnet" in keys, clip, top)


def shown(x: float) -> str:
    """A number in a format name."""
    return np.format_float_positional(x, trim="-")
