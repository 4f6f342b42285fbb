"""What the bits are: `Format`, `QTensor`, `Latent`, `Coded` and the registry.

A format is a frozen dataclass of pure functions over one weight matrix `w_OI` (rows are output channels, groups run
along the input axis). Its numeric core is two functions that are inverse views of one grid,

    quantize(w, stored) -> codes          int32 [O, I]
    dequantize(codes, stored) -> w_hat    float32 [O, I]

where `stored` are the parameters exactly as they are kept on disk (fp16 scales, say). Codes of vectors have another
shape, `[Oc, Ic]`, whose last axis runs along the input axis: the codes of neighbouring columns, concatenated on it, are
the codes of both. Everything else follows:

    encode     = pack . quantize . stored
    decode     = dequantize . unpack
    fake_quant = dequantize . quantize . stored      (with a hand-written gradient)

so `fake_quant(w, p) == decode(encode(w, p))` holds bit for bit as soon as `unpack . pack` is the identity on codes,
which the conformance suite checks for every registered format, eager and jitted.

`stored` is float32 *values* that are exactly representable in the storage dtype; only `pack` casts. Codes times such a
scale are exact products or single roundings in fp32, so no compiler contraction can change a bit.
"""

from __future__ import annotations

import dataclasses
import difflib
import importlib
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any, ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from lowbit.errors import InputError

Params = dict[str, Array]
# Arrays that are steps of a grid: what EfficientQAT trains end to end.
STEPS = ("scale", "d")


class FormatError(InputError):
    """A format name, option or shape that cannot be."""


@partial(jax.tree_util.register_dataclass, data_fields=["arrays"], meta_fields=["format", "shape", "dtype"])
@dataclasses.dataclass(frozen=True)
class QTensor:
    """A packed weight. `arrays` are the stored bytes (codes as uint8 words, scales, codebooks); the rest is static.

    `shape` is that of one weight matrix; a stack of them (layers under `scan`) has leading axes on `arrays` only.
    """

    arrays: dict[str, Any]  # of arrays; jax rebuilds the node with None or specs in their place
    format: Format
    shape: tuple[int, int]
    dtype: str = "float32"  # of the decoded weight

    def decode(self) -> Float[Array, "O I"]:
        """The weights, computed in float32 and cast to `dtype`."""
        return self.format.decode(self)

    def codes(self) -> tuple[Int[Array, "Oc Ic"], Params]:
        """The unpacked codes and the stored parameters."""
        return unpacked(self)

    @property
    def nbytes(self) -> int:
        """Stored bytes, scales and codebooks included."""
        return sum(stored_bytes(a) for a in self.arrays.values())

    @property
    def bits_per_weight(self) -> float:
        """`8 * stored bytes / weights` (law 3)."""
        return 8 * self.nbytes / (self.shape[0] * self.shape[1])


def stored_bytes(a: Any) -> int:
    """Bytes of an array as it is written; refuses sub-byte dtypes, whose in-memory size is not their stored size."""
    dtype = np.dtype(a.dtype)
    if dtype.itemsize * 8 > 8 or dtype in (np.dtype("int8"), np.dtype("uint8"), np.dtype("bool")) or "8" in dtype.name:
        return int(np.prod(a.shape)) * dtype.itemsize
    raise FormatError(f"array of dtype {dtype} has no defined stored size (allowed: whole-byte dtypes)")


@dataclasses.dataclass(frozen=True)
class Super:
    """Two levels of scales on the host: `scale = d * sc` and `offset = -dmin * mn` of `Affine`, exactly.

    `d` and `dmin` float32, exact in fp16, `[O, super-blocks]`; `sc` and `mn` whole numbers `[O, groups]`, as float32.
    """

    d: np.ndarray
    sc: np.ndarray
    dmin: np.ndarray | None = None
    mn: np.ndarray | None = None


@dataclasses.dataclass(frozen=True)
class Affine:
    """Codes and scales of an affine format on the host: `w = (codes - zero) * scale + offset`, in float32, exactly.

    `codes` int32 `[O, I]`; `scale`, `zero`, `offset` float32 `[O, G]`, column `j` belongs to group `j // group`.
    `zero` is 0 for symmetric formats and `offset` is 0 for all but min-based ones (q4_1); never are both non-zero.
    `super` are the factors that a format with two levels of scales (q4_k) stores instead of `scale` and `offset`.
    """

    codes: np.ndarray
    scale: np.ndarray
    zero: np.ndarray
    offset: np.ndarray
    group: int
    super: Super | None = None

    def decode(self) -> np.ndarray:
        """float32 `[O, I]`."""
        scale, zero, offset = (np.repeat(a, self.group, axis=1) for a in (self.scale, self.zero, self.offset))
        w = (self.codes.astype(np.float32) - zero) * scale
        return w + offset if self.offset.any() else w  # adding 0 would turn -0.0 into 0.0


