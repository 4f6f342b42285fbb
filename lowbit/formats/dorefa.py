"""DoReFa's weights (Zhou et al. 2016, arXiv 1606.06160, eq. 9): squashed by tanh, then on a mid-rise grid.

    t = tanh(w) / max|tanh(w)|        w_hat = top * (2 rne((t + 1) / 2 * n) / n - 1),   n = 2^N - 1

The paper's weights lie in [-1, 1] (`top` = 1) and its batch norm makes up for that. Here `top = max|w|`, so that a
pretrained layer keeps its size; what is stored is `scale = top / n`, and codes are the odd integers -n .. n. At one bit
the paper has `sign(w) mean|w|`, which is `int1:tensor`.
"""

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from lowbit.formats.base import Format, Params, register
from lowbit.formats.integer import Integer
from lowbit.formats.uniform import parse_keys, spread


@dataclasses.dataclass(frozen=True)
class DoReFa(Integer):
    """`dorefaN`, N = 2..8; the gradient is straight-through rounding and the derivative of `top * t(w)`, the maximum
    held fixed. Keys: granularity (what shares a maximum; the paper's `tensor` is the default) and storage."""

    granularity: str | int = "tensor"
    midrise: bool = True

    @property
    def name(self) -> str:
        group = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        return ":".join([f"dorefa{self.width}", group, *self._keys()])

    @property
    def idempotent(self) -> bool:
        return False

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        return {"scale": self.reduce(jnp.maximum, jnp.abs(w_OGK)) * np.float32(1 / self.levels[1])}

    def squashed(self, w_OI: Float[Array, "O I"]) -> Float[Array, "O I"]:
        """`tanh(w) / max|tanh(w)|`."""
        t = jnp.tanh(w_OI)
        return t / jnp.maximum(spread(self.reduce(jnp.maximum, self.blocks(jnp.abs(t))), w_OI.shape), 1e-30)

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "O I"]:
        n = float(self.levels[1])
        code = jnp.round((self.squashed(w_OI) + 1) * np.float32(0.5 * n))
        return (2 * code - n).astype(jnp.int32)

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        stored = self.stored(params)
        t = jnp.tanh(w_OI)
        peak = jnp.maximum(spread(self.reduce(jnp.maximum, self.blocks(jnp.abs(t))), w_OI.shape), 1e-30)
        top = spread(stored["scale"], w_OI.shape) * np.float32(self.levels[1])
        codes = self.quantize(w_OI, stored).astype(jnp.float32)
        return g_OI * top / peak * (1 - t * t), {"scale": self.reduce(jnp.add, self.blocks(g_OI * codes))}


def _parser(width: int):
    def parse(keys: list[str]) -> Format:
        return DoReFa(width=width, **parse_keys(f"dorefa{width}", keys, ["granularity", "storage"]))

    return parse


for _width in range(2, 9):
    register(f"dorefa{_width}", _parser(_width), {2: ["dorefa2:tensor"], 4: ["dorefa4:g64"]}.get(_width, []))
