"""Bytes of GGUF blocks, against the `gguf` library's own dequantizers and hand-made bytes."""

import gguf
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.export import gguf_kquants as K
from lowbit.export import gguf_types as T
from lowbit.export.verify import dequantize

QUANTIZED = [n for n, t in T.TYPES.items() if t.quantized]


def random_fields(name, rows=4, columns=768):
    t = T.TYPES[name]
    rng = np.random.default_rng(0)
    levels = rng.integers(t.low, t.high + 1, (rows, columns))
    shape = rows, columns // t.block
    d, m = (rng.standard_normal(shape).astype(np.float16).astype(np.float32) for _ in range(2))
    if name == "MXFP4":
        return t, T.Fields(rng.choice([*T.E2M1, *-T.E2M1], levels.shape), 2.0 ** rng.integers(-126, 124, shape))
    if name not in K.SUB:
        return t, T.Fields(levels, d, m if name in T.WITH_MIN else None)
    sub = rows, columns // K.SUB[name]
    least, most = K.SCALES[name]
    sc = rng.integers(least, most + 1, sub).astype(np.float32)
    if name not in K.MINS:
        return t, T.Fields(levels, d, None, sc, None)
    return t, T.Fields(levels, d, m, sc, rng.integers(0, K.MINS[name] + 1, sub).astype(np.float32))


@pytest.mark.parametrize("name", QUANTIZED)
def test_round_trip(name):
    t, fields = random_fields(name)
    data = T.blocks(t, fields)
    assert data.dtype == np.uint8 and data.shape == (4, t.row_bytes(768))
    for a, b in zip(T.unblock(t, data), fields, strict=True):
        assert (a is None) == (b is None) and (a is None or np.array_equal(a, b))


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_independent_decoder_gives_levels_times_scales(name):
    """The `gguf` library's, and for Q2_0, which it does not know, the one in `verify`."""
    t, (levels, d, m, sc, mn) = random_fields(name)
    d, m = (None if a is None else a.astype(np.float32).repeat(t.block, axis=1) for a in (d, m))
    sc, mn = (None if a is None else a.repeat(K.SUB[name], axis=1) for a in (sc, mn))
    w = levels.astype(np.float32) * (d if sc is None else d * sc)
    if m is not None:
        w = w + m if mn is None else w - m * mn
    np.testing.assert_array_equal(dequantize(name, T.blocks(t, random_fields(name)[1])), w)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *(n for n in QUANTIZED if n != "Q2_0")])
def test_sizes_and_ids_are_the_library_s(name):
    t, kind = T.TYPES[name], gguf.GGMLQuantizationType[name]
    assert t.id == kind and (t.block, t.bytes) == gguf.GGML_QUANT_SIZES[kind]
    of_mixes = {"F32": "ALL_F32", "MXFP4": "MOSTLY_MXFP4_MOE"} | {f"Q{b}_K": f"MOSTLY_Q{b}_K_S" for b in (3, 4, 5)}
    prefix = of_mixes.get(name, f"MOSTLY_{name}")
    assert t.ftype == gguf.LlamaFileType[prefix]


def test_ternary_bytes_equal_the_library_s():
    w = np.random.default_rng(1).integers(-1, 2, (3, 512)).astype(np.float32) * 0.5
    for name in ("TQ1_0", "TQ2_0"):
        t = T.TYPES[name]
        ours = T.blocks(t, T.Fields((w * 2).astype(int), np.full((3, 2), 0.5, np.float32)))
        np.testing.assert_array_equal(ours, gguf.quantize(w, gguf.GGMLQuantizationType[name]))


def test_q2_0_by_hand():
    levels = np.zeros((1, 64), int)
    levels[0, :5] = [-1, 0, 1, 2, -1]
    data = T.blocks(T.TYPES["Q2_0"], T.Fields(levels, np.full((1, 1), 1.5, np.float32)))
    assert data[0, :2].tobytes() == np.float16(1.5).tobytes()
    assert data[0, 2] == 0b11100100 and data[0, 3] == 0b01010100  # element 0 in the lowest bits
    assert dequantize("Q2_0", data)[0, :5].tolist() == [-1.5, 0, 1.5, 3.0, -1.5]


def test_unknown_type():
    with pytest.raises(InputError, match="unknown GGUF type 'Q4_2'; did you mean"):
        T.get("Q4_2")