@partial(jax.tree_util.register_dataclass, data_fields=["w", "params", "mix"], meta_fields=["format", "soft"])
@dataclasses.dataclass(frozen=True)
class Latent:
    """A weight in training: the full-precision latent `w` and, if the recipe learns them, the format's parameters.

    With `params` empty, the format's `init` computes them from `w` at each use and they get no gradient (dynamic
    straight-through quantization). `mix`, a scalar, is how much of the quantized weight the forward pass sees (see
    `blend`; None: all of it). A `soft` one is seen as it is: the optimizer takes it to the grid.
    """

    w: Any  # float [*layers, O, I]; not annotated so, as jax rebuilds the node with None or specs in its place
    params: dict[str, Any]
    format: Format
    mix: Any = None
    soft: bool = False

    def value(self) -> Float[Array, "O I"]:
        """The weight that the forward pass sees."""
        if self.soft:
            return self.w
        q = self.format.fake_quant(self.w, self.params or self.dynamic_params())
        return q if self.mix is None else blend(self.w, q, self.mix)

    def codes(self) -> tuple[Int[Array, "Oc Ic"], Params]:
        """The codes of the quantized weight and the parameters as stored; no gradient."""
        w, params = jax.lax.stop_gradient((self.w, self.params))
        stored = self.format.stored(params or self.dynamic_params())
        return self.format.quantize(w.astype(jnp.float32), stored), stored

    def encode(self) -> QTensor:
        """The trained codes and scales."""
        return self.format.encode(self.w, self.params or self.dynamic_params())

    def dynamic_params(self) -> Params:
        return jax.lax.stop_gradient(_init(self.format, self.w.astype(jnp.float32)))

    def check_values(self) -> None:
        """Raises `FormatError` when the trained weights or parameters cannot be stored."""
        self.format.check_values(self.w, self.params or _init(self.format, self.w))


@partial(jax.tree_util.register_dataclass, data_fields=["arrays", "params"], meta_fields=["format", "shape", "dtype"])
@dataclasses.dataclass(frozen=True)
class Coded:
    """A packed weight of which something continuous is trained, its scales, say: codes, and whatever else is whole
    numbers, stay as they are.

    `params` are those of a `QTensor`'s arrays that are trained, in float32, `arrays` the others; `shape` and `dtype`
    are the `QTensor`'s. With `w_hat = (q - z) * s` the gradient of s is `q - z` exactly, its rounding to what is stored
    is straight-through (EfficientQAT's E2E-QP, arXiv 2407.11062, section 3.3).
    """

    arrays: dict[str, Any]
    params: dict[str, Any]
    format: Format
    shape: tuple[int, int]
    dtype: str = "float32"

    @classmethod
    def of(cls, q: QTensor, every: bool = False) -> Coded:
        """Of a packed weight: its steps are trained, the outer ones of two levels (`d` of k-quants), or `every`
        floating array (minima, codebooks, signs too). Raises `FormatError` for a format that stores none."""
        floats = {k for k, a in q.arrays.items() if jnp.issubdtype(a.dtype, jnp.floating)}
        names = floats if every else floats & set(STEPS)
        if not names:
            raise FormatError(
                f"format {q.format.name!r} has no scales to train (allowed: formats that store real ones)"
            )
        params = {k: q.arrays[k].astype(jnp.float32) for k in q.arrays if k in names}
        return cls({k: a for k, a in q.arrays.items() if k not in params}, params, q.format, q.shape, q.dtype)

    def with_codes(self, codes: Int[Array, "Oc Ic"]) -> Coded:
        """With other codes; what is trained stays."""
        return dataclasses.replace(self, arrays=_recoded(self.format, self.shape, self.arrays, self.params, codes))

    def value(self) -> Float[Array, "O I"]:
        """The weight that the forward pass sees: what `encode` gives, decoded."""
        return _coded_value(self.format, self.shape, self.dtype, self.arrays, self.params)

    def codes(self) -> tuple[Int[Array, "Oc Ic"], Params]:
        """The codes and the parameters as stored; no gradient."""
        return _coded(self.format, self.shape, *jax.lax.stop_gradient((self.arrays, self.params)))

    def encode(self) -> QTensor:
        """The same codes with the trained scales."""
        codes, stored = _coded(self.format, self.shape, self.arrays, self.params)
        return QTensor(self.format.pack(codes, stored), self.format, self.shape, self.dtype)

    def check_values(self) -> None:
        """Raises `FormatError` when what was trained cannot be stored."""
        _, params = _unpack(self.format, self.shape, {**self.arrays, **self.params})
        self.format.check_values(self.value(), params)


