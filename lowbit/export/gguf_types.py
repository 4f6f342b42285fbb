"""GGUF tensor types: ids, block sizes, and their bytes built from codes and scales, never from floats.

Every function works on host arrays `[rows, columns]`. A block is described by integer `levels` and fp16 `d` (and `m`
for Q4_1), meaning `w = levels * d` (`+ m`). Layouts follow ggml's `ggml-common.h` and `ggml-quants.c`.
"""

import dataclasses
from collections.abc import Callable

import ml_dtypes
import numpy as np
from einops import rearrange

from lowbit.errors import unknown


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
    )
}
BY_ID = {t.id: t for t in TYPES.values()}
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
    "Q2_0": (_pack_q2_0, _unpack_q2_0),
    "TQ1_0": (_pack_tq1_0, _unpack_tq1_0),
    "TQ2_0": (_pack_tq2_0, _unpack_tq2_0),
}


def blocks(t: GGMLType, levels: np.ndarray, d: np.ndarray, m: np.ndarray | None = None) -> np.ndarray:
    """Bytes `[rows, row_bytes]` of integer `levels [rows, columns]` within `t.low..t.high` and `d`, `m`
    `[rows, columns / block]`, which must be exact in fp16."""
    codes = rearrange((levels - t.low).astype(np.uint8), "r (g b) -> r g b", b=t.block)
    packed = _CODECS[t.name][0](codes)
    head = [_half(d)] + ([_half(m)] if m is not None else [])
    fields = [packed, *head] if t.name.startswith("TQ") else [*head, packed]
    return rearrange(np.concatenate(fields, axis=-1), "r g b -> r (g b)")


def unblock(t: GGMLType, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """Inverse of `blocks`: `(levels int32 [rows, columns], d float32, m float32 or None)`."""
    b = rearrange(data, "r (g b) -> r g b", b=t.bytes)
    if t.name.startswith("TQ"):
        packed, d, m = b[..., :-2], b[..., -2:], None
    elif t.name == "Q4_1":
        d, m, packed = b[..., :2], b[..., 2:4], b[..., 4:]
    else:
        d, packed, m = b[..., :2], b[..., 2:], None
    levels = _CODECS[t.name][1](packed).astype(np.int32) + t.low
    return rearrange(levels, "r g b -> r (g b)"), _unhalf(d), None if m is None else _unhalf(m)


def _half(x: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(x, dtype="<f2")[..., None].view(np.uint8)


def _unhalf(b: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(b).view("<f2")[..., 0].astype(np.float32)
