"""Ternary weights `{-s, 0, s}` with an absmean scale (BitNet b1.58, arXiv 2402.17764)."""

import dataclasses
from typing import Any

import jax.numpy as jnp
from jaxtyping import Array, Bool, Float

from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.fake_quant import Clip, Levels, inside
from lowbit.formats.uniform import Uniform, parse_keys


@dataclasses.dataclass(frozen=True)
class Ternary(Uniform):
    """`ternary`: codes `clip(rne(w / s), -1, 1)` with `s = mean|w|` over the tensor (the paper's choice and the
    default), each row, or each group of columns. 2 bits stored, four codes a byte, plus an fp16 scale.

    Under `paretoq` its scale learns as in ParetoQ's ternary SEQ (arXiv 2502.02631), `s = 2 alpha / 3`: outside of
    `|w| <= 0.99 alpha` the gradient of alpha is `2 / 3 sign(w)`, the derivative of the top level. `paretoq-compat` has
    the published code's 1.0 there (times 1.5 on s).

    Weights that are ternary already (every magnitude is 0 or one value) keep that value as their scale, so quantizing
    twice is quantizing once; the bare absmean would shrink it by the share of non-zeros. Unlike the paper, the scale's
    lower bound is that of its storage type and not 1e-5.
    """

    granularity: str | int = "tensor"

    @property
    def name(self) -> str:
        group = f"g{self.granularity}" if isinstance(self.granularity, int) else self.granularity
        return ":".join(["ternary", group, *self._keys()])

    @property
    def bits(self) -> int:
        return 2

    @property
    def levels(self) -> tuple[int, int]:
        return (-1, 1)

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        return {"scale": ternary_scale(self, w_OGK)}

    def within(self, w: Array, ratio: Array, zero: Any, levels: Levels, clip: Clip) -> Bool[Array, "..."]:
        if clip in ("paretoq", "paretoq-compat"):  # |w| <= 0.99 alpha, and s = 2 alpha / 3
            return inside(w, ratio, zero, (-1.485, 1.485), "inclusive")
        return super().within(w, ratio, zero, levels, clip)


def ternary_scale(fmt: Uniform, w_OGK: Float[Array, "O G K"]) -> Float[Array, "R G"]:
    """Absmean over what shares a scale, or the one magnitude of weights that are ternary already."""
    size = jnp.abs(w_OGK)
    top = fmt.reduce(jnp.maximum, size)
    ternary = fmt.reduce(jnp.logical_and, (size == 0) | (size == top[:, :, None]))
    return jnp.where(ternary, top, fmt.mean(size))


def _parse(keys: list[str]) -> Format:
    found = parse_keys("ternary", keys, ["granularity", "clip", "compat", "storage"])
    compat = found.pop("compat", None)
    if compat and "clip" in found:
        raise FormatError(f"ternary: key {compat!r} gives a second clip (allowed: one)")
    return Ternary(**(found | {"clip": compat} if compat else found))


register(
    "ternary",
    _parse,
    [
        "ternary:tensor",
        "ternary:channel",
        "ternary:g256",
        "ternary:g64:lsq",
        "ternary:tensor:f32",
        "ternary:channel:paretoq",
        "ternary:channel:paretoq-compat",
    ],
)
