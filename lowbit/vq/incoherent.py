"""`rht:INNER` and `rht128:INNER`: any format behind a randomized Hadamard transform of both sides.

The inner format sees the rotated weight (`lowbit.linalg.incoherence`), whose entries look normal; decoding rotates
back. QuIP# (arXiv 2402.04396) and QTIP (2406.11235) transform the full width, EXL3 blocks of 128.

| key before the inner name | |
|---|---|
| `dct`, `blocks` | what takes the place of a Hadamard matrix where none of the order is known (`hadamard.transform`) |
| `blocks` of `rht128` | smaller blocks where 128 does not divide: the largest power of two that does |
| `f16` | the sign vectors are kept as fp16 and trained, as scales of the rows and columns; otherwise one bit a sign |
| `rows` | as `f16`, and those of the outputs begin as each row's RMS: all rows then have errors in proportion |
| `seedN` | another draw of the signs |
"""

import dataclasses
import re
from collections.abc import Mapping
from typing import Any

import jax.numpy as jnp
import numpy as np
from einops import rearrange
from jaxtyping import Array, Float, Int

from lowbit.errors import InputError, unknown
from lowbit.formats.base import Format, FormatError, Params, get, register
from lowbit.formats.floats import LARGEST, SMALLEST_SCALE, round_to
from lowbit.formats.packing import pack, unpack
from lowbit.formats.reduce import order_free_mean
from lowbit.linalg.incoherence import Incoherence, incoherence, signs

SIGNS = ("su", "sv")


