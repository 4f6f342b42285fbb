"""From a `QTensor`'s trained codes and scales to a GGUF block type, exactly or not at all.

`Format.affine` gives `w = (codes - zero) * scale`; a block type holds `w = levels * d (+ m)`, K types a product of two
scales (and of two minima). The translation changes names, never values: where levels, group or scale do not fit,
`Misfit` says why. Nothing is rounded here.
"""

import dataclasses

import numpy as np
from einops import rearrange, repeat

from lowbit.errors import InputError
from lowbit.export.gguf_kquants import MINS, SCALES, SUB
from lowbit.export.gguf_types import E2M1, TYPES, WITH_MIN, Fields, GGMLType, blocks
from lowbit.formats.base import QTensor, Super

# From small to large: the order in which `auto` tries them.
EXACT_ORDER = tuple("TQ1_0 TQ2_0 Q2_0 Q2_K Q3_K MXFP4 Q4_0 Q4_K Q4_1 Q5_0 Q5_K Q5_1 Q6_K Q8_0".split())


class Misfit(InputError):
    """A tensor that a block type cannot hold."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A weight as integer levels times scales (plus offsets): `w = levels * d + m`, one `d` and `m` per `group`."""

    levels: np.ndarray  # int32 [O, I]
    d: np.ndarray  # float32 [O, I / group]
    m: np.ndarray | None
    group: int
    super: Super | None = None  # the factors of d and m, if the format stores those


def grid(q: QTensor) -> Grid | None:
    """The grid of a packed tensor, or None if it has none (a float or a codebook format)."""
    affine = q.format.affine(q)
    if affine is None:
        return None
    zero, scale = np.asarray(affine.zero), np.asarray(affine.scale, np.float32)
    levels = affine.codes
    if not np.array_equal(zero, np.rint(zero)):
        if not np.array_equal(2 * zero, np.rint(2 * zero)):
            raise Misfit(f"zero points of format {q.format.name} that are not whole or half numbers")
        levels, zero, scale = 2 * levels, 2 * zero, scale * np.float32(0.5)
    if zero.any():
        levels = levels - repeat(zero.astype(np.int32), "o g -> o (g b)", b=affine.group)
    m = np.asarray(affine.offset, np.float32)
    return Grid(levels, scale, m if m.any() else None, affine.group, affine.super)


def fit(g: Grid, t: GGMLType) -> Fields:
    """What the blocks of `t` hold for `g`. Raises `Misfit` with the reason."""
    rows, columns = g.levels.shape
    if columns % t.block:
        raise Misfit(f"rows of {columns} weights are no multiple of {t.name}'s block of {t.block}")
    if t.name in SUB:
        return _two_levels(g, t) if g.super is None else _as_stored(g, t)
    d, m = _regroup(g.d, g.group, columns, t, "scale"), None
    if g.m is not None:
        m = _regroup(g.m, g.group, columns, t, "offset")
    levels = rearrange(g.levels, "o (g b) -> o g b", b=t.block)
    low, high = levels.min(axis=-1), levels.max(axis=-1)

    if t.name in WITH_MIN:
        levels, m = _with_offset(levels, low, high, d, m, t)
    else:
        if m is not None and np.any(m):
            raise Misfit(f"{t.name} has no offset ({' and '.join(WITH_MIN)} have)")
        m = None
        # A block may also be written upside down: levels negated and d = -scale (int2's {-2..1} in Q2_0's {-1..2}).
        flip = ((low < t.low) | (high > t.high)) & (-high >= t.low) & (-low <= t.high)
        levels = np.where(flip[..., None], -levels, levels)
        d = np.where(flip, -d, d)
        low, high = np.where(flip, -high, low), np.where(flip, -low, high)
        if low.min() < t.low or high.max() > t.high:
            raise Misfit(f"levels {g.levels.min()}..{g.levels.max()} ({t.name} holds {t.low}..{t.high})")
    levels = rearrange(levels, "o g b -> o (g b)")
    if t.name == "MXFP4":
        return _floats(levels, d)
    for what, x in (("scale", d), ("offset", m)):
        if x is not None and not np.array_equal(_to_half(x), x):
            raise Misfit(f"a {what} that is not exact in fp16, such as {x[_to_half(x) != x][0]!r}")
    return Fields(levels, d, m)


def encode(g: Grid, t: GGMLType) -> np.ndarray:
    """Bytes `[O, row bytes]` of `g` in type `t`. Raises `Misfit`."""
    return blocks(t, fit(g, t))


def exact_types(g: Grid) -> list[str]:
    """Block types that hold `g` exactly, smallest first."""
    out = []
    for name in EXACT_ORDER:
        try:
            fit(g, TYPES[name])
        except Misfit:
            continue
        out.append(name)
    return out


def _to_half(x: np.ndarray) -> np.ndarray:
    with np.errstate(over="ignore"):
        return x.astype(np.float16).astype(np.float32)


