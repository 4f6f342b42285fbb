"""The laws of `docs/architecture.md`, over every registered format. A new format inherits all of them."""

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
from battery import SHAPE, same_bits, same_tree
from registry import MOST, NAMES, REST, SPARE, W, X, by_operation, encoded, every, everyone, most, over

from lowbit.export import gguf_types, translate
from lowbit.formats import base
from lowbit.formats.activation import get_act
from lowbit.formats.base import Latent, QTensor
from lowbit.formats.fake_quant import PreparedInput
from lowbit.formats.ggml import GGML
from lowbit.formats.uniform import Uniform
from lowbit.kernels.qdot import qdot

# -- law 1: fake_quant is decode of encode, bit for bit ---------------------------------------------------------------


@everyone
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
        ("e8p2", 2 + 32 / 8192),
        ("e8p3", 3 + 32 / 8192),
        ("e8p4:mse", 4 + 32 / 8192),
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
        ("aqlm:2x4:g4", 2 + (2 * 16 * 4 + 16) * 16 / 8192),  # codes, codebooks, a scale a row
        ("aqlm:3x3:g4", 9 / 4 + (3 * 8 * 4 + 16) * 16 / 8192),
        ("vptq:v4:k16:r32", 9 / 4 + (16 + 32) * 4 * 16 / 8192),
        ("vptq:v2:k16:o8", 2 + (2 * 16 * 2 + 8) * 16 / 8192),
        ("vptq:v4:k16:s", 1 + (16 * 4 + 512) * 16 / 8192),
        ("gptvq:v2:k16:c64", 2 + 8 * 16 * 2 * 16 / 8192),
        ("nuq3", 3 + 16 * 8 * 16 / 8192),
        ("trellis2:mcg", 2 + 32 / 8192),
        ("trellis2.5:mul1:l10", 2.5 + 32 / 8192),
        ("trellis1.5:hyb", 1.5 + (32 + 512 * 2 * 16) / 8192),
        ("trellis4:lut:l8", 4 + (32 + 256 * 16) / 8192),
    ],
)
def test_declared_bits(name: str, bits: float):
    fmt = base.get(name)
    assert jax.eval_shape(fmt.encode, jax.ShapeDtypeStruct(SHAPE, "f4")).bits_per_weight == bits


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


ON_MESH = "int4:g64 ternary:tensor q4_k nf4:dq rht:rows:ternary:channel aqlm:2x4:g4 e8p2 trellis2:mcg:l10".split()


@pytest.mark.parametrize(
    "names",
    [
        pytest.param(ON_MESH, id="some"),
        pytest.param([n for n in MOST if n not in ON_MESH], id="most", marks=pytest.mark.slow),
        pytest.param([n for n in REST if n not in SPARE], id="rest", marks=pytest.mark.slow),
    ],
)
def test_mesh(names: list[str]):
    """Decoding, and fitting scales, on 8 devices gives the bits of one device (in a process of its own)."""
    env = dict(os.environ, XLA_FLAGS="--xla_force_host_platform_device_count=8", JAX_PLATFORMS="cpu")
    program = Path(__file__).with_name("mesh_program.py")
    done = subprocess.run([sys.executable, str(program), *names], env=env, capture_output=True, text=True, timeout=900)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.split() == names


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