@dataclasses.dataclass(frozen=True)
class Incoherent(Format):
    """`inner` on rotated weights. Params: `su` float32 `[1, I]`, `sv` `[O, 1]` and those of the inner format.

    Stored: the inner format's arrays, and the signs as packed bits (`(O + I) / (O I)` bits per weight, padded to bytes)
    or as fp16. The codes are the inner format's. A bit's sign is not trained: its gradient is 0.

    Solvers work in the rotated space: `signs(w)`, `enter`, `hessian` and then `wrap` with the inner format's codes.
    A block of its columns is not a block of the weight's, so those that round weights as they are refuse it
    (`idempotent` is False).
    """

    inner: Format
    block: int | None = None
    fallback: str = "refuse"
    trained: bool = False  # whether the sign vectors are fp16
    balanced: bool = False  # and whether those of the outputs begin as the rows' RMS
    seed: int = 0

    def __post_init__(self) -> None:
        if self.balanced and not self.trained:
            raise FormatError("rows' sizes in signs of one bit (allowed: with fp16 signs)")

    @property
    def name(self) -> str:
        keys = [] if self.fallback == "refuse" else [self.fallback]
        keys += ["rows" if self.balanced else "f16"] * self.trained + ([f"seed{self.seed}"] if self.seed else [])
        return ":".join(["rht" if self.block is None else f"rht{self.block}", *keys, self.inner.name])

    @property
    def tile(self) -> tuple[int, int]:
        return self.inner.tile

    @property
    def idempotent(self) -> bool:
        return False

    @property
    def searched(self) -> bool:
        """Whether fitting is a search."""
        return bool(getattr(self.inner, "searched", False))

    def check(self, shape: tuple[int, ...]) -> None:
        if len(shape) != 2 or min(shape) < 1:
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)} (must be [out, in])")
        try:
            self.space(shape)
        except InputError as e:
            keys = {(None, "refuse"): "rht:dct or rht:blocks", (128, "refuse"): "rht128:blocks"}
            more = keys.get((self.block, self.fallback))
            more = f"; as a key: {more}" if more else ""
            raise FormatError(f"{self.name}: weight of shape {tuple(shape)}: {e}{more}") from e
        self.inner.check(shape)

    # -- the rotated space --------------------------------------------------------------------------------------------

    def space(self, shape: tuple[int, ...]) -> Incoherence:
        """The transforms for a weight of this shape."""
        return incoherence((shape[0], shape[1]), self.block, self.fallback)

    def signs(self, w_OI: Float[Array, "O I"], key: Any = None) -> Params:
        """The random sign vectors of a weight, as stored; drawn from `key` instead of the seed if there is one."""
        O, I = w_OI.shape
        su = jnp.asarray(signs(I, "in", self.seed, key))[None]
        sv = jnp.asarray(signs(O, "out", self.seed, key))[:, None]
        if self.balanced:
            size_O1 = jnp.sqrt(order_free_mean(jnp.square(w_OI.astype(jnp.float32))[:, None]))
            # A row of zeros is divided by what does not make it NaN; one far below the others is not blown up.
            sv *= jnp.maximum(size_O1, jnp.maximum(np.float32(1e-3) * jnp.max(size_O1), SMALLEST_SCALE["fp16"]))
        return self.stored_signs({"su": su, "sv": sv})

    def enter(self, w_OI: Float[Array, "O I"], params: Params) -> Float[Array, "O I"]:
        """The weight as the inner format sees it."""
        return self.space(w_OI.shape).enter(w_OI, params["su"], params["sv"])

    def leave(self, w_OI: Float[Array, "O I"], params: Params) -> Float[Array, "O I"]:
        """Inverse of `enter`."""
        return self.space(w_OI.shape).leave(w_OI, params["su"], params["sv"])

    def hessian(self, H_II: Any, params: Params) -> Float[Array | np.ndarray, "I I"]:
        """The inputs' Hessian in the rotated space: `tr(D H D^T)` stays for signs; scales of rows are left out."""
        shape = (params["sv"].shape[0], params["su"].shape[1])
        return self.space(shape).hessian(H_II, params["su"])

    def output_hessian(self, H_OO: Any, params: Params) -> Float[Array | np.ndarray, "O O"]:
        """The same for the outputs' side."""
        shape = (params["sv"].shape[0], params["su"].shape[1])
        return self.space(shape).output_hessian(H_OO, params["sv"])

    def wrap(self, arrays: Mapping[str, Array], params: Params) -> dict[str, Array]:
        """What is stored of a weight whose rotated self the inner format stores as `arrays`."""
        stored = self.stored_signs(params)
        if self.trained:
            return {**arrays, **{k: a.astype(jnp.float16) for k, a in stored.items()}}
        bits = {k: (stored[k].reshape(1, -1) > 0).astype(jnp.int32) for k in SIGNS}
        return {**arrays, **{k: pack(b, 1) for k, b in bits.items()}}

    # -- Format -------------------------------------------------------------------------------------------------------

    def init(self, w_OI: Float[Array, "O I"], stats: Any = None, key: Any = None) -> Params:
        """Signs, and the inner parameters fitted to the rotated weight; importances of columns (`stats`) say nothing
        about rotated ones and are not used."""
        own = self.signs(w_OI, key)
        return {**self.inner.init(self.enter(w_OI, own)), **own}

    def stored(self, params: Params) -> Params:
        return {**self.inner.stored(_inner(params)), **self.stored_signs(params)}

    def stored_signs(self, params: Params) -> Params:
        """The sign vectors as kept: +1 and -1, or (`f16`, `rows`) rounded to fp16, away from 0 and finite."""
        out = {}
        for k in SIGNS:
            sign = jnp.where(params[k] < 0, -1.0, 1.0).astype(jnp.float32)
            size = jnp.maximum(jnp.abs(round_to(params[k], "fp16")), np.float32(SMALLEST_SCALE["fp16"]))
            out[k] = sign * size if self.trained else sign
        return out

    def quantize(self, w_OI: Float[Array, "O I"], stored: Params) -> Int[Array, "Oc Ic"]:
        return self.inner.quantize(self.enter(w_OI, stored), _inner(stored))

    def dequantize(self, codes: Int[Array, "Oc Ic"], stored: Params) -> Float[Array, "O I"]:
        return self.leave(self.inner.dequantize(codes, _inner(stored)), stored)

    def pack(self, codes: Int[Array, "Oc Ic"], stored: Params) -> dict[str, Array]:
        return self.wrap(self.inner.pack(codes, _inner(stored)), stored)

    def unpack(self, arrays: Mapping[str, Array], shape: tuple[int, int]) -> tuple[Int[Array, "Oc Ic"], Params]:
        codes, stored = self.inner.unpack({k: a for k, a in arrays.items() if k not in SIGNS}, shape)
        if self.trained:
            own = {k: arrays[k].astype(jnp.float32) for k in SIGNS}
        else:
            n = {"su": shape[1], "sv": shape[0]}
            own = {k: 2.0 * unpack(arrays[k], 1, n[k]).astype(jnp.float32) - 1.0 for k in SIGNS}
            own["sv"] = rearrange(own["sv"], "1 o -> o 1")
        return codes, {**stored, **own}

    def vjp(self, w_OI: Float[Array, "O I"], params: Params, g_OI: Float[Array, "O I"]) -> tuple[Array, Params]:
        """The inner format's gradient in the rotated space. A sign vector's is that of a scale under the same
        straight-through rule, `sum (g w_hat - g_w w) / s` (LSQ, arXiv 1902.08153, for `w_hat = s Q(w / s)`)."""
        stored = self.stored(params)
        own = {k: stored[k] for k in SIGNS}
        g_rotated = self.gradient_inside(g_OI, stored)
        gw_rotated, g_inner = self.inner.vjp(self.enter(w_OI, own), _inner(params), g_rotated)
        # What passes everything passes it unchanged, not through two transforms.
        gw_OI = g_OI if gw_rotated is g_rotated else self.leave(gw_rotated, {k: 1.0 / a for k, a in own.items()})
        if not self.trained:
            return gw_OI, {**g_inner, **{k: jnp.zeros_like(params[k]) for k in SIGNS}}
        codes = self.quantize(w_OI, stored)
        both = g_OI * self.dequantize(codes, stored) - gw_OI * w_OI
        g_su, g_sv = jnp.sum(both, axis=0, keepdims=True), jnp.sum(both, axis=1, keepdims=True)
        return gw_OI, {**g_inner, "su": g_su / own["su"], "sv": g_sv / own["sv"]}

    def inside(self, stored: Params) -> tuple[Format, Params]:
        return self.inner, _inner(stored)

    def gradient_inside(self, g_OI: Float[Array, "O I"], stored: Params) -> Float[Array, "O I"]:
        return self.enter(g_OI, {k: 1.0 / stored[k] for k in SIGNS})  # the transpose of `leave`

    def check_values(self, w_OI: Float[Array, "O I"], params: Params) -> None:
        super().check_values(w_OI, params)
        for k in SIGNS if self.trained else ():
            top = float(jnp.max(jnp.abs(params[k])))
            if not top <= LARGEST["fp16"]:
                raise FormatError(f"{self.name}: {k} of magnitude {top:g} (largest in fp16: {LARGEST['fp16']:g})")
        whole = w_OI.shape == (params["sv"].shape[0], params["su"].shape[1])  # a `Coded` has no weight to show
        self.inner.check_values(self.enter(w_OI, self.stored_signs(params)) if whole else w_OI, _inner(params))


