"""ggml's simple block types as formats, so that training meets the grid that llama.cpp will read.

| name | block | levels | bits per weight | scale fitted to a block |
|---|---|---|---|---|
| `q8_0` | 32 | -128..127 times d | 8.5 | `max|w| / 127` |
| `q4_0` | 32 | -8..7 times d | 4.5 | `v / -8`, v the signed entry of largest magnitude; d may be negative |
| `q4_1` | 32 | 0..15 times d, plus m | 5.0 | `d = (max - min) / 15`, `m = min` |
| `q5_0` | 32 | -16..15 times d | 5.5 | `v / -16`, as q4_0 |
| `q5_1` | 32 | 0..31 times d, plus m | 6.0 | `d = (max - min) / 31`, `m = min` |
| `q2_0` | 64 | -1..2 times d | 2.25 | `sign(v) * 1.3 * mean|w|` |
| `tq1_0` | 256 | -1..1 times d, five in a byte | 1.6875 | absmean |
| `tq2_0` | 256 | -1..1 times d | 2.0625 | absmean |

d and m are fp16. Decoding is ggml's; encoding departs from its reference quantizers (`ggml-quants.c`) where those are
worse: codes are chosen for the scale as *stored* in fp16 (ggml divides by the unrounded one), half to even; ggml's q2_0
scale is `max|w|`, which never uses level 2 and leaves a relative error of 0.72 on normal weights (here 0.36; the
factor 1.3 is between the best for normal weights, 1.25, and for Student-t(5), 1.5); and its tq scale is `max|w|`, meant
for weights that are ternary already (0.81 on normal ones), where the absmean rule gives the same (see
`lowbit.formats.ternary`).

Keys: `mse` searches the scale (and m, for least squares; then m is at most 0), and the clip policies of
`lowbit.formats.fake_quant`.
"""

import dataclasses
from typing import Any, NamedTuple

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.formats import search
from lowbit.formats.base import Format, Params, register
from lowbit.formats.floats import round_to
from lowbit.formats.ternary import ternary_scale
from lowbit.formats.uniform import Uniform, parse_keys, signed_max


class Block(NamedTuple):
    """Size of a block, stored bits of a code and its levels."""

    size: int
    bits: int
    levels: tuple[int, int]


BLOCKS = {
    "q8_0": Block(32, 8, (-128, 127)),
    "q4_0": Block(32, 4, (-8, 7)),
    "q4_1": Block(32, 4, (0, 15)),
    "q5_0": Block(32, 5, (-16, 15)),
    "q5_1": Block(32, 5, (0, 31)),
    "q2_0": Block(64, 2, (-1, 2)),
    "tq1_0": Block(256, 2, (-1, 1)),
    "tq2_0": Block(256, 2, (-1, 1)),
}


@dataclasses.dataclass(frozen=True)
class GGML(Uniform):
    """A ggml type with levels times one scale, and a minimum in q4_1 and q5_1. See the module for the grids."""

    granularity: str | int = 32
    type: str = "q4_0"
    mse: bool = False

    @property
    def name(self) -> str:
        return ":".join([self.type, *["mse"] * self.mse, *self._keys()])

    @property
    def bits(self) -> int:
        return BLOCKS[self.type].bits

    @property
    def levels(self) -> tuple[int, int]:
        return BLOCKS[self.type].levels

    @property
    def has_min(self) -> bool:
        return self.type in ("q4_1", "q5_1")

    @property
    def signed_scale(self) -> bool:
        return self.type in ("q4_0", "q5_0", "q2_0")

    @property
    def searched(self) -> bool:
        return self.mse

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """As `Uniform.init`; a search for a minimum too solves for both."""
        if not (self.searched and self.has_min):
            return super().init(w_OI, stats, key)
        scale, low = search.fit(*search.blocks(w_OI, stats, self.granularity), self.levels, True)
        return {"scale": scale, "min": low}

    def fit(self, w_OGK: Float[Array, "O G K"]) -> Params:
        match self.type:
            case "q8_0":
                return {"scale": self.reduce(jnp.maximum, jnp.abs(w_OGK)) * np.float32(1 / 127)}
            case "q4_0" | "q5_0":
                return {"scale": signed_max(self, w_OGK) * np.float32(1 / self.levels[0])}
            case "q4_1" | "q5_1":
                low = self.reduce(jnp.minimum, w_OGK)
                span = self.reduce(jnp.maximum, w_OGK) - low
                return {"scale": span * np.float32(1 / self.levels[1]), "min": round_to(low, "fp16")}
            case "q2_0":
                sign = jnp.where(signed_max(self, w_OGK) < 0, -1.0, 1.0)
                return {"scale": sign * self.mean(jnp.abs(w_OGK)) * np.float32(1.3)}
        return {"scale": ternary_scale(self, w_OGK)}

    def pack_codes(self, codes_OI: Int[Array, "O I"]) -> Array:
        return _pack_trits(codes_OI + 1) if self.type == "tq1_0" else super().pack_codes(codes_OI)

    def unpack_codes(self, packed: Array, shape: tuple[int, int]) -> Int[Array, "O I"]:
        return _unpack_trits(packed) - 1 if self.type == "tq1_0" else super().unpack_codes(packed, shape)


# -- base 3: ggml's tq1_0 bytes, five trits each (the last four bytes of a block hold four) ---------------------------

# Per run of bytes in a block: first element, trits per byte, bytes. Trit n of byte m is element first + n * bytes + m.
_RUNS = ((0, 5, 32), (160, 5, 16), (240, 4, 4))


def _pack_trits(trits_OI: Int[Array, "O I"]) -> Array:
    """Values 0..2, rows of a multiple of 256, to uint8 `[O, I/256*52]`."""
    x = rearrange(trits_OI, "o (b k) -> o b k", k=256)
    out = []
    for first, n, size in _RUNS:
        digits = x[..., first : first + n * size].reshape(*x.shape[:2], n, size)
        value = sum(digits[..., i, :] * 3 ** (4 - i) for i in range(n))
        out.append((value * 256 + 242) // 243)  # a binary fraction value/243, rounded up
    return rearrange(jnp.concatenate(out, axis=-1), "o b k -> o (b k)").astype(jnp.uint8)


def _unpack_trits(packed: Array) -> Int[Array, "O I"]:
    x = rearrange(packed.astype(jnp.int32), "o (b k) -> o b k", k=52)
    out, at = [], 0
    for _, n, size in _RUNS:
        byte, at = x[..., at : at + size], at + size
        out += [(((byte * 3**i) & 255) * 3) >> 8 for i in range(n)]
    return rearrange(jnp.concatenate(out, axis=-1), "o b k -> o (b k)")


# -- names ------------------------------------------------------------------------------------------------------------


def _parser(type: str):
    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = parse_keys(type, keys, ["search", "clip"])
        return GGML(granularity=BLOCKS[type].size, type=type, mse=found.pop("search", None) == "mse", **found)

    return parse


_EXAMPLES = {
    "q4_0": ["q4_0", "q4_0:mse:lsq"],
    "q2_0": ["q2_0", "q2_0:mse"],
    "q5_0": ["q5_0", "q5_0:mse:clip"],
    "q5_1": ["q5_1", "q5_1:mse:lsq"],
}
for _type in BLOCKS:
    register(_type, _parser(_type), _EXAMPLES.get(_type, [_type]))
