"""Bytes of ggml's K types: super-blocks of 256 weights from codes and two levels of scales, and back.

Layouts follow ggml's `ggml-common.h`. Arrays hold one super-block in their last axes: `c` `[..., 256]` are codes from 0
on, `sc` and `mn` `[..., 16 or 8]` whole numbers, all uint8 (`sc` of signed types as their byte in the file wants them).
"""

from typing import Any

import numpy as np
from einops import rearrange

SUB = {"Q2_K": 16, "Q3_K": 16, "Q4_K": 32, "Q5_K": 32, "Q6_K": 16}  # weights of a sub-block
SCALES = {"Q2_K": (0, 15), "Q3_K": (-32, 31), "Q4_K": (0, 63), "Q5_K": (0, 63), "Q6_K": (-128, 127)}
MINS = {"Q2_K": 15, "Q4_K": 63, "Q5_K": 63}  # the largest `mn` of the types that have any


def pack(name: str, c: np.ndarray, d: np.ndarray, sc: np.ndarray, dmin: Any = None, mn: Any = None) -> np.ndarray:
    """uint8 `[..., bytes of the type]`; `d` and `dmin` are the two bytes of an fp16 number each. Types in `MINS` have
    `dmin` and `mn`."""
    match name:
        case "Q2_K":
            fields = [sc | (mn << 4), _quarters(c), d, dmin]
        case "Q3_K":
            fields = [_bit_planes(c >> 2), _quarters(c & 3), _pack_scales3(sc), d]
        case "Q4_K":
            fields = [d, dmin, _pack_scales(sc, mn), _nibbles(c)]
        case "Q5_K":
            fields = [d, dmin, _pack_scales(sc, mn), _bit_planes(c >> 4), _nibbles(c & 15)]
        case "Q6_K":
            low = rearrange(c & 15, "... (half two m) -> ... half two m", half=2, two=2)
            low = rearrange(low[..., 0, :] | (low[..., 1, :] << 4), "... half m -> ... (half m)")
            fields = [low, _quarters(c >> 4), sc, d]
    return np.concatenate(fields, axis=-1)


def unpack(name: str, b: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray | None, np.ndarray | None]:
    """Inverse of `pack`: `(c, d, sc, dmin, mn)`, the last two None for types that have none."""
    match name:
        case "Q2_K":
            head, qs, d, dmin = _split(b, 16, 64, 2, 2)
            return _unquarters(qs), d, head & 15, dmin, head >> 4
        case "Q3_K":
            hmask, qs, scales, d = _split(b, 32, 64, 12, 2)
            return _unquarters(qs) | (_unbit_planes(hmask) << 2), d, _unpack_scales3(scales), None, None
        case "Q4_K":
            d, dmin, scales, qs = _split(b, 2, 2, 12, 128)
            return _unnibbles(qs), d, *_unpack_scales(scales, dmin)
        case "Q5_K":
            d, dmin, scales, qh, qs = _split(b, 2, 2, 12, 32, 128)
            return _unnibbles(qs) | (_unbit_planes(qh) << 4), d, *_unpack_scales(scales, dmin)
    ql, qh, sc, d = _split(b, 128, 64, 16, 2)
    low = rearrange(ql, "... (half m) -> ... half m", half=2)
    low = rearrange(np.stack([low & 15, low >> 4], axis=-2), "... half two m -> ... (half two m)")
    return low | (_unquarters(qh) << 4), d, sc, None, None


def _split(b: np.ndarray, *sizes: int) -> list[np.ndarray]:
    return np.split(b, np.cumsum(sizes)[:-1], axis=-1)


def _quarters(c: np.ndarray) -> np.ndarray:
    """Each half of 128: byte l holds elements l, l + 32, l + 64, l + 96, from the lowest bits up."""
    c = rearrange(c, "... (half n m) -> ... half n m", half=2, n=4)
    b = sum(c[..., i, :] << (2 * i) for i in range(4))
    return rearrange(b, "... half m -> ... (half m)")


def _unquarters(b: np.ndarray) -> np.ndarray:
    b = rearrange(b, "... (half m) -> ... half m", half=2)
    c = np.stack([(b >> (2 * i)) & 3 for i in range(4)], axis=-2)
    return rearrange(c, "... half n m -> ... (half n m)")


def _bit_planes(c: np.ndarray) -> np.ndarray:
    """Bit i of byte l is element 32 i + l."""
    c = rearrange(c, "... (n m) -> ... n m", n=8)
    return sum(c[..., i, :] << i for i in range(8))  # type: ignore[return-value]


def _unbit_planes(b: np.ndarray) -> np.ndarray:
    return rearrange(np.stack([(b >> i) & 1 for i in range(8)], axis=-2), "... n m -> ... (n m)")


def _nibbles(c: np.ndarray) -> np.ndarray:
    """Each 64: byte l holds element l low and l + 32 high."""
    c = rearrange(c, "... (chunk two m) -> ... chunk two m", chunk=4, two=2)
    return rearrange(c[..., 0, :] | (c[..., 1, :] << 4), "... chunk m -> ... (chunk m)")


def _unnibbles(b: np.ndarray) -> np.ndarray:
    b = rearrange(b, "... (chunk m) -> ... chunk m", chunk=4)
    return rearrange(np.stack([b & 15, b >> 4], axis=-2), "... chunk two m -> ... (chunk two m)")


def _pack_scales(sc: np.ndarray, mn: np.ndarray) -> np.ndarray:
    """12 bytes of eight 6-bit scales and minima: the first four of each whole, in whose two free bits lie the upper
    bits of the last four; their lower nibbles share the last four bytes."""
    first = [a[..., :4] | ((a[..., 4:] >> 4) << 6) for a in (sc, mn)]
    return np.concatenate([*first, (sc[..., 4:] & 15) | ((mn[..., 4:] & 15) << 4)], axis=-1)


def _unpack_scales(b: np.ndarray, dmin: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    sc, mn, rest = _split(b, 4, 4, 4)
    sc = np.concatenate([sc & 63, (rest & 15) | ((sc >> 6) << 4)], axis=-1)
    mn = np.concatenate([mn & 63, (rest >> 4) | ((mn >> 6) << 4)], axis=-1)
    return sc, dmin, mn


def _pack_scales3(sc: np.ndarray) -> np.ndarray:
    """12 bytes of sixteen 6-bit scales: nibbles of j and j + 8, then in byte j of four the upper bits of j + 4 i."""
    high = rearrange(sc >> 4, "... (i j) -> ... i j", i=4)
    high = sum(high[..., i, :] << (2 * i) for i in range(4))
    return np.concatenate([(sc[..., :8] & 15) | ((sc[..., 8:] & 15) << 4), high], axis=-1)


def _unpack_scales3(b: np.ndarray) -> np.ndarray:
    low, high = _split(b, 8, 4)
    low = np.concatenate([low & 15, low >> 4], axis=-1)
    high = rearrange(np.stack([(high >> (2 * i)) & 3 for i in range(4)], axis=-2), "... i j -> ... (i j)")
    return low | (high << 4)
