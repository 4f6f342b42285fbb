"""The laws of `docs/architecture.md`, over every registered format. A new format inherits all of them."""

import functools
import itertools
import math
import os
import subprocess
import sys
from pathlib import Path

import gguf
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from battery import SHAPE, same_bits, same_tree, weights

from lowbit.export import gguf_types, translate
from lowbit.formats import base
from lowbit.formats.activation import get_act
from lowbit.formats.base import FormatError, Latent, QTensor
from lowbit.formats.dorefa import DoReFa
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.floats import FloatFormat
from lowbit.formats.ggml import GGML
from lowbit.formats.integer import Integer
from lowbit.formats.mx import MXFP4
from lowbit.formats.ternary import Ternary
from lowbit.formats.uniform import Uniform
from lowbit.kernels.qdot import qdot

NAMES = base.names()
W = weights()
X = np.random.default_rng(1).standard_normal((3, SHAPE[1])).astype(np.float32)
# Formats that add no pair of choices to the others run with `-m slow` only.
SPARE = """f32 int1:channel:paretoq ternary:channel:paretoq-compat
int2:g64 int2:g64:mse int3:g64 ternary:channel ternary:g64:lsq ternary:tensor:f32 q4_0:mse:lsq
q2_0:mse q5_0:mse:clip q2_k q2_k:absmax:lsq q3_k q4_k:lsq q5_k q5_k:absmax:rounded q6_k mxfp4:lsq nf2 nf4
aqlm:1x8:g8 aqlm:3x3:g4 vptq:v4:k16 vptq:v4:k16:r32 vptq:v4:k16:s gptvq:v1:k4:c64:n4 nuq1 nuq3 nuq4
e8p3:rho0.98:r2.04 trellis2:mcg trellis2:1mad:l12 trellis4:latin:l12
rht:ternary:channel rht128:blocks:int2:channel:midrise""".split()
# The laws that compile large programs run over one format of each code path by default.
MOST = """bf16 int1:g64 int2:g64:midrise:mse:paretoq ternary:channel:paretoq
int2:tensor:asym:mse int3:g64:asym:rounded int4:g64 int4:g64:clip:bf16 ternary:tensor
q4_0 q4_1 tq1_0 q4_k q6_k:absmax:fixed2 mxfp4:mse:clip nf4:dq rht:f16:int4:g64:clip
aqlm:2x4:g4 nuq2 e8p2 e8p3 e8p4
trellis2:mcg:l10 trellis2:hyb:l10 trellis2.5:mul1:l10""".split()
REST = [n for n in NAMES if n not in MOST]


