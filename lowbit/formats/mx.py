"""`mxfp4`: OCP microscaling FP4, a 4-bit float for each weight and one power of two for 32 of them.

    w_hat = level * 2^e,  level in +-{0, 0.5, 1, 1.5, 2, 3, 4, 6} (E2M1)

Stored as ggml and gpt-oss store it: 4-bit codes and a byte `e + 127` (E8M0), 4.25 bits per weight. Source: OCP
Microscaling Formats (MX) v1.0, sections 5.2.1 and 6.3.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.formats.base import Format, Params, register
from lowbit.formats.floats import power_of_two
from lowbit.formats.uniform import Uniform, parse_keys

BLOCK = 32
LEAST, MOST = 2.0**-100, 2.0**124  # of the scale: no product is a float32 subnormal or overflows


@dataclasses.dataclass(frozen=True)
class MXFP4(Uniform):
    """E2M1's levels, doubled: codes `0, 1, 2, 3, 4, 6, 8, 12` and their negatives times `scale = 2^(e-1)`.

    `e = floor(log2 max|w|) - 2` (section 6.3); weights beyond 6 of its units saturate. Key `mse` tries `e - 1`, `e` and
    `e + 1` and keeps the least squared error. Codes are rounded half to even (ggml: to the smaller one), -0 is 0.
    A trained scale is rounded to the nearest power of two by its logarithm, straight-through, and gets the gradient of
    every uniform grid: `level - w/s` where the policy passes, else the level.
    """

    granularity: str | int = BLOCK
    mse: bool = False

    @property
    def name(self) -> str:
        return ":".join(["mxfp4", *["mse"] * self.mse, *self._keys()])

    @property
    def bits(self) -> int:
        return 4

    @property
    def levels(self) -> tuple[int, int]:
        return (-12, 12)

    @property
    def searched(self) -> bool:
        return self.mse

    @property
    def factors(self) -> Float[np.ndarray, " n"]:
        return np.array([1.0, 0.5, 2.0], np.float32)

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        return {"scale": power_of_two(self.reduce(jnp.maximum, jnp.abs(w_OGK))) * np.float32(1 / 8)}

    def round(self, ratio: Float[Array, "*s"]) -> Float[Array, "*s"]:
        """Two significant bits, half to even; below 4 whole numbers."""
        step = jnp.maximum(power_of_two(ratio) * np.float32(0.5), 1.0)
        return jnp.round(ratio / step) * step

    def stored_scale(self, scale: Array) -> Array:
        """The nearest power of two in `LEAST..MOST`, by logarithm."""
        return jnp.clip(power_of_two(jnp.maximum(scale, 0.0) * np.float32(np.sqrt(2))), LEAST, MOST)

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        Format.check_values(self, w_OI, params)

    def pack(self, codes_OI: Int[Array, "O I"], stored: Params) -> dict[str, Array]:
        exponent = (jax.lax.bitcast_convert_type(stored["scale"], jnp.int32) >> 23) + 1
        return {"codes": self.pack_codes(codes_OI), "exponent": exponent.astype(jnp.uint8)}

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O I"], Params]:
        scale = jax.lax.bitcast_convert_type((arrays["exponent"].astype(jnp.int32) - 1) << 23, jnp.float32)
        return self.unpack_codes(arrays["codes"], shape), {"scale": scale}

    def pack_codes(self, codes_OI: Int[Array, "O I"]) -> Array:
        size = jnp.abs(codes_OI)  # 0 1 2 3 4 6 8 12 -> 0 .. 7
        index = jnp.where(size <= 4, size, jnp.where(size == 12, 7, size // 2 + 2))
        return super().pack_codes(index + jnp.where(codes_OI < 0, 8, 0) + self.levels[0])

    def unpack_codes(self, packed: Array, shape: tuple[int, int]) -> Int[Array, "O I"]:
        index = super().unpack_codes(packed, shape) - self.levels[0]
        size = index & 7
        size = jnp.where(size <= 4, size, jnp.where(size == 7, 12, 2 * size - 4))
        return jnp.where(index >= 8, -size, size)


def _parse(keys: list[str]) -> Format:
    found: dict[str, Any] = parse_keys("mxfp4", keys, ["search", "clip"])
    return MXFP4(mse=found.pop("search", None) == "mse", **found)


register("mxfp4", _parse, ["mxfp4", "mxfp4:mse:clip", "mxfp4:lsq"])
