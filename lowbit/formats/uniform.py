"""Levels times a scale: `Uniform`, which integers, ternary and ggml's types build on, and the keys of their names.

    codes = clip(rne(w / s) + z, lo, hi)          w_hat = (codes - z) * s

The contract is division by the *stored* scale, half to even. Scales are rounded to their storage type (fp16 unless the
name says otherwise) before any code is chosen, and never reach 0.
"""

import dataclasses
import math
import re
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange, repeat
from jaxtyping import Array, Bool, Float, Int

from lowbit.errors import unknown
from lowbit.formats.base import Affine, Format, FormatError, Params, QTensor, unpacked
from lowbit.formats.fake_quant import Clip, Levels, inside, uniform_gradients
from lowbit.formats.floats import LARGEST, SMALLEST_SCALE, STORAGE, round_to
from lowbit.formats.packing import pack, unpack
from lowbit.formats.reduce import order_free_mean, over_last

# Factors on the absmax (or min-max) scale that `:mse` tries; 1.0 is among them, so it never loses to no search.
SHRINK = np.linspace(0.4, 1.15, 31, dtype=np.float32)


@dataclasses.dataclass(frozen=True)
class Uniform(Format):
    """Integer levels `lo..hi` times one scale per tensor, row (`channel`) or group of columns, minus a zero point.

    Stored: codes as a dense `bits`-wide stream per row, `scale` in `storage`, and for asymmetric grids `zero` as a
    `bits`-wide stream or `min` in `storage`. Bits per weight: `bits + (16 + zero bits) / group`. Trainable: `scale`
    (and `zero` or `min`), float32 `[O, G]`, `[O, 1]` or `[1, 1]`; their rounding to what is stored is straight-through.
    `clip` is the gradient policy (see `lowbit.formats.fake_quant`).

    With `min` the grid is `w_hat = code * s + min`. A decoder that adds after multiplying needs exact products: the
    scale's significant bits (11 of fp16) and those of a code together are at most 24. Its gradient is LSQ+'s (arXiv
    2004.09576): that of the saturated weights.
    """

    granularity: str | int = "channel"
    storage: str = "fp16"
    clip: Clip = "none"

    # -- the grid: what a subclass declares -------------------------------------------------------------------------

    @property
    def bits(self) -> int:
        raise TypeError(f"{type(self).__name__} has no bits")

    @property
    def levels(self) -> tuple[int, int]:
        """`(lo, hi)` of the codes."""
        raise TypeError(f"{type(self).__name__} has no levels")

    @property
    def has_zero(self) -> bool:
        return False

    @property
    def has_min(self) -> bool:
        return False

    @property
    def min_storage(self) -> str:
        """Type of the minimum."""
        return self.storage

    @property
    def signed_scale(self) -> bool:
        return False

    def grid(self, stored: Params) -> Params:
        """`scale` (and `zero` or `min`) per group, from parameters as stored."""
        return stored

    def round(self, ratio: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """The nearest level of a grid without ends, for weights in units of the scale."""
        return jnp.round(ratio)

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        """Unrounded `scale` (and `zero` or `min`), `[O, G]` or `[1, 1]`."""
        raise TypeError(f"{self.name} has no fit")

    @property
    def searched(self) -> bool:
        """Whether `init` searches a shrink factor of the fitted scale for the least squared error."""
        return False

    @property
    def factors(self) -> Float[np.ndarray, " n"]:
        """What a search tries, times the fitted scale."""
        return SHRINK

    # -- groups -----------------------------------------------------------------------------------------------------

    def group(self, shape: tuple[int, ...]) -> int:
        """Columns that share a scale."""
        return self.granularity if isinstance(self.granularity, int) else shape[1]

    def params_span(self, shape: tuple[int, int]) -> int:
        return self.group(shape)

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (must be [out, in])")
        if min(shape) < 1 or shape[1] % self.group(shape):
            raise FormatError(
                f"{self.name}: weight of shape {tuple(shape)} (rows must be a multiple of {self.group(shape)} long)"
            )

    def blocks(self, w_OI: Array) -> Array:
        """`[O, I]` as `[O, G, K]`, K columns that share a scale."""
        return rearrange(w_OI, "o (g k) -> o g k", k=self.group(w_OI.shape))

    def reduce(self, f: Any, x_OGK: Array) -> Array:
        """A ufunc (jnp.maximum, jnp.add, ...) over everything that shares a scale, to `[O, G]` or `[1, 1]`."""
        x_OG = over_last(f, x_OGK)
        return f.reduce(x_OG, axis=0, keepdims=True) if self.granularity == "tensor" else x_OG

    def mean(self, x_OGK: Float[Array, "O G K"]) -> Float[Array, "R G"]:
        """Mean of non-negative values over everything that shares a scale."""
        return order_free_mean(x_OGK, over_rows=self.granularity == "tensor")

    # -- Format -----------------------------------------------------------------------------------------------------

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """Scales fitted to `w`; `stats`, if given, are non-negative importances `[I]` of the columns, which only a
        searched (`:mse`) fit uses."""
        params = self.fit(self.blocks(w_OI))
        if not self.searched:
            return params
        weight = jnp.ones((), jnp.float32) if stats is None else stats / jnp.maximum(jnp.max(stats), 1e-30)

        def step(best: tuple[Array, Array], factor: Array):
            scale = self.stored_scale(params["scale"] * factor)
            stored = self.stored({**params, "scale": scale})
            error = w_OI - self.dequantize(self.quantize(w_OI, stored), stored)
            error = self.mean(self.blocks(jnp.square(error) * weight))
            keep = error < best[0]
            return (jnp.where(keep, error, best[0]), jnp.where(keep, scale, best[1])), None

        start = (jnp.full(params["scale"].shape, jnp.inf), params["scale"])
        (_, scale), _ = jax.lax.scan(step, start, jnp.asarray(self.factors))
        return {**params, "scale": scale}

    def stored(self, params: Params) -> Params:
        """`scale` rounded to storage and kept away from 0; `zero` rounded and clipped to the codes; `min` rounded to
        storage."""
        out = {"scale": self.stored_scale(params["scale"])}
        if self.has_zero:
            lo, hi = self.levels
            out["zero"] = jnp.clip(jnp.round(params["zero"]), lo, hi)
        if self.has_min:
            out["min"] = round_to(params["min"], self.min_storage)
        return out

    def stored_scale(self, scale: Array) -> Array:
        """Rounded to `storage`; of magnitude `SMALLEST_SCALE` at least, and positive unless `signed_scale`."""
        scale, least = round_to(scale, self.storage), np.float32(SMALLEST_SCALE[self.storage])
        if self.signed_scale:
            return jnp.where(scale < 0, -1.0, 1.0) * jnp.maximum(jnp.abs(scale), least)
        return jnp.maximum(scale, least)

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        super().check_values(w_OI, params)
        for what in ("scale", "min"):
            if what in params:
                self.check_range(what, params[what], self.min_storage if what == "min" else self.storage)

    def check_range(self, what: str, value: Array, storage: str) -> None:
        top, bound = float(jnp.max(jnp.abs(value))), LARGEST[storage]
        if not top <= bound:
            raise FormatError(f"{self.name}: {what} of magnitude {top:g} (largest in {storage}: {bound:g})")

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O I"]:
        grid = self.grid(stored)
        if self.has_min:
            w_OI = w_OI - spread(grid["min"], w_OI.shape)
        codes = self.round(w_OI / spread(grid["scale"], w_OI.shape))
        if self.has_zero:
            codes = codes + spread(grid["zero"], w_OI.shape)
        return jnp.clip(codes, *map(float, self.levels)).astype(jnp.int32)

    def dequantize(self, codes_OI: Int[Array, "O I"], stored: Params) -> Float[Array, "O I"]:
        grid, levels = self.grid(stored), codes_OI.astype(jnp.float32)
        if self.has_zero:
            levels = levels - spread(grid["zero"], codes_OI.shape)
        w_hat_OI = levels * spread(grid["scale"], codes_OI.shape)
        return w_hat_OI + spread(grid["min"], codes_OI.shape) if self.has_min else w_hat_OI

    @property
    def whole(self) -> bool:
        return not (self.has_zero or self.has_min or isinstance(self.granularity, int))

    def integers(self, codes_OI: Int[Array, "O I"], stored: Params) -> tuple[Array, Array] | None:
        if not self.whole:
            return None
        scale = stored["scale"]
        return codes_OI.astype(jnp.float32), scale[:, 0] if self.granularity == "channel" else scale[0, 0]

    def pack(self, codes_OI: Int[Array, "O I"], stored: Params) -> dict[str, Array]:
        arrays = {"codes": self.pack_codes(codes_OI), "scale": stored["scale"].astype(STORAGE[self.storage])}
        if self.has_zero:
            arrays["zero"] = pack(stored["zero"].astype(jnp.int32), self.bits)
        if self.has_min:
            arrays["min"] = stored["min"].astype(STORAGE[self.min_storage])
        return arrays

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O I"], Params]:
        stored = {"scale": arrays["scale"].astype(jnp.float32)}
        if self.has_zero:
            stored["zero"] = unpack(arrays["zero"], self.bits, arrays["scale"].shape[-1]).astype(jnp.float32)
        if self.has_min:
            stored["min"] = arrays["min"].astype(jnp.float32)
        return self.unpack_codes(arrays["codes"], shape), stored

    def pack_codes(self, codes_OI: Int[Array, "O I"]) -> Array:
        return pack(codes_OI - self.levels[0], self.bits)

    def unpack_codes(self, packed: Array, shape: tuple[int, int]) -> Int[Array, "O I"]:
        return unpack(packed, self.bits, shape[1]) + self.levels[0]

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        scale, zero, low = self._spread(self.grid(stored := self.stored(params)), w_OI.shape)
        level = self.quantize(w_OI, stored).astype(jnp.float32) - zero
        end = 1.5 if self.clip == "paretoq-compat" else 1.0
        gw, gs, out = uniform_gradients(
            w_OI, scale, zero, self.levels, self.clip, g_OI, low, level=level, within=self.within, end=end
        )
        each = (
            {"scale": gs} | ({"zero": -scale * out} if self.has_zero else {}) | ({"min": out} if self.has_min else {})
        )
        factor = self.grad_factor(w_OI.shape)
        return gw, {k: self.reduce(jnp.add, self.blocks(g)) * factor for k, g in each.items()}

    def passes(self, w_OI: Float[Array, "O I"], stored: Params) -> Bool[Array, "O I"]:
        scale, zero, low = self._spread(self.grid(stored), w_OI.shape)
        return self.within(w_OI, (w_OI - low) / scale, zero, self.levels, self.clip)

    def within(self, w: Array, ratio: Array, zero: Any, levels: Levels, clip: Clip) -> Bool[Array, "..."]:
        """`fake_quant.inside` as this grid reads it."""
        return inside(w, ratio, zero, levels, clip, self.round)

    def _spread(self, grid: Params, shape: tuple[int, ...]) -> list[Any]:
        return [spread(grid[k], shape) if k in grid else 0.0 for k in ("scale", "zero", "min")]

    def grad_factor(self, shape: tuple[int, ...]) -> float:
        """LSQ's `g = 1 / sqrt(N * Qp)`, N the weights of the layer, under the `lsq` policy and `paretoq`, for which Qp
        is 1 up to two bits; else 1."""
        n = shape[0] * shape[1]
        if self.clip == "lsq":
            return 1.0 / math.sqrt(n * self.levels[1])
        return 1.0 / math.sqrt(n * max(2 ** (self.bits - 1) - 1, 1)) if str(self.clip).startswith("paretoq") else 1.0

    def affine(self, q: QTensor) -> Affine:
        codes, stored = unpacked(q)
        grid, group = self.grid(stored), self.group(q.shape)
        full = (q.shape[0], q.shape[1] // group)
        scale, zero, low = (np.broadcast_to(np.asarray(grid.get(k, 0.0), "f4"), full) for k in ("scale", "zero", "min"))
        return Affine(np.asarray(codes), scale, zero, low, group)

    def _keys(self) -> list[str]:
        """The keys of the canonical name that every uniform format shares, after its granularity and calibration."""
        clip = {"none": [], "inclusive": ["clip"]}.get(self.clip, [self.clip])
        clip = [f"fixed{self.clip:g}"] if isinstance(self.clip, float) else clip
        return clip + ([] if self.storage == "fp16" else [self.storage])


def spread(scale_RG: Float[Array, "R G"], shape: tuple[int, ...]) -> Float[Array, "R I"]:
    """One value per column out of one per group; a single row is left to broadcast."""
    return repeat(scale_RG, "r g -> r (g k)", k=shape[1] // scale_RG.shape[1])


def signed_max(fmt: Uniform, w_OGK: Float[Array, "O G K"]) -> Float[Array, "R G"]:
    """The entry of largest magnitude with its sign; the positive one on ties."""
    high, low = fmt.reduce(jnp.maximum, w_OGK), fmt.reduce(jnp.minimum, w_OGK)
    return jnp.where(high >= -low, high, low)


# -- names ------------------------------------------------------------------------------------------------------------

_KINDS = {
    "granularity": r"tensor|channel|g([1-9]\d*)",
    "zero": r"asym",
    "rise": r"midrise",
    "center": r"centered",
    "offset": r"min|min32",
    "calibration": r"absmax|signmax|minmax|mse|signmse|absmean",
    "clip": r"clip|rounded|lsq|paretoq|fixed(\d+(?:\.\d+)?)",
    "compat": r"paretoq-compat",
    "storage": r"f32|fp16|bf16",
    "search": r"mse",
    "range": r"absmax",
}
_SAMPLES = {
    "granularity": ["tensor", "channel", "g64"],
    "zero": ["asym"],
    "rise": ["midrise"],
    "center": ["centered"],
    "offset": ["min", "min32"],
    "calibration": ["absmax", "signmax", "minmax", "mse", "signmse"],
    "clip": ["clip", "rounded", "lsq", "paretoq", "fixed2"],
    "compat": ["paretoq-compat"],
    "storage": ["f32", "fp16", "bf16"],
    "search": ["mse"],
    "range": ["absmax"],
}


def parse_keys(family: str, keys: list[str], kinds: list[str]) -> dict[str, Any]:
    """`{kind: value}` of a format name's keys. Raises `FormatError` for an unknown key or two of one kind."""
    found: dict[str, Any] = {}
    for key in keys:
        for kind in kinds:
            m = re.fullmatch(_KINDS[kind], key)
            if m is None:
                continue
            if kind in found:
                raise FormatError(f"{family}: key {key!r} gives a second {kind} (allowed: one)")
            if kind == "granularity" and m[1]:
                found[kind] = int(m[1])
            elif kind == "clip":
                found[kind] = float(m[1]) if m[1] else {"clip": "inclusive"}.get(key, key)
            else:
                found[kind] = True if kind in ("zero", "rise", "center") else key
            break
        else:
            raise FormatError(str(unknown(f"key of {family}", key, [s for k in kinds for s in _SAMPLES[k]])))
    return found