def over(names: list[str], slow: list[str]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize(
        "name", [pytest.param(n, marks=[pytest.mark.slow] if n in slow else []) for n in names]
    )


every, most = over(NAMES, SPARE), over(NAMES, REST)
# DoReFa's gradient goes through tanh: tests/qat/test_recipes.py.
uniform = over([n for n in NAMES if isinstance(base.get(n), Uniform) and not isinstance(base.get(n), DoReFa)], SPARE)


@functools.cache
def encoded(name: str, what: str) -> QTensor:
    return base.get(name).encode(jnp.asarray(W[what]))


def by_operation(fmt: base.Format, w: jax.Array, params: base.Params) -> tuple[dict, jax.Array, jax.Array]:
    """Encode, decode and fake-quantize one operation at a time: what eager execution really means."""
    stored = fmt.stored(params)
    codes = fmt.quantize(w.astype(jnp.float32), stored)
    arrays = fmt.pack(codes, stored)
    codes_back, stored_back = fmt.unpack(arrays, w.shape)
    assert codes.dtype == jnp.int32 and same_bits(codes, codes_back) and same_tree(stored, stored_back)
    return arrays, fmt.dequantize(codes_back, stored_back).astype(w.dtype), fmt.fake_quant(w, params)


# -- names and registry -----------------------------------------------------------------------------------------------


def test_names_are_canonical_and_parse_back():
    assert len(set(NAMES)) == len(NAMES) > 50
    for name in NAMES:
        fmt = base.get(name)
        assert fmt.name == name and base.get(f" {name.upper()} ") == fmt and hash(base.get(name)) == hash(fmt)


def test_integer_examples_cover_every_pair():
    """Width, zero point, granularity and calibration, two by two; symmetric int1 has one calibration only."""
    grids = [f for f in map(base.get, NAMES) if isinstance(f, Integer) and f.name not in SPARE]
    kinds = [(f.width, f.asym, f.granularity if isinstance(f.granularity, str) else "group", f.searched) for f in grids]
    choices = (range(1, 9), (False, True), ("tensor", "channel", "group"), (False, True))
    for a, b in itertools.combinations(range(4), 2):
        missing = set(itertools.product(choices[a], choices[b])) - {(k[a], k[b]) for k in kinds}
        assert not missing


@pytest.mark.parametrize(
    "spelled, canonical",
    [
        ("int4", "int4:channel"),
        ("int4:asym:g64", "int4:g64:asym"),
        ("int1:minmax:asym", "int1:channel:asym"),
        ("int8:fp16:tensor:absmax", "int8:tensor"),
        ("int4:bf16:clip:mse:g32:asym", "int4:g32:asym:mse:clip:bf16"),
        ("int2:g64:fixed0.50", "int2:g64:fixed0.5"),
        ("ternary", "ternary:tensor"),
        ("q4_0:lsq:mse", "q4_0:mse:lsq"),
        ("int2:midrise:paretoq", "int2:channel:midrise:paretoq"),
        ("ternary:paretoq-compat", "ternary:tensor:paretoq-compat"),
        ("q4_k:clip:absmax", "q4_k:absmax:clip"),
        ("trellis2.5:l16:v1:mcg", "trellis2.5:mcg"),
        ("trellis3:qtip:v2:l12:hyb", "trellis3:hyb:l12:qtip"),
        ("trellis2:v2:lut", "trellis2:lut:v2"),
        ("mxfp4:fixed1:mse", "mxfp4:mse:fixed1"),
        ("aqlm:g4:2x8", "aqlm:2x8:g4"),
        ("aqlm", "aqlm:1x8:g8"),
        ("vptq:s:r16:k256:v8", "vptq:v8:k256:r16:s"),
        ("gptvq", "gptvq:v4:k16:c256"),
        ("e8p4:mse:r3.750:rho0.89", "e8p4:mse"),
    ],
)
def test_other_spellings(spelled: str, canonical: str):
    assert base.get(spelled).name == canonical and base.get(canonical) == base.get(spelled)


# -- law 1: fake_quant is decode of encode, bit for bit ---------------------------------------------------------------


@most
def test_train_law(name: str):
    fmt = base.get(name)

    @jax.jit
    def larger(w, params, q: QTensor, x):
        decoded, dynamic, trained = q.decode(), Latent(w, {}, fmt).value(), Latent(w, params, fmt).value()
        # Additions that a compiler may contract with the decoder's multiplication, and a reduction it may fuse with.
        used = [(x[:1] * v + x[1:2]).sum() + (v + x[:1]).max() for v in (decoded, dynamic, trained)]
        return decoded, dynamic, trained, fmt.encode(w, params).arrays, used

    for what, array in W.items():
        w = jnp.asarray(array)
        params = Latent(w, {}, fmt).dynamic_params()
        # A search is one scan anyway, and slow to trace; ggml's fits are functions of the integers and of ternary.
        if what == "mixed" and not getattr(fmt, "searched", False) and not isinstance(fmt, GGML):
            assert same_tree(fmt.init(w), params)
        arrays, decoded, faked = by_operation(fmt, w, params)
        assert np.isfinite(np.asarray(decoded)).all(), what
        assert same_bits(decoded, faked), what
        q = fmt.encode(w, params)
        assert same_tree(q.arrays, arrays), what
        assert same_bits(q.decode(), decoded), what
        inner, dynamic, trained, inner_arrays, _ = larger(w, params, q, X)
        assert same_bits(inner, decoded) and same_bits(trained, decoded) and same_tree(inner_arrays, arrays), what
        # Scales fitted inside the training step are those that the export fits, to the bit.
        assert same_bits(dynamic, encoded(name, what).decode()), what


@most
def test_train_law_bf16_and_trained_parameters(name: str):
    fmt = base.get(name)
    w = jnp.asarray(W["normal"], jnp.bfloat16)
    noise = np.random.default_rng(2)
    params = jax.tree.map(
        lambda p: p * noise.uniform(0.5, 1.5, p.shape).astype(np.float32), base._init(fmt, w.astype("f4"))
    )
    _, decoded, faked = by_operation(fmt, w, params)
    q = fmt.encode(w, params)
    assert decoded.dtype == jnp.bfloat16 and q.dtype == "bfloat16"
    for other in (faked, q.decode(), jax.jit(fmt.fake_quant)(w, params), Latent(w, params, fmt).encode().decode()):
        assert same_bits(decoded, other)
    assert same_bits(Latent(w, params, fmt).value(), decoded)


# -- law 2: other decoders read the same weights ----------------------------------------------------------------------


@every
def test_affine_reconstructs_decode(name: str):
    for what in W:
        q = encoded(name, what)
        affine = q.format.affine(q)
        if affine is None:
            assert not isinstance(q.format, Uniform)
            return
        assert affine.codes.shape == SHAPE and affine.scale.shape == (SHAPE[0], SHAPE[1] // affine.group)
        assert same_bits(affine.decode(), q.decode()), what


def dequantize_q2_0(blocks: np.ndarray) -> np.ndarray:
    """Q2_0 of ggml 0.25: fp16 d, then 16 bytes of 2-bit codes, `(c - 1) * d` (the gguf library does not know it)."""
    b = blocks.reshape(blocks.shape[0], -1, 18)
    d = b[..., :2].copy().view(np.float16).astype(np.float32)
    c = (b[..., 2:, None] >> np.array([0, 2, 4, 6], np.uint8)) & 3
    return ((c.reshape(*b.shape[:2], 64).astype(np.float32) - 1) * d).reshape(b.shape[0], -1)


def foreign_decode(type: str, blocks: np.ndarray) -> np.ndarray:
    if type == "Q2_0":
        return dequantize_q2_0(blocks)
    return gguf.quants.dequantize(blocks, gguf.GGMLQuantizationType[type])


@every
def test_ggml_blocks_decode_to_the_same_weights(name: str):
    ggml_type = name.split(":")[0].upper()
    if not isinstance(base.get(name), Uniform):
        return
    for what in W:
        q = encoded(name, what)
        grid = translate.grid(q)
        types = translate.exact_types(grid)
        assert ggml_type in types or ggml_type not in gguf_types.TYPES, what
        for t in types:
            blocks = translate.encode(grid, gguf_types.TYPES[t])
            np.testing.assert_array_equal(foreign_decode(t, blocks), np.asarray(q.decode()), err_msg=f"{what} {t}")
            if t == ggml_type:
                assert blocks.size == q.nbytes  # our own layout takes the file's bytes


# -- law 3: sizes -----------------------------------------------------------------------------------------------------


@every
def test_size_law(name: str):
    q = encoded(name, "normal")
    written = sum(len(np.asarray(a).tobytes()) for a in q.arrays.values())
    assert q.nbytes == written and q.bits_per_weight == 8 * written / math.prod(SHAPE)
    assert all(np.dtype(a.dtype).itemsize * 8 >= 8 and "int4" not in str(a.dtype) for a in q.arrays.values())


@pytest.mark.parametrize(
    "name, bits",
    [
        ("f32", 32),
        ("bf16", 16),
        ("int1:g64", 1.25),
        ("int1:g64:asym", 1 + (16 + 1) / 64),
        ("int2:g64", 2.25),
        ("int2:channel:midrise", 2 + 16 / 512),
        ("int3:channel", 3 + 16 / 512),
        ("int4:g64", 4.25),
        ("int4:g64:asym", 4 + (16 + 4) / 64),
        ("int8:g32:f32", 9),
        ("ternary:tensor", 2 + 16 / 8192),
        ("ternary:g256", 2.0625),
        ("q8_0", 8.5),
        ("q4_0", 4.5),
        ("q4_1", 5),
        ("q2_0", 2.25),
        ("tq1_0", 1.6875),
        ("tq2_0", 2.0625),
        ("e8p2", 2 + 32 / 4096),
        ("e8p3", 3 + 32 / 4096),
        ("e8p4:mse", 4 + 32 / 4096),
        ("nf4", 4.5),
        ("nf3:g32", 4),
        ("nf2", 2.5),
        ("nf4:dq", 4 + (8 + 32 / 16) / 64 + 32 / 8192),  # 16 rows: a step for as many absmax, an offset for all
        ("q5_0", 5.5),
        ("q5_1", 6),
        ("q2_k", 84 * 8 / 256),
        ("q3_k", 110 * 8 / 256),
        ("q4_k", 144 * 8 / 256),
        ("q5_k", 176 * 8 / 256),
        ("q6_k", 210 * 8 / 256),
        ("mxfp4", 17 * 8 / 32),
        ("aqlm:2x4:g4", 2 + (2 * 16 * 4 + 8) * 16 / 4096),  # codes, codebooks, a scale a row
        ("aqlm:3x3:g4", 9 / 4 + (3 * 8 * 4 + 8) * 16 / 4096),
        ("vptq:v4:k16:r32", 9 / 4 + (16 + 32) * 4 * 16 / 4096),
        ("vptq:v2:k16:o8", 2 + (2 * 16 * 2 + 8) * 16 / 4096),
        ("vptq:v4:k16:s", 1 + (16 * 4 + 512) * 16 / 4096),
        ("gptvq:v2:k16:c64", 2 + 8 * 16 * 2 * 16 / 4096),
        ("nuq3", 3 + 8 * 8 * 16 / 4096),
        ("trellis2:mcg", 2 + 32 / 8192),
        ("trellis2.5:mul1:l10", 2.5 + 32 / 8192),
        ("trellis1.5:hyb", 1.5 + (32 + 512 * 2 * 16) / 8192),
        ("trellis4:lut:l8", 4 + (32 + 256 * 16) / 8192),
    ],
)
def test_declared_bits(name: str, bits: float):
    fmt = base.get(name)
    assert jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct(SHAPE, "f4")).bits_per_weight == bits


# -- law 4: gradients -------------------------------------------------------------------------------------------------


def nearest(fmt: Uniform, u: np.ndarray) -> np.ndarray:
    """The level next to each weight on the grid without ends, half to even."""
    if not isinstance(fmt, MXFP4):
        return np.rint(u)
    levels = np.array([0, 1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 1e9])
    at = np.searchsorted(levels, np.abs(u), side="right") - 1
    below, above = levels[at], levels[at + 1]
    up = np.abs(u) - below - (above - np.abs(u))
    return np.sign(u) * np.where((up > 0) | ((up == 0) & (at % 2 == 1)), above, below)


def published(fmt: Uniform, w: np.ndarray, grid: dict[str, np.ndarray], g: np.ndarray) -> dict[str, np.ndarray]:
    """Cotangents of w and of every parameter in float64, per element, written from the papers' formulas."""
    lo, hi = fmt.levels
    wide = {k: np.repeat(np.asarray(v, np.float64), w.shape[1] // v.shape[1], axis=1) for k, v in grid.items()}
    s, z, m = wide["scale"], wide.get("zero", 0.0), wide.get("min", 0.0)
    u = (w.astype(np.float64) - m) / s
    n = w.size
    paretoq = str(fmt.clip).startswith("paretoq")
    # Qp of ParetoQ: 1, 1, 1, 3, 7 at 1, 1.58, 2, 3 and 4 bits.
    factor = 1 / np.sqrt(n * hi) if fmt.clip == "lsq" else 1.0
    if paretoq:
        factor = 1 / np.sqrt(n * {3: 3, 4: 7}.get(fmt.bits, 1))
    if isinstance(fmt, Integer) and fmt.signs:
        mask = np.ones(w.shape, bool) if fmt.clip == "none" else np.abs(u) <= 1
        return {
            "w": np.where(mask, g, 0),
            "scale": factor * g * np.where(w >= (w.mean(dtype="f8") if fmt.centered else 0), 1, -1),
        }
    if isinstance(fmt, Integer) and fmt.midrise:
        # In ParetoQ's terms: alpha = 2^b s, level = (rne(clip(w/alpha) 2^(b-1) - 1/2) + 1/2) / 2^(b-1).
        top = (hi + 1) * {"paretoq": 0.99, "lsq": hi / (hi + 1), "inclusive": hi / (hi + 1)}.get(fmt.clip, 1.0)
        mask = np.abs(u) < top if fmt.clip == "lsq" else np.abs(u) <= top
        level = np.clip(2 * np.rint(u / 2 - 0.5) + 1, lo, hi)
        passes = np.ones(w.shape, bool) if fmt.clip == "none" else mask
        return {"w": np.where(passes, g, 0), "scale": factor * g * np.where(mask, level - u, level)}
    if isinstance(fmt, Ternary) and paretoq:
        mask, end = np.abs(u) <= 1.485, 1.5 if fmt.clip == "paretoq-compat" else 1.0
        return {"w": np.where(mask, g, 0), "scale": factor * g * np.where(mask, np.rint(u) - u, end * np.sign(u))}
    r = nearest(fmt, u) + z
    masks = {
        "inclusive": (u + z >= lo) & (u + z <= hi),
        "paretoq": (u + z >= lo) & (u + z <= hi),
        "lsq": (u + z > lo) & (u + z < hi),
        "rounded": (r >= lo) & (r <= hi),
    }
    on_grid = masks.get(fmt.clip, masks["rounded"])
    passes = np.ones(w.shape, bool) if fmt.clip == "none" else masks.get(fmt.clip)
    if passes is None:
        passes = np.abs(w) < fmt.clip
    end = np.where(r > hi, hi, np.where(r < lo, lo, np.where(u + z >= hi, hi, lo))) - z  # the level of what is outside
    return {
        "w": np.where(passes, g, 0),
        "scale": factor * g * np.where(on_grid, nearest(fmt, u) - u, end),
        "zero": factor * g * np.where(on_grid, 0, -s),
        "min": factor * g * np.where(on_grid, 0, 1),
    }


def gradient_weights(fmt: Uniform) -> tuple[jax.Array, base.Params]:
    """Weights, with parameters on powers of two so that many lie exactly on the grid's ends and on rounding ties."""
    w = jnp.asarray(W["ties"])
    params = base._init(fmt, w)
    params = {**params, "scale": jnp.full(params["scale"].shape, 2.0**-5, jnp.float32)}
    if "zero" in params:
        params["zero"] = jnp.full(params["zero"].shape, 1.0 if fmt.levels[1] <= 3 else 5.0)
    if "min" in params:
        params["min"] = jnp.full(params["min"].shape, -(2.0**-4), jnp.float32)
    return w, params


@uniform
def test_gradient_law(name: str):
    """The published cotangents, reaching the declared fraction of the weights, of a value that is the encoded one."""
    fmt = base.get(name)
    g = np.random.default_rng(3).standard_normal(SHAPE).astype(np.float32)

    @jax.jit
    def run(w, params):
        value, pull = jax.vjp(fmt.fake_quant, w, params)
        return value, *pull(jnp.asarray(g)), fmt.grid(fmt.stored(params))

    normal = jnp.asarray(W["normal"])
    for w, params in (gradient_weights(fmt), (normal, base._init(fmt, normal))):
        value, gw, gp, grid = run(w, params)
        assert same_bits(value, fmt.encode(w, params).decode())
        want = published(fmt, np.asarray(w), {k: np.asarray(v) for k, v in grid.items()}, g)
        np.testing.assert_array_equal(gw, want["w"].astype(np.float32))
        assert (g != 0).all() and np.count_nonzero(gw) == round(fmt.gradient_fraction(w, params) * w.size)
        assert gp.keys() == params.keys()
        for k, got in gp.items():
            each = want[k].reshape(SHAPE[0], -1, fmt.group(SHAPE))
            total = each.sum(axis=(0, 2) if fmt.granularity == "tensor" else 2, keepdims=True)[..., 0]
            np.testing.assert_allclose(got, total, rtol=1e-4, atol=2e-4 * np.abs(each).max())
    # The last weights are fitted ones: most lie inside of every policy's range, and all where there is none.
    share = np.count_nonzero(gw) / gw.size
    assert share == 1 if fmt.clip in ("none", 2.0) else 0.5 < share < 1 or fmt.clip == "rounded"
    assert fmt.gradient_fraction(normal) == fmt.gradient_fraction(normal, params)


@pytest.mark.parametrize("name", [n for n in NAMES if isinstance(base.get(n), FloatFormat)])
def test_gradient_of_floats_is_the_identity(name: str):
    fmt, w = base.get(name), jnp.asarray(W["mixed"])
    assert (jax.grad(lambda w: Latent(w, {}, fmt).value().sum())(w) == 1).all() and fmt.gradient_fraction(w) == 1


SURROGATES = """int4:g64 int3:tensor:lsq int4:g64:asym ternary:channel ternary:channel:paretoq
int2:g64:midrise:paretoq q4_1 q2_0 q4_k:absmax q6_k:absmax:fixed2 mxfp4""".split()


@pytest.mark.parametrize("name", SURROGATES)
def test_scale_gradient_is_the_derivative_of_the_surrogate(name: str):
    """Straight-through replaces rne(v) by v plus a constant; its derivative by finite differences in float64."""
    fmt, w = base.get(name), W["normal"].astype(np.float64)
    params = {k: np.asarray(v, np.float64) for k, v in fmt.init(jnp.asarray(W["normal"])).items()}
    params["scale"] = params["scale"] * (0.5 if isinstance(fmt, MXFP4) else 0.9)
    grid = fmt.grid(fmt.stored(jax.tree.map(jnp.float32, params)))
    stored = {k: np.asarray(v, np.float64) for k, v in grid.items()}
    lo, hi = fmt.levels
    group = fmt.group(SHAPE)

    def parts(p):
        wide = {k: np.repeat(v, group, axis=1) for k, v in p.items()}
        return wide["scale"], wide.get("zero", 0.0), wide.get("min", 0.0)

    s0, z0, m0 = parts(stored)
    u = (w - m0) / s0
    # Which branch of the clip an element is on: (value to compare, its bound at either end).
    level0 = nearest(fmt, u)
    at, low, high = (u + z0 if fmt.clip == "lsq" else level0 + z0), lo, hi
    if fmt.clip == "paretoq":
        bound = 1.485 if fmt.levels == (-1, 1) else 0.99 * (hi + 1)
        at, low, high = u, -bound, bound
        level0 = np.rint(u) if fmt.levels == (-1, 1) else np.clip(2 * np.rint(u / 2 - 0.5) + 1, lo, hi)
    assert np.abs(u + z0 - low).min() > 1e-6 and np.abs(u + z0 - high).min() > 1e-6

    def surrogate(p) -> np.ndarray:
        s, z, m = parts(p)
        level = np.where(at < low, lo, np.where(at > high, hi, (w - m) / s + (level0 - u) + z))
        return (level - z) * s + m

    g = np.random.default_rng(4).standard_normal(SHAPE)
    got = jax.jit(jax.grad(lambda p: (fmt.fake_quant(jnp.asarray(W["normal"]), p) * g.astype(np.float32)).sum()))(
        jax.tree.map(jnp.float32, stored)
    )
    axis = (0, 2) if fmt.granularity == "tensor" else 2
    for k in stored:
        eps = 1e-7 * np.abs(stored[k]).max()
        up, down = ({**stored, k: stored[k] + e} for e in (eps, -eps))
        each = (g * (surrogate(up) - surrogate(down)) / (2 * eps)).reshape(SHAPE[0], -1, group)
        want = each.sum(axis=axis, keepdims=True)[..., 0] * fmt.grad_factor(SHAPE)
        np.testing.assert_allclose(got[k], want, rtol=2e-3, atol=1e-3 * np.abs(each).max())


def test_dynamic_parameters_get_no_gradient_and_learned_ones_do():
    fmt, w = base.get("int4:g64:clip"), jnp.asarray(W["normal"])
    learned = jax.jit(jax.grad(lambda l: jnp.square(l.value()).sum()))(Latent(w, base._init(fmt, w), fmt))
    assert (np.abs(np.asarray(learned.params["scale"])) > 0).all()
    dynamic = jax.jit(jax.grad(lambda l: l.value().sum()))(Latent(w, {}, fmt))
    assert dynamic.params == {} and set(np.unique(dynamic.w)) <= {0.0, 1.0}  # nothing leaks through the absmax


# -- law 6: the product -----------------------------------------------------------------------------------------------


@most
def test_kernel_law(name: str):
    q = encoded(name, "normal")
    x = jnp.asarray(np.random.default_rng(0).standard_normal((2, 3, SHAPE[1])), jnp.float32)
    want = np.asarray(x, np.float64) @ np.asarray(q.decode(), np.float64).T
    got = jax.jit(qdot)(x, q)
    assert got.shape == want.shape and got.dtype == jnp.float32
    np.testing.assert_allclose(got, want, rtol=1e-4, atol=1e-5)


def test_kernel_law_shapes_and_dtypes():
    for rows, columns, name in ((5, 192, "int3:g64"), (1, 33, "int5:channel"), (*SHAPE, "int4:g64")):
        array = np.random.default_rng(1).standard_normal((rows, columns)).astype(np.float32)
        q = base.get(name).encode(jnp.asarray(array if (rows, columns) != SHAPE else W["normal"]))
        w = np.asarray(q.decode(), np.float64)
        for shape in ((), (1,), (7,), (2, 3)) if rows == SHAPE[0] else ((2, 3),):
            x = jnp.asarray(np.random.default_rng(0).standard_normal((*shape, columns)), jnp.float32)
            got = qdot(x, q)
            assert got.shape == (*shape, rows)
            np.testing.assert_allclose(got, np.asarray(x, np.float64) @ w.T, rtol=1e-4, atol=1e-5)
    half = qdot(x.astype(jnp.bfloat16), q)
    assert half.dtype == jnp.bfloat16
    np.testing.assert_allclose(np.asarray(half, np.float32), np.asarray(x, np.float64) @ w.T, rtol=0.03, atol=0.03)
    np.testing.assert_array_equal(qdot(x, Latent(jnp.asarray(W["normal"]), {}, q.format)), qdot(x, q))
    act = get_act("int8:token")
    want = np.asarray(act.fake_quant(x), np.float64) @ w.T
    np.testing.assert_allclose(qdot(x, PreparedInput(q, act)), want, rtol=1e-4, atol=1e-5)


@over(
    NAMES,
    sorted(
        {*NAMES} - {"int1:g64", "int3:g64:asym:rounded", "int4:g64", "ternary:tensor", "q4_1", "tq1_0", "q4_k", "mxfp4"}
    ),
)
def test_decode_fused_into_a_reduction_is_not_miscompiled(name: str):
    """XLA:CPU gets int8 arithmetic wrong when fused with a multiply and a reduce; codes must not meet it."""
    fmt = base.get(name)
    qs = [encoded(name, k) for k in ("normal", "heavy")]

    @jax.jit
    def fused(x, a, b):
        a, b = (fmt.dequantize(*fmt.unpack(arrays, SHAPE)) for arrays in (a, b))
        return (x[:, None] * a + x[:, None] * b).sum((-1, -2)), (x[:, None] * a).sum(-1)

    @jax.jit
    def codes_fused(x, arrays):
        return (x[:, None] * (fmt.unpack(arrays, SHAPE)[0] - 1).astype(jnp.float32)).sum(-1)

    a, b = (np.asarray(q.decode(), np.float64) for q in qs)
    total, each = fused(X, qs[0].arrays, qs[1].arrays)
    want = X.astype(np.float64)[:, None] * a
    np.testing.assert_allclose(each, want.sum(-1), rtol=1e-4, atol=1e-4 * np.abs(want).max())
    want = want + X.astype(np.float64)[:, None] * b
    np.testing.assert_allclose(total, want.sum((-1, -2)), rtol=1e-3, atol=1e-3 * np.abs(want).max())
    if isinstance(fmt, Uniform):
        codes = np.asarray(fmt.unpack(qs[0].arrays, SHAPE)[0], np.float64) - 1
        want = X.astype(np.float64)[:, None] * codes
        got = codes_fused(X, qs[0].arrays)
        np.testing.assert_allclose(got, want.sum(-1), rtol=1e-4, atol=1e-4 * np.abs(want).max())


# -- law 7: shapes, transformations, meshes ---------------------------------------------------------------------------


@most
def test_shape_law(name: str):
    fmt = base.get(name)
    ws = jnp.asarray(np.stack([W["normal"], W["heavy"], W["zeros"]]))
    each = [encoded(name, k) for k in ("normal", "heavy", "zeros")]
    traces = []

    @jax.jit
    def run(ws, x):
        traces.append(0)
        stack = jax.vmap(fmt.encode)(ws)
        mapped = jax.vmap(lambda q: q.decode())(stack)
        _, scanned = jax.lax.scan(lambda c, q: (c, q.decode()), 0, stack)

        @jax.checkpoint
        def loss(x, q):
            w = q.decode()
            return (jnp.square(x) * w).sum(), w

        one = jax.tree.map(lambda a: a[0], stack)
        return stack, mapped, scanned, *jax.grad(loss, has_aux=True)(x, one)

    x = np.resize(X, SHAPE)
    stack, mapped, scanned, grad, rematted = run(ws, x)
    for i, q in enumerate(each):
        assert same_tree(jax.tree.map(lambda a, i=i: a[i], stack), q)
        assert same_bits(mapped[i], q.decode()) and same_bits(scanned[i], q.decode())
    want = 2 * x * np.asarray(each[0].decode(), np.float64)
    np.testing.assert_allclose(grad, want, rtol=1e-5, atol=1e-6)
    assert same_bits(rematted, each[0].decode())
    run(ws * 0.5, x + 1)
    assert len(traces) == 1


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(MOST, id="most"),
        pytest.param(REST, id="rest", marks=pytest.mark.slow),
    ],
)
def test_mesh(names: list[str]):
    """Decoding, and fitting scales, on 8 devices gives the bits of one device (in a process of its own)."""
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    program = Path(__file__).with_name("mesh_program.py")
    done = subprocess.run([sys.executable, str(program), *names], env=env, capture_output=True, text=True, timeout=600)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == names


# -- law 8: refusals --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "name, message",
    [
        ("int9", r"unknown format 'int9'; did you mean 'int\d.*'\? \(allowed: .*int8.*"),
        ("itn4:g64", r"unknown format 'itn4:g64'"),
        ("q4_k_m", r"unknown format 'q4_k_m'; did you mean 'q4_k'"),
        ("q4_k:mse", r"unknown key of q4_k 'mse' \(allowed: absmax, clip, .*"),
        ("mxfp4:g32", r"unknown key of mxfp4 'g32'"),
        ("int4:g0", r"unknown key of int4 'g0' .allowed: absmax, asym"),
        ("int4:g-3", r"unknown key of int4 'g-3'"),
        ("int4:", r"unknown key of int4 ''"),
        ("int4:chanel", r"unknown key of int4 'chanel'; did you mean 'channel'\? \(allowed: .*\)"),
        ("int4:g64:g32", r"int4: key 'g32' gives a second granularity"),
        ("int1:asym:absmean", r"calibration 'absmean' of asymmetric int1 \(allowed: minmax, mse\)"),
        ("int1:mse", r"calibration 'mse' of int1 \(allowed: absmean\)"),
        ("int4:absmean", r"calibration 'absmean' of int4 \(allowed: absmax, signmax, minmax, mse, signmse\)"),
        ("int4:asym:absmax", r"calibration 'absmax' of asymmetric int4 \(allowed: minmax, mse\)"),
        ("ternary:asym", r"unknown key of ternary 'asym'"),
        ("q4_0:g64", r"unknown key of q4_0 'g64'"),
        ("q4_1:absmax", r"unknown key of q4_1 'absmax'"),
        ("nf4:mse", r"unknown key of nf4 'mse' \(allowed: dq, g64\)"),
        ("nf4:g32:g64", r"nf4: key 'g64' gives a second block"),
        ("e8p2:r2", r"unknown key of e8p2 'r2' \(allowed: mse, rho1.03\)"),
        ("e8p3:rho", r"unknown key of e8p3 'rho'; did you mean 'rho1.0'\? \(allowed: mse, r1.84, rho1.0\)"),
        ("e8p3:r1.9:r2", r"e8p3: key 'r2' gives a second residual \(allowed: one\)"),
        ("e8p4:rho0", r"e8p4: rho 0 \(allowed: 0.1 to 10\)"),
        ("e8p4:r0.5", r"e8p4: residual 0.5 \(allowed: 1 to 16\)"),
        ("e8p5", r"unknown format 'e8p5'; did you mean 'e8p\d'"),
        ("trellis2", r"trellis2 without a code \(allowed: 1mad, 3inst, mcg, mul1, hyb, lut, latin\)"),
        ("trellis9:mcg", r"unknown format 'trellis9:mcg'; did you mean 'trellis\d"),
        ("trellis2:mgc", r"unknown key of trellis2 'mgc'; did you mean 'mcg'"),
        ("trellis2:mcg:v2", r"trellis2: v2 of code 'mcg' \(allowed: v1\)"),
        ("trellis2:mcg:hyb", r"trellis2: key 'hyb' gives a second code"),
        ("trellis5:hyb", r"trellis5: steps of 2 values and 10 bits \(allowed: up to 8 bits\)"),
        ("trellis2:mcg:l3", r"trellis2: l3 \(allowed: l4 to l20\)"),
        ("nf5", r"unknown format 'nf5'; did you mean 'nf\d'"),
        ("aqlm:2x8:g8:g4", r"aqlm: key 'g4' gives a second vector length"),
        ("aqlm:1x17", r"aqlm: 1x17 \(allowed: 1 to 8 codebooks of 1 to 16 bits\)"),
        ("vptq:v4:k100", r"vptq: codebook of 100 vectors \(allowed: powers of two, 2 to 65536\)"),
        ("vptq:v8:k65536:r65536", r"vptq: 32 bits of codes for a vector \(allowed: at most 24\)"),
        ("vptq:k4:k4", r"vptq: key 'k4' gives a second k"),
        ("vptq:c64", r"unknown key of vptq 'c64'"),
        ("gptvq:v2:k4:n3", r"gptvq: codebooks for 3 rows \(allowed: multiples of 2\)"),
        ("nuq2:g64", r"unknown key 'g64' of nuq2 \(allowed: none\)"),
        ("bf16:g64", r"unknown key 'g64' of bf16 \(allowed: none\)"),
    ],
)
def test_unknown_names_are_refused(name: str, message: str):
    with pytest.raises(FormatError, match=message) as e:
        base.get(name)
    assert "\n" not in str(e.value)


