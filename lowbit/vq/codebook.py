"""What formats with learned codebooks share: codes name vectors of fp16 values, which are summed and scaled once.

    w_hat = scale * (book_1[code_1] + book_2[code_2] + ...)

A decoder adds float32 values that are exact fp16 numbers, in one order, and multiplies once, so its result is the same
bits in every program. Codes are found in whole numbers (`lowbit.vq.kmeans`), and they are too. Codebooks count:
`bits_per_weight` has their bytes, and a codebook of more values than its weight is refused.

Gradients: a weight's passes everywhere; codebooks and scale get the derivative at fixed codes, exactly, and their
rounding to fp16 is straight-through. Codebooks `[A, P, K, d]` belong to A equal parts of the rows and P of the columns.
"""

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.formats.base import Format, FormatError, Params
from lowbit.formats.floats import LARGEST, SMALLEST_SCALE, round_to
from lowbit.formats.reduce import order_free_mean
from lowbit.vq import kmeans

SEED = 0
BEAM = 4


@dataclasses.dataclass(frozen=True)
class Codebooks(Format):
    """Base; a subclass says what its vectors, stages and codes are.

    `params`: codebooks (`books`) and, if `scaled`, `scale` of the rows `[O, 1]` or columns `[1, I]`, float32, trained.
    """

    searched: ClassVar[bool] = True  # `init` is a search, too slow for a recipe that fits at every step

    # -- what a subclass declares -------------------------------------------------------------------------------------

    @property
    def stages(self) -> tuple[int, ...]:
        """Code vectors in each codebook that is summed."""
        raise TypeError(f"{type(self).__name__} has no stages")

    def parts(self, shape: tuple[int, ...]) -> tuple[int, int]:
        """`(A, P)`: parts of the rows and of the columns that have their own codebooks."""
        return (1, 1)

    @property
    def scaled(self) -> int | None:
        """The axis that a scale is a mean over (1: one for a row, 0: for a column), None without scales."""
        return None

    def split(self, w_OI: Array, parts: tuple[int, int]) -> Array:
        """Vectors `[A P, N, d]` of a weight."""
        raise TypeError(f"{self.name} has no split")

    def join(self, x_BNd: Array, parts: tuple[int, int], shape: tuple[int, int]) -> Array:
        """Inverse of `split`."""
        raise TypeError(f"{self.name} has no join")

    def join_codes(self, codes: list[Array], parts: tuple[int, int], shape: tuple[int, int]) -> Array:
        """The codes of all stages, `[A P, N]` each, as one matrix whose last axis is the columns'."""
        raise TypeError(f"{self.name} has no join_codes")

    def split_codes(self, codes: Array, parts: tuple[int, int]) -> list[Array]:
        """Inverse of `join_codes`."""
        raise TypeError(f"{self.name} has no split_codes")

    def shape_of(self, codes: Array) -> tuple[int, int]:
        """The weight's shape."""
        raise TypeError(f"{self.name} has no shape_of")

    def books(self, params: Params) -> list[Float[Array, "A P K d"]]:
        """The codebook of each stage."""
        raise TypeError(f"{self.name} has no books")

    def params_of(self, books: list[Array]) -> Params:
        """Inverse of `books`."""
        raise TypeError(f"{self.name} has no params_of")

    # -- Format -------------------------------------------------------------------------------------------------------

    def check_size(self, shape: tuple[int, ...], values: int) -> None:
        """Raises `FormatError` when codebooks of so many values are larger than the weight."""
        O, I = shape
        if values > O * I:
            raise FormatError(
                f"{self.name}: weight of shape {tuple(shape)} has codebooks of {values} values, which cost "
                f"{16 * values / (O * I):.4g} bits per weight (allowed: at most as many values as weights, {O * I})"
            )

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """Codebooks by k-means of the weights, stage after stage and then together; `stats`, if given, are non-negative
        importances `[I]` of the columns, `key` draws the vectors that k-means starts from. A scale is the root mean
        square."""
        parts = self.parts(w_OI.shape)
        scale, x_OI = {}, w_OI
        if self.scaled is not None:
            rows = w_OI if self.scaled == 1 else w_OI.T
            rms = jnp.sqrt(order_free_mean(jnp.square(rows)[:, None]))
            scale = {"scale": rms if self.scaled == 1 else rms.T}
            x_OI = w_OI / self.stored_scale(scale["scale"])
        weight = None
        if stats is not None:
            weight = jnp.maximum(stats / jnp.maximum(jnp.max(stats), 1e-30), 1e-6)
            weight = jnp.mean(self.split(jnp.broadcast_to(weight, w_OI.shape), parts), axis=-1)
        key = jax.random.key(SEED) if key is None else key
        found = kmeans.residual(self.split(x_OI, parts), self.stages, BEAM, key, weight)
        books = [rearrange(b, "(a p) k d -> a p k d", a=parts[0]) for b in found]
        return {**self.params_of(books), **scale}

    def stored_scale(self, scale: Array) -> Array:
        return jnp.maximum(round_to(scale, "fp16"), np.float32(SMALLEST_SCALE["fp16"]))

    def stored(self, params: Params) -> Params:
        """Everything in fp16; a scale at least fp16's smallest."""
        return {k: self.stored_scale(a) if k == "scale" else round_to(a, "fp16") for k, a in params.items()}

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        super().check_values(w_OI, params)
        for what, a in params.items():
            top = float(jnp.max(jnp.abs(a)))
            if not top <= LARGEST["fp16"]:
                raise FormatError(f"{self.name}: {what} of magnitude {top:g} (largest in fp16: {LARGEST['fp16']:g})")

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "P Q"]:
        """Codes of near vectors: the nearest in units of the scale for one stage, by beam search for several."""
        x_OI = w_OI / stored["scale"] if "scale" in stored else w_OI
        parts, books = self._flat(stored)
        x_BNd = self.split(x_OI, parts)
        u = kmeans.unit(x_BNd, books, len(books))
        codes = kmeans.search(jnp.round(x_BNd * u), [jnp.round(b * u) for b in books], BEAM)
        return self.join_codes(codes, parts, w_OI.shape)

    def dequantize(self, codes_PQ: Int[Array, "P Q"], stored: Params) -> Float[Array, "O I"]:
        parts, books = self._flat(stored)
        vectors = [kmeans.take(b, c) for b, c in zip(books, self.split_codes(codes_PQ, parts))]
        total = vectors[0]
        for v in vectors[1:]:
            total = total + v
        w_OI = self.join(total, parts, self.shape_of(codes_PQ))
        return w_OI * stored["scale"] if "scale" in stored else w_OI

    def params_at(self, stored: Params, column: Any, span: int) -> Params:
        """Solver hook: an array's second axis has one entry for each of equal parts of the span's columns."""
        return {k: jax.lax.dynamic_slice_in_dim(a, column * a.shape[1] // span, 1, axis=1) for k, a in stored.items()}

    def _flat(self, stored: Params) -> tuple[tuple[int, int], list[Array]]:
        books = self.books(stored)
        return books[0].shape[:2], [rearrange(b, "a p k d -> (a p) k d") for b in books]

    def pack_params(self, stored: Params) -> dict[str, Array]:
        return {k: a.astype(jnp.float16) for k, a in stored.items()}

    def unpack_params(self, arrays: Mapping[str, Array]) -> Params:
        return {k: a.astype(jnp.float32) for k, a in arrays.items() if k != "codes"}

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        stored = self.stored(params)
        codes = self.quantize(w_OI, stored)
        return g_OI, jax.vjp(lambda p: self.dequantize(codes, p), stored)[1](g_OI)[0]


def power(name: str, what: str, value: int, most: int) -> None:
    """Raises `FormatError` unless a number of code vectors is a power of two from 2 to `most`."""
    if value < 2 or value > most or value & (value - 1):
        raise FormatError(f"{name}: {what} of {value} vectors (allowed: powers of two, 2 to {most})")
