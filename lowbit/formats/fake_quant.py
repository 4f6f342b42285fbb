"""Gradients of fake quantization, explicitly: the rule for uniform grids and its clip policies; and what a linear's
input goes through.

Nothing here is `x + stop_gradient(q - x)` (it differs from `q` in the last bit), and
nothing differentiates through clip or max, whose gradient at equality (where absmax scaling always puts one weight) is
0.5, 0 or 1 depending on which jax function spelled it.

Clip policies, which say for what weights the gradient passes. `v = w / s + z` is the weight in code units:

| policy | passes where | source |
|---|---|---|
| `none` | everywhere | BitNet b1.58; the default |
| `inclusive` | `lo <= v <= hi` | ParetoQ; torch's clamp before rounding |
| `rounded` | `lo <= rne(w / s) + z <= hi` | EfficientQAT, torchao: clamp after rounding |
| `lsq` | `lo < v < hi`, and scale gradients times `1 / sqrt(N * hi)` | LSQ, arXiv 1902.08153 |
| `paretoq` | `inclusive`; 0.99 of the stretched range on ternary and mid-rise grids | ParetoQ, arXiv 2502.02631 |
| a number c (`fixedC`) | `|w| < c` | LLM-QAT, c = 2 |

The scale's gradient is `code - z - w / s` where the policy passes and `code - z` where it does not, summed over the
group; the zero point's is 0 and `-s`. Under `none` and `fixedC`, which say nothing about the grid's ends, scale and
zero use the `rounded` mask: the derivative of what the forward pass computes.
"""

import dataclasses
from collections.abc import Callable
from functools import partial
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lowbit.errors import unknown
from lowbit.formats.base import FormatError, blend

Clip = str | float
Levels = tuple[int, int] | tuple[float, float]
CLIPS = ("none", "inclusive", "rounded", "lsq", "paretoq")


@partial(jax.tree_util.register_dataclass, data_fields=["w", "op", "params", "mix"], meta_fields=["act"])
@dataclasses.dataclass(frozen=True)
class PreparedInput:
    """A linear's weight whose input is first transformed by `op` (see `lowbit.linalg.online`; None: as it is) and then
    quantized by `act`, the plan's `path:in` rule (None: not), with the arrays `params` if that format stores any. `mix`
    is how much of the quantized input the product sees (`base.blend`; None: all of it).

    Raises `FormatError` for a format that stores arrays (a static scale) without them."""

    w: Any
    act: Any = None
    op: Any = None
    params: dict[str, Any] = dataclasses.field(default_factory=dict)
    mix: Any = None

    def __post_init__(self) -> None:
        if self.act is not None and isinstance(self.params, dict):  # jax rebuilds nodes with other things in place
            self.act.check_params(self.params)

    def prepare(self, x: Float[Array, "*batch I"]) -> Float[Array, "*batch I"]:
        """What the weight is multiplied with, in `x`'s dtype."""
        x = x if self.op is None else self.op(x)
        if self.act is None:
            return x
        q = self.act.fake_quant(x, self.params)
        return q if self.mix is None else blend(x, q, self.mix)


# -- gradients of a uniform grid --------------------------------------------------------------------------------------


def inside(
    w: Array, ratio: Array, zero: Any, levels: Levels, clip: Clip, rounded: Callable[[Array], Array] = jnp.round
) -> Bool[Array, "..."]:
    """Where a policy lets the gradient pass. `ratio` is `w / s`, everything broadcastable to `w`; `rounded` gives its
    nearest level on the grid without ends."""
    lo, hi = map(float, levels)
    match clip:
        case "none":
            return jnp.ones(w.shape, bool)
        case "inclusive" | "paretoq" | "paretoq-compat":
            return (ratio + zero >= lo) & (ratio + zero <= hi)
        case "rounded":
            code = rounded(ratio) + zero
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
    level: Array | None = None,
    within: Callable[..., Array] = inside,
    end: float = 1.0,
) -> tuple[Array, Array, Array]:
    """Per element, for `w_hat = (code - z) * s + offset` with `code = clip(rne((w - offset) / s) + z, lo, hi)`: the
    cotangents of w and of s, and the cotangent `out` that the saturated elements pass (0 inside): the offset's own, and
    times `-s` the zero point's.

    A grid of another kind gives its own `level` (`code - z`) and its own `within`, called as `inside` is. The scale's
    cotangent of saturated elements is multiplied by `end`.
    """
    ratio = (w - offset) / scale
    if level is None:
        level = jnp.clip(jnp.round(ratio) + zero, *map(float, levels)) - zero
    passed = within(
        w, ratio, zero, levels, clip if clip not in ("none", "rounded") and isinstance(clip, str) else "rounded"
    )
    gw = g if clip == "none" else jnp.where(within(w, ratio, zero, levels, clip), g, 0.0)
    return gw, g * jnp.where(passed, level - ratio, end * level), jnp.where(passed, 0.0, g)