def blend(x: Float[Array, "*s"], q: Float[Array, "*s"], mix: Float[Array, ""]) -> Float[Array, "*s"]:
    """`x + mix (q - x)`; exactly `x` at 0 and exactly `q` from 1 on. Warms quantization up, as Hugging Face's 1.58-bit
    fine-tuning of pretrained models does; the gradient is split in the same shares."""
    mix = jax.lax.stop_gradient(mix).astype(x.dtype)
    return jnp.where(mix >= 1, q, x + mix * (q - x))


@dataclasses.dataclass(frozen=True)
class Format:
    """Base of all formats; subclasses give the numeric core, this class composes it.

    Subclasses define `name` (canonical, parses back to an equal format), `check`, `init`, `stored`, `quantize`,
    `dequantize`, `pack`, `unpack` and, when something can be trained, `vjp`.
    """

    trainable: ClassVar[bool] = True

    @property
    def name(self) -> str:
        raise TypeError(f"{type(self).__name__} has no name")

    @property
    def tile(self) -> tuple[int, int]:
        """The (out, in) block of weights that is rounded at once."""
        return (1, 1)

    def params_span(self, shape: tuple[int, int]) -> int:
        """Columns over which one set of `params` is fitted."""
        return shape[1]

    def check(self, shape: tuple[int, int]) -> None:
        """Raises `FormatError` when a weight of this shape cannot be held."""

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """Parameters (scales, zero points, ...) fitted to `w`, float32."""
        raise TypeError(f"{self.name} has no init")

    def fitted(self, w_OI: Float[Array, "O I"]) -> Params:
        """`init(w)` in one compiled program."""
        return _init(self, w_OI)

    def stored(self, params: Params) -> Params:
        """Parameters rounded to what is stored, still float32; stored ones stay as they are."""
        raise TypeError(f"{self.name} has no stored")

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "Oc Ic"]:
        """Nearest codes: one a weight, or one for all weights of a tile; those of neighbouring columns lie side by side
        along the last axis."""
        raise TypeError(f"{self.name} has no quantize")

    def dequantize(self, codes: Int[Array, "Oc Ic"], stored: Params) -> Float[Array, "O I"]:
        """Weights of codes, float32."""
        raise TypeError(f"{self.name} has no dequantize")

    def pack(self, codes: Int[Array, "Oc Ic"], stored: Params) -> dict[str, Array]:
        """Arrays as stored."""
        raise TypeError(f"{self.name} has no pack")

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "Oc Ic"], Params]:
        """Inverse of `pack`."""
        raise TypeError(f"{self.name} has no unpack")

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        """Cotangents of `fake_quant` for `w` and `params`; the policy (clip, scale gradient) is the format's own."""
        raise TypeError(f"{self.name} has no gradient")

    def passes(self, w_OI: Float[Array, "O I"], stored: Params) -> Bool[Array, "O I"]:
        """Which weights `vjp` passes the gradient to, by declaration: all of them unless there is a clip policy."""
        return jnp.ones(w_OI.shape, bool)

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        """Raises `FormatError` when these weights or parameters cannot be stored. Called with concrete arrays only:
        a traced program cannot raise, there NaN propagates and an overflowing scale saturates."""
        if not bool(jnp.isfinite(w_OI).all()):
            row, col = np.argwhere(~np.isfinite(np.asarray(w_OI)))[0]
            raise FormatError(f"{self.name}: weight [{row}, {col}] is {w_OI[row, col]} (must be finite)")

    def inside(self, stored: Params) -> tuple[Format, Params]:
        """The format whose tiles the codes are, and its parameters: another one where this one rotates."""
        return self, stored

    def gradient_inside(self, g_OI: Float[Array, "O I"], stored: Params) -> Float[Array, "O I"]:
        """The gradient of that format's weights, given that of the weights."""
        return g_OI

    @property
    def idempotent(self) -> bool:
        """Whether rounding what is on the grid changes nothing, and codes of some columns are those of all: what the
        solvers that round column by column need."""
        return True

    @property
    def whole(self) -> bool:
        """Whether the grid is integers times one scale for a row or for the matrix (see `integers`)."""
        return False

    def integers(
        self, codes_OI: Int[Array, "O I"], stored: Params
    ) -> tuple[Float[Array, "O I"], Float[Array, " O"] | Float[Array, ""]] | None:
        """`(levels, scale)` with `dequantize = levels * scale`, float32, where one scale serves a row or the matrix;
        None for other grids."""
        return None

    def affine(self, q: QTensor) -> Affine | None:
        """Codes and scales as numpy arrays, or None if the format is not affine.

        What exporters translate into a runtime's own layout without re-quantizing.
        """
        return None

    # -- composed, never overridden ---------------------------------------------------------------------------------

    def encode(self, w_OI: Float[Array, "O I"], params: Params | None = None) -> QTensor:
        """Packs `w`; `params` default to `init(w)`.

        Raises `FormatError` on a shape that does not fit and, outside of jit, on values that cannot be stored (NaN,
        infinity, a scale beyond the storage type).
        """
        self.check(w_OI.shape)
        w32 = w_OI.astype(jnp.float32)
        params = _init(self, w32) if params is None else params
        if not any(isinstance(a, jax.core.Tracer) for a in jax.tree.leaves((w32, params))):
            self.check_values(w32, params)
        return QTensor(_encode(self, w32, params), self, tuple(w_OI.shape), str(w_OI.dtype))

    def decode(self, q: QTensor) -> Float[Array, "O I"]:
        """Weights of a packed tensor, in `q.dtype`."""
        return _decode(self, q.shape, q.dtype, q.arrays)

    def fake_quant(self, w_OI: Float[Array, "O I"], params: Params | None = None) -> Float[Array, "O I"]:
        """`decode(encode(w, params))` with the format's gradient; `params=None` fits them to `w` without gradient."""
        self.check(w_OI.shape)
        if params is None:
            params = jax.lax.stop_gradient(_init(self, w_OI.astype(jnp.float32)))
        return _fake_quant(self, w_OI, params)

    def gradient_fraction(self, w_OI: Float[Array, "O I"], params: Params | None = None) -> float:
        """The declared share of the weights whose `fake_quant` gradient is not blocked: 1 without a clip policy, else
        those inside its range. `params=None` fits them to `w`."""
        w32 = w_OI.astype(jnp.float32)
        return float(_fraction(self, w32, _init(self, w32) if params is None else params))

    def fit_block(self, w_OI: Float[Array, "O I"], importance: Any = None) -> Params:
        """Solver hook: parameters for one block of columns."""
        return self.init(w_OI, importance)

    def round_block(self, w_OI: Float[Array, "O I"], params: Params) -> tuple[Array, Array]:
        """Solver hook: `(codes, w_hat)` of one block, or of columns of it with their part of the stored parameters."""
        stored = self.stored(params)
        codes = self.quantize(w_OI, stored)
        return codes, self.dequantize(codes, stored)

    def params_at(self, stored: Params, column: Any, span: int) -> Params:
        """Solver hook: the part of the stored parameters of `span` columns that the tile at `column` needs.

        An array `[R, P]` holds P of them for equal parts of the span. Formats that round more than one weight at once
        have parameters for all of the matrix (a scale, codebooks), which every tile needs as they are; a format for
        which this is not so says it here.
        """
        if self.tile != (1, 1):
            return stored
        return {k: jax.lax.dynamic_slice_in_dim(a, column * a.shape[1] // span, 1, axis=1) for k, a in stored.items()}


# Jitted, so that a call outside of jit compiles one program for a shape and not one for every operation, and holds no
# unpacked intermediates.


@partial(jax.jit, static_argnums=0)
def _init(fmt: Format, w: Array) -> Params:
    return fmt.init(w)


@partial(jax.jit, static_argnums=0)
def _fraction(fmt: Format, w: Array, params: Params) -> Array:
    return jnp.mean(fmt.passes(w, fmt.stored(params)).astype(jnp.float32))


def unpacked(q: QTensor) -> tuple[Int[Array, "Oc Ic"], Params]:
    """`q.format.unpack` of its arrays in one compiled program for a format and a shape."""
    return _unpack(q.format, q.shape, q.arrays)


@partial(jax.jit, static_argnums=(0, 1))
def _unpack(fmt: Format, shape: tuple[int, int], arrays: dict[str, Array]) -> tuple[Array, Params]:
    return fmt.unpack(arrays, shape)


@partial(jax.jit, static_argnums=0)
def _encode(fmt: Format, w: Array, params: Params) -> dict[str, Array]:
    stored = fmt.stored(params)
    return fmt.pack(fmt.quantize(w, stored), stored)


@partial(jax.jit, static_argnums=(0, 1, 2))
def _decode(fmt: Format, shape: tuple[int, int], dtype: str, arrays: dict[str, Array]) -> Array:
    codes, stored = fmt.unpack(arrays, shape)
    return fmt.dequantize(codes, stored).astype(dtype)


@partial(jax.custom_vjp, nondiff_argnums=(0,))
def _fake_quant(fmt: Format, w: Array, params: Params) -> Array:
    stored = fmt.stored(params)
    return fmt.dequantize(fmt.quantize(w.astype(jnp.float32), stored), stored).astype(w.dtype)


def _fake_quant_fwd(fmt: Format, w: Array, params: Params):
    return _fake_quant(fmt, w, params), (w, params)


def _fake_quant_bwd(fmt: Format, residuals, g: Array):
    w, params = residuals
    gw, gp = fmt.vjp(w.astype(jnp.float32), params, g.astype(jnp.float32))
    return gw.astype(w.dtype), gp


_fake_quant.defvjp(_fake_quant_fwd, _fake_quant_bwd)


def _coded(fmt: Format, shape: tuple[int, int], arrays: dict[str, Array], params: Params) -> tuple[Array, Params]:
    codes, trained = fmt.unpack({**arrays, **params}, shape)
    return codes, fmt.stored(trained)


@partial(jax.custom_vjp, nondiff_argnums=(0, 1, 2))
def _coded_value(fmt: Format, shape: tuple[int, int], dtype: str, arrays: dict[str, Array], params: Params) -> Array:
    codes, stored = _coded(fmt, shape, arrays, params)
    return fmt.dequantize(codes, stored).astype(dtype)


def _coded_fwd(fmt: Format, shape: tuple[int, int], dtype: str, arrays: dict[str, Array], params: Params):
    return _coded_value(fmt, shape, dtype, arrays, params), (arrays, params)


def _coded_bwd(fmt: Format, shape: tuple[int, int], dtype: str, residuals, g: Array):
    arrays, params = residuals
    g = g.astype(jnp.float32)
    codes, stored = _coded(fmt, shape, arrays, params)
    # `dequantize` has no clip and is smooth in what is real, so autodiff's gradient is the formula.
    _, pull = jax.vjp(lambda p: fmt.dequantize(codes, {**stored, **p}), {k: stored[k] for k in params})
    return None, pull(g)[0]


_coded_value.defvjp(_coded_fwd, _coded_bwd)


@partial(jax.jit, static_argnums=(0, 1))
def _recoded(
    fmt: Format, shape: tuple[int, int], arrays: dict[str, Array], params: Params, codes: Array
) -> dict[str, Array]:
    packed = fmt.pack(codes, _coded(fmt, shape, arrays, params)[1])
    return {k: packed[k] for k in arrays}


# -- registry ---------------------------------------------------------------------------------------------------------

_FAMILIES: dict[str, Callable[[list[str]], Format]] = {}
_EXAMPLES: dict[str, list[str]] = {}


def register(family: str, parse: Callable[[list[str]], Format], examples: list[str]) -> None:
    """Adds a family: `NAME[:key...]` is parsed by `parse(keys)`; `examples` are the names that `lowbit formats` lists
    and that the conformance suite runs."""
    _FAMILIES[family] = parse
    _EXAMPLES[family] = examples


def get(name: str) -> Format:
    """The format of a name such as `int4:g64`, `ternary:tensor`, `q4_0`. Raises `FormatError`."""
    _load_all()
    family, *keys = str(name).strip().lower().split(":")
    if family not in _FAMILIES:
        raise FormatError(_suggest(name, family, keys))
    return _FAMILIES[family](keys)


def _suggest(name: str, family: str, keys: list[str]) -> str:
    """The message of an unknown name: what was misspelt is most often the family, so the keys stay."""
    hint = ""
    if near := difflib.get_close_matches(family, sorted(_FAMILIES), n=1):
        try:
            hint = f"; did you mean {_FAMILIES[near[0]](keys).name!r}?"
        except FormatError:
            hint = f"; did you mean {near[0]!r}?"
    return f"unknown format {name!r}{hint} (allowed: {', '.join(sorted(_FAMILIES))})"


def names() -> list[str]:
    """Canonical names of every registered example, in registration order."""
    _load_all()
    return [get(n).name for family in _EXAMPLES.values() for n in family]


def _load_all() -> None:
    # Imported on first use: each module registers its families, and this file stays below them.
    from lowbit.formats import dorefa, floats, ggml, integer, kquant, mx, normal_float, ternary  # noqa: F401

    importlib.import_module("lowbit.vq")  # formats of vectors, a floor above: it may know this one, not the reverse
