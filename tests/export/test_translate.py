"""Trained codes and scales into block types: exact, or refused with the reason."""

import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.export import translate
from lowbit.export.gguf_types import TYPES
from lowbit.export.translate import Misfit
from lowbit.export.verify import dequantize
from lowbit.formats import base as formats
from lowbit.formats.base import QTensor

SHAPE = (4, 512)


def encode(format, seed=0):
    w = np.random.default_rng(seed).standard_normal(SHAPE).astype(np.float32)
    return formats.get(format).encode(jnp.asarray(w))


EXACT = [
    ("q4_0", "Q4_0"), ("q4_1", "Q4_1"), ("q8_0", "Q8_0"), ("q2_0", "Q2_0"), ("tq1_0", "TQ1_0"), ("tq2_0", "TQ2_0"),
    ("int4:g64", "Q4_0"), ("int4", "Q4_0"), ("int4:g32:signmax", "Q4_0"), ("int3:g64", "Q4_0"), ("int4:g64", "Q8_0"),
    ("int8", "Q8_0"), ("int8:g32:asym", "Q8_0"), ("int2:g64", "Q2_0"), ("int2:g128", "Q2_0"), ("int2:g64", "Q4_0"),
    ("ternary:tensor", "TQ1_0"), ("ternary:tensor", "TQ2_0"), ("ternary:tensor", "Q2_0"), ("ternary:g64", "Q2_0"),
    ("ternary:channel", "TQ2_0"), ("ternary:g256", "TQ2_0"), ("int2:g64:asym", "Q4_0"),
]  # fmt: skip


@pytest.mark.parametrize("format, type", EXACT)
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
    levels, d, _ = translate.fit(translate.grid(q), TYPES["Q2_0"])
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
]


@pytest.mark.parametrize("format, type, why", REFUSED)
def test_refused(format, type, why):
    with pytest.raises(Misfit, match=why):
        translate.fit(translate.grid(encode(format)), TYPES[type])


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
