"""From a `QTensor`'s trained codes and scales to a GGUF block type, exactly or not at all.

`Format.affine` gives `w = (codes - zero) * scale`; a block type holds `w = levels * d (+ m)`. The translation changes
names, never values: where levels, group or scale do not fit, `Misfit` says why. Nothing is rounded here.
"""

import dataclasses

import numpy as np
from einops import rearrange, repeat

from lowbit.errors import InputError
from lowbit.export.gguf_types import TYPES, GGMLType, blocks
from lowbit.formats.base import QTensor

# From small to large: the order in which `auto` tries them.
EXACT_ORDER = ("TQ1_0", "TQ2_0", "Q2_0", "Q4_0", "Q4_1", "Q8_0")


class Misfit(InputError):
    """A tensor that a block type cannot hold."""


@dataclasses.dataclass(frozen=True)
class Grid:
    """A weight as integer levels times scales (plus offsets): `w = levels * d + m`, one `d` and `m` per `group`."""

    levels: np.ndarray  # int32 [O, I]
    d: np.ndarray  # float32 [O, I / group]
    m: np.ndarray | None
    group: int


def grid(q: QTensor) -> Grid | None:
    """The grid of a packed tensor, or None if it has none (a float or a codebook format)."""
    affine = q.format.affine(q)
    if affine is None:
        return None
    zero = np.asarray(affine.zero)
    if not np.array_equal(zero, np.rint(zero)):
        raise Misfit(f"zero points of format {q.format.name} that are not integers (GGUF types hold integer levels)")
    levels = affine.codes
    if zero.any():
        levels = levels - repeat(zero.astype(np.int32), "o g -> o (g b)", b=affine.group)
    m = np.asarray(affine.offset, np.float32)
    return Grid(levels, np.asarray(affine.scale, np.float32), m if m.any() else None, affine.group)


def fit(g: Grid, t: GGMLType) -> tuple[np.ndarray, np.ndarray, np.ndarray | None]:
    """`(levels, d, m)` of `g` in blocks of `t`. Raises `Misfit` with the reason."""
    rows, columns = g.levels.shape
    if columns % t.block:
        raise Misfit(f"rows of {columns} weights are no multiple of {t.name}'s block of {t.block}")
    d, m = _regroup(g.d, g.group, columns, t, "scale"), None
    if g.m is not None:
        m = _regroup(g.m, g.group, columns, t, "offset")
    levels = rearrange(g.levels, "o (g b) -> o g b", b=t.block)
    low, high = levels.min(axis=-1), levels.max(axis=-1)

    if t.name == "Q4_1":
        levels, m = _with_offset(levels, low, high, d, m)
    else:
        if m is not None and np.any(m):
            raise Misfit(f"{t.name} has no offset (Q4_1 has)")
        m = None
        # A block may also be written upside down: levels negated and d = -scale (int2's {-2..1} in Q2_0's {-1..2}).
        flip = ((low < t.low) | (high > t.high)) & (-high >= t.low) & (-low <= t.high)
        levels = np.where(flip[..., None], -levels, levels)
        d = np.where(flip, -d, d)
        low, high = np.where(flip, -high, low), np.where(flip, -low, high)
        if low.min() < t.low or high.max() > t.high:
            raise Misfit(f"levels {g.levels.min()}..{g.levels.max()} ({t.name} holds {t.low}..{t.high})")
    for what, x in (("scale", d), ("offset", m)):
        if x is not None and not np.array_equal(_to_half(x), x):
            raise Misfit(f"a {what} that is not exact in fp16, such as {x[_to_half(x) != x][0]!r}")
    return rearrange(levels, "o g b -> o (g b)"), d, m


def encode(g: Grid, t: GGMLType) -> np.ndarray:
    """Bytes `[O, row bytes]` of `g` in type `t`. Raises `Misfit`."""
    return blocks(t, *fit(g, t))


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
    levels: np.ndarray, low: np.ndarray, high: np.ndarray, d: np.ndarray, m: np.ndarray | None
) -> tuple[np.ndarray, np.ndarray]:
    """Levels in 0..15 and the fp16 offset of Q4_1. `levels * d` becomes `(levels - low) * d + low * d`, which is the
    same float only if both are exact, so the sum is compared."""
    if m is not None:
        if low.min() < 0 or high.max() > 15:
            raise Misfit(f"levels {low.min()}..{high.max()} with an offset (Q4_1 holds 0..15)")
        return levels, m
    if (high - low).max() > 15:
        raise Misfit(f"levels spanning {(high - low).max() + 1} (Q4_1 holds 16)")
    # Zero where it can be, then a power of two: both keep the offset exact in fp16.
    base = np.where((low >= 0) & (high <= 15), 0, np.where((low >= -8) & (high <= 7), -8, low))
    offset = (base * d).astype(np.float32)
    moved = levels - base[..., None]
    if not np.array_equal(moved.astype(np.float32) * d[..., None] + offset[..., None], levels * d[..., None]):
        raise Misfit("levels whose offset form rounds differently")
    return moved, offset
