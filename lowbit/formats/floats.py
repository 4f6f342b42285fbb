"""Floating-point formats `bf16`, `fp16`, `f32`, and the roundings to them that scales use too.

The roundings are arithmetic on float32 instead of a cast there and back: XLA may drop such a pair of casts inside a
jitted program ("excess precision"), and then eager and jitted code would see different scales.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.formats.base import Format, FormatError, Params, QTensor, register

STORAGE = {"f32": np.dtype("float32"), "fp16": np.dtype("float16"), "bf16": jnp.dtype("bfloat16")}
LARGEST = {k: float(jnp.finfo(d).max) for k, d in STORAGE.items()}
# The smallest scale that a format may store. fp16's is its smallest subnormal, 5.96e-8; the others are far above the
# float32 subnormals that XLA:CPU flushes.
SMALLEST_SCALE = {"f32": 2.0**-100, "fp16": 2.0**-24, "bf16": 2.0**-100}


def power_of_two(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """The largest power of two that is at most `|x|` (0 for zeros and subnormals), exactly."""
    bits = jax.lax.bitcast_convert_type(x, jnp.int32) & 0x7F800000
    return jax.lax.bitcast_convert_type(bits, jnp.float32)


def round_to(x: Float[Array, "*s"], storage: str) -> Float[Array, "*s"]:
    """float32 values rounded half to even to those that `storage` (`f32`, `fp16`, `bf16`) holds; saturating, with
    subnormals of fp16."""
    x = x.astype(jnp.float32)
    if storage == "f32":
        return x
    if storage == "bf16":  # the upper half of a float32
        u = jax.lax.bitcast_convert_type(x, jnp.uint32)
        magnitude = ((u & 0x7FFFFFFF) + 0x7FFF + ((u >> 16) & 1)) & np.uint32(0xFFFF0000)
        u = jnp.minimum(magnitude, np.uint32(0x7F7F0000)) | (u & np.uint32(0x80000000))
        return jax.lax.bitcast_convert_type(u, jnp.float32)
    ulp = jnp.maximum(power_of_two(x), 2.0**-14) * np.float32(2.0**-10)
    return jnp.clip(jnp.round(x / ulp) * ulp, -65504.0, 65504.0)


def round_e4m3(x: Float[Array, "*s"]) -> Float[Array, "*s"]:
    """float32 values rounded half to even to those of e4m3fn (4 exponent bits, 3 of mantissa, subnormals, no infinity);
    saturating at 448."""
    ulp = jnp.maximum(power_of_two(x), 2.0**-6) * np.float32(2.0**-3)
    return jnp.clip(jnp.round(x / ulp) * ulp, -448.0, 448.0)


@dataclasses.dataclass(frozen=True)
class FloatFormat(Format):
    """Weights cast to a float type of 16 or 32 bits; nothing to fit, and the gradient is the identity.

    Codes are the bit patterns as int32. Source: IEEE 754 (fp16 and f32), bfloat16. Half to even, subnormals kept, and
    saturating under jit (an eager `encode` refuses what does not fit).
    """

    storage: str

    @property
    def name(self) -> str:
        return self.storage

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        super().check_values(w_OI, params)
        top = float(jnp.max(jnp.abs(w_OI))) if w_OI.size else 0.0
        if top > LARGEST[self.storage]:
            raise FormatError(f"{self.name}: weight of magnitude {top:g} (largest: {LARGEST[self.storage]:g})")

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        return {}

    def stored(self, params: Params) -> Params:
        return params

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O I"]:
        return self._codes(round_to(w_OI, self.storage).astype(STORAGE[self.storage]))

    def dequantize(self, codes_OI: Int[Array, "O I"], stored: Params) -> Float[Array, "O I"]:
        return self._value(codes_OI).astype(jnp.float32)

    def _codes(self, value: Array) -> Array:
        if self.storage == "f32":
            return jax.lax.bitcast_convert_type(value, jnp.int32)
        return jax.lax.bitcast_convert_type(value, jnp.uint16).astype(jnp.int32)

    def _value(self, codes: Array) -> Array:
        if self.storage == "f32":
            return jax.lax.bitcast_convert_type(codes, jnp.float32)
        return jax.lax.bitcast_convert_type(codes.astype(jnp.uint16), STORAGE[self.storage])

    def pack(self, codes_OI: Int[Array, "O I"], stored: Params) -> dict[str, Array]:
        return {"w": self._value(codes_OI)}

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O I"], Params]:
        return self._codes(arrays["w"]), {}

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        return g_OI, {}

    def affine(self, q: QTensor) -> None:
        return None


def _parser(storage: str):
    def parse(keys: list[str]) -> Format:
        if keys:
            raise FormatError(f"unknown key {keys[0]!r} of {storage} (allowed: none)")
        return FloatFormat(storage)

    return parse


for _name in STORAGE:
    register(_name, _parser(_name), [_name])
