"""Trained codes and scales into block types: exact, or refused with the reason."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.export import translate
from lowbit.export.gguf_types import TYPES
from lowbit.export.translate import Misfit
from lowbit.export.verify import dequantize
from lowbit.formats import base as formats
from lowbit.formats.base import Affine, QTensor

SHAPE = (4, 512)


def encode(format, seed=0):
    w = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    return formats.get(format).encode(jnp.asarray(w))


EXACT = [
    ("q4_0", "Q4_0"), ("q4_1", "Q4_1"), ("q8_0", "Q8_0"), ("q2_0", "Q2_0"), ("tq1_0", "TQ1_0"), ("tq2_0", "TQ2_0"),
    ("int4:g64", "Q4_0"), ("int4", "Q4_0"), ("int4:g32:signmax", "Q4_0"), ("int3:g64", "Q4_0"), ("int4:g64", "Q8_0"),
    ("int8", "Q8_0"), ("int8:g32:asym", "Q8_0"), ("int2:g64", "Q2_0"), ("int2:g128", "Q2_0"), ("int2:g64", "Q4_0"),
    ("ternary:tensor", "TQ1_0"), ("ternary:tensor", "TQ2_0"), ("ternary:tensor", "Q2_0"), ("ternary:g64", "Q2_0"),
    ("ternary:channel", "TQ2_0"), ("ternary:g256", "TQ2_0"), ("int2:g64:asym", "Q4_0"), ("q5_0", "Q5_0"),
    ("q5_1", "Q5_1"), ("int5:g32", "Q5_0"), ("q4_1", "Q5_1"), ("q2_k:absmax", "Q2_K"), ("q3_k:absmax", "Q3_K"),
    ("q4_k:absmax", "Q4_K"), ("q4_k:absmax", "Q5_K"), ("q5_k:absmax", "Q5_K"), ("q6_k:absmax", "Q6_K"),
    ("mxfp4", "MXFP4"), ("mxfp4:mse", "Q8_0"), ("int2", "Q2_K"), ("int2:g256", "Q2_K"), ("int2:channel:asym", "Q2_K"),
    ("int2:g256:signmse", "Q2_K"), ("int1:channel", "Q2_K"), ("ternary:tensor", "Q2_K"), ("int4", "Q4_K"),
    ("int5", "Q5_K"),
]  # fmt: skip


# By default one of each type.
FIRST = {t: (f, t) for f, t in reversed(EXACT)}.values()


@pytest.mark.parametrize(
    "format, type", [pytest.param(*c, marks=[] if c in FIRST else [pytest.mark.slow]) for c in dict.fromkeys(EXACT)]
)
def test_bytes_decode_to_the_trained_weights(format, type):
    q = encode(format)
    if format == "int8:g32:asym":  # levels up to +-255: only blocks whose zero point is near the middle fit
        q = formats.get(format).encode(
            q.decode(), {"scale": jnp.full((4, 16), 0.03125), "zero": jnp.full((4, 16), 128.0)}
        )
    data = translate.encode(translate.grid(q), TYPES[type])
    np.testing.assert_array_equal(dequantize(type, data), np.asarray(q.decode()))


def test_int2_is_written_upside_down():
    q = encode("int2:g64")
    levels, d, *_ = translate.fit(translate.grid(q), TYPES["Q2_0"])
    codes = q.format.affine(q).codes
    flipped = d < 0
    assert flipped.any() and levels.min() == -1 and levels.max() == 2
    assert np.array_equal(np.repeat(np.where(flipped, -1, 1), 64, axis=1) * levels, codes)


REFUSED = [
    ("int4:g64", "TQ2_0", "more than one scale in TQ2_0's block of 256"),
    ("int4:g64", "Q2_0", r"levels -8..7 \(Q2_0 holds -1..2\)"),
    ("int8", "Q4_0", r"\(Q4_0 holds -8..7\)"),
    ("int4:g16", "Q4_0", "group 16 has more than one scale in Q4_0's block of 32"),
    ("int4:g64:f32", "Q4_0", "a scale that is not exact in fp16"),
    ("q4_1", "Q4_0", "Q4_0 has no offset"),
    ("int5:g64", "Q4_1", "Q4_1 holds 16"),
    ("q4_k:absmax", "Q2_K", r"sub-blocks of 32 weights \(Q2_K has 16\)"),
    ("q3_k:absmax", "Q2_K", "Q2_K has minima, unlike the format"),
    ("q2_k:absmax", "Q6_K", "Q6_K has no minima, unlike the format"),
    ("q6_k:absmax", "Q3_K", r"levels -32..31 \(Q3_K holds -4..3\)"),
    ("q5_k:absmax", "Q4_K", r"levels 0..31 \(Q4_K holds 0..15\)"),
    ("q4_k:absmax", "Q4_1", "a scale that is not exact in fp16"),
    ("int2", "Q3_K", "Q3_K holds the format q3_k only"),
    ("int2:g64", "Q2_K", "group 64 has more than one scale in Q2_K's block of 256"),
    ("int3", "Q2_K", r"levels -4..3 \(Q2_K holds 4 of even distance\)"),
    ("int2:channel:f32", "Q2_K", "a scale that is not exact in fp16"),
    ("q4_1", "Q2_K", "an offset that is no multiple of half the scale"),
    ("int4:g32", "MXFP4", "level -?[57] .MXFP4 holds 0, 1, 2, 3, 4, 6, 8, 12"),
    ("ternary:g32", "MXFP4", "a scale that is no power of two"),
]


@pytest.mark.parametrize("format, type, why", REFUSED)
def test_refused(format, type, why):
    with pytest.raises(Misfit, match=why):
        translate.fit(translate.grid(encode(format)), TYPES[type])


LEVELS = {"midrise": [-3, -1, 1, 3], "lopsided": [-5, -3, -1, 1], "odd pairs": [-1, 1], "int2": [-2, -1, 0, 1]}


@pytest.mark.parametrize("sign", [1, -1])
@pytest.mark.parametrize("group", [128, 256, 512])
@pytest.mark.parametrize("kind", LEVELS)
def test_four_even_levels_are_exact_in_q2_k(kind, group, sign):
    """However they are written: as whole levels, with a half zero point, or with an offset."""
    rng = np.random.default_rng(0)
    levels = rng.choice(LEVELS[kind], SHAPE).astype(np.int32)
    levels[0, 16:48] = max(LEVELS[kind])  # a sub-block without the lowest level
    d = sign * rng.uniform(0.01, 1, (4, 512 // max(group, 256))).astype(np.float16).astype(np.float32)
    d = d.repeat(max(group, 256) // group, axis=1)
    w = levels * d.repeat(group, axis=1)
    lowest = min(LEVELS[kind])
    codes, step = levels - lowest, 2 if kind != "int2" else 1
    grids = [translate.Grid(levels, d, None, group), translate.Grid(codes // step, step * d, lowest * d, group)]
    zero = np.full(d.shape, -lowest / step, np.float32)
    grids.append(translate.grid(affine(Affine(codes // step, step * d, zero, 0 * d, group))))
    for g in grids:
        np.testing.assert_array_equal(dequantize("Q2_K", translate.encode(g, TYPES["Q2_K"])), w)
        if kind in ("midrise", "lopsided"):
            assert translate.exact_types(g)[0] == "Q2_K"


def affine(a: Affine) -> QTensor:
    """A tensor of a format that has this affine form."""

    class Given(formats.Format):
        name = "given"
        affine = staticmethod(lambda q: a)

    return QTensor({}, Given(), a.codes.shape)


def test_quarter_zero_points_are_refused():
    a = Affine(np.zeros((1, 32), np.int32), *(np.full((1, 1), x, np.float32) for x in (1, 0.25, 0)), 32)
    with pytest.raises(Misfit, match="zero points of format given that are not whole or half numbers"):
        translate.grid(affine(a))


def test_groups_smaller_than_a_block_fit_when_they_agree():
    fmt = formats.get("int4:g16")
    q = fmt.encode(encode("int4:g16").decode(), {"scale": jnp.full((4, 32), 0.5)})
    data = translate.encode(translate.grid(q), TYPES["Q4_0"])
    np.testing.assert_array_equal(dequantize("Q4_0", data), np.asarray(q.decode()))


def test_rows_that_are_no_multiple():
    q = formats.get("int4:g43").encode(jnp.ones((2, 172)))
    with pytest.raises(Misfit, match="rows of 172 weights are no multiple of Q8_0's block of 32"):
        translate.fit(translate.grid(q), TYPES["Q8_0"])


def test_exact_types_are_ordered_by_size():
    assert translate.exact_types(translate.grid(encode("ternary:tensor")))[:3] == ["TQ1_0", "TQ2_0", "Q2_0"]
    assert translate.exact_types(translate.grid(encode("int2:g64")))[0] == "Q2_0"
    sizes = [TYPES[n].bits_per_weight for n in translate.EXACT_ORDER]
    assert sizes == sorted(sizes)


def test_float_formats_have_no_grid():
    assert translate.grid(encode("bf16")) is None
    assert isinstance(encode("bf16"), QTensor)
