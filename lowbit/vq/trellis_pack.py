"""The layouts in which other runtimes store trellis codes, on the host: QTIP's and EXL3's.

Both write a tile's stored bits most significant first, as a circle of `256 K` bits. In EXL3's the window of step t
*ends* with the bits that step t shifts in; in QTIP's it *starts* at bit `t K V`. The circles are one and the same,
turned by `L - K V` bits (`rotate`).

EXL3 (exllamav3, `pack.cu`): `trellis` int16 `[in/16, out/16, 16 K]`, a tile's path in the order of a tensor core's
fragments (`trellis.ORDERS`); uint32 words hold 32 bits of the circle each, so of two int16 the second comes first.
QTIP (`lib/codebook/bitshift.py`): int16 `[tiles, 16 K]`, each the next 16 bits; tiles row by row, or where it has a
kernel (`hyb` of 2 to 4 bits, L = 16) in that one's order.
"""

import numpy as np
from jaxtyping import Integer, Shaped

from lowbit.formats.base import FormatError

States = Integer[np.ndarray, "Z N"]
Bits = Shaped[np.ndarray, "Z M"]  # bool


def bits_of(states_ZN: States, width: int) -> Bits:
    """The circle of bits, each step's `width` in turn, highest first: windows end with their step's own bits."""
    shifts = np.arange(width - 1, -1, -1)
    return ((states_ZN[..., None] >> shifts) & 1).astype(bool).reshape(len(states_ZN), -1)


def windows_of(bits_ZM: Bits, width: int, L: int) -> States:
    """States of a circle whose windows end with their step's bits; inverse of `bits_of` for closed paths."""
    M = bits_ZM.shape[1]
    at = (np.arange(width, M + 1, width)[:, None] - L + np.arange(L)) % M
    return (bits_ZM[:, at].astype(np.int64) << np.arange(L - 1, -1, -1)).sum(axis=-1).astype(np.int32)


def rotate(bits_ZM: Bits, width: int, L: int) -> Bits:
    """EXL3's circle as QTIP's: the first step's window starts where the circle does."""
    return np.roll(bits_ZM, L - width, axis=1)


def check_closed(states_ZN: States, width: int, L: int) -> None:
    """Raises `FormatError` for states that are no closed path: their bits would not give them back."""
    before = np.roll(states_ZN, 1, axis=1)
    if (bad := np.argwhere((states_ZN >> width) != (before & ((1 << (L - width)) - 1)))).size:
        tile, step = bad[0]
        raise FormatError(f"states of tile {tile} do not follow one another at step {step} (allowed: closed paths)")


def states_of_codes(codes_RC: Integer[np.ndarray, "R C"], width: int, L: int, steps: int) -> States:
    """States of the tiles' paths, row by row, from a format's codes (of whole rates; `steps` in a tile)."""
    bits = codes_RC.reshape(-1, steps)[:, ::-1].astype(np.int64)
    states = np.zeros_like(bits)
    for back in range(-(-L // width)):  # a window ends with the step's own bits
        states |= np.roll(bits, back, axis=1) << (back * width)
    return (states & ((1 << L) - 1)).astype(np.int32)


def codes_of_states(states_ZN: States, width: int, rows: int) -> Integer[np.ndarray, "R C"]:
    """Inverse of `states_of_codes`; `rows` of tiles."""
    return (states_ZN & ((1 << width) - 1))[:, ::-1].reshape(rows, -1)


# -- words ------------------------------------------------------------------------------------------------------------


def to_qtip(states_ZN: States, width: int, L: int) -> Integer[np.ndarray, "Z W"]:
    """int16 words of QTIP's `trellis`, one row a tile."""
    check_closed(states_ZN, width, L)
    return _words(rotate(bits_of(states_ZN, width), width, L))


def to_qtip_kernel(words_ZW: Integer[np.ndarray, "Z W"], shape: tuple[int, int]) -> Integer[np.ndarray, "Z W"]:
    """QTIP's words of the tiles of a weight `[out, in]`, both multiples of 32, in the order of its kernel: of 2 x 2
    tiles K bytes each in turn (the two rows of tiles innermost), every int16's and every group's bytes reversed."""
    O, I = shape
    data = words_ZW.astype("<i2").view(np.uint8).reshape(-1, 2)[:, ::-1]
    parts = data.reshape(O // 32, 2, I // 32, 2, 32, -1).transpose(0, 2, 4, 3, 1, 5)[..., ::-1]
    return np.ascontiguousarray(parts).reshape(-1).view("<i2").reshape(words_ZW.shape)


def from_qtip_kernel(words_ZW: Integer[np.ndarray, "Z W"], shape: tuple[int, int]) -> Integer[np.ndarray, "Z W"]:
    """Inverse of `to_qtip_kernel`."""
    O, I = shape
    data = np.ascontiguousarray(words_ZW.astype("<i2")).view(np.uint8)
    parts = data.reshape(O // 32, I // 32, 32, 2, 2, -1)[..., ::-1].transpose(0, 4, 1, 3, 2, 5)
    return np.ascontiguousarray(parts.reshape(-1, 2)[:, ::-1]).reshape(-1).view("<i2").reshape(words_ZW.shape)


def from_qtip(words_ZW: Integer[np.ndarray, "Z W"], width: int, L: int) -> States:
    """Inverse of `to_qtip`."""
    return windows_of(np.roll(_bits(words_ZW), width - L, axis=1), width, L)


def to_exl3(states_ZN: States, width: int, shape: tuple[int, int], L: int = 16) -> Integer[np.ndarray, "C R W"]:
    """int16 `trellis` of EXL3, `[in/16, out/16, 16 K]`, of the tiles of a weight `[out, in]`, row by row."""
    check_closed(states_ZN, width, L)
    words = _words(bits_of(states_ZN, width))
    words = words.reshape(shape[0] // 16, shape[1] // 16, -1, 2)[..., ::-1]
    return np.ascontiguousarray(words.reshape(*words.shape[:2], -1).transpose(1, 0, 2))


def from_exl3(trellis_CRW: Integer[np.ndarray, "C R W"], width: int, L: int = 16) -> States:
    """States of the tiles, row by row of the weight `[out, in]`; inverse of `to_exl3`."""
    C, R, W = trellis_CRW.shape
    if W != 16 * width:
        raise FormatError(f"EXL3 trellis of {W} words a tile ({width} bits take {16 * width})")
    words = trellis_CRW.transpose(1, 0, 2).reshape(R * C, -1, 2)[..., ::-1]
    return windows_of(_bits(words.reshape(R * C, -1)), width, L)


def _words(bits_ZM: Bits) -> Integer[np.ndarray, "Z W"]:
    """16 bits each, highest first."""
    return np.packbits(bits_ZM, axis=1).view(">u2").astype("<u2").view(np.int16)


def _bits(words_ZW: Integer[np.ndarray, "Z W"]) -> Bits:
    return np.unpackbits(words_ZW.astype(">i2").view(np.uint8), axis=1).astype(bool)
