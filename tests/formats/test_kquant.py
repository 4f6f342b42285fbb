"""k-quants and MXFP4: how their scales are found, kept and learned."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.export import gguf_types
from lowbit.export.gguf_read import qtensor
from lowbit.export.verify import dequantize
from lowbit.formats import base, search
from lowbit.formats.kquant import KINDS

W = np.random.default_rng(0).standard_t(5, (4, 512)).astype(np.float32)
KS = [pytest.param(k, marks=[pytest.mark.slow] if k in ("q2_k", "q3_k", "q5_k") else []) for k in KINDS]


@functools.cache
def fitted(name: str) -> dict[str, np.ndarray]:
    return jax.tree.map(np.asarray, base._init(base.get(name), jnp.asarray(W)))


def error(name: str, params: dict, weight: np.ndarray | float = 1.0) -> float:
    w_hat = base.get(name).encode(jnp.asarray(W), jax.tree.map(jnp.asarray, params)).decode()
    return float(np.sum(weight * np.square(np.asarray(w_hat, np.float64) - W)))


@pytest.mark.parametrize("name", KS)
def test_what_a_search_finds_is_what_is_stored(name):
    """Its scales and minima are on the grid already: storing them changes no bit, so nothing that was found is lost."""
    fmt, params = base.get(name), fitted(name)
    stored = jax.jit(fmt.stored)(params)
    for k, a in fmt.grid(stored).items():
        np.testing.assert_array_equal(a, params[k])
    again = jax.jit(fmt.stored)(stored)
    assert again.keys() == stored.keys()
    assert all(np.asarray(again[k]).tobytes() == np.asarray(a).tobytes() for k, a in stored.items())


@pytest.mark.parametrize("name", KS)
def test_the_search_beats_the_range(name):
    assert error(name, fitted(name)) < 0.95 * error(name, fitted(name + ":absmax"))


def test_importances_weigh_the_error():
    weight = np.random.default_rng(1).uniform(0.01, 1, 512).astype(np.float32) ** 2
    weighed = jax.jit(base.get("q2_k").init)(W, weight)
    assert error("q2_k", weighed, weight) < 0.95 * error("q2_k", fitted("q2_k"), weight)
    assert error("q2_k", weighed) > error("q2_k", fitted("q2_k"))


def test_zeros_and_one_sided_blocks():
    """Sub-blocks of zeros and of one sign beside ordinary ones: zeros stay, minima are never above 0."""
    w = W.copy()
    w[0, :64], w[1, :256], w[2] = 0.0, 0.0, np.abs(w[2])
    w[3] = -np.abs(w[3])
    for name in ("q4_k:absmax", "q6_k:absmax", "q4_k"):
        fmt = base.get(name)
        q = fmt.encode(jnp.asarray(w))
        w_hat = np.asarray(q.decode())
        assert (w_hat[w == 0] == 0).all() and np.abs(w_hat - w).max() < 0.5
        two = fmt.affine(q).super
        assert (two.sc != 0).all() and (two.mn is None or (two.mn >= 0).all())


def test_least_squares_of_a_block_equal_numpy_s():
    x = W.reshape(-1, 32).T[:, None]
    scale, low = jax.jit(lambda x: search.fit(x, None, (0, 15), True))(x)
    codes = np.clip(np.rint((x - low) / scale), 0, 15)
    ours = np.square(codes * scale + low - x).sum(0)[0]
    for i in range(0, x.shape[2], 7):
        a = np.stack([codes[:, 0, i], np.ones(32)], axis=1)
        best = np.linalg.lstsq(a, x[:, 0, i], rcond=None)[1][0]
        assert ours[i] < 1.1 * best + 1e-6  # codes are rounded once more after the last solution


def test_cut_and_tree_sum():
    x = np.random.default_rng(2).standard_normal((32, 5)).astype(np.float32)
    np.testing.assert_allclose(search.tree_sum(jnp.asarray(x)), x.astype(np.float64).sum(0), rtol=1e-5)
    cut = np.asarray(search.cut(jnp.asarray(x)))
    assert (np.abs(cut - x) <= np.spacing(np.abs(x))).all() and (cut.view(np.int32) & 1 == 0).all()


@pytest.mark.parametrize("name, most", [("q2_k:absmax", 0.85), ("q3_k:absmax", 0.96)])
def test_scales_that_are_learned(name, most):
    """Gradient descent on the scales alone, through `stored`, ends below where it began."""
    fmt = base.get(name)
    w = jnp.asarray(W)

    @jax.jit
    def train(params):
        rate = jax.tree.map(lambda a: 0.002 * jnp.abs(a).mean(), params)

        def loss(p):
            return jnp.square(fmt.fake_quant(w, p) - w).sum()

        def step(p, _):
            value, g = jax.value_and_grad(loss)(p)
            return jax.tree.map(lambda a, d, r: a - r * jnp.sign(d), p, g, rate), value

        return jax.lax.scan(step, params, None, length=300)

    start = fitted(name)
    _, losses = train(jax.tree.map(jnp.asarray, start))
    best = float(jnp.min(losses))
    assert float(losses[0]) == pytest.approx(error(name, start), rel=1e-4)
    assert best < most * float(losses[0])


# -- blocks that others wrote -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"])
def test_any_block_is_read_exactly(name):
    """Random bytes with finite d: scales of 0 and negative d and dmin, which our encoder never writes, too."""
    t, rng = gguf_types.TYPES[name], np.random.default_rng(3)
    data = rng.integers(0, 256, (2, 2, t.bytes)).astype(np.uint8)
    halves = {"Q2_K": (80, 82), "Q3_K": (108,), "Q4_K": (0, 2), "Q5_K": (0, 2), "Q6_K": (208,)}[name]
    for at in halves:
        data[..., at : at + 2] = rng.standard_normal((2, 2, 1)).astype(np.float16).view(np.uint8)
    data = data.reshape(2, -1)
    q = qtensor(t, gguf_types.unblock(t, data))
    assert q.format.name == t.format and q.nbytes == data.size
    want = dequantize(name, data)
    assert np.asarray(q.decode()).tobytes() == want.tobytes()  # -0.0 too
    np.testing.assert_array_equal(q.format.affine(q).decode(), want)


def test_mxfp4_blocks_of_zeros_and_tiny_scales():
    """ggml writes exponent 0 for a block of zeros."""
    t = gguf_types.TYPES["MXFP4"]
    data = np.zeros((1, 2, 17), np.uint8)
    data[0, 1] = [127, *range(0x10, 0xFF, 0xF)]
    data = data.reshape(1, -1)
    q = qtensor(t, gguf_types.unblock(t, data))
    np.testing.assert_array_equal(q.decode(), dequantize("MXFP4", data))
    data[0, 5] = 0x21
    with pytest.raises(base.InputError, match="an MXFP4 scale of 2.9.*e-39"):
        qtensor(t, gguf_types.unblock(t, data))
    data[0, 0] = 255
    with pytest.raises(base.InputError, match="an MXFP4 scale that is NaN"):
        gguf_types.unblock(t, data)


def test_mxfp4_rule_and_codes():
    """OCP MX v1.0, 6.3: the largest power of two below the largest magnitude becomes level 4; half to even."""
    fmt = base.get("mxfp4")
    w = np.zeros((1, 64), np.float32)
    w[0, :10] = [7.9, 5.0, 3.5, 2.5, 1.75, 1.25, 0.75, 0.25, -0.25, -6.5]
    w[0, 32] = 4.0
    q = fmt.encode(jnp.asarray(w))
    levels = [6, 4, 4, 2, 2, 1, 1, 0, 0, -6]
    np.testing.assert_array_equal(np.asarray(q.decode())[0, :10], levels)
    assert np.asarray(q.arrays["exponent"]).tolist() == [[127, 127]]
    scale = fmt.stored({"scale": jnp.asarray([[0.25, 0.3535, 0.3536, 0.5, 0.7072, -1.0]])})["scale"]
    assert scale[0, :5].tolist() == [0.25, 0.25, 0.5, 0.5, 1.0] and scale[0, 5] == 2.0**-100