def _regroup(x: np.ndarray, group: int, columns: int, t: GGMLType, what: str) -> np.ndarray:
    """One value per block of `t` from one per `group`; groups that share a block must agree."""
    if group % t.block == 0:
        return repeat(x, "o g -> o (g n)", n=group // t.block)
    if t.block % group:
        raise Misfit(f"group {group} neither divides nor is a multiple of {t.name}'s block of {t.block}")
    shared = rearrange(x, "o (g n) -> o g n", n=t.block // group)
    if not np.array_equal(shared, np.broadcast_to(shared[..., :1], shared.shape)):
        raise Misfit(f"group {group} has more than one {what} in {t.name}'s block of {t.block}")
    return shared[..., 0]


def _with_offset(
    levels: np.ndarray, low: np.ndarray, high: np.ndarray, d: np.ndarray, m: np.ndarray | None, t: GGMLType
) -> tuple[np.ndarray, np.ndarray]:
    """Levels in 0..15 (0..31) and the fp16 offset of Q4_1 (Q5_1). `levels * d` becomes `(levels - low) * d + low * d`,
    which is the same float only if both are exact, so the sum is compared."""
    half = (t.high + 1) // 2
    if m is not None:
        if low.min() < 0 or high.max() > t.high:
            raise Misfit(f"levels {low.min()}..{high.max()} with an offset ({t.name} holds 0..{t.high})")
        return levels, m
    if (high - low).max() > t.high:
        raise Misfit(f"levels spanning {(high - low).max() + 1} ({t.name} holds {t.high + 1})")
    # Zero where it can be, then a power of two: both keep the offset exact in fp16.
    base = np.where((low >= 0) & (high <= t.high), 0, np.where((low >= -half) & (high < half), -half, low))
    offset = (base * d).astype(np.float32)
    moved = levels - base[..., None]
    if not np.array_equal(moved.astype(np.float32) * d[..., None] + offset[..., None], levels * d[..., None]):
        raise Misfit("levels whose offset form rounds differently")
    return moved, offset


def _floats(levels: np.ndarray, d: np.ndarray) -> Fields:
    """MXFP4: doubled E2M1 values times a power of two."""
    if not np.isin(np.abs(levels), E2M1).all():
        raise Misfit(f"level {levels[~np.isin(np.abs(levels), E2M1)][0]} (MXFP4 holds {', '.join(map(str, E2M1))})")
    fraction, exponent = np.frexp(d)
    if (np.abs(fraction) != 0.5).any() or exponent.min() < -125 or exponent.max() > 127:
        raise Misfit("a scale that is no power of two from 2^-126 to 2^126 (MXFP4 stores its exponent)")
    sign = repeat(np.sign(fraction).astype(np.int32), "o g -> o (g b)", b=levels.shape[1] // d.shape[1])
    return Fields(levels * sign, np.abs(d))


# -- K types ----------------------------------------------------------------------------------------------------------


def _as_stored(g: Grid, t: GGMLType) -> Fields:
    """The trained factors of a k-quant, if `t` has its sub-blocks and holds its codes and whole numbers."""
    s, (least, most) = g.super, SCALES[t.name]
    if g.group != SUB[t.name]:
        raise Misfit(f"sub-blocks of {g.group} weights ({t.name} has {SUB[t.name]})")
    if (s.mn is not None) != (t.name in MINS):
        raise Misfit(f"{t.name} has {'' if t.name in MINS else 'no '}minima, unlike the format")
    low, high = g.levels.min(), g.levels.max()
    if low < t.low or high > t.high:
        raise Misfit(f"levels {low}..{high} ({t.name} holds {t.low}..{t.high})")
    if s.sc.min() < least or s.sc.max() > most or (s.mn is not None and s.mn.max() > MINS[t.name]):
        raise Misfit(f"scales of sub-blocks {s.sc.min():g}..{s.sc.max():g} ({t.name} holds {least}..{most})")
    return Fields(g.levels, s.d, s.dmin, s.sc, s.mn)


def _two_levels(g: Grid, t: GGMLType) -> Fields:
    """Evenly spaced levels of one scale for a super-block, in a K type with minima: `sc` is the distance of the levels
    (1, or 2 where all are odd or all even), `mn` minus the lowest one, and `d = dmin` the scale.

    Q2_K so holds any four neighbouring levels, those without a 0 too: {-3, -1, 1, 3} is sc = 2, mn = 3.
    """
    if t.name not in MINS:
        raise Misfit(f"{t.name} holds the format {t.format} only")
    columns = g.levels.shape[1]
    levels, d, group = g.levels, g.d, g.group
    if g.m is not None:  # in units of half a scale
        steps = np.rint(2 * g.m / np.where(g.d == 0, 1, g.d)).clip(-999, 999)
        if not np.array_equal(steps * (g.d * np.float32(0.5)), g.m):
            raise Misfit(f"an offset that is no multiple of half the scale ({t.name} stores whole numbers)")
        levels = 2 * levels + repeat(steps.astype(np.int32), "o g -> o (g b)", b=group)
        d = d * np.float32(0.5)
    d = _regroup(d, group, columns, t, "scale")
    levels = rearrange(levels, "o (g b) -> o g b", b=t.block) * np.sign(d).astype(np.int32)[..., None]
    d = np.abs(d)
    step = np.where((levels % 2 == levels[..., :1] % 2).all(axis=-1), 2, 1)
    levels = rearrange(levels, "o g (j k) -> o g j k", k=SUB[t.name])
    low = levels.min(axis=-1)
    spacing = step[..., None]
    low = np.minimum(low, low % spacing - spacing * (low % spacing > 0))  # 0 or less, on the same levels
    codes = (levels - low[..., None]) // spacing[..., None]
    if codes.max() > t.high or -low.min() > MINS[t.name]:
        raise Misfit(f"levels {g.levels.min()}..{g.levels.max()} ({t.name} holds {t.high + 1} of even distance)")
    if not np.array_equal(_to_half(d), d):
        raise Misfit(f"a scale that is not exact in fp16, such as {d[_to_half(d) != d][0]!r}")
    sc = np.broadcast_to(spacing, low.shape).astype(np.float32)
    sub = [rearrange(x, "o g j -> o (g j)") for x in (sc, -low.astype(np.float32))]
    return Fields(rearrange(codes, "o g j k -> o (g j k)"), d, d, *sub)