def _inner(params: Params) -> Params:
    return {k: a for k, a in params.items() if k not in SIGNS}


def _parser(family: str, block: int | None):
    def parse(keys: list[str]) -> Format:
        found: dict[str, Any] = {}
        while keys and (m := re.fullmatch(r"(dct|blocks)|(f16|rows)|seed(\d+)", keys[0])):
            kind = ("fallback", "trained", "seed")[m.lastindex - 1]
            if kind in found:
                raise FormatError(f"{family}: key {keys[0]!r} gives a second {kind} (allowed: one)")
            found[kind] = keys[0] if kind == "fallback" else kind == "trained" or int(m[3])
            found |= {"balanced": True} if m[2] == "rows" else {}
            keys = keys[1:]
        if not keys:
            raise FormatError(f"{family} without an inner format (allowed: {family}:INNER, such as {family}:int2:g64)")
        if block is not None and found.get("fallback") == "dct":
            raise FormatError(str(unknown(f"key of {family}", "dct", ["blocks", "f16", "rows", "seed1"])))
        inner = get(":".join(keys))
        if isinstance(inner, Incoherent):
            raise FormatError(f"{family} around {inner.name!r} (allowed: a format that is not rotated already)")
        return Incoherent(inner=inner, block=block, **found)

    return parse


for _family, _block, _names in (
    ("rht", None, ["rht:int2:g64", "rht:f16:int4:g64:clip", "rht:rows:ternary:channel"]),
    ("rht128", 128, ["rht128:blocks:int2:channel:midrise"]),
):
    register(_family, _parser(_family, _block), _names)
