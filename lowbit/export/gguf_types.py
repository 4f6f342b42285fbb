"""GGUF tensor types: ids, block sizes, and their bytes built from codes and scales, never from floats.

Every function works on host arrays `[rows, columns]`. A block is described by its `Fields`: integer `levels` and fp16
`d` (and `m` for Q4_1 and Q5_1), meaning `w = levels * d` (`+ m`); K types (`gguf_kquants`) have `d` and `m` per
super-block and whole numbers `sc` and `mn` per sub-block, `w = levels * (d * sc) - m * mn`. MXFP4's levels are doubled
E2M1 values, its `d` a power of two. Layouts follow ggml's `ggml-common.h` and `ggml-quants.c`.
"""

import dataclasses
from collections.abc import Callable
from typing import NamedTuple

import ml_dtypes
import numpy as np
from einops import rearrange

from lowbit.errors import InputError, unknown
from lowbit.export import gguf_kquants


@dataclasses.dataclass(frozen=True)
class GGMLType:
    """One tensor type. `low..high` are the integer levels it can hold (floats have none); sizes are per block."""

    name: str
    id: int
    ftype: int  # general.file_type of a file that is mostly of this type
    block: int  # weights
    bytes: int
    low: int = 0
    high: int = 0
    format: str = ""  # the lowbit format with the same grid

    @property
    def quantized(self) -> bool:
        return self.block > 1

    @property
    def bits_per_weight(self) -> float:
        """Stored bits per weight, scales included."""
        return 8 * self.bytes / self.block

    def row_bytes(self, columns: int) -> int:
        """Bytes of a row of `columns` weights (a multiple of `block`)."""
        return columns // self.block * self.bytes


TYPES = {
    t.name: t
    for t in (
        GGMLType("F32", 0, 0, 1, 4),
        GGMLType("F16", 1, 1, 1, 2),
        GGMLType("BF16", 30, 32, 1, 2),
        GGMLType("Q8_0", 8, 7, 32, 34, -128, 127, "q8_0"),
        GGMLType("Q4_0", 2, 2, 32, 18, -8, 7, "q4_0"),
        GGMLType("Q4_1", 3, 3, 32, 20, 0, 15, "q4_1"),
        GGMLType("Q2_0", 42, 41, 64, 18, -1, 2, "q2_0"),
        GGMLType("TQ1_0", 34, 36, 256, 54, -1, 1, "tq1_0"),
        GGMLType("TQ2_0", 35, 37, 256, 66, -1, 1, "tq2_0"),
        GGMLType("Q5_0", 6, 8, 32, 22, -16, 15, "q5_0"),
        GGMLType("Q5_1", 7, 9, 32, 24, 0, 31, "q5_1"),
        # File types of the K types are those of llama.cpp's mixes that hold the fewest tensors of other types.
        GGMLType("Q2_K", 10, 10, 256, 84, 0, 3, "q2_k"),
        GGMLType("Q3_K", 11, 11, 256, 110, -4, 3, "q3_k"),
        GGMLType("Q4_K", 12, 14, 256, 144, 0, 15, "q4_k"),
        GGMLType("Q5_K", 13, 16, 256, 176, 0, 31, "q5_k"),
        GGMLType("Q6_K", 14, 18, 256, 210, -32, 31, "q6_k"),
        GGMLType("MXFP4", 39, 38, 32, 17, -12, 12, "mxfp4"),
    )
}
BY_ID = {t.id: t for t in TYPES.values()}
WITH_MIN = ("Q4_1", "Q5_1")
E2M1 = np.array([0, 1, 2, 3, 4, 6, 8, 12], np.int32)  # doubled
FLOAT_DTYPES = {"F32": np.dtype("<f4"), "F16": np.dtype("<f2"), "BF16": np.dtype(ml_dtypes.bfloat16)}


def get(name: str) -> GGMLType:
    """The type of a name, any case. Raises `InputError`."""
    if name.upper() not in TYPES:
        raise unknown("GGUF type", name, TYPES)
    return TYPES[name.upper()]


# -- bytes of a block: codes are uint8 [..., block], results [..., code bytes] -------------------------------------


def _pack_nibbles(c: np.ndarray) -> np.ndarray:
    """Split halves: byte j holds element j low and j + 16 high."""
    return c[..., :16] | (c[..., 16:] << 4)


