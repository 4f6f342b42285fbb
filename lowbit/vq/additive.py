"""Additive codebooks (AQLM, arXiv 2401.06118): G neighbouring weights of a row are a sum of M code vectors.

    w_hat[o, jG : (j+1)G] = scale_o * sum_m book_m[code_ojm]

`aqlm:MxB:gG`: M codebooks of 2^B vectors of G weights, one fp16 scale a row. Bits per weight: `M B / G` for codes,
packed to the bit along each row, `16 G M 2^B / (O I)` for codebooks, `16 / I` for scales. Small layers want small
codebooks: 1x16 with g8 on a 1024 x 1024 weight costs 8 bits per weight for the codebook alone.

Without data, codebooks are fitted by residual k-means and refined together; `lowbit.ptq.aqlm` fits them to a text.
"""

import dataclasses
import re
from collections.abc import Mapping

import jax.numpy as jnp
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import unknown
from lowbit.formats.base import Format, FormatError, Params, register
from lowbit.formats.packing import pack, unpack
from lowbit.vq.codebook import Codebooks


@dataclasses.dataclass(frozen=True)
class Additive(Codebooks):
    """`aqlm:MxB:gG`; see the module. `params`: `codebook` `[M, 1, 2^B, G]`, `scale` `[O, 1]`, float32. Codes are int32
    `[O, I / G * M]`, those of a vector next to each other."""

    number: int = 1
    bits: int = 8
    size: int = 8

    @property
    def name(self) -> str:
        return f"aqlm:{self.number}x{self.bits}:g{self.size}"

    @property
    def tile(self) -> tuple[int, int]:
        return (1, self.size)

    @property
    def idempotent(self) -> bool:
        return self.number == 1  # a beam search may miss the sum that a vector is

    @property
    def stages(self) -> tuple[int, ...]:
        return (2**self.bits,) * self.number

    @property
    def scaled(self) -> int:
        return 1

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (must be [out, in])")
        if shape[1] % self.size:
            raise FormatError(
                f"{self.name}: weight of shape {tuple(shape)} (rows must be a multiple of {self.size} long)"
            )
        self.check_size(shape, self.number * 2**self.bits * self.size)

    def split(self, w_OI: Array, parts: tuple[int, int]) -> Array:
        return rearrange(w_OI, "o (j g) -> 1 (o j) g", g=self.size)

    def join(self, x_BNd: Array, parts: tuple[int, int], shape: tuple[int, int]) -> Array:
        return rearrange(x_BNd, "1 (o j) g -> o (j g)", o=shape[0])

    def join_codes(self, codes: list[Array], parts: tuple[int, int], shape: tuple[int, int]) -> Array:
        return rearrange(jnp.stack(codes, axis=-1), "1 (o j) m -> o (j m)", o=shape[0])

    def split_codes(self, codes: Array, parts: tuple[int, int]) -> list[Array]:
        each = rearrange(codes, "o (j m) -> m 1 (o j)", m=self.number)
        return [each[m] for m in range(self.number)]

    def shape_of(self, codes: Array) -> tuple[int, int]:
        return codes.shape[0], codes.shape[1] // self.number * self.size

    def books(self, params: Params) -> list[Float[Array, "A P K d"]]:
        return [params["codebook"][m][None] for m in range(self.number)]

    def params_of(self, books: list[Array]) -> Params:
        return {"codebook": jnp.stack([b[0] for b in books])}

    def pack(self, codes_PQ: Int[Array, "O Q"], stored: Params) -> dict[str, Array]:
        return {"codes": pack(codes_PQ, self.bits), **self.pack_params(stored)}

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "O Q"], Params]:
        n = shape[1] // self.size * self.number
        return unpack(arrays["codes"], self.bits, n), self.unpack_params(arrays)


def _parse(keys: list[str]) -> Format:
    books, size = None, None
    for key in keys:
        if m := re.fullmatch(r"([1-9]\d*)x([1-9]\d*)", key):
            if books is not None:
                raise FormatError(f"aqlm: key {key!r} gives second codebooks (allowed: one)")
            books = int(m[1]), int(m[2])
        elif m := re.fullmatch(r"g([1-9]\d*)", key):
            if size is not None:
                raise FormatError(f"aqlm: key {key!r} gives a second vector length (allowed: one)")
            size = int(m[1])
        else:
            raise FormatError(str(unknown("key of aqlm", key, ["1x8", "2x8", "g8"])))
    number, bits = books or (1, 8)
    if not (number <= 8 and bits <= 16):
        raise FormatError(f"aqlm: {number}x{bits} (allowed: 1 to 8 codebooks of 1 to 16 bits)")
    if (size := size or 8) > 32:
        raise FormatError(f"aqlm: vectors of {size} weights (allowed: 1 to 32)")
    return Additive(number, bits, size)


register("aqlm", _parse, ["aqlm:1x8:g8", "aqlm:2x4:g4", "aqlm:3x3:g4"])
