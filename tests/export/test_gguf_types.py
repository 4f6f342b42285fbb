"""Bytes of GGUF blocks, against the `gguf` library's own dequantizers and hand-made bytes."""

import gguf
import numpy as np
import pytest

from lowbit.errors import InputError
from lowbit.export import gguf_types as T
from lowbit.export.verify import dequantize

QUANTIZED = [n for n, t in T.TYPES.items() if t.quantized]


def random_blocks(name, rows=4, columns=768):
    t = T.TYPES[name]
    rng = np.random.default_rng(0)
    levels = rng.integers(t.low, t.high + 1, (rows, columns))
    d = rng.standard_normal((rows, columns // t.block)).astype(np.float16).astype(np.float32)
    m = rng.standard_normal(d.shape).astype(np.float16).astype(np.float32) if name == "Q4_1" else None
    return t, levels, d, m


@pytest.mark.parametrize("name", QUANTIZED)
def test_round_trip(name):
    t, levels, d, m = random_blocks(name)
    data = T.blocks(t, levels, d, m)
    assert data.dtype == np.uint8 and data.shape == (4, t.row_bytes(768))
    levels2, d2, m2 = T.unblock(t, data)
    np.testing.assert_array_equal(levels2, levels)
    np.testing.assert_array_equal(d2, d)
    assert (m is None) == (m2 is None) and (m is None or np.array_equal(m, m2))


@pytest.mark.parametrize("name", QUANTIZED)
def test_an_independent_decoder_gives_levels_times_scales(name):
    """The `gguf` library's, and for Q2_0, which it does not know, the one in `verify`."""
    t, levels, d, m = random_blocks(name)
    w = levels.astype(np.float32) * d.repeat(t.block, axis=1) + (0 if m is None else m.repeat(t.block, axis=1))
    np.testing.assert_array_equal(dequantize(name, T.blocks(t, levels, d, m)), w)


@pytest.mark.parametrize("name", ["F32", "F16", "BF16", *(n for n in QUANTIZED if n != "Q2_0")])
def test_sizes_and_ids_are_the_library_s(name):
    t, kind = T.TYPES[name], gguf.GGMLQuantizationType[name]
    assert t.id == kind and (t.block, t.bytes) == gguf.GGML_QUANT_SIZES[kind]
    prefix = {"F32": "ALL_F32"}.get(name, f"MOSTLY_{name}")
    assert t.ftype == gguf.LlamaFileType[prefix]


def test_ternary_bytes_equal_the_library_s():
    w = np.random.default_rng(1).integers(-1, 2, (3, 512)).astype(np.float32) * 0.5
    for name in ("TQ1_0", "TQ2_0"):
        t = T.TYPES[name]
        ours = T.blocks(t, (w * 2).astype(int), np.full((3, 2), 0.5, np.float32))
        np.testing.assert_array_equal(ours, gguf.quantize(w, gguf.GGMLQuantizationType[name]))


def test_q2_0_by_hand():
    levels = np.zeros((1, 64), int)
    levels[0, :5] = [-1, 0, 1, 2, -1]
    data = T.blocks(T.TYPES["Q2_0"], levels, np.full((1, 1), 1.5, np.float32))
    assert data[0, :2].tobytes() == np.float16(1.5).tobytes()
    assert data[0, 2] == 0b11100100 and data[0, 3] == 0b01010100  # element 0 in the lowest bits
    assert dequantize("Q2_0", data)[0, :5].tolist() == [-1.5, 0, 1.5, 3.0, -1.5]


def test_unknown_type():
    with pytest.raises(InputError, match="unknown GGUF type 'Q4_2'; did you mean"):
        T.get("Q4_2")
