"""Scale conventions, gradient rules and the order-free mean, against independent numpy."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from lowbit.formats import base
from lowbit.formats.reduce import order_free_mean
from lowbit.formats.uniform import SHRINK

W = np.random.default_rng(0).standard_normal((4, 128)).astype(np.float32)


def grouped(w: np.ndarray, group: int) -> np.ndarray:
    return w.reshape(w.shape[0], -1, group)


@pytest.mark.parametrize(
    "name, group, expected",
    [
        ("int2:g64", 64, lambda g: np.abs(g).max(-1) / 2),
        ("int3:g64", 64, lambda g: np.abs(g).max(-1) / 4),
        ("int4:g64", 64, lambda g: np.abs(g).max(-1) / 8),
        ("int5:g64", 64, lambda g: np.abs(g).max(-1) / 15),
        ("int8", 128, lambda g: np.abs(g).max(-1) / 127),
        ("int1:g64", 64, lambda g: np.abs(g).mean(-1)),
        ("int4:g64:asym", 64, lambda g: (g.max(-1) - g.min(-1)) / 15),
        ("ternary:g64", 64, lambda g: np.abs(g).mean(-1)),
        ("q8_0", 32, lambda g: np.abs(g).max(-1) / 127),
        ("q4_1", 32, lambda g: (g.max(-1) - g.min(-1)) / 15),
    ],
)
def test_scale_conventions(name: str, group: int, expected):
    fmt = base.get(name)
    stored = jax.jit(lambda w: fmt.stored(fmt.init(w)))(W)
    want = expected(grouped(W.astype(np.float64), group)).astype(np.float16)
    got = np.asarray(stored["scale"])
    assert np.abs(got.astype(np.float16).view(np.int16) - want.view(np.int16)).max() <= 1  # float64 against float32
    assert (got == want).mean() > 0.8


def test_signed_max_keeps_the_extreme_of_both_signs():
    for name, group in (("int4:g32:signmax", 32), ("q4_0", 32)):
        q = base.get(name).encode(jnp.asarray(W))
        g = grouped(W, group)
        at = np.abs(g).argmax(-1)[..., None]
        extreme = np.take_along_axis(g, at, -1)
        got = np.take_along_axis(grouped(np.asarray(q.decode()), group), at, -1)
        np.testing.assert_allclose(got, extreme, rtol=2**-11)
        assert (np.take_along_axis(grouped(np.asarray(base.get(name).affine(q).codes), group), at, -1) == -8).all()


def test_int1_has_two_levels_and_sign_of_zero_is_plus():
    w = W.copy()
    w[0, :5] = 0.0
    q = base.get("int1:g64").encode(jnp.asarray(w))
    a = base.get("int1:g64").affine(q)
    assert set(np.unique(a.codes)) == {-1, 1} and (a.codes[0, :5] == 1).all()
    np.testing.assert_array_equal(np.abs(np.asarray(q.decode())), np.repeat(a.scale, 64, axis=1))


def test_asymmetric_int1_holds_weights_of_one_sign():
    fmt = base.get("int1:channel:asym")
    for sign in (1, -1):
        w = sign * np.float32(0.375) * (W > 0)
        a = fmt.affine(fmt.encode(jnp.asarray(w)))
        assert set(np.unique(a.codes)) == {0, 1} and (a.zero == (sign < 0)).all()
        np.testing.assert_array_equal(a.decode(), w)
    w = jnp.asarray(np.abs(W))  # half-normal: the search finds the levels' place
    error = [float(np.sqrt(((base.get(n).encode(w).decode() - w) ** 2).mean())) for n in ("int1:asym:mse", "int1")]
    assert error[0] < 0.8 * error[1]


def test_asymmetric_grid_holds_zero_and_one_sided_weights():
    w = np.abs(W)
    fmt = base.get("int4:g64:asym")
    q = fmt.encode(jnp.asarray(np.where(w < 0.3, 0, w)))
    assert (fmt.affine(q).zero == 0).all() and (np.asarray(q.decode())[w < 0.3] == 0).all()
    rel = np.abs(np.asarray(q.decode()) - np.where(w < 0.3, 0, w)).max()
    assert rel <= (w.max() / 15) * 0.51 + 1e-3


@pytest.mark.parametrize("name", ["int2:g64", "int4:channel", "int4:g64:asym", "q4_0", "q2_0"])
def test_search_never_loses_to_no_search_and_wins_somewhere(name: str):
    plain, searched = base.get(name), base.get(name + ":mse")
    error = [((np.asarray(f.encode(jnp.asarray(W)).decode()) - W) ** 2).mean() for f in (plain, searched)]
    assert error[1] < error[0]
    assert 1.0 in SHRINK


def test_search_weighs_columns_by_importance():
    fmt = base.get("int2:channel:mse")
    importance = np.ones(128, np.float32)
    importance[:4] = 1e4

    def error(params) -> float:
        got = np.asarray(fmt.encode(jnp.asarray(W), params).decode())
        return float(((got - W) ** 2 * importance).mean())

    fit = jax.jit(fmt.fit_block)
    assert error(fit(jnp.asarray(W), jnp.asarray(importance))) < error(fit(jnp.asarray(W)))


def test_ternary_weights_stay_what_they_are():
    trits = np.random.default_rng(1).integers(-1, 2, (2, 256)).astype(np.float32) * np.float32(0.0375)
    for name in ("ternary:tensor", "ternary:channel", "ternary:g256", "tq1_0", "tq2_0"):
        once = base.get(name).encode(jnp.asarray(trits)).decode()
        np.testing.assert_allclose(once, trits, rtol=2**-11)
        np.testing.assert_array_equal(base.get(name).encode(once).decode(), once)


def test_learned_scales_below_the_smallest_stored_are_lifted_and_keep_their_gradient():
    fmt, w = base.get("int4:g64"), jnp.asarray(W)
    params = {"scale": jnp.full((4, 2), -1.0)}
    assert (fmt.stored(params)["scale"] == 2.0**-24).all()
    g = jax.jit(jax.grad(lambda p: fmt.fake_quant(w, p).sum()))(params)["scale"]
    assert np.isfinite(g).all() and (np.abs(g) > 0).all()


@pytest.mark.parametrize("shape, over_rows", [((3, 4, 64), False), ((5, 1, 1000), False), ((300, 1, 77), True)])
def test_order_free_mean(shape: tuple[int, ...], over_rows: bool):
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_t(3, shape)).astype(np.float32) * 1e-3
    axis = (0, 2) if over_rows else 2
    want = x.astype(np.float64).mean(axis=axis, keepdims=True)[..., 0]
    mean = jax.jit(order_free_mean, static_argnums=1)  # eager and jitted agree: the conformance suite's first law
    got = np.asarray(mean(jnp.asarray(x), over_rows))
    np.testing.assert_allclose(got, want, rtol=2**-18)
    shuffled = rng.permuted(x, axis=2)
    if over_rows:
        shuffled = rng.permutation(shuffled, axis=0)
    again = np.asarray(mean(jnp.asarray(shuffled), over_rows))
    np.testing.assert_array_equal(got, again)
    assert (np.asarray(mean(jnp.zeros(shape, jnp.float32), over_rows)) == 0).all()


def test_order_free_mean_spans_the_float_range():
    for scale in (1e-25, 1e-3, 1e30):
        x = np.abs(W[:, None, :] * np.float32(scale))
        np.testing.assert_allclose(jax.jit(order_free_mean)(jnp.asarray(x)), x.astype(np.float64).mean(2), rtol=2**-18)
