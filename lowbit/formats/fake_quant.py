"""Straight-through ops with explicit gradients: the rule for uniform grids, LSQ, rounding, and activation formats.

Every op is a `custom_vjp`. Nothing here is `x + stop_gradient(q - x)` (it differs from `q` in the last bit), and
nothing differentiates through clip or max, whose gradient at equality (where absmax scaling always puts one weight) is
0.5, 0 or 1 depending on which jax function spelled it.

Clip policies, which say for what weights the gradient passes. `v = w / s + z` is the weight in code units:

| policy | passes where | source |
|---|---|---|
| `none` | everywhere | BitNet b1.58; the default |
| `inclusive` | `lo <= v <= hi` | ParetoQ; torch's clamp before rounding |
| `rounded` | `lo <= rne(w / s) + z <= hi` | EfficientQAT, torchao: clamp after rounding |
| `lsq` | `lo < v < hi`, and scale gradients times `1 / sqrt(N * hi)` | LSQ, arXiv 1902.08153 |
| a number c (`fixedC`) | `|w| < c` | LLM-QAT, c = 2 |

The scale's gradient is `code - z - w / s` where the policy passes and `code - z` where it does not, summed over the
group; the zero point's is 0 and `-s`. Under `none` and `fixedC`, which say nothing about the grid's ends, scale and
zero use the `rounded` mask: the derivative of what the forward pass computes.
"""

import dataclasses
import math
import re
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from lowbit.errors import unknown
from lowbit.formats.base import FormatError
from lowbit.formats.reduce import order_free_mean

Clip = str | float
Levels = tuple[int, int] | tuple[float, float]
CLIPS = ("none", "inclusive", "rounded", "lsq")


