"""Activation formats whose scale is trained: LSQ, LSQ+ and PACT.

| name | levels | learned | gradient |
|---|---|---|---|
| `intN:lsq` | -2^(N-1)..2^(N-1)-1 times s | s | LSQ (arXiv 1902.08153, eq. 3): x passes strictly inside of the levels |
| `intN:lsq:asym` | 0..2^N-1 times s, plus b | s, b | LSQ+ (arXiv 2004.09576, eqs. 4 to 7) |
| `intN:pact` | -(2^(N-1)-1)..2^(N-1)-1 times s | s = alpha / (2^(N-1)-1) | PACT (arXiv 1805.06085), for signed inputs |
| `intN:pact:pos` | 0..2^N-1 times s | s = alpha / (2^N-1) | PACT, eq. 1: for inputs that are not negative |

One scale (and offset) per linear, float32, stored with the weights. They start from calibration (`fit`): s at
`2 mean|x| / sqrt(Qp)` for LSQ; for LSQ+, whose paper minimises the squared error, the part of the range that does so
for a Laplace distribution of the same `mean|x|` (ACIQ, arXiv 1810.05723, eq. 5); the range for PACT; with `rR` the
range times R for all.

LSQ's factor on the gradients of s is `1 / sqrt(features * Qp)`, Qp the highest level; PACT has none. DoReFa's rule for
activations (arXiv 1606.06160) is `intN:pact:pos` with a scale that is not trained, `1 / (2^N - 1)`.
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
from lowbit.formats.activation import ActFormat, Grid, shown
from lowbit.formats.base import FormatError

LEARNED = ("int8:lsq", "int4:lsq", "int4:lsq:asym", "int3:lsq:r0.8", "int8:pact", "int4:pact", "int4:pact:pos")
SMALLEST = np.float32(1e-8)


@dataclasses.dataclass(frozen=True)
class LearnedAct(ActFormat):
    """`rule` is lsq or pact; `grid.asym` means LSQ+, `pos` PACT's one-sided levels. `params` are `{"scale": float32
    []}` and for LSQ+ `"offset"`."""

    static: bool = True
    rule: str = "lsq"
    pos: bool = False

    @property
    def name(self) -> str:
        keys = [f"int{self.grid.width}", self.rule, *["asym"] * self.grid.asym, *["pos"] * self.pos]
        return ":".join(keys + [f"r{shown(self.grid.ratio)}"] * (self.grid.ratio != 1.0))

    @property
    def learned(self) -> bool:
        """Whether training changes the stored arrays."""
        return True

    @property
    def levels(self) -> tuple[float, float]:
        """The lowest and the highest code."""
        half = 2.0 ** (self.grid.width - 1)
        if self.grid.asym or self.pos:
            return 0.0, 2 * half - 1
        return (1 - half if self.rule == "pact" else -half), half - 1

    def array_shapes(self, length: int) -> dict[str, tuple[int, ...]]:
        return {"scale": (), "offset": ()} if self.grid.asym else {"scale": ()}

    def fit(self, high_I: Any, low_I: Any = None, absmean_I: Any = None) -> dict[str, Array]:
        """Where training starts; see the module. Raises `FormatError` on statistics that are not finite."""
        low, high = self.range_of(high_I, low_I)
        r, top = self.grid.ratio, self.levels[1]
        if self.grid.asym:
            if r == 1.0 and absmean_I is not None:
                most = float(np.mean(np.asarray(absmean_I, np.float64))) * _clip(self.grid.width)
                low, high = max(low, -most), min(high, most)
            return {"scale": jnp.float32(max(r * (high - low) / top, SMALLEST)), "offset": jnp.float32(r * low)}
        if self.rule == "lsq" and r == 1.0 and absmean_I is not None:
            scale = 2 * float(np.mean(np.asarray(absmean_I, np.float64))) / math.sqrt(top)
        else:
            scale = r * (high if self.pos else max(-low, high)) / top
        return {"scale": jnp.float32(max(scale, SMALLEST))}

    def ratio(self, x: Array, params: dict[str, Any]) -> tuple[Array, Array, Any]:
        # 16 significant bits: a code of 8 times it is exact, so no compiler can change a bit by adding the offset.
        scale = jax.lax.reduce_precision(jnp.maximum(jnp.asarray(params["scale"], jnp.float32), SMALLEST), 8, 15)
        return (x - params.get("offset", np.float32(0))) * (1.0 / scale), scale, 0.0

    def passes(self, x: Float[Array, "*batch I"], params: dict[str, Any]) -> Bool[Array, "*batch I"]:
        ratio = self.ratio(x.astype(jnp.float32), params)[0]
        return (ratio > self.levels[0]) & (ratio < self.levels[1])

    def codes(self, x: Array, params: dict[str, Any]) -> tuple[Array, Array] | None:
        if self.grid.asym:
            return None
        x32 = x.astype(jnp.float32)
        ratio, scale, _ = self.ratio(x32, params)
        return jnp.where(jnp.isfinite(x32), jnp.clip(jnp.round(ratio), *self.levels), jnp.nan), scale

    def value(self, x: Float[Array, "*batch I"], params: dict[str, Any]) -> Float[Array, "*batch I"]:
        return _learned(self, x, params)


def _clip(width: int) -> float:
    """Where to clip a Laplace distribution for the least squared error of evenly spaced levels, over its mean
    magnitude: `x e^x = 3 * 4^width`."""
    x = 1.0
    for _ in range(50):  # Newton on the logarithm
        x -= (math.log(x) + x - math.log(3 * 4**width)) / (1 / x + 1)
    return x


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _learned(act: LearnedAct, x: Array, params: dict[str, Any]) -> Array:
    x32 = x.astype(jnp.float32)
    ratio, scale, _ = act.ratio(x32, params)
    y = jnp.clip(jnp.round(ratio), *act.levels) * scale + params.get("offset", np.float32(0))
    return jnp.where(jnp.isfinite(x32), y, jnp.nan).astype(x.dtype)  # an infinity would saturate without a trace


def _fwd(act: LearnedAct, x: Array, params: dict[str, Any]):
    return _learned(act, x, params), (x, params)


def _bwd(act: LearnedAct, residuals, g: Array):
    x, params = residuals
    ratio, _, _ = act.ratio(x.astype(jnp.float32), params)
    g32, inside = g.astype(jnp.float32), act.passes(x, params)
    level = jnp.clip(jnp.round(ratio), *act.levels)
    if act.rule == "pact":  # d y / d alpha is the sign of what is cut off; s = alpha / Qp. At 0, pos passes nothing.
        grads = {"scale": jnp.sum(jnp.where(inside, 0.0, g32 * level))}
    else:
        factor = 1.0 / math.sqrt(x.shape[-1] * act.levels[1])
        grads = {"scale": jnp.sum(g32 * jnp.where(inside, level - ratio, level)) * factor}
        if act.grid.asym:
            grads["offset"] = jnp.sum(jnp.where(inside, 0.0, g32))
    return jnp.where(inside, g, jnp.zeros((), g.dtype)), grads


_learned.defvjp(_fwd, _bwd)


def get(name: str) -> LearnedAct:
    """The format of a name (see the module), lower case. Raises `FormatError`."""
    m = re.fullmatch(r"int([2-8]):(lsq|pact)((?::(?:asym|pos|r\d+(?:\.\d+)?))*)", name)
    keys = [] if m is None else m[3].split(":")[1:]
    kinds = [k[0] for k in keys]
    if m is None or len(set(kinds)) != len(kinds):
        raise FormatError(str(unknown("activation format", name, LEARNED)))
    only = {"asym": "lsq", "pos": "pact"}
    for key in set(keys) & only.keys():
        if only[key] != m[2]:
            raise FormatError(f"activation format {name!r}: {key} (allowed: with {only[key]})")
    ratio = next((float(k[1:]) for k in keys if k[0] == "r"), 1.0)
    if not 0.1 <= ratio <= 1.0:
        raise FormatError(f"activation format {name!r}: clip ratio {ratio:g} (allowed: 0.1 to 1)")
    grid = Grid(int(m[1]), False, "asym" in keys, ratio)
    return LearnedAct(grid, rule=m[2], pos="pos" in keys)