def _unpack_nibbles(b: np.ndarray) -> np.ndarray:
    return np.concatenate([b & 15, b >> 4], axis=-1)


def _pack_q5(c: np.ndarray) -> np.ndarray:
    """Bit 4 of element j at bit j of a little-endian word, then nibbles."""
    return np.concatenate([np.packbits(c >> 4, axis=-1, bitorder="little"), _pack_nibbles(c & 15)], axis=-1)


def _unpack_q5(b: np.ndarray) -> np.ndarray:
    return _unpack_nibbles(b[..., 4:]) | (np.unpackbits(b[..., :4], axis=-1, bitorder="little") << 4)


def _pack_q2_0(c: np.ndarray) -> np.ndarray:
    """Element i at bits 2 (i mod 4) of byte i // 4."""
    c = rearrange(c, "... (b four) -> ... b four", four=4)
    return c[..., 0] | (c[..., 1] << 2) | (c[..., 2] << 4) | (c[..., 3] << 6)


def _unpack_q2_0(b: np.ndarray) -> np.ndarray:
    return rearrange(np.stack([(b >> s) & 3 for s in (0, 2, 4, 6)], axis=-1), "... b four -> ... (b four)")


def _pack_tq2_0(c: np.ndarray) -> np.ndarray:
    """Each half of 128: element 32 n + m at bits 2 n of byte m."""
    c = rearrange(c, "... (half n m) -> ... half n m", half=2, n=4)
    b = c[..., 0, :] | (c[..., 1, :] << 2) | (c[..., 2, :] << 4) | (c[..., 3, :] << 6)
    return rearrange(b, "... half m -> ... (half m)")


def _unpack_tq2_0(b: np.ndarray) -> np.ndarray:
    b = rearrange(b, "... (half m) -> ... half m", half=2)
    return rearrange(np.stack([(b >> s) & 3 for s in (0, 2, 4, 6)], axis=-2), "... half n m -> ... (half n m)")