@partial(jax.tree_util.register_dataclass, data_fields=["w", "op", "params"], meta_fields=["act"])
@dataclasses.dataclass(frozen=True)
class PreparedInput:
    """A linear's weight whose input is first transformed by `op` (see `lowbit.linalg.online`; None: as it is) and then
    quantized by `act`, the plan's `path:in` rule (None: not), with the arrays `params` if that format stores any."""

    w: Any
    act: Any = None
    op: Any = None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)

    def prepare(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
        """What the weight is multiplied with, in `x`'s dtype."""
        x = x if self.op is None else self.op(x)
        if self.act is None:
            return x
        return self.act.fake_quant(x, self.params) if self.params else self.act.fake_quant(x)


# -- gradients of a uniform grid --------------------------------------------------------------------------------------


def inside(w: Array, ratio: Array, zero: Any, levels: Levels, clip: Clip) -> Bool[Array, "..."]:
    """Where a policy lets the gradient pass. `ratio` is `w / s`, everything broadcastable to `w`."""
    lo, hi = map(float, levels)
    match clip:
        case "none":
            return jnp.ones(w.shape, bool)
        case "inclusive":
            return (ratio + zero >= lo) & (ratio + zero <= hi)
        case "rounded":
            code = jnp.round(ratio) + zero
            return (code >= lo) & (code <= hi)
        case "lsq":
            return (ratio + zero > lo) & (ratio + zero < hi)
        case float() | int():
            return jnp.abs(w) < clip
    raise FormatError(str(unknown("clip policy", clip, (*CLIPS, "a number"))))


def uniform_gradients(
    w: Float[Array, "..."],
    scale: Array,
    zero: Any,
    levels: Levels,
    clip: Clip,
    g: Float[Array, "..."],
    offset: Any = 0.0,
) -> tuple[Array, Array, Array]:
    """Per element, for `w_hat = (code - z) * s + offset` with `code = clip(rne((w - offset) / s) + z, lo, hi)`: the
    cotangents of w and of s, and the cotangent `out` that the saturated elements pass (0 inside): the offset's own, and
    times `-s` the zero point's."""
    ratio = (w - offset) / scale
    level = jnp.clip(jnp.round(ratio) + zero, *map(float, levels)) - zero
    passed = inside(w, ratio, zero, levels, clip if clip in ("inclusive", "lsq") else "rounded")
    gw = g if clip == "none" else jnp.where(inside(w, ratio, zero, levels, clip), g, 0.0)
    return gw, g * (level - jnp.where(passed, ratio, 0.0)), jnp.where(passed, 0.0, g)


# -- ops --------------------------------------------------------------------------------------------------------------


@jax.custom_vjp
def ste_round(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """Half to even, with the identity as gradient."""
    return jnp.round(x)


ste_round.defvjp(lambda x: (jnp.round(x), None), lambda _, g: (g,))


@partial(jax.custom_vjp, nondiff_argnums=(1, 2, 3))
def ste_clip(x: Float[Array, "*s"], lo: float, hi: float, clip: Clip = "inclusive") -> Float[Array, "*s"]:
    """`clip(x, lo, hi)` whose gradient passes where the policy says: `inclusive` is 1 at the ends, `lsq` 0 there."""
    return jnp.clip(x, lo, hi)


ste_clip.defvjp(
    lambda x, lo, hi, clip: (jnp.clip(x, lo, hi), x),
    lambda lo, hi, clip, x, g: (jnp.where(inside(x, x, 0.0, (lo, hi), clip), g, 0.0),),
)


@partial(jax.custom_vjp, nondiff_argnums=(2, 3, 4, 5))
def lsq(
    x: Float[Array, "..."],
    scale: Float[Array, "..."],
    lo: int,
    hi: int,
    clip: Clip = "lsq",
    factor: float | None = None,
) -> Float[Array, "..."]:
    """`clip(rne(x / s), lo, hi) * s` with a learned step `s > 0` that broadcasts against `x` (LSQ, arXiv 1902.08153).

    The step's gradient is the sum of `level - x / s` inside and `level` outside, times `factor`; None takes the paper's
    `1 / sqrt(x.size * hi)`, which for an activation should be given with its feature count instead.
    """
    return jnp.clip(jnp.round(x / scale), lo, hi) * scale


def _lsq_fwd(x, scale, lo, hi, clip, factor):
    return lsq(x, scale, lo, hi, clip, factor), (x, scale)


def _lsq_bwd(lo, hi, clip, factor, residuals, g):
    x, scale = residuals
    factor = 1.0 / math.sqrt(x.size * hi) if factor is None else factor
    gx, gs, _ = uniform_gradients(x, scale, 0.0, (lo, hi), clip, g)
    wide = (1,) * (x.ndim - scale.ndim) + scale.shape
    axes = tuple(i for i, n in enumerate(wide) if n == 1 and x.shape[i] > 1)
    gs = jnp.sum(gs, axis=axes, keepdims=True).reshape(scale.shape)
    return gx, (gs * factor).astype(scale.dtype)


lsq.defvjp(_lsq_fwd, _lsq_bwd)


# -- activation formats -----------------------------------------------------------------------------------------------


@dataclasses.dataclass(frozen=True)
class TokenInt:
    """Signed integers with one dynamic float32 scale per token (the last axis), for the input of a linear.

    Without `bitnet`: `s = max|x| / (2^(b-1) - 1)`, `x_hat = rne(x / s) * s`; a zero token stays zero. With `bitnet`,
    the papers' formulas: int8 `s = 127 / max(max|x|, 1e-5)`, `x_hat = clip(rne(x * s), -128, 127) / s` (b1.58); int4
    absmean, `b / sqrt7 * clip(rne(x * sqrt7 / (b + 1e-5)), -8, 7)` with `b = mean|x|` (a4.8, arXiv 2411.04965).
    The gradient is straight-through under `clip`; the scale is dynamic and gets none. Eager, jitted and inside of a
    larger program the values are the same bits.
    """

    width: int
    bitnet: bool = False
    clip: Clip = "none"

    @property
    def name(self) -> str:
        clip = {"none": [], "inclusive": ["clip"]}.get(self.clip, [self.clip])
        clip = [f"fixed{self.clip:g}"] if isinstance(self.clip, float) else clip
        return ":".join([f"int{self.width}:token", *["bitnet"] * self.bitnet, *clip])

    def check(self, shape: tuple[int, ...]) -> None:
        """Raises `FormatError` when an input of this shape has no tokens or features; any length will do."""
        if len(shape) < 1 or shape[-1] < 1:
            raise FormatError(f"{self.name}: input of shape {tuple(shape)} (must be [..., features], 1 or more)")

    def array_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        """Shapes of what a checkpoint stores for inputs of this length: nothing, the scale is dynamic."""
        return {}

    @property
    def bits(self) -> int:
        """Of a code; a token's scale adds 32."""
        return self.width

    def gradient_fraction(self, x: Float[Array, "*batch I"]) -> float:
        """The declared share of the inputs whose gradient is not blocked (see `Format.gradient_fraction`)."""
        x32, half = x.astype(jnp.float32), 2 ** (self.width - 1)
        return float(jnp.mean(inside(x32, self.codes(x32)[0], 0.0, (-half, half - 1), self.clip)))

    def fake_quant(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
        """Quantized and dequantized in float32, returned in `x`'s dtype.

        Raises `FormatError` on a shape without features and, outside of jit, on NaN or infinity; inside of it, where
        nothing can raise, they turn their token to NaN.
        """
        self.check(x.shape)
        if not isinstance(x, jax.core.Tracer):
            values = np.asarray(x, np.float32)  # numpy: a constant inside of jit is concrete, but jnp would trace it
            if not np.isfinite(values).all():
                at = np.argwhere(~np.isfinite(values))[0]
                raise FormatError(f"{self.name}: input {at.tolist()} is {values[tuple(at)]} (must be finite)")
        return _token(self, x)

    def codes(self, x32: Float[Array, "*batch I"]) -> tuple[Float[Array, "*batch I"], Float[Array, "*batch 1"]]:
        """`x` in codes, neither rounded nor clipped, and the value of one code.

        Never `a / (b / c)` or a sum of floats: a compiler rewrites the one and reorders the other, and then jitted
        programs would see other bits than eager ones.
        """
        if self.bitnet and self.width == 4:
            mean = absmean(x32)
            return x32 * (np.float32(7**0.5) / (mean + 1e-5)), mean * np.float32(7**-0.5)
        n = 2 ** (self.width - 1) - 1
        top = jnp.maximum(jnp.max(jnp.abs(x32), axis=-1, keepdims=True), 1e-5 if self.bitnet else 1e-30)
        step = top * np.float32(1 / n)
        return x32 * (n / top) if self.bitnet else x32 / step, step


def absmean(x: Float[Array, "*batch I"]) -> Float[Array, "*batch 1"]:
    """Mean magnitude of each token, the same bits in any program."""
    tokens_OGK = jnp.abs(x).reshape(x.shape[0] if x.ndim > 1 else 1, -1, x.shape[-1])
    return order_free_mean(tokens_OGK).reshape(*x.shape[:-1], 1)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _token(act: TokenInt, x: Array) -> Array:
    half = 2 ** (act.width - 1)
    codes, step = act.codes(x.astype(jnp.float32))
    return (jnp.clip(jnp.round(codes), -half, half - 1) * step).astype(x.dtype)


def _token_fwd(act: TokenInt, x: Array):
    return _token(act, x), None if act.clip == "none" else x


def _token_bwd(act: TokenInt, x: Array | None, g: Array):
    if x is None:
        return (g,)
    half, x32 = 2 ** (act.width - 1), x.astype(jnp.float32)
    return (jnp.where(inside(x32, act.codes(x32)[0], 0.0, (-half, half - 1), act.clip), g, 0.0),)


_token.defvjp(_token_fwd, _token_bwd)


# The names that `lowbit formats` lists and that the conformance suite runs; each takes any of the gradient policies.
ACTS = (
    "int8:token",
    "int4:token",
    "int8:token:bitnet",
    "int4:token:bitnet",
    "int8:token:fixed2",
    "int4:token:rounded",
    "int4:token:bitnet:clip",
)


def get_act(name: str) -> TokenInt:
    """The activation format of a name: `int8:token` or `int4:token`, then optionally `bitnet` and one of `clip`,
    `rounded`, `fixedC`. Raises `FormatError`."""
    m = re.fullmatch(r"int([48]):token(:bitnet)?(?::(clip|rounded|fixed(\d+(?:\.\d+)?)))?", str(name).strip().lower())
    if m is None:
        raise FormatError(str(unknown("activation format", name, ACTS)))
    clip = "none" if m[3] is None else float(m[4]) if m[4] else {"clip": "inclusive"}.get(m[3], m[3])
    return TokenInt(int(m[1]), m[2] is not None, clip)
