"""Quantization by the optimizer: PARQ and BinaryRelax, which leave the model alone.

The forward pass sees `w`; the optimizer keeps a float latent `u`, steps on it with the gradient at `w`, and shows
`w = prox(u)`, which goes from the identity to the quantizer as training goes on.

- `parq` (Jin et al. 2025, arXiv 2503.15748): the proximal map of a piecewise-affine regularizer. Between two
  neighbouring levels with centre c, `w = clip(c + (u - c) / r, lower, upper)`; beyond the last level, `w = level + r (u
  - level)`. The inverse slope r falls from 1 to 0 along a mirrored sigmoid, normalized to reach both ends.
- `binary-relax` (Yin et al. 2018, arXiv 1801.06313): `w = r u + (1 - r) q(u)`, for any format.

Scales are fitted to `u` at every step. With r = 0 `w` is on the grid exactly, and what is packed is what was seen.
Keys: `parq:start0.1:end0.8:steep10`, the fractions of the steps between which r falls and the sigmoid's steepness.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from functools import partial
from typing import Any, NamedTuple

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float

from lowbit import tree as trees
from lowbit.errors import InputError
from lowbit.formats.base import Format, Latent, Params
from lowbit.formats.dorefa import DoReFa
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.ggml import GGML
from lowbit.formats.integer import Integer
from lowbit.formats.ternary import Ternary
from lowbit.formats.uniform import spread
from lowbit.qat import latents
from lowbit.qat.base import Recipe, register_family
from lowbit.qat.latents import Assignment, Stored
from lowbit.tree import Tree


@dataclasses.dataclass(frozen=True)
class Anneal:
    """When r falls from 1 to 0, in fractions of the steps, and how steeply."""

    start: float = 0.0
    end: float = 0.8
    steep: float = 10.0

    def inverse_slope(self, count: Any, steps: int) -> Float[Array, "*t"]:
        """r after `count` updates of `steps`; exactly 1 until `start` and exactly 0 from `end` on."""
        first, last = (math.ceil(f * steps - 1e-9) for f in (self.start, self.end))
        t = jnp.asarray(count, jnp.float32) / steps
        t = (t - self.start) / (self.end - self.start)
        f = lambda t: jax.nn.sigmoid(self.steep * (0.5 - t))  # noqa: E731
        low, high = f(1.0), f(0.0)
        return jnp.where(count <= first, 1.0, jnp.where(count >= last, 0.0, (f(t) - low) / (high - low)))


class ProxState(NamedTuple):
    count: Array
    inner: Any
    latent: dict[str, Array]  # u of every weight in `formats`
    shown: dict[str, Array]  # w, and the scales that belong to it


def prox(
    tx: optax.GradientTransformation, formats: Mapping[str, Format], steps: int, kind: str, anneal: Anneal = Anneal()
) -> optax.GradientTransformation:
    """`tx` on latents of the weights in `formats`, by name; other parameters as `tx` has them. For any flat dict of
    float arrays. The new parameters are `params + updates` up to the last bit, and exactly `state.shown`."""

    def init(params: Mapping[str, Array]) -> ProxState:
        latent = {n: params[n] for n in formats}
        return ProxState(jnp.zeros((), jnp.int32), tx.init(params), latent, shown(latent, params, jnp.float32(1)))

    def shown(latent: Mapping[str, Array], params: Mapping[str, Array], r: Array) -> dict[str, Array]:
        out = {}
        for name, fmt in formats.items():
            own = fmt.init(latent[name])
            out[name] = value(fmt, latent[name], own, r, kind)
            out |= {f"{name}:{k}": a for k, a in own.items() if f"{name}:{k}" in params}
        return out

    def update(grads: Any, state: ProxState, params: Any = None) -> tuple[Any, ProxState]:
        at = {n: state.latent.get(n, a) for n, a in params.items()}
        updates, inner = tx.update(grads, state.inner, at)
        latent = {n: at[n] + updates[n] for n in formats}
        count = state.count + 1
        new = shown(latent, params, anneal.inverse_slope(count, steps))
        updates = {n: new[n] - params[n] if n in new else updates[n] for n in params}
        return updates, ProxState(count, inner, latent, new)

    return optax.GradientTransformation(init, update)


def value(fmt: Format, u: Float[Array, "O I"], params: Params, r: Array, kind: str = "parq") -> Float[Array, "O I"]:
    """What is shown of the latent u at inverse slope r: u itself at 1, the quantized weight at 0, exactly."""
    q = fmt.fake_quant(u, params)
    if kind == "binary-relax":
        soft = r * u + (1 - r) * q
    else:
        stored = fmt.stored(params)
        scale = spread(stored["scale"], u.shape)
        zero = spread(stored["zero"], u.shape) if fmt.has_zero else 0.0
        low, high = map(float, fmt.levels)
        step = 2.0 if isinstance(fmt, Integer) and fmt.odd else 1.0
        at = (u / scale + zero - low) / step  # in steps above the lowest level
        top = (high - low) / step
        floor = jnp.clip(jnp.floor(at), 0.0, max(top - 1, 0.0))
        between = floor + jnp.clip(0.5 + (at - floor - 0.5) / jnp.maximum(r, 1e-6), 0.0, 1.0)
        end = jnp.clip(at, 0.0, top)
        at = jnp.where((at < 0) | (at > top), end + r * (at - end), between)
        soft = (at * step + low - zero) * scale
    return jnp.where(r <= 0, q, jnp.where(r >= 1, u, soft))


def prepare(params: Tree, assignment: Assignment, *, stored: Stored | None = None, kind: str = "parq") -> Tree:
    """Latents that the forward pass sees as they are; raises `InputError` for formats without levels times a scale."""
    return trees.map_leaves(_soft, latents.prepare(params, assignment, partial(start, kind=kind), stored))


def start(fmt: Format, w: jax.Array, kind: str = "parq") -> tuple[Format, Params]:
    """See the module. Raises `InputError`."""
    known = isinstance(fmt, Integer | Ternary | GGML) and not (fmt.has_min or isinstance(fmt, DoReFa))
    if isinstance(fmt, DoReFa):
        raise InputError(f"format {fmt.name!r} with recipe {kind}: rounding it twice is not rounding it once")
    if kind == "parq" and not known:
        raise InputError(
            f"format {fmt.name!r} with recipe parq (allowed: levels times a scale, or recipe binary-relax)"
        )
    return fmt, fmt.fitted(w)


def _soft(path: str, leaf: Any) -> Any:
    if isinstance(leaf, PreparedInput):
        return dataclasses.replace(leaf, w=_soft(path, leaf.w))
    return dataclasses.replace(leaf, soft=True) if isinstance(leaf, Latent) else leaf


def _recipe(kind: str, keys: list[str]) -> Recipe:
    found: dict[str, float] = {}
    for key in keys:
        m = re.fullmatch(r"(start|end|steep)(\d+(?:\.\d+)?)", key)
        if m is None or m[1] in found:
            raise InputError(f"recipe {kind}: key {key!r} (allowed: startF, endF, steepN, each once)")
        found[m[1]] = float(m[2])
    anneal = Anneal(**found)
    if not (0 <= anneal.start < anneal.end <= 1 and anneal.steep > 0):
        raise InputError(f"recipe {kind}: {anneal} (allowed: 0 <= start < end <= 1, steep above 0)")
    name = ":".join([kind, *keys])
    wrap = partial(_wrap, kind=kind, anneal=anneal)
    return Recipe(name, partial(prepare, kind=kind), latents.convert, {}, wrap=wrap)


def _wrap(
    tx: optax.GradientTransformation, formats: Mapping[str, Format], steps: int, *, kind: str, anneal: Anneal
) -> optax.GradientTransformation:
    return prox(tx, formats, steps, kind, anneal)


register_family("parq", partial(_recipe, "parq"))
register_family("binary-relax", partial(_recipe, "binary-relax"))
