import jax
import jax.numpy as jnp
import numpy as np

from lowbit.formats.activation import get_act

X = np.random.default_rng(0).standard_normal((6, 512)).astype(np.float32)


def sqnr(x: np.ndarray, y: np.ndarray) -> float:
    return float(10 * np.log10((x**2).sum() / ((x - y) ** 2).sum()))


def test_int8_and_int4_per_token():
    for name, top in (("int8:token", 127), ("int4:token", 7)):
        got = np.asarray(get_act(name).fake_quant(jnp.asarray(X)))
        step = np.abs(X).max(-1, keepdims=True) / top
        assert (np.abs(got - X) <= step * 0.5001).all()
        np.testing.assert_allclose(np.abs(got).max(-1), np.abs(X).max(-1), rtol=1e-6)
        assert max(len(np.unique(row)) for row in got) <= 2 * top + 1


def test_bitnet_spellings():
    x = X.copy()
    x[0] = 0.0
    x[1] *= 1e-9  # the floor of 1e-5 turns it to zeros
    got = np.asarray(jax.jit(get_act("int8:token:bitnet").fake_quant)(x))
    s = np.float32(127) / np.maximum(np.abs(x).max(-1, keepdims=True), np.float32(1e-5))
    np.testing.assert_allclose(got, np.clip(np.rint(x * s), -128, 127) / s, rtol=1e-6, atol=1e-9)
    assert (got[:2] == 0).all()
    # arXiv 2411.04965's absmean int4 on N(0,1) rows of 4096: 18.7 dB, absmax 15.9 dB, 1.2 % clipped high.
    x = np.random.default_rng(1).standard_normal((32, 4096)).astype(np.float32)
    got = np.asarray(jax.jit(get_act("int4:token:bitnet").fake_quant)(x))
    assert abs(sqnr(x, got) - 18.7) < 0.1
    assert abs(sqnr(x, np.asarray(get_act("int4:token").fake_quant(jnp.asarray(x)))) - 15.9) < 0.3
    assert (np.asarray(get_act("int4:token").fake_quant(jnp.zeros((2, 8)))) == 0).all()