@uniform
def test_rows_that_do_not_divide_are_refused(name: str):
    fmt = base.get(name)
    group = fmt.params_span((4, 100))
    if 100 % group == 0:
        assert jax.eval_shape(fmt.encode, jnp.ones((4, 100))).shape == (4, 100)
        return
    for f in (fmt.encode, fmt.fake_quant, jax.jit(fmt.encode)):
        with pytest.raises(FormatError, match=rf"{name}: weight of shape \(4, 100\).*multiple of {group} long"):
            f(jnp.ones((4, 100)))


@every
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_nan_and_infinity_are_refused(name: str, bad: float):
    w = W["normal"].copy()
    w[3, 17] = bad
    with pytest.raises(FormatError, match=rf"{name}: weight \[3, 17\] is {bad} \(must be finite\)"):
        base.get(name).encode(jnp.asarray(w))


@pytest.mark.parametrize(
    "name", ["int4:g64", "int1:g64", "ternary:tensor", "q8_0", "q4_0", "q4_1", "tq2_0", "q4_k", "q2_k:absmax"]
)
def test_scale_overflow_is_refused(name: str):
    with pytest.raises(FormatError, match=rf"{name}: (scale|min) of magnitude .* \(largest in fp16: 65504\)"):
        base.get(name).encode(jnp.asarray(W["normal"] * 1e9))