def _pack_trits(t: np.ndarray) -> np.ndarray:
    """`[..., n, m]` trits, first most significant, to `[..., m]` bytes `ceil(q * 256 / 243)`; n = 4 is padded to 5."""
    q = np.zeros((*t.shape[:-2], t.shape[-1]), np.uint16)
    for n in range(5):
        q = q * 3 + (t[..., n, :] if n < t.shape[-2] else 0)
    return ((q * 256 + 242) // 243).astype(np.uint8)


def _unpack_trits(b: np.ndarray, n: int) -> np.ndarray:
    powers = np.array([1, 3, 9, 27, 81], np.uint8)[:n, None]
    return ((b[..., None, :] * powers).astype(np.uint16) * 3 >> 8).astype(np.uint8)


# TQ1_0: (elements, trits a byte, bytes) of its three parts.
_TQ1_0_PARTS = ((160, 5, 32), (80, 5, 16), (16, 4, 4))


def _pack_tq1_0(c: np.ndarray) -> np.ndarray:
    parts, start = [], 0
    for size, n, _ in _TQ1_0_PARTS:
        parts.append(_pack_trits(rearrange(c[..., start : start + size], "... (n m) -> ... n m", n=n)))
        start += size
    return np.concatenate(parts, axis=-1)


def _unpack_tq1_0(b: np.ndarray) -> np.ndarray:
    parts, start = [], 0
    for _, n, width in _TQ1_0_PARTS:
        parts.append(rearrange(_unpack_trits(b[..., start : start + width], n), "... n m -> ... (n m)"))
        start += width
    return np.concatenate(parts, axis=-1)


_CODECS: dict[str, tuple[Callable, Callable]] = {
    "Q8_0": (lambda c: (c - 128).astype(np.uint8), lambda b: b + np.uint8(128)),
    "Q4_0": (_pack_nibbles, _unpack_nibbles),
    "Q4_1": (_pack_nibbles, _unpack_nibbles),
    "Q5_0": (_pack_q5, _unpack_q5),
    "Q5_1": (_pack_q5, _unpack_q5),
    "Q2_0": (_pack_q2_0, _unpack_q2_0),
    "TQ1_0": (_pack_tq1_0, _unpack_tq1_0),
    "TQ2_0": (_pack_tq2_0, _unpack_tq2_0),
}


class Fields(NamedTuple):
    """What a type's blocks hold, as arrays of rows; see the module. float32 but for `levels`, int32."""

    levels: np.ndarray  # [rows, columns]
    d: np.ndarray  # [rows, columns / block], exact in fp16 (MXFP4: a power of two)
    m: np.ndarray | None = None
    sc: np.ndarray | None = None  # [rows, columns / sub-block]
    mn: np.ndarray | None = None


def blocks(t: GGMLType, f: Fields) -> np.ndarray:
    """Bytes `[rows, row_bytes]` of fields whose values `t` can hold."""
    if t.name == "MXFP4":
        size = np.searchsorted(E2M1, np.abs(f.levels)).astype(np.uint8)
        codes = rearrange(size | (f.levels < 0).astype(np.uint8) << 3, "r (g b) -> r g b", b=t.block)
        exponent = (np.frexp(f.d)[1] + 127).astype(np.uint8)[..., None]
        return rearrange(np.concatenate([exponent, _pack_nibbles(codes)], axis=-1), "r g b -> r (g b)")
    codes = rearrange((f.levels - t.low).astype(np.uint8), "r (g b) -> r g b", b=t.block)
    if t.name in gguf_kquants.SUB:
        offset = 32 if t.name == "Q3_K" else 0  # Q6_K's scales are bytes of two's complement
        sc = rearrange((f.sc.astype(np.int32) + offset).astype(np.uint8), "r (g j) -> r g j", g=f.d.shape[1])
        mins: list[np.ndarray] = []
        if f.mn is not None:
            mins = [_half(f.m), rearrange(f.mn.astype(np.uint8), "r (g j) -> r g j", g=f.d.shape[1])]
        return rearrange(gguf_kquants.pack(t.name, codes, _half(f.d), sc, *mins), "r g b -> r (g b)")
    packed = _CODECS[t.name][0](codes)
    head = [_half(f.d)] + ([_half(f.m)] if f.m is not None else [])
    fields = [packed, *head] if t.name.startswith("TQ") else [*head, packed]
    return rearrange(np.concatenate(fields, axis=-1), "r g b -> r (g b)")


def unblock(t: GGMLType, data: np.ndarray) -> Fields:
    """Inverse of `blocks`. Raises `InputError` for an MXFP4 exponent that is NaN."""
    b = rearrange(data, "r (g b) -> r g b", b=t.bytes)
    if t.name == "MXFP4":
        return _unblock_mxfp4(b)
    if t.name in gguf_kquants.SUB:
        c, d, sc, dmin, mn = gguf_kquants.unpack(t.name, b)
        sc = sc.view(np.int8) if t.name == "Q6_K" else sc.astype(np.int32) - (32 if t.name == "Q3_K" else 0)
        sub = [None if x is None else rearrange(x, "r g j -> r (g j)").astype(np.float32) for x in (sc, mn)]
        levels = rearrange(c.astype(np.int32) + t.low, "r g b -> r (g b)")
        return Fields(levels, _unhalf(d), None if dmin is None else _unhalf(dmin), *sub)
    if t.name.startswith("TQ"):
        packed, d, m = b[..., :-2], b[..., -2:], None
    elif t.name in WITH_MIN:
        d, m, packed = b[..., :2], b[..., 2:4], b[..., 4:]
    else:
        d, packed, m = b[..., :2], b[..., 2:], None
    levels = _CODECS[t.name][1](packed).astype(np.int32) + t.low
    return Fields(rearrange(levels, "r g b -> r (g b)"), _unhalf(d), None if m is None else _unhalf(m))


def _unblock_mxfp4(b: np.ndarray) -> Fields:
    codes, exponent = _unpack_nibbles(b[..., 1:]), b[..., 0].astype(np.int32)
    levels = np.where(codes < 8, 1, -1) * E2M1[codes & 7]
    if (exponent == 255).any():
        raise InputError("an MXFP4 scale that is NaN (allowed: exponents 0 to 254)")
    return Fields(rearrange(levels, "r g b -> r (g b)"), np.ldexp(np.float32(1), exponent - 128))


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype="<f2")[..., None].view(np.uint8)


def _unhalf(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f2")[..., 0].astype(np.float32)