@uniform
def test_scales_never_underflow(name: str):
    for what in ("tiny", "zeros"):
        q = encoded(name, what)
        scale = q.format.grid(base.unpacked(q)[1])["scale"]
        least = 2.0**-100 if "f32" in name or "bf16" in name or "mxfp4" in name else 2.0**-24
        assert (np.abs(np.asarray(scale)) >= least).all()


# -- distortion -------------------------------------------------------------------------------------------------------


def normal_distortion(levels: np.ndarray, scale: float) -> float:
    """Relative RMS error of N(0, 1) rounded to the nearest of `levels * scale`, by quadrature."""
    x = np.linspace(-9, 9, 100_001)
    grid = np.sort(levels * scale)
    nearest = grid[np.searchsorted((grid[1:] + grid[:-1]) / 2, x)]
    density = np.exp(-(x**2) / 2) / np.sqrt(2 * np.pi)
    return float(np.sqrt(np.sum((x - nearest) ** 2 * density) * (x[1] - x[0])))


@pytest.mark.parametrize(
    "name, published_rms",
    [
        ("q8_0", 0.0054),  # RMSE of ggml's own quantizers on 64 x 4096 N(0, 1)
        ("q4_0", 0.0862),
        ("q4_1", 0.0784),
        # ggml with importance 1: ours may be better, not worse.
        ("q4_0:mse", 0.0819),
        ("q4_1:mse", 0.0701),
        ("q5_0", 0.0429),
        ("q5_0:mse", 0.0406),
        ("q5_1", 0.0380),
        ("q5_1:mse", 0.0339),
        ("q2_k", 0.2687),
        ("q3_k", 0.1448),
        ("q4_k", 0.0710),
        ("q5_k", 0.0355),
        ("q6_k", 0.0174),
        ("mxfp4", 0.1151),
        ("mxfp4:mse", 0.1115),  # measured; ggml has no search
        ("int8:g32", 0.0054),
        ("int4:g32:signmax", 0.0862),
        ("tq2_0", None),
        ("ternary:tensor", None),
        ("ternary:channel", None),
        ("int1:tensor", None),
        *((f"int{b}:tensor", None) for b in range(2, 9)),
        ("q2_0", 0.362),  # our own fit; ggml's reference is at 0.7201
    ],
)
def test_distortion_of_normal_weights(name: str, published_rms: float | None):
    w = np.random.default_rng(5).standard_normal((64, 4096)).astype(np.float32)
    fmt = base.get(name)
    w_hat, scale = jax.jit(lambda w: (fmt.fake_quant(w), fmt.grid(fmt.stored(fmt.init(w)))["scale"]))(w)
    got = float(np.sqrt(np.mean((np.asarray(w_hat) - w) ** 2)))
    if published_rms is None:
        lo, hi = fmt.levels
        levels = np.array([-1, 1]) if name.startswith("int1") else np.arange(lo, hi + 1)
        published_rms = normal_distortion(levels, float(np.mean(np.abs(scale))))
    if name == "int1:tensor":
        assert abs(published_rms - np.sqrt(1 - 2 / np.pi)) < 1e-4
    assert (0.97 if "_k" in name else 0.985) < got / published_rms < 1.01
